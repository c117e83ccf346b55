"""Values by Monte Carlo: closed forms, all texts enumerated, the slow way, and the returns of a rollout's buffer."""

import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import VecNormalize

from agents import (
    CriticWarmup,
    DropEpisodes,
    KLPenalty,
    LoRA,
    RewardShaping,
    RolloutStep,
)
from agents.evaluation.continuations import replay
from agents.evaluation.credit import Credit, critic_agreement, monte_carlo_values
from agents.evaluation.trained_rewards import TrainedRewards
from agents.models.sequences import SequenceBatch
from tests.agents.evaluation.credit_toys import A, agent_of, episode_of, few_tokens, letters, preds_of
from tests.helpers.models import few, tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import PROMPTS, TOKENIZER, run_state, tiny_env
from textenv import TextEnv
from textenv.episodes.rules import PADDING, SEPARATOR
from textenv.lanes.lanes import Lanes
from textenv.prompts.prompts import Prompt
from textenv.rewards import DROPPED


def longest(model, n=20):
    """Return the longest of some episodes."""
    return max((episode_of(model, seed=seed) for seed in range(n)), key=lambda episode: len(episode.ids))


def enumerated(model, episode):
    """Return the value of each prefix of a text by enumerating all texts that `few_tokens` allows, (T,)."""
    env, lm = model.get_env().unwrapped.env, model.policy.lm
    prompt, penalty, most = episode.prompt, TrainedRewards.of(model).penalty, env.rules.max_new_tokens

    def log_probs(net, written, ids):
        row = torch.full((1, env.max_prompt_tokens + 1 + most), PADDING)
        tokens = [*prompt.ids.tolist(), SEPARATOR, *written]
        row[0, : len(tokens)] = torch.tensor(tokens)
        return net.distribution(SequenceBatch.from_observations(row)).log_probabilities[0, ids].log_softmax(dim=0)

    @cache
    def value(written):
        ids, total = few_tokens(prompt, written), 0.0
        own, other = log_probs(lm, written, ids), log_probs(penalty.reference, written, ids)
        for token, ours, theirs in zip(ids, own.tolist(), other.tolist(), strict=True):
            text = (*written, token)
            is_over = token == 0 or len(text) == most
            reward = letters(prompt, preds_of(env, prompt, text), is_over) - penalty.coef * (ours - theirs)
            total += math.exp(ours) * (reward + (0.0 if is_over else model.gamma * value(text)))
        return total

    with torch.no_grad():
        return np.array([value(tuple(episode.ids[:i])) for i in range(len(episode.ids))])


@pytest.mark.parametrize("family", few(("gpt2", "llama", "bloom", "mamba"), 2))
def test_values_of_fixed_probabilities_are_the_closed_form(family):
    """Each token is "a" with probability p, whatever stands before: V is the sum of gamma^k p over the tokens left."""
    env = tiny_env(
        lambda prompt, preds, done: float(preds.ids[-1] == A), max_new_tokens=5, stop_ids=(), mask=few_tokens
    )
    model = agent_of(env, tiny(family), gamma=0.9)
    with torch.no_grad():
        for name, weight in model.policy.backbone.model.named_parameters():
            if "norm" in name or "ln_f" in name:  # the last norm then returns zeros, and all logits are 0
                weight.zero_()
    p = [1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 3]
    expected = np.array([sum(0.9 ** (k - t) * p[k] for k in range(t, 5)) for t in range(5)])
    credit = monte_carlo_values(model, episode_of(model), n=200, n_envs=1000)
    assert np.all(np.abs(credit.monte_carlo - expected) < 4 * credit.standard_error)
    low, high = credit.interval
    assert np.sum((low <= expected) & (expected <= high)) >= 4
    assert credit.standard_error[-1] == pytest.approx(math.sqrt(2 / 9 / 200), rel=0.1)  # of one draw of p = 1/3


TRAINED_PARTS = {"gpt2": "all", "llama": LoRA(r=2), "qwen2": "all", "opt": LoRA(r=2)}


