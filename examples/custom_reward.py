"""Three ways to write a reward: a function, a subclass, and named parts; each trains in seconds.

    python examples/custom_reward.py

A tiny model with fresh weights learns, character by character, to write the letter that each reward asks for. Expect
every mean reward to rise (0.7 to 1.2, 0.6 to 16.0, -0.5 to 1.2), in about a minute on two cores.
"""

from __future__ import annotations

import argparse

import numpy as np
from transformers import GPT2Config

from agents import EpisodeMetrics, make_agent
from textenv import CharTokenizer, Preds, Prompt, TextEnv

TOKENIZER = CharTokenizer("abcdefghisty ")
PROMPTS = [{"prompt": "say ", "letter": "a"}, {"prompt": "say it ", "letter": "b"}]


def many_letters(prompt: Prompt, preds: Preds, done: bool) -> float:
    """Return the number of different letters in a complete text, over 8: a reward as a function."""
    return len(set(preds.text)) / 8 if done else 0.0


class AskedLetter(TextEnv):
    """A reward as a subclass, called at every token: the rewarded letter is a column of the prompt's row."""

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return float(preds.text.endswith(prompt.row["letter"]))


class LetterAndLength(TextEnv):
    """A reward of named parts: their sum is the reward, and each part is logged (reward/letter, reward/length).

    `preds.state` is a dict of the episode's own.
    """

    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> dict[str, float]:
        preds.state["best"] = max(preds.state.get("best", 0), preds.text.count("a"))
        return {"letter": preds.state["best"] / 8, "length": -0.1 * abs(len(preds) - 8)} if done else {}


def train(name: str, env: TextEnv, n_tokens: int) -> None:
    """Train on an env, and print the mean reward before and after."""
    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=len(TOKENIZER), n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = make_agent(env, config, n_envs=32, learning_rate=3e-3, seed=0)
    model.learn(1, callback=EpisodeMetrics())  # one rollout and update: the episodes are the untrained model's
    before = np.mean([episode["r"] for episode in model.ep_info_buffer])
    model.learn(n_tokens, callback=EpisodeMetrics(), progress_bar=True)
    after = np.mean([episode["r"] for episode in model.ep_info_buffer])
    print(f"{name:16} mean reward {before:6.2f} -> {after:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    n_tokens = 1024 if parser.parse_args().smoke else 20_000
    limits = {"max_new_tokens": 16, "max_prompt_tokens": 8}
    train("function", TextEnv(["say "], TOKENIZER, reward=many_letters, **limits), n_tokens)
    train("subclass", AskedLetter(PROMPTS, TOKENIZER, **limits), n_tokens)
    train("parts", LetterAndLength(["say "], TOKENIZER, **limits), n_tokens)


if __name__ == "__main__":
    main()
