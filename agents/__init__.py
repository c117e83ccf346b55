"""A language model as a Stable-Baselines3 agent: policy, buffer, vector env, and what trains, scores and exports it."""

from .backbone import Pretrained
from .buffers import SequenceRolloutBuffer
from .build import make_agent
from .callbacks import Checkpoints, EpisodeMetrics, RewardCurves, SampleTable, sample_table
from .checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from .critic import SharedCritic
from .export import export
from .generation import Generation, generate
from .groups import SampleGroups
from .kl import KLPenalty
from .policies import LMPolicy
from .rollout_steps import LateScores, RolloutStep
from .shaping import RewardShaping
from .vec_env import TextVecEnv

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "EpisodeMetrics",
    "Generation",
    "KLPenalty",
    "LMPolicy",
    "LateScores",
    "Pretrained",
    "RewardCurves",
    "RewardShaping",
    "RolloutStep",
    "SampleGroups",
    "SampleTable",
    "SequenceRolloutBuffer",
    "SharedCritic",
    "TextVecEnv",
    "export",
    "generate",
    "latest_checkpoint",
    "load_checkpoint",
    "make_agent",
    "sample_table",
    "save_checkpoint",
]
