"""Callbacks that log metrics, show samples and draw curves, against figures worked out by hand."""

import io

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from agents import KLPenalty
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.callbacks.reward_curves import RewardCurves
from agents.evaluation.generation import Generation
from agents.evaluation.sample_table import SampleTable, sample_table
from tests.helpers.training import PROMPTS, TOKENIZER, Recorder, tiny_agent, tiny_env
from textenv import EndReason, Prompt


class Dumps(KVWriter):
    """Keeps the values of every dump of the logger."""

    def __init__(self):
        self.dumped = []

    def write(self, key_values, key_excluded, step=0):
        self.dumped.append((step, dict(key_values)))


def logged(model, callbacks, n_rollouts):
    """Train, and return the values that were logged for each rollout, with their step."""
    dumps = Dumps()

    class Attach(BaseCallback):
        def _on_training_start(self):
            self.logger.output_formats.append(dumps)

        def _on_step(self):
            return True

    model.learn(n_rollouts * model.n_steps * model.n_envs, callback=[Attach(), *callbacks])
    return dumps.dumped


def parts(prompt, preds, done):
    """Reward every token by one part, and the end of longer texts by a second one."""
    reward = {"tokens": 0.1}
    if done and len(preds) > 1:
        reward["long"] = 1.0 + len(prompt)
    return reward


def test_episode_metrics_by_hand():
    """Every key of the class's docstring, for every rollout, from the infos of the episodes that ended in it."""
    model, recorder = tiny_agent(tiny_env(parts, max_new_tokens=3, stop_strings=["z", "k"]), n_envs=16), Recorder()
    dumped = logged(model, [EpisodeMetrics(), recorder], 3)
    assert [step for step, _ in dumped] == [48, 96, 144]
    for rollout, (_, values) in enumerate(dumped):
        infos = [info for step in recorder.infos[3 * rollout : 3 * rollout + 3] for info in step if info]
        means = {"reward/task": np.mean([info["episode"]["r"] for info in infos])}
        means["episode/length"] = np.mean([info["episode"]["l"] for info in infos])
        means["reward/tokens"] = np.mean([0.1 * info["episode"]["l"] for info in infos])
        long = [(1.0 + len(info["prompt"])) * (info["episode"]["l"] > 1) for info in infos]
        means["reward/long"] = np.mean(long)
        for reason in EndReason:
            means[f"episode/end_{reason}"] = np.mean([info["end_reason"] is reason for info in infos])
        assert {key: values[key] for key in means} == pytest.approx(means)
        assert values["reward/task"] == pytest.approx(values["reward/tokens"] + values["reward/long"])
        assert sum(values[f"episode/end_{reason}"] for reason in EndReason) == pytest.approx(1.0)
        assert values["time/tokens_per_second"] > 0
        assert values["rollout/ep_len_mean"] > 0
    assert values["episode/end_stop"] > 0 and values["episode/end_length"] > 0 and values["episode/end_env"] == 0


def test_a_rollout_without_the_end_of_an_episode_logs_no_means():
    model = tiny_agent(tiny_env(stop_ids=(), max_new_tokens=6), n_steps=4)
    first, second = logged(model, [EpisodeMetrics()], 2)
    assert "reward/task" not in first[1] and "episode/length" not in first[1]
    assert first[1]["time/tokens_per_second"] > 0
    assert second[1]["episode/length"] == 6.0


