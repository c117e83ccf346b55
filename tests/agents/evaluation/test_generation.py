"""`generate`: each prompt exactly `n` times, equal to a plain loop, and without effect on training (E12)."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from agents import KLPenalty, TextVecEnv
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.evaluation.generation import generate
from agents.evaluation.sample_table import SampleTable
from tests.helpers.models import few
from tests.helpers.training import PROMPTS, TOKENIZER, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv import CharTokenizer, EndReason

MANY = ("a", "bcd", "efghi", "jk", "l", "mnop", "q")


@pytest.fixture(scope="module")
def model():
    """A model trained a little, so that some texts end early, from large weights, so that texts differ."""
    model = tiny_agent(tiny_env(max_new_tokens=8), lm=tiny_config(initializer_range=0.3))
    return model.learn(64)


def one_by_one(model, prompt_ids, max_new_tokens, pick):
    """Continue a prompt by a plain loop: full forwards of one row, without padding or cache; return the new ids."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model.policy.lm.backbone.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(pick(logits / model.policy.lm.sampling.temperature))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("n_envs", [2, 7, 64])
def test_each_prompt_exactly_so_often_in_order(model, n, n_envs):
    generations = generate(model, MANY, TOKENIZER, n, max_new_tokens=6, n_envs=n_envs)
    assert [str(generation.prompt) for generation in generations] == [prompt for prompt in MANY for _ in range(n)]
    for generation in generations:
        ended = generation.ids[-1] == 0
        assert generation.end_reason is (EndReason.EOS if ended else EndReason.LENGTH)
        assert len(generation.ids) == 6 or (ended and len(generation.ids) < 6)
        assert generation.text == TOKENIZER.decode(generation.ids, skip_special_tokens=True)
    if n > 1:
        assert len({tuple(generation.ids) for generation in generations[:n]}) > 1, "samples of generation prompt differ"


def test_the_same_prompt_several_times_in_the_list(model):
    generations = generate(model, ["ab", "c", "ab"], TOKENIZER, 2, max_new_tokens=3)
    assert [str(generation.prompt) for generation in generations] == ["ab", "ab", "c", "c", "ab", "ab"]


def test_deterministic_is_the_same_as_one_by_one(model):
    generations = generate(model, MANY, TOKENIZER, max_new_tokens=8, n_envs=3, deterministic=True)
    for generation in generations:
        assert generation.ids == one_by_one(
            model, TOKENIZER.encode(str(generation.prompt)), 8, lambda logits: int(logits.argmax())
        )


@pytest.mark.parametrize("n_envs", [1, 3, 64])
def test_rows_sample_the_same_as_one_by_one(model, n_envs):
    """A plain inverse CDF draws the same tokens from the numbers of a text alone, however many are written at once."""
    generations = generate(model, MANY, TOKENIZER, max_new_tokens=8, n_envs=n_envs, seed=3)
    assert len({len(generation.ids) for generation in generations}) > 1, "lanes end, and are refilled, at other steps"
    for number, generation in enumerate(generations):
        draws = iter(np.random.default_rng([3, number]).random(8, dtype=np.float32))

        def pick(logits, draws=draws):
            cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
            return int(torch.searchsorted(cumulative, float(next(draws)) * cumulative[-1]))

        assert generation.ids == one_by_one(model, TOKENIZER.encode(str(generation.prompt)), 8, pick)


