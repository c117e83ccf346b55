"""The doctor's checks of vocabulary, lengths, stop tokens, templates, the reward and settings: each can fail."""

import dataclasses

import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from agents import LMPolicy, TextVecEnv, word_tokenizer
from agents.doctor import trial_checks
from tests.helpers.examining import agent, assert_names, one, statuses
from tests.helpers.models import tiny
from tests.helpers.training import tiny_env
from textenv import CharTokenizer, TextEnv


def test_vocabularies_that_do_not_fit_are_named():
    assert_names(one("vocabulary", agent(tiny(vocab_size=80))), "vocabulary", "warning", "80 embedding rows")
    report = one("vocabulary", agent(), TextEnv(["a"], CharTokenizer("abc"), reward=lambda *_: 0.0, max_new_tokens=4))
    assert_names(report, "vocabulary", "failed", "chooses among 33")


def test_positions_that_do_not_suffice_are_named():
    model = agent()
    model.policy.lm.backbone.model.config.n_positions = 8
    assert_names(one("positions", model), "positions", "failed", "8 positions")


def test_stop_tokens_that_do_not_fit_are_named():
    assert_names(one("stop_tokens", agent(env=tiny_env(stop_ids=[5]))), "stop tokens", "warning", "[0] do not")
    assert_names(one("stop_tokens", agent(env=tiny_env(stop_ids=[]))), "stop tokens", "warning", "no end token")
    assert_names(
        one("stop_tokens", agent(env=tiny_env(prompts=[[1, 0]]))), "stop tokens", "warning", "prompts end with"
    )
    env = tiny_env()
    env.rules = dataclasses.replace(env.rules, stop_ids=(99,))
    assert_names(one("stop_tokens", agent(env=env)), "stop tokens", "failed", "[99] are outside")
    model = agent()
    model.policy.lm.backbone.model.generation_config.eos_token_id = [0, 7]
    assert_names(one("stop_tokens", model), "stop tokens", "warning", "stop_ids=[0, 7]")


class OpeningTokenizer(CharTokenizer):
    """Puts token 27 in front of each text, as a BOS token."""

    def encode(self, text, *, add_special_tokens=True):
        return ([27] if add_special_tokens else []) + super().encode(text)


@pytest.mark.parametrize(
    ("prompts", "fits"), [(["ab"], True), ([[27, 1]], True), ([[1]], False), ([[27, 27, 1]], False)]
)
def test_prompts_without_their_opening_are_named(prompts, fits):
    env = TextEnv(prompts, OpeningTokenizer(), reward=lambda *_: 0.0, max_new_tokens=4)
    report = one("opening", agent(env=env))
    if fits:
        assert "opening tokens" in statuses(report, "ok")
    else:
        assert_names(report, "opening tokens", "warning", "[27]")


def test_b8_cut_prompts_are_counted():
    env = tiny_env(prompts=("abcd", "a"), max_prompt_tokens=2, truncation_side="left")
    assert_names(one("prompts", agent(env=env)), "prompts", "warning", "1 of 2")


def test_plain_prompts_for_a_chat_model_are_named():
    tokenizer = word_tokenizer(["user", "assistant", "hello", ":", "end"])
    env = TextEnv(["hello"], tokenizer, reward=lambda *_: 0.0, max_new_tokens=4)
    config = tiny(eos_token_id=tokenizer.eos_token_id)
    assert "chat template" in statuses(one("chat_template", agent(config, env)), "ok")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} end{% endfor %}"
    assert_names(one("chat_template", agent(config, env)), "chat template", "warning", "'end'")
    env = TextEnv(["user : hello end assistant"], tokenizer, reward=lambda *_: 0.0, max_new_tokens=4)
    assert "chat template" in statuses(one("chat_template", agent(config, env)), "ok")


def test_a4_a_generation_config_is_said_to_be_ignored():
    model = agent(policy_kwargs={"temperature": 0.7})
    generation = model.policy.lm.backbone.model.generation_config
    generation.temperature = 0.7
    assert not one("generation_config", model).warnings
    generation.repetition_penalty, generation.top_k = 1.2, 50
    assert_names(
        one("generation_config", model), "generation config", "warning", "'top_k': 50, 'repetition_penalty': 1.2"
    )


@pytest.mark.parametrize(
    ("reward", "status", "words"),
    [
        (lambda prompt, preds, done: float("nan"), "failed", "finite number"),
        (lambda prompt, preds, done: None, "failed", "finite number"),
        (lambda prompt, preds, done: 1 / 0, "failed", "ZeroDivisionError"),
        (lambda prompt, preds, done: 1e4 if done else 0.0, "warning", "Scale rewards"),
    ],
)
def test_rewards_that_cannot_work_are_named(reward, status, words):
    assert_names(one("reward", agent(env=tiny_env(reward))), "reward", status, words)


def test_the_reward_sees_two_episodes_to_their_end():
    seen = []
    one("reward", agent(env=tiny_env(lambda prompt, preds, done: seen.append(done) or 0.0, max_new_tokens=64)))
    assert sum(seen) == 2 and len(seen) <= 2 * trial_checks.TRIAL_TOKENS


def test_d7_settings_that_do_not_suit_text_are_named():
    env = tiny_env(max_new_tokens=64)
    assert_names(one("discount", agent(env=env, gamma=0.99)), "discount", "warning", "52.6%", "gamma=1.0")
    assert_names(one("learning_rate", agent(learning_rate=0.1)), "learning rate", "warning", "undo each other")
    assert_names(one("learning_rate", agent(learning_rate=0.0)), "learning rate", "warning", "hardly move")


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"n_envs": 2}, "warning", "fewer than 4"),
        ({"batch_size": 8}, "warning", "at least 2 sequences"),
        ({"batch_size": 7}, "failed", "does not divide"),
        ({"normalize_advantage": True}, "warning", "again in each minibatch"),
        ({"n_steps": 2}, "warning", "inside episodes of up to 4"),
    ],
)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_batches_that_do_not_suit_text_are_named(options, status, words):
    assert_names(one("batches", agent(**options)), "batches", status, words)


def test_the_stock_buffer_is_named():
    vec_env = TextVecEnv(tiny_env(), 8)
    model = PPO(
        LMPolicy,
        vec_env,
        n_steps=4,
        batch_size=32,
        rollout_buffer_class=RolloutBuffer,
        policy_kwargs={"lm": tiny()},
        device="cpu",
    )
    assert_names(one("batches", model), "batches", "warning", "read the whole prefix")
