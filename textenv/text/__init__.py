"""Tokenizers, vocabularies in bytes, printable text and the built-in corpus."""
