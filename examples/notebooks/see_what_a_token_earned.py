# %% [markdown]
# # See what a token earned
#
# A text gets one score, at its end. PPO learns from every token. This notebook shows what lies in between: the value
# that the critic predicts before and after each token, and the divergence from the model before training. `textenv show
# RUN` prints the same numbers for a run of the command. Nothing is downloaded, and it takes less than a minute on two
# cores of a CPU.

# %%
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from agents import CriticWarmup, KLPenalty, SeparateCritic, demo_model, make_agent
from textenv import Preds, Prompt, TextEnv, demo

COEF = 0.05  # of the KL penalty: the reward that a nat of divergence costs

folder = demo_model(progress_bar=False)
tokenizer = AutoTokenizer.from_pretrained(folder)


class Positive(TextEnv):
    def get_reward(self, prompt: Prompt, preds: Preds, done: bool) -> float:
        return demo.score(prompt + preds.text)


env = Positive(demo.prompts(), tokenizer, max_new_tokens=32, score_at="done")
model = make_agent(
    env,
    str(folder),
    n_envs=64,
    seed=0,
    learning_rate=1.5e-3,
    batch_size=512,
    target_kl=0.05,
    policy_kwargs={"critic": SeparateCritic(str(folder))},
)
start = make_agent(env, str(folder), n_envs=1).policy  # the model before training

# %% [markdown]
# ## Let the critic learn first
#
# The critic is a model of its own (`SeparateCritic`). A rollout has 64 x 32 tokens, and in the first eight the critic
# alone learns (`CriticWarmup`): the model still writes reviews of all moods, and the critic learns what to expect from
# them.

# %%
model.learn(8 * 64 * 32, callback=[KLPenalty(COEF), CriticWarmup(8)])

# %% [markdown]
# ## Play an episode
#
# The loop is Gymnasium's, and policy and values are Stable-Baselines3's: `predict`, `predict_values` and
# `get_distribution`. All observations of an episode are read in one call.


# %%
class Episode(NamedTuple):
    prompt: str
    tokens: list[str]
    rewards: np.ndarray  # (T,)
    values: np.ndarray  # (T,): what is still to come, as the critic sees it before the token
    divergences: np.ndarray  # (T,): KL(model, start) over the whole vocabulary, in nats


def play(prompt: str) -> Episode:
    observation, _ = env.reset(options={"prompts": [prompt]})
    observations, tokens, rewards, done = [], [], [], False
    while not done:
        action, _ = model.predict(observation)
        observations.append(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        tokens.append(tokenizer.decode([int(action)]))
        rewards.append(reward)
        done = terminated or truncated
    with torch.no_grad():
        batch, _ = model.policy.obs_to_tensor(np.stack(observations))  # (T, L)
        values = model.policy.predict_values(batch)[:, 0]
        new, old = (policy.get_distribution(batch).distribution.logits for policy in (model.policy, start))  # (T, V)
        divergences = (new.exp() * (new - old)).sum(dim=-1)
    return Episode(prompt, tokens, np.array(rewards), values.numpy(), divergences.numpy())


# %% [markdown]
# ## What each token earned
#
# A token earns its reward, less the penalty for its divergence, plus the change of the value: with it, the critic
# expects more or less than before. With gamma = 1 this is the error of temporal differences, from which GAE makes
# advantages. After the last token nothing is still to come.


# %%
def earned(episode: Episode) -> np.ndarray:
    after = np.append(episode.values[1:], 0.0)
    return episode.rewards - COEF * episode.divergences + after - episode.values


def show(prompt: str) -> Episode:
    """Play an episode, and print a line per token."""
    episode = play(prompt)
    print(f"{prompt}\n\n{'token':<14}{'reward':>8}{'value':>8}{'KL, nats':>10}{'earned':>8}")
    for token, *numbers in zip(*episode[1:], earned(episode), strict=True):
        print("{:<14}{:8.3f}{:8.3f}{:10.4f}{:+8.3f}".format(repr(token), *numbers))
    return episode


torch.manual_seed(1)
episode = show("this phone is")

# %% [markdown]
# The divergence is 0 at each token, since the model is still the one from the start. The changes of the value cancel,
# so that an episode's tokens earn in sum its score, less the penalties, less the value of the prompt:

# %%
total = episode.rewards.sum() - COEF * episode.divergences.sum() - episode.values[0]
print(f"sum of what the tokens earned: {earned(episode).sum():.4f}, by the formula: {total:.4f}")

# %% [markdown]
# ## Which words earn, and which cost
#
# The score knows only whole texts. Words of mood stand out all the same, since the critic has learned what they lead
# to; other words, the control, earn about nothing.


# %%
def by_mood() -> None:
    """Print what words of each mood earn on average."""
    amounts: dict[str, list[float]] = {"positive": [], "negative": [], "other": []}
    for episode in map(play, demo.prompts()):
        for token, amount in zip(episode.tokens, earned(episode), strict=True):
            word = token.strip()
            mood = "positive" if word in demo.POSITIVE else "negative" if word in demo.NEGATIVE else "other"
            amounts[mood].append(float(amount))
    for mood, earnings in amounts.items():
        print(f"{mood:<10}{np.mean(earnings or [0.0]):+.3f} a token ({len(earnings)} tokens)")


by_mood()

# %% [markdown]
# ## After training
#
# Now the model learns, too. It comes to write positive words, and the critic to expect them: what is expected earns
# nothing. In one run a positive word earned 0.194 before and 0.021 after. The divergence shows at which tokens the
# model has changed.

# %%
model.learn(4 * 64 * 32, reset_num_timesteps=False)
show("this phone is")
print()
by_mood()
