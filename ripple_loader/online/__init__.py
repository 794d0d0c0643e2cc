"""The online stage: within a DRAM budget, select neurons, fetch them from cache and file, and compute.

Streaming modules call `engine.Engine`; the other files are its parts.
"""
