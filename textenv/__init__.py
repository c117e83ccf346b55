"""Text generation as a Gymnasium environment: what an episode is, and what it earns."""

from gymnasium.envs.registration import register

from textenv.completion import Preds, Turn
from textenv.env import TextEnv
from textenv.episode import EndReason
from textenv.grammar_masks import GrammarMask, JSONSchemaMask, RegexMask
from textenv.masks import AllowedMask, BannedMask, MaskError, MinLengthMask, TokenMask
from textenv.prompts import Prompt
from textenv.rewarding import RewardError
from textenv.testing import check_text_env
from textenv.tokenizer import CharTokenizer, Tokenizer
from textenv.vector import TextVectorEnv

__version__ = "0.1.0"

__all__ = [
    "AllowedMask",
    "BannedMask",
    "CharTokenizer",
    "EndReason",
    "GrammarMask",
    "JSONSchemaMask",
    "MaskError",
    "MinLengthMask",
    "Preds",
    "Prompt",
    "RegexMask",
    "RewardError",
    "TextEnv",
    "TextVectorEnv",
    "TokenMask",
    "Tokenizer",
    "Turn",
    "__version__",
    "check_text_env",
]

register(
    id="textenv/Text-v0",
    entry_point="textenv.env:TextEnv",
    vector_entry_point="textenv.vector:make_vector_env",
)
