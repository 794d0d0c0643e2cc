"""The sidecar `neurons.ripple`: its layout, how weights are stored in it, and what selects neurons from it.

`offline` writes it and `online` reads it; neither says here when, or for which tokens.
"""
