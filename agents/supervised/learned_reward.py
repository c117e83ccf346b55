"""A reward that learns from people's answers: a reward model, trained anew as more answers come in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from textenv.checks.trust import check_written
from textenv.episodes.completion import Preds
from textenv.episodes.scores import ScoreAt
from textenv.feedback.records import Answer
from textenv.huggingface.weights import from_pretrained
from textenv.prompts.prompts import Prompt
from textenv.rewards.base import BatchReward
from textenv.rewards.preference import Preference
from textenv.text.named_tokenizer import DEMO

from ..small_models.demo_model import model_folder
from .feedback_data import examples_of
from .reward_model import train_reward_model


@dataclass
class LearnedReward(BatchReward):
    """The score of a reward model that each call of `fit` trains anew, on all answers so far.

    It is made for `textenv.rewards.HumanReward(..., learned=LearnedReward(...))`, which calls `fit`. Each training
    starts from `model`, so it does not matter in which portions the answers came in. Scores are normalised to mean 0
    and standard deviation 1 over the texts of the training data.

    Args:
        model: The model that each training starts from: a language or reward model, as a folder or a name on the hub;
            "demo" is the built-in model.
        folder: The folder of the newest reward model; None for a temporary folder. A configuration may only name a
            folder below the current one.
        n_epochs: The number of passes over the answers: ten, since answers are few.
        batch_size: The number of answers in a minibatch.
        learning_rate: The peak of the learning rate's schedule.
        seed: The seed of a fresh head and of the order of the answers.

    Raises:
        RuntimeError: If a score is needed before the first `fit`.

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
        """Train the reward model on all answers.

        Raises:
            ValueError: If no answer says which text is better.
        """
        if self.folder is None and self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="textenv-")  # removed with this object
        folder = f"{self._temporary.name}/model" if self.folder is None else self.folder
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # otherwise each `fit` would warn about the fresh head again
        try:
            self._train(answers, folder)
        finally:
            transformers_logging.set_verbosity(verbosity)
        self._scorer = Preference(folder, stats="stored")

    def _train(self, answers: Sequence[Answer], folder: str) -> None:
        with torch.enable_grad():  # `generation.run_episodes`, which may call this, switches gradients off
            train_reward_model(
                self.model,
                from_pretrained(AutoTokenizer, model_folder(self.model)),
                examples_of(answers),
                folder,
                n_epochs=self.n_epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.seed,
                overwrite=True,  # the folder has the model of the previous `fit`
                progress_bar=False,
            )

    def score(self, prompts: Sequence[Prompt], preds: Sequence[Preds], dones: Sequence[bool]) -> list[float]:
        """Return the score of each row.

        Raises:
            RuntimeError: Before the first `fit`.
        """
        if self._scorer is None:
            raise RuntimeError("Expected `fit` before `score`: use it as HumanReward(..., learned=LearnedReward(...)).")
        return self._scorer.score(prompts, preds, dones)
