"""Hugging Face: rows of data sets by name, weights whole."""