@pytest.mark.parametrize("family", few(TRAINED_PARTS, 2))
def test_values_are_those_of_all_texts(family):
    """The true value is the mean over all texts of rewards minus penalties, with the probabilities after learning."""
    env = tiny_env(letters, max_new_tokens=4, mask=few_tokens)
    model = agent_of(env, tiny(family), gamma=0.9, policy_kwargs={"train": TRAINED_PARTS[family]}, learning_rate=3e-2)
    model.learn(48, callback=KLPenalty(0.5, reference=tiny(family)))
    episode = longest(model)
    expected = enumerated(model, episode)
    credit = monte_carlo_values(model, episode, n=250, n_envs=2000)
    assert len(episode.ids) >= 3
    assert np.all(np.abs(credit.monte_carlo - expected) < 4 * credit.standard_error)
    without = expected + 0.5  # the control: values that are a little off are outside
    assert np.any(np.abs(credit.monte_carlo - without) > 4 * credit.standard_error)


class Talk(TextEnv):
    """Three turns of up to two tokens; the reply depends on the turn, the reward on what `preds.state` remembers."""

    def respond(self, prompt, preds):
        preds.state["n_replies"] = preds.state.get("n_replies", 0) + 1
        return "x" if preds.turn_ids[0] == A else "yz"

    def get_reward(self, prompt, preds, done):
        preds.state["seen"] = preds.state.get("seen", 0) + 1
        return preds.state["seen"] * 0.1 + preds.state.get("n_replies", 0) + float(preds.ids[-1] == A)


def talk():
    stops = {"stop_ids": [0, A], "max_turns": 3, "max_response_tokens": 2}
    return Talk(PROMPTS, TOKENIZER, max_new_tokens=6, mask=few_tokens, **stops)


def slowly(model, episode, n, seed=0):
    """Return the mean return from each prefix: all written from the prompt again, without a cache, lane by lane."""
    env, lm, generator = model.get_env().unwrapped.env, model.policy.lm, torch.Generator().manual_seed(seed)
    n_own = len(replay(env, episode).actions)
    rows, observations = [], []
    for t in [t for t in range(n_own) for _ in range(n)]:
        lanes = Lanes(env, 1)
        observation = lanes.reset(0, [episode.prompt])
        for _ in range(t):
            n_behind = int(lanes.state.lengths[0]) - len(episode.prompt.ids) - 1
            observation = lanes.step(np.array([episode.ids[n_behind]])).observations
        rows.append(lanes)
        observations.append(observation)
    returns, discount = np.zeros(len(rows)), 1.0
    while not all(lanes.idle[0] for lanes in rows):
        allowed = torch.as_tensor(np.concatenate([lanes.allowed() for lanes in rows])) if env.masks else None
        batch = torch.as_tensor(np.concatenate(observations))
        with torch.no_grad():
            actions = lm.act(batch, generator=generator, allowed=allowed).actions
        results = [lanes.step(actions[i : i + 1].numpy()) for i, lanes in enumerate(rows)]
        returns += discount * np.array([result.rewards[0] for result in results])
        observations = [result.observations for result in results]
        discount *= model.gamma
    return returns.reshape(-1, n).mean(axis=1)


ENVS = {
    "plain": lambda: tiny_env(letters, stop_ids=[0, *range(10, 20)]),
    "masks": lambda: tiny_env(letters, mask=few_tokens),
    "turns": talk,
}


@pytest.mark.parametrize("kind", ["plain", "masks", "turns"])
def test_forks_are_what_is_written_from_the_prompt_again(kind):
    """Equal random numbers give equal texts and returns, with states of the lane that no two forks share."""
    model = agent_of(ENVS[kind](), gamma=0.9)
    episode = longest(model)
    credit = monte_carlo_values(model, episode, n=6, n_envs=1000)
    assert len(credit.monte_carlo) >= 3 and np.std(credit.monte_carlo) > 0
    np.testing.assert_allclose(credit.monte_carlo, slowly(model, episode, 6), atol=1e-6)


