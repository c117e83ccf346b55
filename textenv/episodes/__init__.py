"""The nouns of an episode: its rules, its completion, its scores, and failed scores."""
