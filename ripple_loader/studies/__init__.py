"""Replays of a trace, without reading or computing, to price other drives, caches and orders."""
