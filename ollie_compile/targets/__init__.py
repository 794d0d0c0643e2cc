"""What an expression may be computed by: matching a scope with matrix products, convolutions and kernels.

Each module holds one target: the match and what a call needs to know of it (OLLIE, section 4.3).
"""
