"""The diagnosis: what went wrong in a run of training, by the figures and texts that it left."""

from .catalogue import CATALOGUE, Cause
from .diagnose import diagnose
from .findings import Diagnosis

__all__ = ["CATALOGUE", "Cause", "Diagnosis", "diagnose"]
