"""Evaluation of a policy: texts, figures, curves, tables."""
