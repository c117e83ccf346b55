"""Callbacks of Stable-Baselines3 that log, warn and save while a model trains."""
