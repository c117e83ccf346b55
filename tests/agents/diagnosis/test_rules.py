"""The rules of the diagnosis, on figures written by hand: each names its cause, and is silent one step away."""

import json
from pathlib import Path

import numpy as np
import pytest

from agents.diagnosis.diagnose import findings_of
from agents.diagnosis.run_files import RunRecord
from agents.diagnosis.trends import reward_trend, trend

N = 10
RISING = [0.1 * i for i in range(N)]
HEALTHY = {
    "reward/task": RISING,
    "episode/reward_std": [0.3] * N,
    "episode/count": [40] * N,
    "episode/end_length": [0.2] * N,
    "episode/length": [6.0] * N,
    "train/approx_kl": [0.01] * N,
    "train/clip_fraction": [0.05] * N,
    "train/entropy_loss": [-2.0] * N,
    "train/value_loss": [0.1] * N,
    "train/explained_variance": [0.4] * N,
    "kl/token": [0.01 * i for i in range(N)],
    "text/distinct": [0.9] * N,
    "text/repetition": [0.02] * N,
}


def record(config=None, history=(), samples=(), error="", n=N, **figures):
    """Return a healthy record with other figures: a number for all rows or one for each, by keys with "__" for "/"."""
    values = {**HEALTHY, **{name.replace("__", "/"): value for name, value in figures.items()}}
    columns = {name: value if isinstance(value, list) else [value] * n for name, value in values.items()}
    rows = [
        {
            "tokens": 320 * (i + 1),
            **{name: column[i % len(column)] for name, column in columns.items()},
        }
        for i in range(n)
    ]
    return RunRecord(Path("run"), config or {}, rows, dict(history), list(samples), error)


def ids(*args, **kwargs):
    return [finding.id for finding in findings_of(record(*args, **kwargs))]


def test_a_healthy_record_has_no_finding():
    assert ids() == []


FLAT = {"reward__task": 0.5, "episode__reward_std": 0.0}
GRPO = {"algorithm": {"advantage": "grpo"}}
NOISE = [0.5, 0.4, 0.55, 0.45, 0.5, 0.5, 0.45, 0.55, 0.4, 0.5]


@pytest.mark.parametrize(
    ("cause", "figures", "silent"),
    [
        ("constant-reward", FLAT, {"episode__reward_std": [0.3] * 6 + [0.0] * 4}),  # solved at last
        ("all-cut", {**FLAT, "episode__end_length": 1.0}, {"episode__end_length": 0.9}),
        ("no-group-signal", {"groups__signal": 0.1}, {"groups__signal": [0.9] * 6 + [0.0] * 4}),
        ("reward-fails", {"episode__dropped": 3}, {"episode__dropped": 2}),  # of 43 and of 42
        (
            "reward-slow",
            {"time__reward_share": 0.6, "time__tokens_per_second": 1000.0},
            {"time__reward_share": 0.6, "time__tokens_per_second": 10_000.0},  # 0.2 s in all
        ),
        ("never-stops", {"episode__end_length": 0.96}, {"episode__end_length": 0.94}),
        ("empty-texts", {"text__blank": 0.6}, {"text__blank": 0.4}),
        (
            "longer-texts",
            {"episode__length": [5.0 + i for i in range(N)], "episode__end_length": RISING},
            {"episode__length": [5.0 + i for i in range(N)]},
        ),
        ("repetition", {"text__repetition": RISING}, {"text__repetition": RISING, "reward__task": NOISE}),
        ("one-text", {"text__distinct": RISING[::-1]}, {"text__distinct": 0.1}),
        ("unlike-start", {"kl__reference_nll": [2 * x for x in RISING]}, {"kl__reference_nll": RISING}),
        (
            "entropy-collapse",
            {"train__entropy_loss": [-2.0] * 3 + [-0.1] * 7, "reward__task": NOISE},
            {"train__entropy_loss": [-2.0] * 3 + [-0.1] * 7},  # the reward pays for it
        ),
        ("kl-runaway", {"kl__token": [0.3 * i for i in range(N)], "reward__task": NOISE}, {"reward__task": NOISE}),
        ("kl-negative", {"kl__token": [0.0] * 4 + [-0.1] * 6}, {"kl__token": [-0.1, 0.1] * 5}),
        ("stale-reference", {"kl__token": 0.02}, {"kl__token": 0.009}),
        ("rollout-update-mismatch", {"rollout__log_ratio": 0.1}, {"rollout__log_ratio": 1e-4}),
        ("critic-useless", {"train__explained_variance": 0.0}, {"train__explained_variance": -0.1}),
        ("critic-dominates", {"train__value_loss": 200.0}, {"train__value_loss": 50.0}),
        ("rate-high", {"train__clip_fraction": 0.4}, {"train__clip_fraction": 0.3}),
        (
            "rate-low",
            {"train__approx_kl": 1e-9, "train__clip_fraction": 0.0, "reward__task": NOISE},
            {"train__approx_kl": 1e-9, "train__clip_fraction": 0.0},
        ),
        ("not-finite", {"train__skipped_updates": [0, 1] * 5}, {"train__skipped_updates": 0}),
        ("template-missing", {"prompt__plain": 1.0}, {"prompt__plain": 0.1}),
        ("prompts-cut", {"prompt__cut": 0.3}, {"prompt__cut": 0.1}),
        ("one-prompt", {"prompt__largest_share": 0.8}, {"prompt__largest_share": 0.3}),
        (
            "one-prompt",
            {"prompt__signal_share": 0.9, "prompt__largest_share": 0.1},
            {"prompt__signal_share": 0.5, "prompt__largest_share": 0.1},
        ),
    ],
)
def test_a_cause_is_named_by_its_figures_alone(cause, figures, silent):
    assert ids(**figures)[:1] == [cause]
    assert cause not in ids(**silent)


