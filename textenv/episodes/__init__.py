"""The parts of an episode: its rules, its completion, its scores, and the policy for scores that fail."""
