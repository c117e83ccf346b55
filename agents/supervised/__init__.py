"""Supervised training before PPO: SFT, classifiers, reward models, models from scratch."""
