"""Rollouts that are written by another engine than the policy."""
