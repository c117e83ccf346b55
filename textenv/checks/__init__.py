"""Checks of untrusted and optional things: files, names of classes, arguments, packages of extras."""