def test_many_epochs_are_told_from_a_high_rate_by_the_configuration():
    assert ids({"algorithm": {"n_epochs": 20}}, train__clip_fraction=0.5) == ["many-epochs"]


def test_a_rate_that_shatters_texts_comes_before_what_they_look_like_afterwards():
    shattered = {"train__clip_fraction": 0.8, "train__approx_kl": 3.0, "text__repetition": RISING}
    assert ids(**shattered) == ["rate-high", "repetition"]
    assert ids(**{**shattered, "train__approx_kl": 0.2}) == ["repetition", "rate-high"]


def test_an_entropy_bonus_is_told_from_a_high_rate():
    noise = {
        "train__clip_fraction": 0.4,
        "train__entropy_loss": [-1.0 - 0.2 * i for i in range(N)],
        "reward__task": NOISE,
    }
    noise["kl__token"] = [0.5 * i for i in range(N)]
    assert ids({"algorithm": {"args": {"ent_coef": 1.0}}}, **noise)[0] == "kl-runaway"
    assert ids(**noise)[0] == "rate-high"


def test_a_judge_that_falls_while_the_reward_rises_is_named():
    history = {at: {"reward": at / 1000, "judge": 0.8 - at / 2000} for at in (0, 500, 1000)}
    (finding,) = findings_of(record(history=history))
    assert (
        finding.id == "judge-gap" and "their judge from 0.8 to 0.425" in finding.evidence
    )  # the median of the last two
    assert ids(history={at: {"reward": at / 1000, "judge": 0.8} for at in (0, 500, 1000)}) == []


def test_a_large_value_loss_of_a_critic_apart_or_of_none_does_not_matter():
    assert ids({"model": {"critic": "separate"}}, train__value_loss=200.0) == []
    assert ids(GRPO, train__value_loss=200.0, train__explained_variance=0.0) == []
    assert ids({"algorithm": {"args": {"vf_coef": 0.01}}}, train__value_loss=200.0) == []


def test_a_critic_that_explains_nothing_is_named_once_it_had_time_to_learn():
    long = {"n": 40, "train__explained_variance": [-0.1] * 40}
    assert ids(**long, reward__task=NOISE * 4) == ["critic-useless"]
    assert ids(**long, reward__task=[0.1 * i for i in range(40)]) == []  # the reward rises without it
    assert ids(n=40, train__explained_variance=[0.2] * 40, reward__task=NOISE * 4) == []


def test_texts_that_cannot_end_by_themselves_are_not_asked_to():
    assert ids({"env": {"args": {"stop_ids": []}}}, episode__end_length=1.0) == []


def test_a_rollout_of_few_groups_has_few_prompts_by_design():
    grouped = {"env": {"args": {"samples_per_prompt": 32}}, **GRPO}
    assert ids(grouped, prompt__largest_share=0.8) == []


ROWS = [
    {"prompt": "a", "id": "7", "answer": "red", "none": ""},
    {"prompt": "b", "id": "8", "answer": "blue", "none": ""},
]


def column(name, tmp_path, **kwargs):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    env = {"prompts": str(file), "args": {"references_column": name}}
    (first, *_) = findings_of(record({"env": env}, **FLAT, **kwargs))
    return first.id, first.evidence


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "is empty in all rows"), ("prompt", "is the prompt itself"), ("id", "numbers such as '7', and 'answer'")],
)
def test_a_column_that_tells_nothing_is_named(name, words, tmp_path):
    cause, evidence = column(name, tmp_path)
    assert cause == "wrong-column" and words in evidence


def test_a_column_whose_values_are_in_the_texts_is_preferred(tmp_path):
    samples = [{"tokens": 0, "prompt": "a", "text": "it is red"}]
    assert "is in none of the sampled texts, and 'answer' is" in column("id", tmp_path, samples=samples)[1]
    assert column("answer", tmp_path, samples=samples)[0] == "constant-reward"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("textenv.episodes.scores.RewardError: Expected ..., got KeyError: 'label'.", "wrong-column"),
        ("textenv.episodes.scores.RewardError: Expected a number, got None.", "reward-fails"),
        ("agents.errors.NumericsError: three updates in a row", "not-finite"),
        ("RuntimeError: a callback has failed", "crashed"),
    ],
)
def test_the_error_that_ended_a_run_decides(error, cause):
    assert ids(error=error)[0] == cause


def test_a_trend_by_hand():
    values = np.array([0.0, 2.0, 0.0, 2.0, 4.0, 6.0, 4.0, 6.0])
    # Two rows at first and two at last; the squared differences are 4, 4, 4, 4, 4, 4, 4, half of their mean is 2.
    assert trend(values) == pytest.approx((1.0, 5.0, 2**0.5))


def test_a_reward_rises_only_beyond_noise_and_by_a_part_of_its_spread():
    assert reward_trend(record()).rose
    assert not reward_trend(record(reward__task=NOISE)).rose
    assert not reward_trend(record(episode__reward_std=4.0)).rose
    assert reward_trend(record(reward__task=RISING[::-1])).fell
