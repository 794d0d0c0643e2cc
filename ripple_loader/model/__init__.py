"""The MLPs of transformers' models: where to find them, and the modules that replace them.

It imports no other folder; `online` and `offline` implement the `streaming.Backend` that computes the MLPs.
"""
