"""The algorithms and policies of textenv in rl_zoo3."""
