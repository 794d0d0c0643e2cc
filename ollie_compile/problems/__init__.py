"""What is planned: operators and subprograms found in a graph, each with its expression and torch's result.

Shapes may be symbolic: then a problem is derived at a few sizes and emitted for all.
"""
