"""The rollout: the VecEnv that fills it, the buffer that holds it, and its minibatches."""
