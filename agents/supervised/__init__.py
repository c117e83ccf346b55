"""Supervised training before PPO: fine-tuning, classifiers, reward models and critics."""
