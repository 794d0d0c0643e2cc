"""Time: calls of programs as they will run, timed; bounds of what was not timed; what earlier timings say."""
