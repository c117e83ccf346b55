"""Episodes side by side, and what they ask of an environment."""
