"""Rollouts that another engine writes."""
