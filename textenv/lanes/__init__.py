"""Lanes: episodes that run side by side in arrays, and the protocols by which they use an environment."""
