"""Products with neurons as they are stored, compiled for this processor when they are first used.

May import `registry`, `files` and `compat` only.
"""
