"""The steps between a finished rollout and its returns: scores, groups, shaping, KL penalty, critic warm-up."""
