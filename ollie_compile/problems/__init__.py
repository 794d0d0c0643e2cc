"""The problems that are planned: operators and subprograms of a graph, with expression and reference.

Shapes may be symbolic: then a problem is derived at a few sizes and emitted for all.
"""
