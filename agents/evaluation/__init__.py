"""Evaluation of a policy: generated texts, metrics, curves and tables."""
