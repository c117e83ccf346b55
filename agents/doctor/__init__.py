"""The doctor: checks of a model, a policy and an env for known mistakes, before training."""

from .examine import check

__all__ = ["check"]
