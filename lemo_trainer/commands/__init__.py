"""The commands of `lemo`, behind the options that `lemo_trainer.cli` reads.

Each module is one command: it checks its options, calls the library and prints tables. Nothing else prints. A
ValueError, TypeError or OSError raised here is an input for the user to correct. Everything heavy is imported
inside the functions, so that `lemo --help` stays fast.
"""
