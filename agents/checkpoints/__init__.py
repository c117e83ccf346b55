"""Files on disk: the whole state of a run, Stable-Baselines3's zip, a Hugging Face folder."""
