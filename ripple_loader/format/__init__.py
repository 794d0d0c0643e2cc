"""The sidecar `neurons.ripple`: its layout, its encodings of weights, and the sketches and predictors in it.

`offline` writes it and `online` reads it; which neurons a token needs is not decided here.
"""