def test_the_seed_repeats_and_another_does_not(model):
    first, again, other = (
        [text.ids for text in generate(model, MANY, TOKENIZER, 2, max_new_tokens=6, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_stop_strings_and_other_arguments_of_the_env(model):
    alphabet = tuple("abcdefghijklm")
    generations = generate(model, MANY, TOKENIZER, 8, max_new_tokens=8, stop_strings=alphabet)
    stopped = [generation for generation in generations if generation.end_reason is EndReason.STOP]
    assert stopped
    for generation in stopped:
        assert TOKENIZER.decode(generation.ids)[-1] in alphabet
        assert not set(generation.text) & set(alphabet) and len(generation.text) == len(generation.ids) - 1
    assert not any(set(generation.text) & set(alphabet) for generation in generations)
    kept = generate(model, ["abcdef"], TOKENIZER, max_new_tokens=2, max_prompt_tokens=3, truncation_side="left")
    assert kept[0].prompt.ids.tolist() == TOKENIZER.encode("def")


def test_prompts_as_rows_and_as_token_ids(model):
    rows = [{"prompt": "ab", "label": 1, "max_new_tokens": 2}, [1, 2], "ab"]
    generations = generate(model, rows, TOKENIZER, max_new_tokens=4, deterministic=True)
    assert generations[0].prompt.row["label"] == 1
    assert generations[1].ids == generations[2].ids
    assert generations[0].ids == generations[2].ids[:2]


def test_a_policy_alone_and_its_progress(model, capfd, monkeypatch):
    monkeypatch.setattr("agents.small_models.progress.SECONDS_OF_A_LINE", 0.0)
    with_policy = generate(model.policy, ["ab"], TOKENIZER, max_new_tokens=4, progress_bar=True)
    assert with_policy == generate(model, ["ab"], TOKENIZER, max_new_tokens=4)
    assert "texts: 1 of 1 texts in" in capfd.readouterr().err


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="of 33 tokens, got one of 4"):
        generate(model, ["a"], CharTokenizer("abc"))
    with pytest.raises(ValueError, match="Expected `n` to be at least 1, got 0"):
        generate(model, ["a"], TOKENIZER, n=0)
    with pytest.raises(ValueError, match="Expected at least one prompt, got none"):
        generate(model, [], TOKENIZER)
    with pytest.raises(TypeError, match="Expected a model with an LMPolicy, got ActorCriticPolicy"):
        generate(PPO("MlpPolicy", "CartPole-v1", device="cpu"), ["a"], TOKENIZER)
    with pytest.raises(
        ValueError, match="Expected prompt and completion to fit the model's 32 positions, got up to 41"
    ):
        generate(model, ["a"], TOKENIZER, max_new_tokens=40)


# E12: looking at a model does not change its training


class Generates(BaseCallback):
    """Generates and predicts at every step of a rollout, and generates at its end."""

    def _on_step(self):
        assert generate(self.model, ["ab", "c"], TOKENIZER, max_new_tokens=5)
        self.model.predict(self.locals["new_obs"][:2])
        return True

    def _on_rollout_end(self):
        generate(self.model, MANY, TOKENIZER, n=2, max_new_tokens=3, deterministic=True)


def sample_table():
    return SampleTable(PROMPTS, TOKENIZER, every=1, max_new_tokens=5, console=Console(file=io.StringIO()))


def evaluation(env=None, deterministic=True):
    envs = TextVecEnv(env or tiny_env(max_new_tokens=6), 3)
    return EvalCallback(envs, n_eval_episodes=4, eval_freq=3, deterministic=deterministic, verbose=0)


LOOKS = {
    "table": lambda env: [sample_table()],
    "evaluation": lambda env: [evaluation()],
    "sampled evaluation": lambda env: [evaluation(deterministic=False)],
    "evaluation of the same env": lambda env: [evaluation(env)],
    "generate": lambda env: [Generates()],
    "metrics": lambda env: [EpisodeMetrics()],
    "all": lambda env: [sample_table(), evaluation(), Generates(), EpisodeMetrics()],
}


@pytest.fixture(scope="module")
def undisturbed():
    return trained(lambda env: [])


def trained(look):
    """Train with a penalty and episodes that straddle rollouts; return weights, generator states and last rewards."""
    env = tiny_env(max_new_tokens=6)
    model = tiny_agent(env, n_steps=5)
    model.learn(20 * 4, callback=[KLPenalty(0.1), *look(env)])
    generators = [model.policy.generator.get_state(), torch.get_rng_state()]
    return weights(model), generators, np.random.get_state()[1].tolist(), model.rollout_buffer.rewards.tolist()


@pytest.mark.parametrize("look", few(reversed(LOOKS), 2))
def test_e12_trained_parameters_are_bit_identical_with_or_without(look, undisturbed):
    """Neither the rollout's random numbers nor its cached keys and values are touched (E12, A9)."""
    looked = trained(LOOKS[look])
    assert same_weights(looked[0], undisturbed[0])
    assert all(torch.equal(one, other) for one, other in zip(looked[1], undisturbed[1]))
    assert looked[2:] == undisturbed[2:]


def test_e12_the_rollout_goes_on_from_its_cached_rows():
    """Generation in between does not make the rollout read any row again."""
    model = tiny_agent(tiny_env(max_new_tokens=6, stop_ids=()), n_steps=6)
    fresh = []
    prefill = model.policy.lm.rollout_cache._prefill
    model.policy.lm.rollout_cache._prefill = lambda *args: fresh.append(len(args[2])) or prefill(*args)
    model.learn(24, callback=Generates())
    assert len(fresh) == 1, "the prompts at the start, and no row after"
