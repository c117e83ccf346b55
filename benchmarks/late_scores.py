"""The gain of scoring finished texts once per rollout: `score_at="rollout_end"` against "done", with a classifier.

    python benchmarks/late_scores.py [--quick]

The same policy takes the same rollouts, in turns. The reward is `textenv.rewards.classifier.Classifier` over a BERT of
4 layers and width 256, built here with fresh weights. With "done" it scores the one or two texts that end in a step;
with "rollout_end" all of them, sorted by length and in batches of 32. The texts are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from transformers import BertConfig, BertForSequenceClassification
from work import Row, Settings, pairs, rollout, run_script

from agents import word_tokenizer
from textenv.episodes.scores import ScoreAt
from textenv.rewards.classifier import Classifier

LIMITS = (8, 128)


class Counted(Classifier):
    """A classifier that counts its calls and their texts."""

    calls = 0
    texts = 0

    def score(self, prompts: Sequence[Any], preds: Sequence[Any], dones: Sequence[bool]) -> list[float]:
        self.calls += 1
        self.texts += len(preds)
        return super().score(prompts, preds, dones)


def measure(settings: Settings) -> list[Row]:
    """Measure the row."""
    late, at_done = (agent(settings, score_at) for score_at in ("rollout_end", "done"))
    for model in (late, at_done):
        rollout(model)  # until lanes end at different steps
    result = pairs(lambda: rollout(late), lambda: rollout(at_done), settings.n_pairs, settings.device)
    low, high = limits(settings)
    return [
        Row(
            f"rollout, limits of {low} to {high} tokens, a 4-layer classifier at the rollout's end, against at done",
            f"{result.a:,.0f} tokens/s; {texts_a_call(late):.0f} texts a call",
            f"{result.b:,.0f} tokens/s; {texts_a_call(at_done):.1f} texts a call",
            result.ratio,
            result.spread,
            "-",
            None,
        )
    ]


def limits(settings: Settings) -> tuple[int, int]:
    """Return the lengths of the shortest and the longest completion, in tokens."""
    return (2, 8) if settings.smoke else LIMITS


def agent(settings: Settings, score_at: ScoreAt) -> PPO:
    """Return an agent whose texts a classifier scores."""
    low, high = limits(settings)
    work = settings.work(new_tokens=high)
    lengths = np.random.default_rng(1).integers(low, high + 1, 4096)
    rows = [{"prompt": p, "max_new_tokens": int(n)} for p, n in zip(work.prompts(), lengths, strict=True)]
    tokenizer = word_tokenizer([str(token) for token in range(work.vocab_size)])  # a word for each id
    shape = {"num_hidden_layers": work.n_layer, "hidden_size": work.width, "num_attention_heads": work.n_head}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=4 * work.width, num_labels=2, **shape)
    classifier = BertForSequenceClassification(config)
    reward = Counted(classifier, label=1, tokenizer=tokenizer, device=settings.device)
    return work.agent(rows, reward=reward, score_at=score_at, n_steps=work.new_tokens)


def texts_a_call(model: PPO) -> float:
    """Return the mean number of texts in a call of the classifier."""
    reward, *_ = model.get_env().get_attr("reward")
    return reward.texts / reward.calls


if __name__ == "__main__":
    run_script(__doc__, measure)
