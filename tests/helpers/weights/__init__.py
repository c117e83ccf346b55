"""Weights in files: a tiny GGUF file that is written in the process, and the files of a real model."""
