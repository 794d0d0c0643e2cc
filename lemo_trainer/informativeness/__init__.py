"""How much a block of tokens matters to a layer, and which blocks it keeps (LeMo, sections 3 and 4).

`scores` has the paper's scores, `predictors` the nets that predict them, `selectors` the ways to rank blocks
that a configuration can name, `selection` keeps as many of the ranked blocks as a plan says. It reads a model
through `lemo_trainer.model`; the layers that apply a choice are in `lemo_trainer.layers`.
"""
