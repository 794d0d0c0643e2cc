"""Exact mode: the gradient of all tokens in the memory of a few (`mode="exact"`)."""
