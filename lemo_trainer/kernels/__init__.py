"""Kernels of the permutation-free path, each with a torch reference and a Triton version."""
