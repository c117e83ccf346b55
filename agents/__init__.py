"""A language model as a Stable-Baselines3 agent: policy, buffer, vector env, and what trains, scores and exports it."""

from .backbone import Pretrained
from .buffers import SequenceRolloutBuffer
from .critic import SharedCritic
from .kl import KLPenalty
from .policies import LMPolicy
from .rollout_steps import LateScores, RolloutStep
from .vec_env import TextVecEnv

__all__ = [
    "KLPenalty",
    "LMPolicy",
    "LateScores",
    "Pretrained",
    "RolloutStep",
    "SequenceRolloutBuffer",
    "SharedCritic",
    "TextVecEnv",
]
