"""The operators of torch's library `ollie`, with references in torch and code in C++ and Triton.

They know nothing of expressions: `targets` says which expressions they compute, `lower` calls them.
"""
