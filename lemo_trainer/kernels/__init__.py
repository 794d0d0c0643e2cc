"""The arithmetic of chosen rows: each kernel has a torch reference and a Triton version.

`rows`, `norm` and `attention` are what the other folders call, with autograd; `torch_*` and `triton_*` are
the versions, between which `dispatch` decides. Nothing here knows a model.
"""
