"""Saved models: checkpoints of a whole run, zips of Stable-Baselines3, and Hugging Face folders."""
