"""Runs of `textenv train`: their objects, folder, loggers and screens."""
