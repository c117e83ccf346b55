"""A language model as a Stable-Baselines3 agent: policy, buffer, vector env, and what trains, scores and exports it."""

from . import doctor
from .backbone import Pretrained
from .buffers import SequenceRolloutBuffer
from .build import make_agent
from .callbacks import Checkpoints, EpisodeMetrics, RewardCurves, SampleTable, sample_table
from .checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from .critic import SharedCritic
from .export import export
from .findings import DoctorError, Finding, Report
from .generation import Generation, generate
from .kl import KLPenalty
from .policies import LMPolicy
from .rollout_steps import LateScores, RolloutStep
from .training_warnings import TrainingWarnings
from .vec_env import TextVecEnv

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DoctorError",
    "EpisodeMetrics",
    "Finding",
    "Generation",
    "KLPenalty",
    "LMPolicy",
    "LateScores",
    "Pretrained",
    "Report",
    "RewardCurves",
    "RolloutStep",
    "SampleTable",
    "SequenceRolloutBuffer",
    "SharedCritic",
    "TextVecEnv",
    "TrainingWarnings",
    "doctor",
    "export",
    "generate",
    "latest_checkpoint",
    "load_checkpoint",
    "make_agent",
    "sample_table",
    "save_checkpoint",
]
