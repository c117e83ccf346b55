"""Language models as Stable-Baselines3 agents: policies, rollouts, and the tools that train, score and export them.

A public name is imported from its module at its first use (PEP 562), so that the command line can print its help
without torch, and a script loads no more than it uses.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from textenv_agents import check_agents

if TYPE_CHECKING:  # the same names for type checkers and editors; test_public_names.py compares the two lists
    from . import doctor as doctor
    from .build import make_agent as make_agent
    from .callbacks.checkpoints import Checkpoints as Checkpoints
    from .callbacks.episode_metrics import EpisodeMetrics as EpisodeMetrics
    from .callbacks.finite_updates import FiniteUpdates as FiniteUpdates
    from .callbacks.reward_curves import RewardCurves as RewardCurves
    from .callbacks.training_warnings import TrainingWarnings as TrainingWarnings
    from .checkpoints.checkpoint import latest_checkpoint as latest_checkpoint
    from .checkpoints.checkpoint import load_checkpoint as load_checkpoint
    from .checkpoints.checkpoint import save_checkpoint as save_checkpoint
    from .checkpoints.hf_export import export as export
    from .checkpoints.manifest import CheckpointError as CheckpointError
    from .checkpoints.sb3_zip import load_sb3_zip as load_sb3_zip
    from .configuration.config import AlgorithmConfig as AlgorithmConfig
    from .configuration.config import EnvConfig as EnvConfig
    from .configuration.config import EvaluationConfig as EvaluationConfig
    from .configuration.config import KLConfig as KLConfig
    from .configuration.config import ModelConfig as ModelConfig
    from .configuration.config import Named as Named
    from .configuration.config import ShapingConfig as ShapingConfig
    from .configuration.config import TrainConfig as TrainConfig
    from .configuration.recipes import RECIPES as RECIPES
    from .diagnosis.diagnose import diagnose as diagnose
    from .diagnosis.findings import Diagnosis as Diagnosis
    from .distributed.sharding import Sharded as Sharded
    from .distributed.world import is_main_process as is_main_process
    from .doctor.report import DoctorError as DoctorError
    from .doctor.report import Finding as Finding
    from .doctor.report import Report as Report
    from .engines.local import LocalEngine as LocalEngine
    from .engines.protocol import BackgroundEngine as BackgroundEngine
    from .engines.protocol import EngineLost as EngineLost
    from .engines.protocol import RolloutEngine as RolloutEngine
    from .engines.rollouts import EngineRollouts as EngineRollouts
    from .evaluation.credit import critic_agreement as critic_agreement
    from .evaluation.credit import monte_carlo_values as monte_carlo_values
    from .evaluation.evaluate_callback import Evaluate as Evaluate
    from .evaluation.evaluation import Evaluation as Evaluation
    from .evaluation.evaluation import evaluate as evaluate
    from .evaluation.generation import Generation as Generation
    from .evaluation.generation import generate as generate
    from .evaluation.improvement import SeedComparison as SeedComparison
    from .evaluation.prompt_scores import PromptScores as PromptScores
    from .evaluation.sample_table import SampleTable as SampleTable
    from .evaluation.sample_table import sample_table as sample_table
    from .evaluation.seeds import SeedTable as SeedTable
    from .models.critic import RewardModelCritic as RewardModelCritic
    from .models.critic import SeparateCritic as SeparateCritic
    from .models.critic import SharedCritic as SharedCritic
    from .models.interface import BackendSpec as BackendSpec
    from .models.interface import LanguageModel as LanguageModel
    from .models.interface import LengthError as LengthError
    from .models.interface import RowCache as RowCache
    from .models.pretrained import Pretrained as Pretrained
    from .models.trainable import LastLayers as LastLayers
    from .models.trainable import LoRA as LoRA
    from .policies.flat import FlatLMPolicy as FlatLMPolicy
    from .policies.lm_policy import LMPolicy as LMPolicy
    from .policies.maskable import MaskableLMPolicy as MaskableLMPolicy
    from .policies.pretrained_critic import PretrainedCritic as PretrainedCritic
    from .policies.surrogates import CISPO as CISPO
    from .policies.surrogates import GSPO as GSPO
    from .policies.surrogates import ClipHigher as ClipHigher
    from .policies.surrogates import DualClip as DualClip
    from .policies.surrogates import SoftGate as SoftGate
    from .policies.surrogates import Surrogate as Surrogate
    from .rollout.buffer import SequenceRolloutBuffer as SequenceRolloutBuffer
    from .rollout.maskable_buffer import MaskableSequenceRolloutBuffer as MaskableSequenceRolloutBuffer
    from .rollout.vec_env import TextVecEnv as TextVecEnv
    from .small_models.demo_model import demo_model as demo_model
    from .small_models.from_scratch import pretrain as pretrain
    from .small_models.tokenizers import bpe_tokenizer as bpe_tokenizer
    from .small_models.tokenizers import char_tokenizer as char_tokenizer
    from .small_models.tokenizers import word_tokenizer as word_tokenizer
    from .steps.critic_warmup import CriticWarmup as CriticWarmup
    from .steps.data_parallel import DataParallel as DataParallel
    from .steps.kl_penalty import AdaptiveCoef as AdaptiveCoef
    from .steps.kl_penalty import KLPenalty as KLPenalty
    from .steps.reward_shaping import RewardShaping as RewardShaping
    from .steps.sample_groups import SampleGroups as SampleGroups
    from .steps.scores import DropEpisodes as DropEpisodes
    from .steps.scores import LateScores as LateScores
    from .steps.step import RolloutStep as RolloutStep
    from .supervised import sft as sft
    from .supervised.accuracy import RewardFigures as RewardFigures
    from .supervised.accuracy import calibration as calibration
    from .supervised.accuracy import pair_accuracy as pair_accuracy
    from .supervised.accuracy import wilson_interval as wilson_interval
    from .supervised.classifier import train_classifier as train_classifier
    from .supervised.critic_fit import fit_critic as fit_critic
    from .supervised.learned_reward import LearnedReward as LearnedReward
    from .supervised.preferences import Labelled as Labelled
    from .supervised.preferences import Ranking as Ranking
    from .supervised.preferences import hh_pairs as hh_pairs
    from .supervised.reward_model import score_texts as score_texts
    from .supervised.reward_model import train_reward_model as train_reward_model

MODULES = {"doctor": ".doctor", "sft": ".supervised.sft"}  # public as modules: doctor.check(model), sft.tune(...)
NAMES = {
    "AdaptiveCoef": ".steps.kl_penalty",
    "AlgorithmConfig": ".configuration.config",
    "BackendSpec": ".models.interface",
    "BackgroundEngine": ".engines.protocol",
    "CISPO": ".policies.surrogates",
    "CheckpointError": ".checkpoints.manifest",
    "Checkpoints": ".callbacks.checkpoints",
    "ClipHigher": ".policies.surrogates",
    "CriticWarmup": ".steps.critic_warmup",
    "DataParallel": ".steps.data_parallel",
    "Diagnosis": ".diagnosis.findings",
    "DoctorError": ".doctor.report",
    "DropEpisodes": ".steps.scores",
    "DualClip": ".policies.surrogates",
    "EngineLost": ".engines.protocol",
    "EngineRollouts": ".engines.rollouts",
    "EnvConfig": ".configuration.config",
    "EpisodeMetrics": ".callbacks.episode_metrics",
    "Evaluate": ".evaluation.evaluate_callback",
    "Evaluation": ".evaluation.evaluation",
    "EvaluationConfig": ".configuration.config",
    "Finding": ".doctor.report",
    "FiniteUpdates": ".callbacks.finite_updates",
    "FlatLMPolicy": ".policies.flat",
    "GSPO": ".policies.surrogates",
    "Generation": ".evaluation.generation",
    "KLConfig": ".configuration.config",
    "KLPenalty": ".steps.kl_penalty",
    "LMPolicy": ".policies.lm_policy",
    "Labelled": ".supervised.preferences",
    "LanguageModel": ".models.interface",
    "LastLayers": ".models.trainable",
    "LateScores": ".steps.scores",
    "LearnedReward": ".supervised.learned_reward",
    "LengthError": ".models.interface",
    "LoRA": ".models.trainable",
    "LocalEngine": ".engines.local",
    "MaskableLMPolicy": ".policies.maskable",
    "MaskableSequenceRolloutBuffer": ".rollout.maskable_buffer",
    "ModelConfig": ".configuration.config",
    "Named": ".configuration.config",
    "Pretrained": ".models.pretrained",
    "PretrainedCritic": ".policies.pretrained_critic",
    "PromptScores": ".evaluation.prompt_scores",
    "RECIPES": ".configuration.recipes",
    "Ranking": ".supervised.preferences",
    "Report": ".doctor.report",
    "RewardCurves": ".callbacks.reward_curves",
    "RewardFigures": ".supervised.accuracy",
    "RewardModelCritic": ".models.critic",
    "RewardShaping": ".steps.reward_shaping",
    "RolloutEngine": ".engines.protocol",
    "RolloutStep": ".steps.step",
    "RowCache": ".models.interface",
    "SampleGroups": ".steps.sample_groups",
    "SampleTable": ".evaluation.sample_table",
    "SeedComparison": ".evaluation.improvement",
    "SeedTable": ".evaluation.seeds",
    "SeparateCritic": ".models.critic",
    "SequenceRolloutBuffer": ".rollout.buffer",
    "ShapingConfig": ".configuration.config",
    "Sharded": ".distributed.sharding",
    "SharedCritic": ".models.critic",
    "SoftGate": ".policies.surrogates",
    "Surrogate": ".policies.surrogates",
    "TextVecEnv": ".rollout.vec_env",
    "TrainConfig": ".configuration.config",
    "TrainingWarnings": ".callbacks.training_warnings",
    "bpe_tokenizer": ".small_models.tokenizers",
    "calibration": ".supervised.accuracy",
    "char_tokenizer": ".small_models.tokenizers",
    "critic_agreement": ".evaluation.credit",
    "demo_model": ".small_models.demo_model",
    "diagnose": ".diagnosis.diagnose",
    "evaluate": ".evaluation.evaluation",
    "export": ".checkpoints.hf_export",
    "fit_critic": ".supervised.critic_fit",
    "generate": ".evaluation.generation",
    "hh_pairs": ".supervised.preferences",
    "is_main_process": ".distributed.world",
    "latest_checkpoint": ".checkpoints.checkpoint",
    "load_checkpoint": ".checkpoints.checkpoint",
    "load_sb3_zip": ".checkpoints.sb3_zip",
    "make_agent": ".build",
    "monte_carlo_values": ".evaluation.credit",
    "pair_accuracy": ".supervised.accuracy",
    "pretrain": ".small_models.from_scratch",
    "sample_table": ".evaluation.sample_table",
    "save_checkpoint": ".checkpoints.checkpoint",
    "score_texts": ".supervised.reward_model",
    "train_classifier": ".supervised.classifier",
    "train_reward_model": ".supervised.reward_model",
    "wilson_interval": ".supervised.accuracy",
    "word_tokenizer": ".small_models.tokenizers",
}

_check_agents = cache(check_agents)  # once per process: it reads the file lists of all installed distributions


if not TYPE_CHECKING:  # type checkers read the imports above instead, and so report names that do not exist
    __all__ = sorted({*MODULES, *NAMES})

    def __getattr__(name: str) -> Any:
        """Import a public name at its first use.

        Raises:
            AttributeError: If there is no such name.
            ImportError: If another library has installed its own package `agents` over this one.
        """
        if name not in MODULES and name not in NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _check_agents()
        module = import_module(MODULES.get(name) or NAMES[name], __name__)
        # As a global, the name is found without `__getattr__` from now on.
        value = globals()[name] = module if name in MODULES else getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *NAMES})
