"""Where a model keeps its MLPs, and the modules that take their place: all that knows transformers' models.

It imports no other folder; the neurons come from a `streaming.Backend`, which `online` and `offline` have.
"""
