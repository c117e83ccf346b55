"""The numbers of each token in tokens.jsonl: those of the buffer, and of the model before and after the update."""

import json

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback

from agents import ClipHigher, KLPenalty
from agents.evaluation.token_numbers import OF_ROLLOUT
from agents.rollout.transitions import joined
from agents.runs.folder import TOKENS, RunFolder, read_rows
from agents.runs.token_recording import MOST_TABLES, N_EPISODES, TokenRecorder, by_score, standings
from tests.helpers.command import ROLLOUT, rows, run, settings
from tests.helpers.training import TOKENIZER, same_weights, tiny_agent, tiny_env, weights
from textenv.episodes.rules import PADDING, SEPARATOR


class Spy(BaseCallback):
    """Keeps what the buffer has of the recorded episodes, and the model's distributions before and after the update."""

    def __init__(self):
        super().__init__()
        self.kept, self.after = [], []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        chosen = [number for _, number in by_score([standings(buffer.trained)], N_EPISODES)]
        parts = [joined([buffer.trained.transitions(i)]) for i in chosen]
        segments = [buffer.trained.segment(i) for i in chosen]
        scale = buffer.advantage_mean, buffer.advantage_deviation
        self.kept.append((segments, parts, scale, [self.distribution(*pair) for pair in zip(segments, parts)]))

    def distribution(self, segment, part):
        """Return the distributions at an episode's transitions the slow way: a forward for each token."""
        ids, n = [*segment.tokens.tolist(), 0], segment.n_prompt
        width = self.model.observation_space.shape[0]
        observations = []
        for col in part.cols.tolist():
            row = [*ids[:n], SEPARATOR, *ids[n : col + 1]]
            observations.append(row + [PADDING] * (width - len(row)))
        if self.model.policy.lm.sampling.has_support:
            return None
        with torch.no_grad():
            return self.model.policy.get_distribution(torch.tensor(observations)).log_probabilities.numpy()

    def _on_rollout_start(self):
        if self.kept:
            segments, parts, *_ = self.kept[-1]
            self.after.append([self.distribution(*pair) for pair in zip(segments, parts)])

    def _on_training_end(self):
        self._on_rollout_start()


def recorded(tmp_path, n_rollouts=3, every=1, kl=KLPenalty, env=None, **kwargs):
    """Train, and return the rows of tokens.jsonl by table, what the buffer had, and the agent."""
    tmp_path.mkdir(exist_ok=True)
    folder, spy = RunFolder(tmp_path), Spy()
    agent = tiny_agent(env or tiny_env(max_new_tokens=6), n_envs=8, **kwargs)
    total = n_rollouts * agent.n_steps * 8
    callbacks = [*([kl(0.1)] if kl else []), TokenRecorder(folder, TOKENIZER, every, total), spy]
    agent.learn(total, callback=callbacks)
    tables = {}
    for row in read_rows(folder.tokens, TOKENS):
        tables.setdefault(row["tokens"], []).append(row)
    return tables, spy, agent


def kept_values(row, name):
    return [value for value in row[name] if value is not None]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"rollout_buffer_kwargs": {"normalize_advantage": False}}, {"algorithm": A2C}, {"n_steps": 4, "n_epochs": 1}],
    ids=["ppo", "not normalised", "a2c", "parts of episodes"],
)
def test_the_numbers_are_the_buffers_and_the_models(tmp_path, kwargs):
    tables, spy, agent = recorded(tmp_path, **kwargs)
    assert len(tables) == len(spy.kept) == len(spy.after) == 3
    for table, (segments, parts, (mean, deviation), before), after in zip(tables.values(), spy.kept, spy.after):
        assert len(table) == len(parts) >= 1
        for row, segment, part, old, new in zip(table, segments, parts, before, after):
            assert row["prompt"] == TOKENIZER.decode(segment.tokens[: segment.n_prompt])
            for name, array in OF_ROLLOUT.items():
                np.testing.assert_allclose(kept_values(row, name), getattr(part, array), rtol=1e-6, atol=1e-9)
            index = np.arange(len(part.actions))
            chances = np.exp(old)
            np.testing.assert_allclose(kept_values(row, "entropy"), -(chances * old).sum(axis=1), rtol=1e-5)
            ratio = np.exp(new[index, part.actions] - part.log_probs)
            np.testing.assert_allclose(kept_values(row, "ratio"), ratio, rtol=1e-5)
            expected = part.log_probs - part.reference_log_probs
            np.testing.assert_allclose(kept_values(row, "kl"), expected, rtol=1e-6, atol=1e-7)
            for k, alternatives in zip(index, [one for one in row["alternatives"] if one is not None]):
                best = np.sort(chances[k])[::-1][:5]
                assert [chance for _, chance in alternatives] == pytest.approx(best, rel=1e-2)
                assert alternatives[0][0] == TOKENIZER.decode([int(chances[k].argmax())])
            assert set(kept_values(row, "support")) == {len(TOKENIZER)}
            if isinstance(agent, A2C):
                assert "clipped" not in row
                continue
            scaled = (part.advantages - mean) / deviation
            clipped = ((scaled > 0) & (ratio > 1.2)) | ((scaled < 0) & (ratio < 0.8))
            assert kept_values(row, "clipped") == clipped.tolist()
    assert isinstance(agent, A2C) or any(any(kept_values(row, "clipped")) for table in tables.values() for row in table)


