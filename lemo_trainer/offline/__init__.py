"""Work that precedes training: predicting a step's cost, searching thresholds, training predictors.

It drives the public API (`apply_lemo`) and the layers from outside; nothing that runs in a training step
imports it.
"""
