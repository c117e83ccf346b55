# %% [markdown]
# # Quickstart: a language model learns to write positive reviews
#
# Stable-Baselines3's own PPO trains a tiny GPT-2, which is built in: nothing is downloaded. It takes less than a minute
# on two cores of a CPU.

# %%
import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from agents import Generation, KLPenalty, demo_model, generate, make_agent, sample_table
from textenv import Preds, Prompt, TextEnv, demo

# %% [markdown]
# ## The model
#
# The first call trains it on product reviews of all moods, in seconds, and keeps it in a cache.

# %%
folder = demo_model(progress_bar=False)
tokenizer = AutoTokenizer.from_pretrained(folder)
print(demo.reviews(2))

# %% [markdown]
# ## The task
#
# A `TextEnv` is a Gymnasium environment: an action is a token, and an episode is a text. `get_reward` says how good it
# is. Here it is the share of positive words among all words of mood, from 0 to 1. `score_at="done"` asks for it once,
# at the end of a text.


# %%
class Positive(TextEnv):
    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return demo.score(prompt + preds.text)


env = Positive(demo.prompts(), tokenizer, max_new_tokens=32, score_at="done")

# %% [markdown]
# ## Training
#
# `make_agent` builds a `stable_baselines3.PPO` with settings that suit text. The KL penalty keeps the model close to
# the one before training, so that its texts stay reviews. The learning rate is for this tiny model; a real one needs
# 1e-5, which is the default.

# %%
model = make_agent(env, str(folder), n_envs=64, seed=0, learning_rate=1.5e-3, batch_size=512, target_kl=0.05)


def mean_reward(texts: list[Generation]) -> float:
    return float(np.mean([demo.score(text.prompt + text.text) for text in texts]))


before = generate(model, demo.prompts(), tokenizer, n=4, seed=1)
model.learn(24_000, callback=KLPenalty(0.05))
after = generate(model, demo.prompts(), tokenizer, n=4, seed=1)
print(f"mean reward: {mean_reward(before):.2f} before, {mean_reward(after):.2f} after")

# %% [markdown]
# ## Texts of the same prompts, before and after

# %%
Console(width=110).print(sample_table({"before": before[:24:4], "after": after[:24:4]}))


def share_of_reviews(texts: list[Generation]) -> float:
    return float(np.mean([demo.parses(text.prompt + text.text) for text in texts]))


print(f"reviews that follow the grammar: {share_of_reviews(before):.0%} before, {share_of_reviews(after):.0%} after")

# %% [markdown]
# Next: a reward of your own (`your_own_reward.py`), and what each token earned (`see_what_a_token_earned.py`).
