"""The training forwards that replace a decoder layer's own, mode by mode.

`elimination` and `detachment` choose blocks in each layer; `segments` cuts whole samples. `stream` hands the
residual stream from one patched layer to the next, `checkpointing` decides what is saved for the backward
pass, `wiring` and `probe` find out how a layer is wired. They rank blocks by `informativeness`, take the loss
of a segment from `head`, and run the parts of a layer that `model` names.
"""