def test_pieces_are_the_text_and_scores_go_from_lowest_to_highest(tmp_path):
    tables, spy, _ = recorded(tmp_path, n_rollouts=1)
    (table,) = tables.values()
    for row, segment, part in zip(table, *spy.kept[0][:2]):
        ids = [*segment.tokens.tolist(), int(part.actions[-1])]
        assert "".join(row["pieces"]) == TOKENIZER.decode(ids[segment.n_prompt :])
    scores = [sum(row["reward"]) for row in table]
    assert scores == sorted(scores) and scores[0] < scores[-1]


def test_whole_episodes_come_before_those_that_an_earlier_rollout_began(tmp_path):
    tables, *_ = recorded(tmp_path, env=tiny_env(max_new_tokens=4), n_steps=6)
    assert all(None not in row["value"] for table in tables.values() for row in table)


def test_the_tokens_that_could_be_sampled_are_counted(tmp_path):
    tables, *_ = recorded(tmp_path, policy_kwargs={"top_k": 3})
    for row in (row for table in tables.values() for row in table):
        assert set(row["support"]) == {3}
        assert all(
            sum(chance for _, chance in one) == pytest.approx(1, abs=0.02) and len(one) == 3
            for one in row["alternatives"]
        )
        assert max(row["entropy"]) <= np.log(3) + 1e-6


def test_a_surrogate_says_itself_what_it_clips(tmp_path):
    tables, spy, _ = recorded(tmp_path, policy_kwargs={"surrogate": ClipHigher(low=0.1, high=0.3)})
    seen = []
    for table, (_, parts, (mean, deviation), _) in zip(tables.values(), spy.kept):
        for row, part in zip(table, parts):
            ratio, scaled = np.array(kept_values(row, "ratio")), (part.advantages - mean) / deviation
            expected = ((scaled > 0) & (ratio > 1.3)) | ((scaled < 0) & (ratio < 0.9))
            assert kept_values(row, "clipped") == expected.tolist()
            seen += expected.tolist()
    assert any(seen) and not all(seen)


def test_an_exact_divergence_has_the_numbers_of_its_tokens(tmp_path):
    plain, *_ = recorded(tmp_path / "k1")
    exact, *_ = recorded(tmp_path / "exact", kl=lambda coef: KLPenalty(0.0, estimator="exact"))
    first = [next(iter(tables.values()))[0]["kl"] for tables in (plain, exact)]
    assert first[0] == first[1] == [0.0] * len(first[0]), "before the first update"
    for row in list(exact.values())[1]:
        assert np.any(kept_values(row, "kl")) and len(kept_values(row, "kl")) == len(kept_values(row, "value"))


def test_without_a_reference_there_is_no_divergence(tmp_path):
    tables, *_ = recorded(tmp_path, n_rollouts=1, kl=None)
    assert all("kl" not in row and "ratio" in row for table in tables.values() for row in table)


def test_training_is_the_same_without_it(tmp_path):
    agents = [tiny_agent(tiny_env(max_new_tokens=6), n_envs=8) for _ in range(2)]
    for agent, callbacks in zip(agents, ([TokenRecorder(RunFolder(tmp_path), TOKENIZER, 1, 96)], [])):
        agent.learn(144, callback=callbacks)
    assert same_weights(*map(weights, agents)) and (tmp_path / "tokens.jsonl").is_file()


def test_the_file_of_a_long_run_is_bounded(tmp_path):
    n = 3 * MOST_TABLES
    tables, *_ = recorded(tmp_path, n_rollouts=n, kl=None, env=tiny_env(max_new_tokens=1), n_epochs=1)
    assert len(tables) == MOST_TABLES + 1 and max(tables) == n * 8, "each third, and the last"
    assert all(len(table) <= N_EPISODES for table in tables.values())


def test_a_resumed_run_writes_the_same_rows(model, tmp_path):
    whole = tmp_path / "whole"
    assert run("train", *settings(model, whole, 4), "--quiet") == 0
    assert [row["tokens"] for row in rows(whole, "tokens.jsonl")] == [
        at for at in (ROLLOUT, 3 * ROLLOUT, 4 * ROLLOUT) for _ in range(4)
    ]
    newest = max((whole / "checkpoints").iterdir())
    lines = rows(whole, "tokens.jsonl")
    for path in (newest, whole / "results.json"):
        path.rename(tmp_path / path.name)
    assert run("train", "--resume", whole, "--quiet") == 0
    assert rows(whole, "tokens.jsonl") == lines


def test_no_samples_no_tokens(model, tmp_path):
    assert run("train", *settings(model, tmp_path / "run", 1, samples=0), "--quiet") == 0
    assert not (tmp_path / "run" / "tokens.jsonl").exists()
    assert json.loads((tmp_path / "run" / "results.json").read_text())
