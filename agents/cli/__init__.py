"""The command line: the verbs of `textenv`, their arguments and their output."""
