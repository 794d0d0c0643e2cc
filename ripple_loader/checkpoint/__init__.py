"""A model directory's safetensors files, and where its MLP tensors lie in them.

It knows the names of `model`, and nothing of what Ripple writes.
"""
