"""A reward that is a model of people's answers, and learns again when there are more."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from textenv.completion import Preds
from textenv.feedback.records import Answer
from textenv.model_loading import from_pretrained
from textenv.named_tokenizer import DEMO
from textenv.prompts import Prompt
from textenv.rewarding import ScoreAt
from textenv.rewards.base import BatchReward
from textenv.rewards.preference import Preference
from textenv.trust import check_written

from .demo import model_folder
from .feedback_data import examples_of
from .reward_model import train_reward_model


@dataclass
class LearnedReward(BatchReward):
    """The score of a reward model that is trained anew on all answers whenever `fit` is called.

    For `textenv.rewards.HumanReward(..., learned=LearnedReward(...))`, which calls `fit`; before, there is no score.
    Each training starts from `model`, so that it does not matter in which portions the answers came. Scores are
    normalised to mean 0 and deviation 1 over the texts that were trained on.

    Args:
        model: What each training starts from: a name or folder of a language or reward model; "demo" is the built-in.
        folder: Where the newest reward model is kept, in a configuration below the current folder; a temporary folder
            by default.
        n_epochs: Passes over the answers: they are few.
        batch_size: Answers of a minibatch.
        learning_rate: The peak.
        seed: Of a fresh head and of the order of the answers.

    Example:
        >>> from textenv.feedback.records import Answer
        >>> answer = Answer(1, 1, "compare", "ann", "this phone is", (" great .", " awful ."), value=0)
        >>> reward = LearnedReward(n_epochs=4, learning_rate=1e-2)
        >>> # reward.fit([answer]); reward(Prompt("this phone is"), preds, True)
    """

    model: str = DEMO
    folder: str | None = None
    n_epochs: float = 10.0
    batch_size: int = 16
    learning_rate: float = 1e-5
    seed: int = 0

    score_at: ScoreAt = "rollout_end"

    def __post_init__(self) -> None:
        if self.folder is not None:
            check_written(self.folder)
        self._scorer: Preference | None = None
        self._temporary: Any = None

    def fit(self, answers: Sequence[Answer]) -> None:
        """Train on the answers, all there are.

        Raises:
            ValueError: If none of them says which text is better.
        """
        if self.folder is None and self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="textenv-")  # removed with this object
        folder = f"{self._temporary.name}/model" if self.folder is None else self.folder
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a fresh head is news the first time at most
        try:
            self._train(answers, folder)
        finally:
            transformers_logging.set_verbosity(verbosity)
        self._scorer = Preference(folder, stats="stored")

    def _train(self, answers: Sequence[Answer], folder: str) -> None:
        with torch.enable_grad():  # a rollout and an evaluation build no graph
            train_reward_model(
                self.model,
                from_pretrained(AutoTokenizer, model_folder(self.model)),
                examples_of(answers),
                folder,
                n_epochs=self.n_epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                overwrite=True,  # what was learned from fewer answers
                progress_bar=False,
            )

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return a number a row.

        Raises:
            RuntimeError: Before the first `fit`.
        """
        if self._scorer is None:
            raise RuntimeError("Expected `fit` before `score`: use it as HumanReward(..., learned=LearnedReward(...)).")
        return self._scorer.score(prompts, preds, dones)
