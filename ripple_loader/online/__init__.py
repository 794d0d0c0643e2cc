"""The online stage: within a DRAM budget, select neurons, fetch them from cache and file, and compute.

`engine.Engine` is what streaming modules call; the other files are its parts.
"""
