"""Runs of `textenv train`: their configuration, objects, folder, loggers and screens."""
