"""Masks of the tokens that are allowed next."""
