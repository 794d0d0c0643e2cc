"""Knowledge of transformers models: parts of a layer, arguments, masks, norms, and ways to watch them.

Nothing here leaves tokens out. `architectures` names the parts of each known layer, `calls` binds its
arguments, `capture` reads queries, keys, values and intermediates, `masks` and `rows` cut masks and arguments
to chosen tokens, `norms` recognises the norms that a kernel repeats.
"""
