"""Learning from groups of samples: from chance to over 0.9 without a critic, and not with the reward off (E11)."""

from collections import defaultdict
from functools import partial

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from agents import RewardShaping, SampleGroups
from agents.build import make_agent
from agents.evaluation.generation import generate
from agents.rollout import minibatches
from tests.helpers.advantage_jobs import above_the_group
from tests.helpers.models import few
from tests.helpers.training import tiny_config, train_until
from textenv import CharTokenizer, TextEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
LETTERS = "abcdefg"
TOKENIZER = CharTokenizer(LETTERS)
PROMPTS = [first + second for first in LETTERS for second in LETTERS]
RULES = {"max_new_tokens": 4, "stop_ids": ()}


def share_of_c(prompt, preds, done):
    """Return the share of "c" at the end; by chance it is an eighth."""
    return preds.text.count("c") / 4 if done else 0.0


class Best(TextEnv):
    """A reward by comparison: 1 for the texts of a group with the most "c", however many that is."""

    def get_rewards(self, prompts, preds, dones):
        most = defaultdict(int)
        for text in preds:
            most[text.group] = max(most[text.group], text.text.count("c"))
        return [float(text.text.count("c") == most[text.group]) for text in preds]


def build(env, advantage, **kwargs):
    lm = tiny_config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, initializer_range=0.1)
    settings = {"n_envs": 64, "learning_rate": 1e-2, "batch_size": 128, "seed": 0, "device": "cpu", "vf_coef": 0.0}
    return make_agent(env, lm, rollout_buffer_kwargs={"advantage": advantage}, **{**settings, **kwargs})


def share_in_texts(model):
    """Return the share of "c" in four texts for each prompt."""
    return float(np.mean([share_of_c(None, text, True) for text in generate(model, PROMPTS, TOKENIZER, 4, **RULES)]))


def learn(model, iterations, callback=None):
    """Train until nearly all tokens are "c", for some iterations at most; return their share before and after."""
    before = share_in_texts(model)
    return before, train_until(model, partial(share_in_texts, model), iterations, callback)


@pytest.mark.parametrize("advantage", few(["grpo", "grpo_mean", "rloo", "reinforce++_baseline", above_the_group], 1))
def test_e11_group_relative_advantages_learn(advantage):
    """The 64 lanes are no multiple of the groups of 5."""
    env = TextEnv(PROMPTS, TOKENIZER, reward=share_of_c, samples_per_prompt=5, score_at="done", **RULES)
    before, after = learn(build(env, advantage), 32)
    assert before < 0.35 and after > 0.9


def above_a_half(episodes):
    """Return how far each score is above a half: a baseline that no group needs."""
    return [episode.score - 0.5 for episode in episodes]


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["reinforce++", above_a_half])
def test_e11_texts_alone_learn_without_a_critic_and_without_groups(advantage):
    """The control is a score that does not depend on the text."""
    env = TextEnv(PROMPTS, TOKENIZER, reward=share_of_c, score_at="done", **RULES)
    before, after = learn(build(env, advantage), 40)
    assert before < 0.35 and after > 0.9
    same = TextEnv(PROMPTS, TOKENIZER, reward=lambda prompt, preds, done: 0.5 * done, score_at="done", **RULES)
    assert learn(build(same, advantage), 20)[1] < 0.5


@pytest.mark.slow
def test_e11_samples_dealt_to_one_minibatch_learn_like_those_dealt_apart(monkeypatch):
    """Each minibatch has 16 texts: of two or a few prompts, or of nearly as many prompts as texts."""
    ends, even_groups = [], minibatches.even_groups
    for is_apart in (False, True):
        if is_apart:
            monkeypatch.setattr(minibatches, "even_groups", lambda *args: even_groups(*args[:3]))
        env = TextEnv(PROMPTS, TOKENIZER, reward=share_of_c, samples_per_prompt=8, score_at="done", **RULES)
        model = build(env, "grpo", batch_size=64)
        ends.append(learn(model, 32)[1])
        prompts = [len(np.unique(samples.observations.prompts)) for samples in model.rollout_buffer.get(64)]
        assert max(prompts) > 4 if is_apart else max(prompts) <= 4
    assert min(ends) > 0.9


@pytest.mark.slow
def test_e11_nothing_is_learned_with_the_reward_switched_off():
    env = TextEnv(PROMPTS, TOKENIZER, reward=lambda prompt, preds, done: 0.0, samples_per_prompt=5, **RULES)
    before, after = learn(build(env, "grpo"), 15)
    assert abs(after - before) < 0.05


@pytest.mark.slow
def test_e11_a_reward_that_compares_the_members_of_a_group_learns():
    before, after = learn(
        build(Best(PROMPTS, TOKENIZER, samples_per_prompt=8, score_at="rollout_end", **RULES), "grpo"), 32
    )
    assert before < 0.35 and after > 0.9


@pytest.mark.slow
def test_e11_without_groups_the_same_reward_teaches_nothing():
    """The negative control: each text is the best of a group of one."""
    model = build(Best(PROMPTS, TOKENIZER, score_at="rollout_end", **RULES), "gae", vf_coef=0.1)
    before, after = learn(model, 15)
    assert after < 0.6 and before < 0.35


@pytest.mark.slow
def test_e11_shaped_scores_learn():
    """All texts score 1,000, and a penalty for unended ones teaches the policy to end them."""
    env = TextEnv(PROMPTS, TOKENIZER, reward=lambda prompt, preds, done: 1000.0, score_at="done", max_new_tokens=4)
    ends = []
    for shaping in (RewardShaping(whiten=True, missing_eos_penalty=1.0), RewardShaping(whiten=True)):
        model = build(env, "gae", vf_coef=0.1)
        model.learn(15 * 256, callback=shaping)
        samples = generate(model, PROMPTS, TOKENIZER, 4, max_new_tokens=4)
        ends.append(np.mean([str(sample.end_reason) == "eos" for sample in samples]))
    assert ends[0] > 0.9 and ends[1] < 0.7


class Batches(BaseCallback):
    """Keeps, for each update, the share of its texts that have an advantage, and each rollout's mean reward."""

    def _on_training_start(self):
        self.shares, self.rewards = [], []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        trained, ended = self.model.rollout_buffer.trained, self.training_env.record.ended
        if len(trained):
            self.shares.append(np.mean([bool(part.advantages.any()) for part in trained]))
        self.rewards.append(np.mean([info["episode"]["r"] for info in ended.values()]))


@pytest.mark.slow
def test_e11_dynamic_sampling_trains_on_groups_with_a_signal_alone():
    """Three of seven prompts cannot be answered, and soon the others always are: without it, few groups have a signal.

    Of the same tokens, a few updates teach as much as one after each rollout.
    """

    def repeats(prompt, preds, done):
        return float(done and prompt[0] in "abcd" and prompt[1] in preds.text[:1])

    runs = {}
    for name, steps in (("usual", []), ("dynamic", [SampleGroups(min_groups=16, max_rollouts=10)])):
        env = TextEnv(PROMPTS, TOKENIZER, reward=repeats, samples_per_prompt=4, score_at="done", **RULES)
        model, batches = build(env, "grpo", learning_rate=3e-3), Batches()
        model.learn(80 * 256, callback=[*steps, batches])
        runs[name] = batches
    usual, dynamic = runs["usual"], runs["dynamic"]
    assert min(dynamic.shares) == 1.0 and np.mean(usual.shares) < 0.3
    assert len(usual.shares) == 80 and len(dynamic.shares) < 30
    for batches in (usual, dynamic):
        assert batches.rewards[0] < 0.2 and np.mean(batches.rewards[-20:]) > 0.4
