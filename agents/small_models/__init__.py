"""Small language models from scratch: their tokenizers, their training, and the built-in demo model."""
