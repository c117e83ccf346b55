"""Checkpoints: the whole state of a run, zips of Stable-Baselines3, Hugging Face folders, and their manifests."""
