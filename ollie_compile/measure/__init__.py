"""Times: programs called as they will run and timed, bounds for the others, and timings of earlier runs."""
