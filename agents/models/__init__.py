"""Language models and critics: tokens in, distributions and values out."""