@pytest.mark.parametrize("lm", few([tiny("llama"), tiny("mamba"), tiny_seq2seq("t5"), tiny("gemma3")], 1))
def test_forks_of_other_families_and_samplings(lm):
    kwargs = {"train": LoRA(r=2), "top_k": 5, "temperature": 1.5}
    model = agent_of(ENVS["plain"](), lm, policy_kwargs=kwargs, learning_rate=3e-2)
    model.learn(32)
    episode = longest(model)
    credit = monte_carlo_values(model, episode, n=5, n_envs=1000)
    np.testing.assert_allclose(credit.monte_carlo, slowly(model, episode, 5), atol=1e-6)


def test_the_critics_values_are_those_of_the_policy():
    model = agent_of(talk())
    episode = longest(model)
    credit = monte_carlo_values(model, episode, n=2)
    prefixes = replay(model.get_env().unwrapped.env, episode)
    rows = torch.as_tensor(np.concatenate([arrays["tokens"] for arrays, _ in prefixes.states]))
    with torch.no_grad():
        values = model.policy.predict_values(rows)[:, 0].numpy()
    np.testing.assert_allclose(credit.critic, values, rtol=1e-6, atol=1e-6)
    assert len(credit.tokens) == len(values) < len(episode.ids)  # replies have no value of their own


def test_normalised_rewards_are_those_of_the_wrapper():
    env = tiny_env(lambda prompt, preds, done: 6.0 * done, stop_ids=())
    model = agent_of(env)
    normalised = VecNormalize(model.get_env(), norm_obs=False, norm_reward=True, gamma=1.0)
    model.set_env(normalised)
    normalised.ret_rms.var = np.array(4.0)
    assert monte_carlo_values(model, episode_of(model), n=2).monte_carlo == pytest.approx([3.0] * 4)


