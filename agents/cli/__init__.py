"""The commands of `textenv`."""
