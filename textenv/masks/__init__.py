"""Masks: which tokens are allowed next."""
