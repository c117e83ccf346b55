"""Data sets and model weights from the Hugging Face hub, from folders or GGUF files."""
