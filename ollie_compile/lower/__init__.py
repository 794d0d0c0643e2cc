"""Lowering: expressions as programs of torch, in the different layouts and with the different kernels.

Each scope of a program is computed by a target of `targets`: a library, a kernel, or plain aten.
"""
