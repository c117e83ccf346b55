"""Language models as Stable-Baselines3 policies, with their optimizer and their reference."""
