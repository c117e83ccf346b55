"""`fit_critic` and `PretrainedCritic`: by hand, the same in any units, in files, resumed, and refused by name."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from transformers import AutoModelForSequenceClassification

from agents import (
    CriticWarmup,
    KLPenalty,
    LoRA,
    Pretrained,
    PretrainedCritic,
    RewardModelCritic,
    RewardShaping,
    SeparateCritic,
    SharedCritic,
    fit_critic,
    load_checkpoint,
    save_checkpoint,
)
from agents.cli import main as cli
from agents.errors import StageStopped
from agents.supervised import critic_fit, resumable
from agents.supervised.valued_texts import collect_texts, explained, read_texts, write_texts
from tests.helpers.models import tiny
from tests.helpers.seq2seq import tiny_seq2seq
from tests.helpers.training import TOKENIZER, Recorder, same_weights, tiny_agent, tiny_config, tiny_env, weights
from textenv import AllowedMask, CharTokenizer

SEPARATE = SeparateCritic(tiny_config(n_layer=1, initializer_range=0.3))
START = tiny_config(initializer_range=0.3)  # of which a linear head can read what the prompt was
CRITICS = {"shared": SharedCritic(), "detached": SharedCritic(detach=True), "separate": SEPARATE}
QUIET = {"progress_bar": False, "n_rollouts": 4, "n_epochs": 12, "learning_rate": 2e-2}


def by_prompt(prompt, preds, done):
    """Reward by the prompt's length and the first letter: the prompt alone tells most of it."""
    return (3.0 * len(prompt) + 0.01 * preds.ids[0]) if done else 0.0


def two_prompts(**kwargs):
    return tiny_env(by_prompt, prompts=("ab", "cdefgh"), **kwargs)


