"""The subcommands of `ollie` and the models that they take; `cli.py` puts them together."""
