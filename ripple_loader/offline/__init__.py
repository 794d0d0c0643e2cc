"""The offline stage: trace which neurons are active, place them, write the reordered copy, verify it.

`reordering.reorder` does all of it; each step can be called by itself.
"""