def test_what_training_leaves_out_does_not_count():
    """Texts that are cut off, or that the reward drops, are in no mean; without any other there is no value."""
    dropping = lambda prompt, preds, done: (DROPPED if preds.ids[-1] == A else 1.0) if done else 0.0  # noqa: E731
    model = agent_of(tiny_env(dropping, mask=few_tokens, max_new_tokens=2))
    DropEpisodes(cut=True).attach(model)
    credit = monte_carlo_values(model, longest(model), n=20)
    assert 0 < credit.n[0] < 20 and credit.monte_carlo[0] == 1.0
    assert credit.n[1] < credit.n[0] + 20 and np.all(credit.monte_carlo[credit.n > 0] == 1.0)
    model = agent_of(tiny_env(letters, stop_ids=(), max_new_tokens=2))
    DropEpisodes(cut=True).attach(model)
    credit = monte_carlo_values(model, episode_of(model), n=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert credit.n.tolist() == [0, 0] and credit.to_dict(TOKENIZER)["monte_carlo"] == [None, None]


def test_training_goes_on_as_without():
    """Nothing that the next update depends on changes: weights, generators, episodes, mode, coefficient."""
    env = tiny_env(letters, mask=few_tokens)
    model = agent_of(env)
    penalty = KLPenalty(0.1)
    model.learn(32, callback=penalty)
    episode = longest(model)
    env.reset(seed=3)
    before, own = run_state(model), (env.np_random.bit_generator.state, env._lanes.tokens.copy())
    model.policy.set_training_mode(True)
    first = monte_carlo_values(model, episode, n=3)
    assert model.policy.training and model.policy.lm.training
    assert run_state(model) == before and env.np_random.bit_generator.state == own[0]
    assert np.array_equal(env._lanes.tokens, own[1]) and penalty.coef == 0.1
    again = monte_carlo_values(model, episode, n=3)
    assert np.array_equal(first.monte_carlo, again.monte_carlo)
    other = monte_carlo_values(model, episode, n=3, seed=1)
    assert not np.array_equal(first.monte_carlo, other.monte_carlo)
    in_chunks = monte_carlo_values(model, episode, n=50, n_envs=70)  # other random numbers, the same values
    whole = monte_carlo_values(model, episode, n=50, n_envs=5000)
    spread = np.hypot(in_chunks.standard_error, whole.standard_error)
    assert np.all(np.abs(in_chunks.monte_carlo - whole.monte_carlo) < 4 * spread)


def test_agreement_by_hand():
    def credit(critic, truth, errors):
        cols = np.arange(len(critic)) + 1  # behind a prompt of two tokens
        arrays = (np.array(critic), np.array(truth), np.array(errors), np.full(len(critic), 9))
        return Credit(Prompt("ab", [1, 2]), cols, cols, *arrays)

    rows = {
        row.part: row
        for row in critic_agreement(
            [credit([1.0, 2.0, 4.0], [0.0, 2.0, 2.0], [0.3, 0.4, 0.0]), credit([5.0], [np.nan], [np.nan])]
        )
    }
    assert list(rows) == ["all", "first", "middle", "last"]
    assert rows["all"].n == 3 and rows["all"].bias == 1.0
    assert rows["all"].standard_error == pytest.approx(0.5 / 3)
    assert rows["all"].correlation == pytest.approx(np.corrcoef([1, 2, 4], [0, 2, 2])[0, 1])
    assert [rows[part].bias for part in ("first", "middle", "last")] == [1.0, 0.0, 2.0]
    assert math.isnan(rows["first"].correlation)


def test_the_interval_by_hand():
    """Student's t with 4 degrees of freedom: 2.776 standard errors on either side."""
    arrays = (np.zeros(1), np.array([2.0]), np.array([0.5]), np.array([5]))
    credit = Credit(Prompt("ab", [1, 2]), np.array([A]), np.array([1]), *arrays)
    low, high = credit.interval
    assert (low[0], high[0]) == (pytest.approx(2 - 2.776 * 0.5, abs=1e-3), pytest.approx(2 + 2.776 * 0.5, abs=1e-3))
    assert credit.to_dict(TOKENIZER)["tokens"] == ["a"] and credit.to_dict(TOKENIZER)["critic"] == [0.0]


class Halved(RolloutStep):
    key = "Halved"

    def __call__(self, buffer):
        buffer.rewards /= 2


def attached(step):
    model = agent_of(tiny_env(letters, score_at="done"))
    step.attach(model)
    return model


def loaded():
    model = attached(KLPenalty(0.1))
    model.rollout_buffer.before_returns.clear()
    return model


REFUSED = {
    "whitened": (lambda: attached(RewardShaping(whiten=True)), r"without `whiten`, got whiten=True"),
    "unknown": (lambda: attached(Halved()), r"alone to change rewards, got \['Halved'\]"),
    "missing": (loaded, r"Expected the steps \['KLPenalty'\] that the model was trained with"),
    "no critic": (
        lambda: agent_of(
            tiny_env(letters, samples_per_prompt=2), rollout_buffer_kwargs={"advantage": "rloo"}, n_steps=8
        ),
        r"advantage='gae', got 'rloo', which needs no values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rewards_that_are_not_known_are_refused(name):
    make, words = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=words):
        monte_carlo_values(model, episode_of(model), n=2)


def test_what_else_is_refused():
    model = agent_of(tiny_env(letters, stop_ids=()))
    CriticWarmup(1).attach(model)  # changes no reward
    episode = episode_of(model)
    assert monte_carlo_values(model, episode, n=2).n.tolist() == [2] * 4
    with pytest.raises(ValueError, match="`n` of at least 2 and `n_envs` of at least 1, got 1 and 64"):
        monte_carlo_values(model, episode, n=1)
    long = episode._replace(ids=[*episode.ids, 5])
    with pytest.raises(ValueError, match="one of 5 tokens behind the prompt, of which the env takes 4: it has other"):
        monte_carlo_values(model, long, n=2)
    other = episode_of(agent_of(talk()))
    replies = [i for i, token in enumerate(other.ids) if token in TOKENIZER.encode("xyz")]
    changed = other._replace(ids=[5 if i in replies else token for i, token in enumerate(other.ids)])
    assert replies
    with pytest.raises(ValueError, match="Expected the env's replies to be those of the episode, got others"):
        monte_carlo_values(agent_of(talk()), changed, n=2)
