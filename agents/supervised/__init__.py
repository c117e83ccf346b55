"""Supervised training before PPO: fine-tuning, classifiers and reward models."""
