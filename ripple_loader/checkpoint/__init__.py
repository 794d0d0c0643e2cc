"""A model directory's safetensors files, and where its MLP tensors lie in them.

It uses the names of `model`'s architectures, and knows nothing of the sidecar.
"""