def test_speed_counts_the_tokens_of_a_rollout_over_its_time(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("agents.callbacks.episode_metrics.time.perf_counter", lambda: next(clock))
    dumped = logged(tiny_agent(), [EpisodeMetrics()], 3)
    assert [values["time/tokens_per_second"] for _, values in dumped] == [2.0] * 3  # 16 tokens; two readings


def test_tokens_that_groups_share():
    """Groups of four begin "cde" and "fghi" (2 and 3 tokens before the last), in each of two rollouts."""
    env = tiny_env(prompts=("cde", "fghi"), stop_ids=(), samples_per_prompt=4)
    dumped = logged(tiny_agent(env, n_envs=8), [EpisodeMetrics()], 2)
    assert [values["time/prefill_tokens"] for _, values in dumped] == [2 + 3] * 2
    assert [values["time/shared_tokens"] for _, values in dumped] == [3 * (2 + 3)] * 2


def test_no_tokens_are_shared_without_a_cache():
    ((_, values),) = logged(tiny_agent(policy_kwargs={"cache": False}), [EpisodeMetrics()], 1)
    assert "time/prefill_tokens" not in values


# Samples


def shown(*samples, width=60):
    stream = io.StringIO()
    rows = [Generation(Prompt(prompt), text, [], EndReason.EOS) for prompt, text in samples]
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(sample_table({"after": rows}))
    return stream.getvalue()


def test_what_a_model_writes_is_shown_and_not_obeyed():
    """Escape codes, markup of rich, carriage returns and emoji codes."""
    hostile = "\x1b[31mred \x1b]0;title\x07 [bold]b[/bold] [/] \r\x08 \\ :smile: \u202e"
    out = shown(("ab[red]", hostile))
    for char in "\x1b\x07\r\x08\u202e":
        assert char not in out
    for text in (r"\x1b[31mred", r"\x1b]0;title\x07", "[bold]b[/bold] [/]", r"\r\x08", ":smile:", "ab[red]", r"\u202e"):
        assert text in out
    assert "trailing\\" in shown(("a", "trailing\\")) and "two\\\\" in shown(("a", "two\\\\"))
    assert "abär 好" in shown(("a", "bär 好\nline"))


def test_a_table_of_several_columns():
    rows = [[Generation(Prompt("ab"), text, [], EndReason.EOS)] for text in ("cold", "warm")]
    stream = io.StringIO()
    Console(file=stream, width=60).print(sample_table({"before": rows[0], "after": rows[1]}))
    assert all(text in stream.getvalue() for text in ("before", "after", "abcold", "abwarm"))


def test_a_sample_table_comes_at_the_start_every_so_often_and_at_the_end():
    stream = io.StringIO()
    table = SampleTable(PROMPTS, TOKENIZER, every=2, max_new_tokens=3, console=Console(file=stream, width=60))
    tiny_agent().learn(16 * 5, callback=table)
    titles = [f"samples after {tokens} tokens" for tokens in (0, 32, 64, 80)]
    assert [line.strip("┃ ") for line in stream.getvalue().splitlines() if "samples" in line] == titles
    assert stream.getvalue().count("fghi") == 4


def test_tables_of_one_seed_can_be_compared():
    texts = []
    for _ in range(2):
        stream = io.StringIO()
        SampleTable(["ab"], TOKENIZER, console=Console(file=stream)).init_callback(model := tiny_agent())
        table = SampleTable(["ab"], TOKENIZER, max_new_tokens=8, seed=4, console=Console(file=stream))
        model.learn(16, callback=table)
        texts.append(stream.getvalue().splitlines()[:5])
    assert texts[0] == texts[1]


def test_hostile_text_on_the_page_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Hostile(type(TOKENIZER)):
        def decode(self, token_ids, *, skip_special_tokens=False):
            return "<script>\x1b" * len(token_ids)

    model = tiny_agent(tensorboard_log=str(tmp_path))
    model.learn(16, callback=SampleTable(["ab"], Hostile(), max_new_tokens=2, console=Console(file=io.StringIO())))
    events = EventAccumulator(str(tmp_path / "PPO_1"), size_guidance={"tensors": 0}).Reload()
    for event in events.Tensors("samples/text_summary"):
        text = event.tensor_proto.string_val[0].decode()
        assert "&lt;script&gt;" in text and "<script>" not in text and "\x1b" not in text


def test_bad_options():
    with pytest.raises(ValueError, match="Expected `every` to be at least 1, got 0"):
        SampleTable(["ab"], TOKENIZER, every=0)


# Curves


def test_reward_curves_are_a_picture_of_what_was_logged(tmp_path):
    curves = RewardCurves(tmp_path / "deep" / "curves.png", title="a run")
    model, recorder = tiny_agent(), Recorder()
    dumped = logged(model, [KLPenalty(0.1), EpisodeMetrics(), curves, recorder], 4)
    assert (tmp_path / "deep" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = matplotlib.image.imread(tmp_path / "deep" / "curves.png").shape
    assert width > 3 * height > 900, "three panels beside each other"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["curves.png"]
    assert [row["tokens"] for row in curves.history] == [16, 32, 48, 64]
    for row, (_, values) in zip(curves.history, dumped):
        for key in ("reward/task", "kl/sequence", "episode/length"):
            assert row[key] == pytest.approx(values[key])


@pytest.mark.parametrize("callbacks", [[], [EpisodeMetrics]])
def test_reward_curves_without_a_penalty_or_any_metrics(callbacks, tmp_path):
    tiny_agent().learn(32, callback=[*(callback() for callback in callbacks), RewardCurves(tmp_path / "curves.png")])
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[0] > 100
