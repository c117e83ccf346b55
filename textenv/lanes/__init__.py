"""Lanes: episodes that run side by side, and the protocols by which they use an environment."""
