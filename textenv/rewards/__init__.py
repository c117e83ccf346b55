"""Rewards of finished texts and of their steps, alone or combined.

The rewards that need torch are not imported here: `textenv.rewards.classifier`, `.preference`, `.likelihood`,
`.process_model` and `.similarity`.
"""

from textenv.episodes.failure_policy import RowError
from textenv.episodes.scores import DROPPED
from textenv.episodes.waiting import waiting_for_people
from textenv.rewards.asynchronous import AsyncFunction, AsyncReward
from textenv.rewards.base import BatchReward, RowReward, score_rows
from textenv.rewards.chinese import SnowNLP
from textenv.rewards.compose import Cached, Clip, Ensemble, Gate, Scale, WeightedSum
from textenv.rewards.http_judge import ChatJudge, HTTPJudge
from textenv.rewards.human import HumanReward
from textenv.rewards.lexicon import Vader
from textenv.rewards.overlap import BLEU, METEOR, ROUGE, ChrF, SacreBLEU
from textenv.rewards.registry import make_reward, read_reward, register_reward
from textenv.rewards.rules import Format, Keyword, Length, Regex, Repetition, Zero
from textenv.rewards.steps import StepReward, StepwiseReward

__all__ = [
    "BLEU",
    "DROPPED",
    "METEOR",
    "ROUGE",
    "AsyncFunction",
    "AsyncReward",
    "BatchReward",
    "Cached",
    "ChatJudge",
    "ChrF",
    "Clip",
    "Ensemble",
    "Format",
    "Gate",
    "HTTPJudge",
    "HumanReward",
    "Keyword",
    "Length",
    "Regex",
    "Repetition",
    "RowError",
    "RowReward",
    "SacreBLEU",
    "SnowNLP",
    "Scale",
    "StepReward",
    "StepwiseReward",
    "Vader",
    "WeightedSum",
    "Zero",
    "make_reward",
    "read_reward",
    "register_reward",
    "score_rows",
    "waiting_for_people",
]
