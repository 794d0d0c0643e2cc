"""From expressions to programs of torch: which ways there are to write one, and the calls of each way.

A program calls a library, a kernel of `kernels`, or plain aten for whatever `targets` does not match.
"""
