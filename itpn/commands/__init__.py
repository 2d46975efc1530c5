"""One module per command: ``run(arguments)``."""