def agent(critic, value_norm=None, env=None, policy_kwargs=(), **kwargs):
    policy_kwargs = {"critic": critic, "value_norm": value_norm, **dict(policy_kwargs)}
    return tiny_agent(env or two_prompts(), n_envs=16, policy_kwargs=policy_kwargs, **{"lm": START, **kwargs})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A function that returns the folder of a critic of a kind, its result, and the agent that it was fitted in."""
    done = {}

    def fit(kind):
        if kind not in done:
            folder, model = tmp_path_factory.mktemp(kind) / "critic", agent(CRITICS[kind])
            done[kind] = folder, fit_critic(model, folder, **QUIET), model
        return done[kind]

    return fit


def values(model):
    observations = torch.as_tensor(tiny_env().reset(seed=3)[0])[None].repeat(4, 1)
    observations[:, 0] = torch.arange(1, 5)
    return model.policy.predict_values(observations)[:, 0].detach()


def test_targets_are_the_rewards_that_follow_each_token_by_hand():
    """With a penalty for each token and whatever values; all texts that ended, in rollouts that cut them."""

    def reward(prompt, preds, done):
        return 0.5 + 2.0 * done

    env = tiny_env(reward, max_new_tokens=5, stop_strings=["z", "k"])
    model, recorder = tiny_agent(env, n_envs=8, n_steps=3, gamma=0.5), Recorder()
    texts = collect_texts(model, [KLPenalty(0.1, reference=tiny_config(initializer_range=0.2)), recorder], 4, False)
    rewards = recorder.stacked("rewards")  # what was recorded has the penalties subtracted
    expected = []
    for _, steps in recorder.episodes():
        own = [float(rewards[step]) for step in steps]
        expected.append([sum(r * 0.5**i for i, r in enumerate(own[start:])) for start in range(len(own))])
    assert len(texts) == len(expected) > 10
    ours = sorted(tuple(np.round(text.returns, 3)) for text in texts)
    theirs = sorted(tuple(np.round(row, 3)) for row in expected)
    assert all(np.allclose(a, b, atol=2e-3) for a, b in zip(ours, theirs, strict=True))
    assert all(len(text.tokens) - text.n_prompt == len(text.cols) - 1 for text in texts)


def test_texts_come_back_from_their_file(tmp_path):
    texts = collect_texts(tiny_agent(tiny_env(by_prompt)), [], 2, False)
    write_texts(texts, tmp_path)
    for text, again in zip(texts, read_texts(tmp_path), strict=True):
        assert all(np.array_equal(first, second) for first, second in zip(text, again, strict=True))


@pytest.mark.parametrize("kind", CRITICS)
def test_it_learns_what_held_out_texts_earn_and_the_policy_stands_still(kind, fitted):
    folder, result, model = fitted(kind)
    enough = 0.8 if kind == "separate" else 0.4  # a head alone reads a prompt from its last tokens' states
    assert result.before == 0.0 and result.after > enough and result.thirds["first"] > 0.8, result
    assert result.losses[-1] < result.losses[0]
    policy = {name: weight for name, weight in weights(model).items() if "critic" not in name}
    fresh = {name: weight for name, weight in weights(agent(CRITICS[kind])).items() if "critic" not in name}
    assert same_weights(policy, fresh) and all(weight.requires_grad for weight in model.policy.parameters())
    names = {"critic.json", "critic.safetensors", "textenv.json"} | ({"config.json"} if kind == "separate" else set())
    assert {path.name for path in folder.iterdir()} == names and [path.name for path in folder.parent.iterdir()] == [
        "critic"
    ]


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("value_norm", [None, "norm", "popart"])
def test_loaded_it_has_the_values_of_the_fit_in_any_units_and_trains(kind, value_norm, fitted, tmp_path):
    folder, result, model = fitted(kind)
    loaded = agent(PretrainedCritic(folder), value_norm)
    assert torch.allclose(values(loaded), values(model), atol=1e-5) and values(loaded).std() > 0.1
    if value_norm is not None:
        assert loaded.policy.lm.value_norm.scale() == pytest.approx(result.returns[:2], rel=1e-5)
    loaded.learn(2 * 64)
    loaded.save(tmp_path / "model")
    shared = PPO.load(tmp_path / "model", device="cpu")  # without the folder, since the spec has been built
    assert torch.equal(values(shared), values(loaded))
    save_checkpoint(loaded, tmp_path / "checkpoint")
    other = agent(PretrainedCritic(folder), value_norm)
    load_checkpoint(other, tmp_path / "checkpoint")
    assert torch.equal(values(other), values(loaded))


def test_a_file_loads_without_the_folder(fitted, tmp_path):
    folder = fitted("separate")[0]
    copy = tmp_path / "critic"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    loaded = agent(PretrainedCritic(copy))
    loaded.save(tmp_path / "model")
    for path in copy.iterdir():
        path.unlink()
    assert torch.equal(values(PPO.load(tmp_path / "model", device="cpu")), values(loaded))


def test_a_head_is_detached_as_it_was_fitted_or_as_it_is_asked(fitted):
    for kind, asked, expected in (("detached", None, True), ("shared", None, False), ("shared", True, True)):
        assert agent(PretrainedCritic(fitted(kind)[0], detach=asked)).policy.lm.critic.detach is expected


@pytest.mark.parametrize("units", ["norm", "popart"])
def test_the_units_of_the_agent_do_not_matter(units, fitted, tmp_path):
    model = agent(SharedCritic(), units)
    result = fit_critic(model, tmp_path / "critic", **QUIET)
    kept = load_file(fitted("shared")[0] / "critic.safetensors")
    for name, weight in load_file(tmp_path / "critic" / "critic.safetensors").items():
        assert torch.allclose(weight, kept[name], atol=1e-4), name
    assert torch.allclose(values(model), values(fitted("shared")[2]), atol=1e-3)
    assert model.policy.lm.value_norm.scale() == pytest.approx(result.returns[:2], rel=1e-5)


def test_a_reward_models_critic_begins_at_its_scores_and_is_kept(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scorer")
    model = agent(RewardModelCritic(str(tmp_path / "scorer")))
    before = values(model)
    result = fit_critic(model, tmp_path / "critic", n_rollouts=1, n_epochs=1, learning_rate=1e-9, progress_bar=False)
    shift = values(model) - before  # the mean error is taken away, and nothing is learnt at such a rate
    assert torch.allclose(shift, shift[0].expand(4), atol=1e-4) and float(shift[0]) == pytest.approx(
        result.returns.mean, abs=0.5
    )
    assert torch.allclose(values(agent(PretrainedCritic(tmp_path / "critic"))), values(model), atol=1e-5)


def test_fresh_adapters_an_encoder_decoder_and_a2c_take_it(tmp_path):
    for name, lm in (("t5", tiny_seq2seq("t5", vocab_size=len(TOKENIZER))), ("llama", tiny("llama", vocab_size=33))):
        torch.manual_seed(0)
        kwargs = {"lm": lm, "algorithm": A2C, "policy_kwargs": {}}
        model = agent(SharedCritic(), **kwargs)
        fit_critic(model, tmp_path / name, n_rollouts=1, n_epochs=1, progress_bar=False)
        assert torch.allclose(values(agent(PretrainedCritic(tmp_path / name), **kwargs)), values(model), atol=1e-5)
    kwargs["policy_kwargs"] = {"train": LoRA(r=2)}
    adapted = agent(PretrainedCritic(tmp_path / "llama"), **kwargs)
    assert torch.allclose(values(adapted), values(model), atol=1e-5)
    adapted.learn(64, callback=CriticWarmup(1))


def test_masks_late_scores_of_groups_and_trpo_take_it(tmp_path):
    late = tiny_env(score_at="rollout_end", samples_per_prompt=2)
    masked = tiny_env(mask=AllowedMask(list(range(20))), score_at="done")
    words = {"n_rollouts": 1, "n_epochs": 1, "progress_bar": False}
    for number, kwargs in enumerate(({"env": late}, {"env": masked, "algorithm": MaskablePPO})):
        model, folder = agent(SharedCritic(), **kwargs), tmp_path / str(number)
        result = fit_critic(model, folder, steps=[RewardShaping(clip=0.5)], **words)
        assert result.n_texts + result.n_held_out >= 16 and result.returns.mean <= 0.5
        loaded = agent(PretrainedCritic(folder), **kwargs)
        assert torch.allclose(values(loaded), values(model), atol=1e-5)
    trpo = agent(PretrainedCritic(folder), algorithm=TRPO)
    assert torch.allclose(values(trpo), values(model), atol=1e-5)


def refused(words, critic, **kwargs):
    with pytest.raises((ValueError, TypeError), match=words):
        agent(critic, **kwargs)


def test_what_does_not_fit_is_refused_by_name(fitted, tmp_path):
    folder, whole = fitted("shared")[0], fitted("separate")[0]
    refused("Expected the model on whose hidden states .* got another", PretrainedCritic(folder), seed=1)
    refused(
        "hidden states of 32 numbers, the policy's, got .* for 16", PretrainedCritic(folder), lm=tiny_config(n_embd=32)
    )
    other = tiny_env(by_prompt)
    other.tokenizer = CharTokenizer("abc")
    for path in (folder, whole):
        refused(
            "Expected the tokenizer that the critic .* was fitted with, of 33 tokens", PretrainedCritic(path), env=other
        )
    refused("Expected no `detach` for a critic with a trunk of its own", PretrainedCritic(whole, detach=True))
    refused(
        "33 tokens|positions",
        PretrainedCritic(whole),
        lm=tiny_config(n_positions=64),
        env=tiny_env(by_prompt, max_new_tokens=40),
    )
    refused(r"PretrainedCritic\(folder\) for a folder of `textenv critic`", Pretrained("gpt2"))
    refused("which has no critic.json: fit one", PretrainedCritic(tmp_path))
    agent(PretrainedCritic(whole), seed=1)  # a critic of its own does not depend on the policy's weights


def test_a_damaged_folder_is_refused(fitted, tmp_path):
    for path in fitted("separate")[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors, about = load_file(tmp_path / "critic.safetensors"), json.loads((tmp_path / "critic.json").read_text())
    (tmp_path / "critic.json").write_text(json.dumps({**about, "format": 2}))
    refused("Expected a critic of format 1, got 2", PretrainedCritic(tmp_path))
    (tmp_path / "critic.json").write_text(json.dumps({**about, "returns": None}))
    refused("returns", PretrainedCritic(tmp_path))
    (tmp_path / "critic.json").write_text(json.dumps(about))
    save_file({name: tensors[name] for name in tensors if name != "linear.bias"}, tmp_path / "critic.safetensors")
    refused("Expected the weights of the critic .* linear.bias differ", PretrainedCritic(tmp_path))
    (tmp_path / "critic.safetensors").write_bytes(b"no tensors")
    refused("Expected the weights of a critic in .*critic.safetensors", PretrainedCritic(tmp_path))


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (
            "length_limit='terminate', got 'truncate'",
            lambda: agent(SharedCritic(), env=tiny_env(length_limit="truncate")),
        ),
        ("another algorithm than TRPO", lambda: tiny_agent(algorithm=TRPO)),
        (
            "advantage='gae', which uses a critic, got 'grpo'",
            lambda: tiny_agent(tiny_env(samples_per_prompt=2), rollout_buffer_kwargs={"advantage": "grpo"}),
        ),
        (
            "two texts that end in 1 rollouts, got 0",
            lambda: tiny_agent(tiny_env(stop_ids=(), max_new_tokens=8), n_steps=4),
        ),
    ],
)
def test_what_cannot_be_fitted_exactly_is_refused_by_name(words, make, tmp_path):
    with pytest.raises(ValueError, match=words):
        fit_critic(make(), tmp_path / "critic", n_rollouts=1, progress_bar=False)
    assert not (tmp_path / "critic").exists()


def test_a_trunk_that_its_config_does_not_build_is_refused_before_the_rollouts(tmp_path):
    model = agent(SEPARATE)
    model.policy.lm.critic.trunk.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match="Expected a critic whose trunk transformers builds from its config"):
        fit_critic(model, tmp_path / "critic", **QUIET)


def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(tmp_path, monkeypatch, fitted):
    is_due = resumable.States.is_due

    def stop_at_five(self, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return is_due(self, step)

    whole = (fitted("shared")[0] / "critic.safetensors").read_bytes()
    folder, model = tmp_path / "critic", agent(SharedCritic())
    with monkeypatch.context() as patch:
        patch.setattr(resumable.ResumableFit, "after_step", after(stop_at_five))
        with pytest.raises(StageStopped, match="stopped after step 5"):
            fit_critic(model, folder, **QUIET)
    assert torch.equal(values(model), torch.zeros(4)), "after an error the critic is as it was"
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(critic_fit, "collect_texts", None)  # the rollouts were kept
    with pytest.raises(ValueError, match="Expected the arguments and data of the interrupted run"):
        fit_critic(agent(SharedCritic()), folder, about="another reward", resume=True, **QUIET)
    fit_critic(agent(SharedCritic()), folder, resume=True, **QUIET)
    assert (folder / "critic.safetensors").read_bytes() == whole and [path.name for path in tmp_path.iterdir()] == [
        "critic"
    ]


def after(is_due):
    """Return `ResumableFit.after_step` with another `is_due`, which is asked before the signal is looked at."""
    original = resumable.ResumableFit.after_step

    def after_step(self, model, optimizer, losses, n_steps):
        is_due(self.states, len(losses))
        original(self, model, optimizer, losses, n_steps)

    return after_step


def test_an_earlier_critic_is_replaced_on_request_alone(tmp_path):
    words = {"n_rollouts": 1, "n_epochs": 1, "progress_bar": False}
    fit_critic(agent(SharedCritic()), tmp_path / "critic", **words)
    with pytest.raises(ValueError, match=r"an earlier critic with .* overwrite=True"):
        fit_critic(agent(SharedCritic()), tmp_path / "critic", **words)
    fit_critic(agent(SharedCritic()), tmp_path / "critic", overwrite=True, **words)


def test_equal_returns_leave_nothing_to_explain(tmp_path):
    model = agent(SharedCritic(), env=tiny_env(lambda prompt, preds, done: 0.25 * done))
    result = fit_critic(model, tmp_path / "critic", n_rollouts=1, progress_bar=False)
    assert np.isnan(result.after) and json.loads((tmp_path / "critic" / "critic.json").read_text())["held_out"] == {
        "before": None,
        "after": None,
    }
    assert torch.allclose(values(model), torch.tensor(0.25), atol=1e-4)


def test_explained_variance_of_texts_is_that_of_all_their_tokens():
    texts = collect_texts(tiny_agent(tiny_env(by_prompt)), [], 2, False)
    whole, of_thirds = explained(texts, [text.returns for text in texts])
    assert whole == 1.0 and set(of_thirds.values()) == {1.0}


@pytest.mark.slow
def test_the_command_fits_says_so_and_training_takes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--algorithm.n_envs", "8", "--env.max_new_tokens", "8", "--loggers", "[]"]
    assert cli.main(["critic", "demo", "--out", "critic", "--rollouts", "2", "--quiet", *small]) == 0
    out = capsys.readouterr().out
    assert "held out: explained variance 0.000 -> " in out and "by thirds: first " in out and "critic: critic" in out
    assert cli.main(["critic", "demo", "--out", "critic", "--rollouts", "2", "--quiet", *small]) == 2
    assert "an earlier critic" in capsys.readouterr().err
    rest = ["--total_tokens", "64", "--out", "run", "--quiet", "--evaluation.n_prompts", "4", *small]
    assert cli.main(["train", "--model.critic", "pretrained", "--model.critic_model", "critic", *rest]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "value/explained_variance_last" in rows[-1]
    # Of a run, its configuration is taken, and the critic of it is fitted further.
    assert cli.main(["critic", "run", "--out", "again", "--rollouts", "2", "--quiet"]) == 0
    assert json.loads((tmp_path / "again" / "critic.json").read_text())["held_out"]["before"] != 0.0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo"], "Expected RUN, MODEL or CONFIG.yml, and --out DIR"),
        (["no/such/model", "--out", "x"], "no/such/model"),
        (["no.yml", "--out", "x"], "no.yml"),
        (["model.zip", "--out", "x"], "holds pickles"),
        (["demo", "--out", "x", "--rollouts", "0"], "rollouts"),
        (["demo", "--out", "x", "--model.critic", "pretrained", "--model.critic_model", "y"], "has no critic.json"),
        (["demo", "--out", "x", "--model.critic", "pretrained"], "Expected --model.critic_model NAME"),
    ],
)
def test_the_command_refuses(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["critic", *words]) == 2
    assert says in capsys.readouterr().err and list(tmp_path.iterdir()) == []
