"""The drive: what reads cost, which byte ranges to read, and reading them with O_DIRECT, many at once.

It reads rows of any file and knows no model.
"""
