"""The choice of a program for each operator, within a budget of seconds.

A plan is made for a problem of `problems`, by the search of `search`, with the timings of `measure`.
"""
