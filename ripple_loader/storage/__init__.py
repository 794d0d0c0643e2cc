"""The drive: the cost of reads, the choice of byte ranges, and reading many at once with O_DIRECT.

It reads rows of any file and knows no model.
"""
