"""Data sets and model weights from the Hugging Face hub or from folders."""
