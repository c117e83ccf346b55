"""Language models as Stable-Baselines3 agents: policies, rollouts, and the tools that train, score and export them.

Each public name is imported with its module when it is first asked for (PEP 562), so that the command line can print
its help without torch, and a script loads no more than it uses.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from textenv_command import check_agents

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_public_names.py compares the two lists
    from . import doctor as doctor
    from . import sft as sft
    from .buffers import SequenceRolloutBuffer as SequenceRolloutBuffer
    from .build import make_agent as make_agent
    from .checkpoint import latest_checkpoint as latest_checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .checkpoints_callback import Checkpoints as Checkpoints
    from .classifier import train_classifier as train_classifier
    from .config import AlgorithmConfig as AlgorithmConfig
    from .config import EnvConfig as EnvConfig
    from .config import EvaluationConfig as EvaluationConfig
    from .config import KLConfig as KLConfig
    from .config import ModelConfig as ModelConfig
    from .config import Named as Named
    from .config import ShapingConfig as ShapingConfig
    from .config import TrainConfig as TrainConfig
    from .critic import RewardModelCritic as RewardModelCritic
    from .critic import SeparateCritic as SeparateCritic
    from .critic import SharedCritic as SharedCritic
    from .critic_warmup import CriticWarmup as CriticWarmup
    from .data_parallel import DataParallel as DataParallel
    from .demo import demo_model as demo_model
    from .engine import EngineLost as EngineLost
    from .engine import RolloutEngine as RolloutEngine
    from .engine_rollouts import EngineRollouts as EngineRollouts
    from .episode_metrics import EpisodeMetrics as EpisodeMetrics
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .evaluation_callback import Evaluate as Evaluate
    from .exporting import export as export
    from .findings import DoctorError as DoctorError
    from .findings import Finding as Finding
    from .findings import Report as Report
    from .finite_updates import FiniteUpdates as FiniteUpdates
    from .flat_policy import FlatLMPolicy as FlatLMPolicy
    from .from_scratch import pretrain as pretrain
    from .generation import Generation as Generation
    from .generation import generate as generate
    from .groups import SampleGroups as SampleGroups
    from .interface import BackendSpec as BackendSpec
    from .interface import LanguageModel as LanguageModel
    from .interface import LengthError as LengthError
    from .interface import RowCache as RowCache
    from .kl import AdaptiveCoef as AdaptiveCoef
    from .kl import KLPenalty as KLPenalty
    from .learned_reward import LearnedReward as LearnedReward
    from .local_engine import LocalEngine as LocalEngine
    from .manifest import CheckpointError as CheckpointError
    from .maskable import MaskableLMPolicy as MaskableLMPolicy
    from .maskable_buffer import MaskableSequenceRolloutBuffer as MaskableSequenceRolloutBuffer
    from .policies import LMPolicy as LMPolicy
    from .preferences import Labelled as Labelled
    from .preferences import Ranking as Ranking
    from .preferences import hh_pairs as hh_pairs
    from .pretrained import Pretrained as Pretrained
    from .reward_curves import RewardCurves as RewardCurves
    from .reward_figures import RewardFigures as RewardFigures
    from .reward_figures import calibration as calibration
    from .reward_figures import pair_accuracy as pair_accuracy
    from .reward_figures import wilson_interval as wilson_interval
    from .reward_model import score_texts as score_texts
    from .reward_model import train_reward_model as train_reward_model
    from .rollout_steps import RolloutStep as RolloutStep
    from .sample_table import SampleTable as SampleTable
    from .sample_table import sample_table as sample_table
    from .sb3_zip import load_sb3_zip as load_sb3_zip
    from .scores import DropEpisodes as DropEpisodes
    from .scores import LateScores as LateScores
    from .shaping import RewardShaping as RewardShaping
    from .sharding import Sharded as Sharded
    from .small_tokenizers import bpe_tokenizer as bpe_tokenizer
    from .small_tokenizers import char_tokenizer as char_tokenizer
    from .small_tokenizers import word_tokenizer as word_tokenizer
    from .trainable import LastLayers as LastLayers
    from .trainable import LoRA as LoRA
    from .training_warnings import TrainingWarnings as TrainingWarnings
    from .vec_env import TextVecEnv as TextVecEnv
    from .world import is_main_process as is_main_process

MODULES = {"doctor": ".doctor", "sft": ".sft"}  # called by their module: doctor.check(model), sft.tune(...)
NAMES = {
    "AdaptiveCoef": ".kl",
    "AlgorithmConfig": ".config",
    "BackendSpec": ".interface",
    "CheckpointError": ".manifest",
    "Checkpoints": ".checkpoints_callback",
    "CriticWarmup": ".critic_warmup",
    "DataParallel": ".data_parallel",
    "DoctorError": ".findings",
    "DropEpisodes": ".scores",
    "EngineLost": ".engine",
    "EngineRollouts": ".engine_rollouts",
    "EnvConfig": ".config",
    "EpisodeMetrics": ".episode_metrics",
    "Evaluate": ".evaluation_callback",
    "Evaluation": ".evaluation",
    "EvaluationConfig": ".config",
    "Finding": ".findings",
    "FiniteUpdates": ".finite_updates",
    "FlatLMPolicy": ".flat_policy",
    "Generation": ".generation",
    "KLConfig": ".config",
    "KLPenalty": ".kl",
    "LMPolicy": ".policies",
    "Labelled": ".preferences",
    "LanguageModel": ".interface",
    "LastLayers": ".trainable",
    "LateScores": ".scores",
    "LearnedReward": ".learned_reward",
    "LengthError": ".interface",
    "LoRA": ".trainable",
    "LocalEngine": ".local_engine",
    "MaskableLMPolicy": ".maskable",
    "MaskableSequenceRolloutBuffer": ".maskable_buffer",
    "ModelConfig": ".config",
    "Named": ".config",
    "Pretrained": ".pretrained",
    "Ranking": ".preferences",
    "Report": ".findings",
    "RewardCurves": ".reward_curves",
    "RewardFigures": ".reward_figures",
    "RewardModelCritic": ".critic",
    "RewardShaping": ".shaping",
    "RolloutEngine": ".engine",
    "RolloutStep": ".rollout_steps",
    "RowCache": ".interface",
    "SampleGroups": ".groups",
    "SampleTable": ".sample_table",
    "SeparateCritic": ".critic",
    "SequenceRolloutBuffer": ".buffers",
    "ShapingConfig": ".config",
    "Sharded": ".sharding",
    "SharedCritic": ".critic",
    "TextVecEnv": ".vec_env",
    "TrainConfig": ".config",
    "TrainingWarnings": ".training_warnings",
    "bpe_tokenizer": ".small_tokenizers",
    "calibration": ".reward_figures",
    "char_tokenizer": ".small_tokenizers",
    "demo_model": ".demo",
    "evaluate": ".evaluation",
    "export": ".exporting",
    "generate": ".generation",
    "hh_pairs": ".preferences",
    "is_main_process": ".world",
    "latest_checkpoint": ".checkpoint",
    "load_checkpoint": ".checkpoint",
    "load_sb3_zip": ".sb3_zip",
    "make_agent": ".build",
    "pair_accuracy": ".reward_figures",
    "pretrain": ".from_scratch",
    "sample_table": ".sample_table",
    "save_checkpoint": ".checkpoint",
    "score_texts": ".reward_model",
    "train_classifier": ".classifier",
    "train_reward_model": ".reward_model",
    "wilson_interval": ".reward_figures",
    "word_tokenizer": ".small_tokenizers",
}

_check_agents = cache(check_agents)  # once a process: it reads what every installed distribution has


if not TYPE_CHECKING:  # checkers have the imports above, and report any other name
    __all__ = sorted({*MODULES, *NAMES})

    def __getattr__(name: str) -> Any:
        """Import a public name where it is first asked for.

        Raises:
            AttributeError: If there is no such name.
            ImportError: If another library has installed its own package `agents` over this one.
        """
        if name not in MODULES and name not in NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _check_agents()
        module = import_module(MODULES.get(name) or NAMES[name], __name__)
        value = globals()[name] = module if name in MODULES else getattr(module, name)  # found there from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *NAMES})
