"""Configurations: their dataclasses, the checks of their values, the names in them, and YAML of limited size."""
