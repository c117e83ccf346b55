"""The algorithms and policies of textenv for rl_zoo3."""
