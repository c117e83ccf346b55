"""The public names of the package, in one place."""

from . import doctor, sft
from .buffers import SequenceRolloutBuffer
from .build import make_agent
from .checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from .checkpoints_callback import Checkpoints
from .config import (
    AlgorithmConfig,
    EnvConfig,
    EvaluationConfig,
    KLConfig,
    ModelConfig,
    Named,
    ShapingConfig,
    TrainConfig,
)
from .critic import RewardModelCritic, SeparateCritic, SharedCritic
from .critic_warmup import CriticWarmup
from .data_parallel import DataParallel
from .engine import EngineLost, RolloutEngine
from .engine_rollouts import EngineRollouts
from .episode_metrics import EpisodeMetrics
from .evaluation import Evaluation, evaluate
from .evaluation_callback import Evaluate
from .exporting import export
from .findings import DoctorError, Finding, Report
from .flat_policy import FlatLMPolicy
from .generation import Generation, generate
from .groups import SampleGroups
from .kl import AdaptiveCoef, KLPenalty
from .learned_reward import LearnedReward
from .local_engine import LocalEngine
from .manifest import CheckpointError
from .maskable import MaskableLMPolicy
from .maskable_buffer import MaskableSequenceRolloutBuffer
from .policies import LMPolicy
from .preferences import Labelled, Ranking, hh_pairs
from .pretrained import Pretrained
from .reward_curves import RewardCurves
from .reward_model import score_texts, train_reward_model
from .rollout_steps import RolloutStep
from .sample_table import SampleTable, sample_table
from .sb3_zip import load_sb3_zip
from .scores import DropEpisodes, LateScores
from .shaping import RewardShaping
from .sharding import Sharded
from .trainable import LastLayers, LoRA
from .training_warnings import TrainingWarnings
from .vec_env import TextVecEnv
from .world import is_main_process

__all__ = [
    "AdaptiveCoef",
    "AlgorithmConfig",
    "CheckpointError",
    "Checkpoints",
    "CriticWarmup",
    "DataParallel",
    "DoctorError",
    "DropEpisodes",
    "EngineLost",
    "EngineRollouts",
    "EnvConfig",
    "EpisodeMetrics",
    "Evaluate",
    "Evaluation",
    "EvaluationConfig",
    "Finding",
    "FlatLMPolicy",
    "Generation",
    "KLConfig",
    "KLPenalty",
    "LMPolicy",
    "Labelled",
    "LastLayers",
    "LateScores",
    "LearnedReward",
    "LoRA",
    "LocalEngine",
    "MaskableLMPolicy",
    "MaskableSequenceRolloutBuffer",
    "ModelConfig",
    "Named",
    "Pretrained",
    "Ranking",
    "Report",
    "RewardCurves",
    "RewardModelCritic",
    "RewardShaping",
    "RolloutEngine",
    "RolloutStep",
    "SampleGroups",
    "SampleTable",
    "SeparateCritic",
    "SequenceRolloutBuffer",
    "ShapingConfig",
    "Sharded",
    "SharedCritic",
    "TextVecEnv",
    "TrainConfig",
    "TrainingWarnings",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "hh_pairs",
    "is_main_process",
    "latest_checkpoint",
    "load_checkpoint",
    "load_sb3_zip",
    "make_agent",
    "sample_table",
    "save_checkpoint",
    "score_texts",
    "sft",
    "train_reward_model",
]
