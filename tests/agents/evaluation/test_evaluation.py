"""Evaluation: the texts of `generate`, figures worked out by hand, and a callback that does not disturb training."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import Checkpoints, Evaluate, KLPenalty, evaluate, generate, latest_checkpoint, load_checkpoint
from agents.evaluation.evaluation import Evaluation
from tests.helpers.models import make_policy
from tests.helpers.seq2seq import expected_logits, tiny_seq2seq
from tests.helpers.training import PROMPTS, TOKENIZER, length_and_letters, same_weights, tiny_config, tiny_env, weights
from tests.helpers.training import tiny_agent as agent_of
from textenv import BannedMask, Preds, TextEnv
from textenv.metrics import ROUGE, Distinct, Length, mean_of
from textenv.rewards import DROPPED, make_reward

ROWS = [{"prompt": prompt, "reply": ["x y", prompt]} for prompt in ("ab", "c", "defg", "h", "ij")]


def tiny_agent(*args, **kwargs):
    return agent_of(*args, lm=tiny_config(n_positions=128), **kwargs)


@pytest.fixture(scope="module")
def model():
    model = tiny_agent(seed=3)
    model.learn(32)
    return model


def test_the_texts_are_those_of_generate(model):
    kwargs = {"n": 3, "max_new_tokens": 6, "seed": 5, "n_envs": 4, "stop_strings": ["z"]}
    result = evaluate(model, ROWS, TOKENIZER, reward=length_and_letters, **kwargs)
    assert result.generations == generate(model, ROWS, TOKENIZER, **kwargs)
    greedy = evaluate(model, ROWS, TOKENIZER, deterministic=True, max_new_tokens=6)
    assert greedy.generations == generate(model, ROWS, TOKENIZER, deterministic=True, max_new_tokens=6)
    assert list(greedy.figures) == ["length"]


def test_figures_by_hand(model):
    """Figures equal those of the reward and the metrics, called directly, with references from the rows."""
    metrics = [Length(), Distinct((1,), split=list), ROUGE("rouge1")]
    result = evaluate(model, ROWS, TOKENIZER, metrics, n=2, reward=length_and_letters, references_column="reply")
    texts = [generation.text for generation in result.generations]
    rewards = [
        length_and_letters(written.prompt, Preds(TOKENIZER, written.ids), True) for written in result.generations
    ]
    references = [row["reply"] for row in ROWS for _ in range(2)]
    expected = {
        "length": np.mean([len(generation.ids) for generation in result.generations]),
        "reward": np.mean([sum(reward.values()) for reward in rewards]),
        "reward/length": np.mean([reward["length"] for reward in rewards]),
        "reward/letters": np.mean([reward["letters"] for reward in rewards]),
        "length_words": np.mean([len(text.split()) for text in texts]),
        "distinct_1": len(set("".join(texts))) / len("".join(texts)),
        "rouge1": ROUGE("rouge1")([""] * 10, texts, references)["rouge1"].value,
    }
    assert {name: figure.value for name, figure in result.figures.items()} == pytest.approx(expected)
    assert result.scores["reward"].per_row.tolist() == pytest.approx(
        [sum(rewards[i].values()) / 2 + sum(rewards[i + 1].values()) / 2 for i in range(0, 10, 2)]
    )
    for name, figure in result.figures.items():
        assert figure.low is None if name == "distinct_1" else figure.low <= figure.value <= figure.high


class Twice(TextEnv):
    """An env of two turns that rewards each token with an even id."""

    def get_reward(self, prompt, preds, done):
        return {"even": float(preds[-1] % 2 == 0), "turns": len(preds.turns) - 1.0 if done else 0.0}

    def respond(self, prompt, preds):
        return "ok"


def test_an_env_brings_its_reward_its_limits_and_its_replies(model):
    env = Twice(PROMPTS, TOKENIZER, max_new_tokens=5, max_turns=2, max_response_tokens=2, stop_ids=range(9), seed=1)
    result = evaluate(model, [*PROMPTS, "xy"], TOKENIZER, env=env, n=2)
    assert [str(generation.prompt) for generation in result.generations] == [
        p for p in [*PROMPTS, "xy"] for _ in range(2)
    ]
    assert result.figures["reward"].value == pytest.approx(
        result.figures["reward/even"].value + result.figures["reward/turns"].value
    )
    assert result.figures["reward/turns"].value > 0 and result.figures["length"].value <= 5
    with pytest.raises(ValueError, match=r"`env` alone, got `reward` or \['max_new_tokens'\] with it"):
        evaluate(model, PROMPTS, TOKENIZER, env=env, max_new_tokens=3)


def test_a_judge_scores_what_the_reward_scores_and_may_differ_from_it(model):
    rules = {"max_new_tokens": 6, "stop_strings": ["z"], "stop_ids": range(9), "n": 3, "n_envs": 4}
    same = evaluate(
        model, PROMPTS, TOKENIZER, reward=length_and_letters, score_at="done", judge=length_and_letters, **rules
    )
    assert same.scores["judge"].per_row.tolist() == pytest.approx(same.scores["reward"].per_row.tolist())
    reasons = {generation.end_reason for generation in same.generations}
    assert len(reasons) > 1, "texts that end in one way only do not show that stop strings and end tokens are cut"
    other = evaluate(model, PROMPTS, TOKENIZER, judge={"name": "length", "target": 3}, **rules)
    length = make_reward("length", target=3)
    by_hand = [length(own.prompt, Preds(TOKENIZER, own.ids), True) for own in other.generations]
    assert other.figures["judge"].value == pytest.approx(np.mean(by_hand)) and "reward" not in other.figures


def test_a_text_that_the_judge_drops_does_not_count(model):
    def short(prompt, preds, done):
        return DROPPED if len(preds) > 4 else 2.0

    result = evaluate(model, PROMPTS, TOKENIZER, judge=short, n=8, max_new_tokens=6, stop_ids=range(9))
    assert {len(generation.ids) > 4 for generation in result.generations} == {True, False}
    assert result.figures["judge"].value == 2.0


def test_a_judge_of_several_turns_is_refused(model):
    env = Twice(PROMPTS, TOKENIZER, max_new_tokens=5, max_turns=2, max_response_tokens=2)
    with pytest.raises(ValueError, match="texts of one turn for `judge`"):
        evaluate(model, PROMPTS, TOKENIZER, env=env, judge=length_and_letters)


def test_rewards_of_every_token_add_up(model):
    result = evaluate(model, PROMPTS, TOKENIZER, reward=lambda prompt, preds, done: 1.0, max_new_tokens=4)
    assert result.scores["reward"].per_row.tolist() == result.scores["length"].per_row.tolist()


def test_the_divergence_is_the_sum_over_the_vocabulary_at_each_token(model):
    other = make_policy(seed=7)
    policy = make_policy(seed=1)
    with torch.no_grad():
        for weight in policy.lm.parameters():
            weight.mul_(0.5)
    result = evaluate(policy, PROMPTS, TOKENIZER, reference=other.lm, max_new_tokens=5)
    by_hand = []
    for text in result.generations:
        ids = torch.tensor([[*text.prompt.ids.tolist(), *text.ids]])
        ours, theirs = (p.backbone.model(ids).logits[0, :, :33].log_softmax(-1) for p in (policy, other))
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        by_hand.append(kl[len(text.prompt.ids) - 1 : -1].sum().item())
    assert result.scores["kl"].per_row.tolist() == pytest.approx(by_hand, abs=1e-4)
    n_tokens = sum(len(text.ids) for text in result.generations)
    assert result.figures["kl_token"].value == pytest.approx(sum(by_hand) / n_tokens, abs=1e-4)
    assert evaluate(policy, PROMPTS, TOKENIZER, reference=policy.lm).figures["kl"].value == 0.0


@pytest.mark.slow
def test_the_reference_of_a_penalty_is_the_start():
    model, penalty = tiny_agent(), KLPenalty(0.1)
    with pytest.raises(ValueError, match="KLPenalty that was attached"):
        evaluate(model, PROMPTS, TOKENIZER, reference=penalty)
    penalty.attach(model)
    assert evaluate(model, PROMPTS, TOKENIZER, reference=penalty).figures["kl"].value == pytest.approx(0.0, abs=1e-6)
    model.learn(32)
    assert evaluate(model, PROMPTS, TOKENIZER, reference=penalty).figures["kl"].low > 0
    with pytest.raises(ValueError, match="without masks and replies for `reference`"):
        evaluate(model, PROMPTS, TOKENIZER, reference=penalty, mask=BannedMask([3]))
    with pytest.raises(ValueError, match="Expected a reference with Sampling"):
        evaluate(model, PROMPTS, TOKENIZER, reference=make_policy(temperature=0.5).lm)


def test_the_divergence_of_an_encoder_decoder():
    """Equal to plain forwards, one text at a time: the decoder reads its start token and the text so far."""
    policy, other = (make_policy(tiny_seq2seq(), seed=seed) for seed in (1, 2))
    result = evaluate(policy, PROMPTS, TOKENIZER, reference=other.lm, max_new_tokens=4, seed=1)
    by_hand = []
    for text in result.generations:
        since = np.array([*text.prompt.ids, -2, *text.ids])
        prefixes = [torch.as_tensor(since[: len(text.prompt.ids) + 1 + t])[None] for t in range(len(text.ids))]
        kl = 0.0
        for seen in prefixes:
            ours, theirs = (expected_logits(p.backbone.model, seen)[..., :33].log_softmax(-1) for p in (policy, other))
            kl += (ours.exp() * (ours - theirs)).sum().item()
        by_hand.append(kl)
    assert result.scores["kl"].per_row.tolist() == pytest.approx(by_hand, abs=1e-4)


# Before and after


def test_a_table_of_before_and_after(model, tmp_path):
    def evaluation(before=None, n=1):
        return evaluate(model, ROWS, TOKENIZER, [Distinct((1,), split=list)], before=before, seed=n, n=n)

    first = evaluation()
    second = evaluation(first, 4)
    assert second.differences["length"].value == pytest.approx(
        second.figures["length"].value - first.figures["length"].value
    )
    assert second.differences["distinct_1"].low is None
    lines = second.to_markdown().splitlines()
    assert lines[0] == "| figure | before | after | difference |" and lines[2].startswith("| length | ")
    assert first.to_markdown().splitlines()[0] == "| figure | value [95 % interval] |"
    second.save(tmp_path / "deep" / "after.x")
    assert (tmp_path / "deep" / "after.x.md").read_text() == second.to_markdown() + "\n"
    saved = json.loads((tmp_path / "deep" / "after.x.json").read_text())
    assert saved["figures"]["length"]["value"] == second.figures["length"].value
    assert saved["differences"]["distinct_1"]["low"] is None and saved["n_prompts"] == 5 and len(saved["texts"]) == 20
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["after.x.json", "after.x.md"]
    with pytest.raises(ValueError, match="`before` to be an evaluation of the same prompts"):
        evaluate(model, ROWS[1:], TOKENIZER, before=first)


def test_a_figure_that_is_no_number_is_none_in_json(tmp_path):
    Evaluation({"empty": mean_of([math.nan])}, []).save(tmp_path / "it")
    assert json.loads((tmp_path / "it.json").read_text())["figures"]["empty"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_metrics_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="got 'length_words' twice"):
        evaluate(model, PROMPTS, TOKENIZER, [Length(), Length()])
    with pytest.raises(ValueError, match="'one' of 5 texts to have as many rows, got 1"):
        evaluate(model, PROMPTS, TOKENIZER, [lambda prompts, texts, references: {"one": mean_of([1.0])}])


# The callback


def trained(callbacks, env=None):
    model = tiny_agent(env or tiny_env(max_new_tokens=6), n_steps=5)
    model.learn(20 * 4, callback=callbacks)
    return weights(model), model.policy.generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].tolist()


@pytest.mark.slow
def test_e12_trained_parameters_are_bit_identical_with_or_without_evaluation(tmp_path):
    env, penalty = tiny_env(max_new_tokens=6), KLPenalty(0.1)
    look = Evaluate(["ab", "xy"], TOKENIZER, [Length()], every=1, folder=tmp_path, env=env, n=3, reference=penalty)
    plain, looked = trained([KLPenalty(0.1)]), trained([penalty, look], env)
    assert list(look.history) == [0, 20, 40, 60, 80]
    assert same_weights(plain[0], looked[0])
    assert torch.equal(plain[1], looked[1]) and torch.equal(plain[2], looked[2]) and plain[3] == looked[3]


def letters(prompt, preds, done):
    return float(preds[-1] == 5)


def learner(seed=0):
    return tiny_agent(tiny_env(letters, stop_ids=()), n_envs=16, n_epochs=4, seed=seed)


def test_the_best_model_is_kept_and_loads_alone(tmp_path):
    look = Evaluate(PROMPTS, TOKENIZER, every=128, folder=tmp_path, reward=letters, n=8, stop_ids=(), max_new_tokens=4)
    model = learner()
    logged = {}
    model.learn(64 * 6, callback=[look])
    logged = look.history
    assert list(logged) == [0, 128, 256, 384]
    assert look.best_value == max(row["reward"] for row in logged.values()) > logged[0]["reward"] + 0.5
    kept = json.loads((tmp_path / "best" / "best.json").read_text())
    assert kept == {"figure": "reward", "value": look.best_value, "num_timesteps": look.best_at}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "model")
    assert loaded(torch.tensor([[1, 2]])).logits[0, -1, :33].argmax() == 5
    figures = json.loads((tmp_path / "best" / "evaluation.json").read_text())["figures"]
    assert figures["reward"]["value"] == look.best_value
    with pytest.raises(ValueError, match="without the best model of another run"):
        learner().learn(64, callback=Evaluate(PROMPTS, TOKENIZER, folder=tmp_path, reward=letters))


def test_figures_are_logged_at_the_tokens_trained_on():
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter

    class Dumps(KVWriter):
        dumped = {}

        def write(self, key_values, key_excluded, step=0):
            if "eval/reward" in key_values:
                self.dumped[step] = key_values["eval/reward"]

    class Attach(BaseCallback):
        def _on_training_start(self):
            self.logger.output_formats.append(Dumps())

        def _on_step(self):
            return True

    look = Evaluate(PROMPTS, TOKENIZER, every=1, reward=letters)
    learner().learn(128, callback=[Attach(), look])
    assert Dumps.dumped == {at: row["reward"] for at, row in look.history.items()} and len(Dumps.dumped) == 3


@pytest.mark.parametrize(("sign", "n_evaluations"), [(True, 4), (False, 7)])
def test_training_stops_when_patience_ends(sign, n_evaluations):
    """The figure falls in every evaluation, which is worse or better by `higher_is_better`."""
    values = iter(range(100, 0, -1))

    def falling(prompts, texts, references):
        return {"falling": mean_of([next(values)] * len(texts))}

    compared = {"best": "falling", "higher_is_better": sign, "patience": 3}
    look = Evaluate(PROMPTS, TOKENIZER, [falling], every=1, max_new_tokens=4, **compared)
    model = learner()
    model.learn(64 * 6, callback=look)
    assert len(look.history) == n_evaluations and look.best_at == (0 if sign else 384)
    assert model._n_updates == 4 * (n_evaluations - 1)


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    """Resumed from before the last evaluation: best value and history are those of an uninterrupted run."""

    def look(folder):
        return Evaluate(
            PROMPTS, TOKENIZER, every=64, folder=tmp_path / folder, reward=letters, max_new_tokens=4, patience=50
        )

    whole = look("whole")
    learner().learn(64 * 5, callback=whole)
    model = learner()
    model.learn(64 * 3, callback=[Checkpoints(tmp_path / "run", every=2, keep=9), look("resumed")])
    resumed = learner()
    load_checkpoint(resumed, sorted((tmp_path / "run").iterdir())[0])
    assert resumed.num_timesteps == 128 and latest_checkpoint(tmp_path / "run") is not None
    again = look("resumed")
    resumed.learn(64 * 3, reset_num_timesteps=False, callback=again)
    assert again.history == whole.history and (again.best_value, again.best_at) == (whole.best_value, whole.best_at)
    for name in ("history.json", "best/best.json", "best/evaluation.json"):
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def final(value):
    return lambda prompt, preds, done: value * done


@pytest.mark.slow
def test_a_worse_model_does_not_replace_the_best_of_an_earlier_run(tmp_path):
    model = learner()
    model.learn(64, callback=Evaluate(PROMPTS, TOKENIZER, folder=tmp_path, reward=final(5.0)))
    model.learn(
        64,
        reset_num_timesteps=False,
        callback=Evaluate(PROMPTS, TOKENIZER, every=1, folder=tmp_path, reward=final(4.0)),
    )
    (tmp_path / "history.json").unlink()  # as if a run was killed between writing the model and the history
    again = Evaluate(PROMPTS, TOKENIZER, every=1, folder=tmp_path, reward=final(4.5))
    model.learn(64, reset_num_timesteps=False, callback=again)
    assert list(again.history) == [128, 192] and again.best_value == 5.0
    assert json.loads((tmp_path / "best" / "best.json").read_text())["num_timesteps"] == 0
    with pytest.raises(ValueError, match="Expected best='reward', as in"):
        other = Evaluate(PROMPTS, TOKENIZER, folder=tmp_path, best="length")
        model.learn(64, reset_num_timesteps=False, callback=other)


def test_what_the_callback_refuses():
    with pytest.raises(ValueError, match="`every` and `patience` to be at least 1, got 0 and None"):
        Evaluate(PROMPTS, TOKENIZER, every=0)
    with pytest.raises(ValueError, match=r"`best` to be one of \['length'\], got 'reward'"):
        learner().learn(64, callback=Evaluate(PROMPTS, TOKENIZER))
