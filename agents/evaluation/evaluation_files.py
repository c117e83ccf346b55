"""The shapes of the files that `Evaluate` writes, for all who read them. Importing this does not load torch."""

BEST = {"figure": str, "value": float, "num_timesteps": int}  # best/best.json
HISTORY = [{"num_timesteps": int, "figures": {str: (float, None)}}]  # history.json
