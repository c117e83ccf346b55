"""Checks of what comes from outside: files, names of classes, arguments, installed extras."""
