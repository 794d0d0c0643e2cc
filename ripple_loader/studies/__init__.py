"""Replays of a trace that read and compute nothing: what other drives, caches and orders would take."""
