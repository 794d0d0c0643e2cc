"""The derivation search (OLLIE, section 5): from one expression to equal ones that can be lowered.

Rules of `rules` are explored; guided derivation repairs what keeps an expression from a target of `targets`;
a proof at points says that a derived expression is the original.
"""
