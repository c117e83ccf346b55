"""Prompts: what one is, where it comes from, which is next."""
