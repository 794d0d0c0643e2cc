"""The language-model head and its loss, a segment of tokens at a time (LeMo, section 5).

`loss` is the arithmetic, `forward` lets a causal LM use it in the place of its own loss.
"""
