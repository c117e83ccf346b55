"""Text generation as a Gymnasium environment, with its prompts, episodes, rewards and masks."""

from functools import partial

from gymnasium.envs.registration import register

from textenv.env import TextEnv
from textenv.episodes.completion import Preds, Turn
from textenv.episodes.rules import EndReason
from textenv.episodes.scores import RewardError
from textenv.huggingface.datasets import read_dataset
from textenv.masks.grammar import GrammarMask, JSONSchemaMask, RegexMask
from textenv.masks.token_masks import AllowedMask, BannedMask, MaskError, MinLengthMask, TokenMask
from textenv.prompts.priority import PrioritySampling
from textenv.prompts.prompts import Prompt
from textenv.testing import check_text_env
from textenv.text import demo_corpus as demo
from textenv.text.tokenizer import CharTokenizer, Tokenizer
from textenv.vector import TextVectorEnv, make_vector_env

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
    "PrioritySampling",
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
    "demo",
    "read_dataset",
]

TASKS = {  # from the names in `gymnasium.make("textenv/<name>-v0")` to the classes
    "Text": "textenv.env:TextEnv",
    "Reviews": "textenv.tasks.reviews:Reviews",
    "DailyDialog": "textenv.tasks.dailydialog:DailyDialog",
    "HH": "textenv.tasks.hh:HH",
    "ZhReviews": "textenv.tasks.zh_reviews:ZhReviews",
    "IncreasingNumbers": "textenv.tasks.increasing_numbers:IncreasingNumbers",
    "Dates": "textenv.tasks.dates:Dates",
    "ReasoningGym": "textenv.adapters.reasoning_gym:ReasoningGym",
}

# Entry points are texts, so that gymnasium imports a task's module only when somebody makes its environment.
# The names of the loop are private: `env` would hide the module `textenv.env`.
for _name, _task in {"Demo": "textenv.tasks.demo:Demo", **TASKS}.items():
    register(f"textenv/{_name}-v0", _task, vector_entry_point=partial(make_vector_env, env_type=_task))
