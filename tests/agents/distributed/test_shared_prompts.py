"""Prompts drawn by priority in several processes: one table, no draw twice, exact resume, harder prompts more often."""

import json

import numpy as np
import pytest

from tests.agents.distributed.prompt_jobs import PROMPTS
from tests.helpers.processes import train
from textenv import PrioritySampling


def union(results):
    """Return the prompts of all processes in the order of the draws: the first of each process, the second, ..."""
    return [number for turn in zip(*(numbers for numbers, *_ in results), strict=True) for number in turn]


def table(result):
    """Return the state of a process's cursor without the prompt that it returned last, which is its own."""
    return {name: part for name, part in result[1].items() if name != "number"}


@pytest.mark.parametrize("by", [pytest.param("reward", marks=pytest.mark.slow), "spread"])
def test_two_processes_draw_what_one_draws_and_have_its_table(by):
    """Each text fills a rollout, at whose end rewards are known, so that one process knows no more than two."""
    (one,) = train(1, "drawn_by_priority", 4, None, None, by)
    two = train(2, "drawn_by_priority", 4, None, None, by)
    assert union(two) == one[0] and len(set(one[0])) > 6 and len(one[0]) == 5 * 8
    assert table(two[0]) == table(two[1]) == table(one)
    assert sum(table(one)["prompts"]["n_rewards"]) == 4 * 8


@pytest.mark.slow
def test_the_table_is_one_on_any_number_of_processes(tmp_path):
    """2 -> 2 is the run; 2 -> 1 makes the draws that the two would have made next, from their table."""
    whole = train(2, "drawn_by_priority", 4, None, None, "spread", False)
    half = train(2, "drawn_by_priority", 2, None, tmp_path / "half", "spread", False)
    again = train(2, "drawn_by_priority", 2, tmp_path / "half", None, "spread", False)
    for run, before, after in zip(whole, half, again, strict=True):
        assert before[0] + after[0] == run[0] and table(after) == table(run) and not after[2]
        assert table(before) == table(half[0]), "both have the same"
    assert len(whole[0][0]) != len(whole[1][0]), "the processes draw unequally often"
    (one,) = train(1, "drawn_by_priority", 0, tmp_path / "half", None, "spread", False)
    saved = PrioritySampling("spread").cursor(len(PROMPTS), seed=9)
    saved.load_state_dict(half[0][1])
    assert one[0] == [saved.advance() for _ in range(8)] and "written by 2 processes and is loaded by 1" in one[2][0]
    assert "passed over" not in one[2][0]
    states = json.loads((tmp_path / "half" / "state.json").read_text())
    assert "prompts" in states["env"]["cursor"] and "prompts" not in states["ranks"][0]["env"]["cursor"]


@pytest.mark.slow
def test_harder_prompts_are_drawn_more_often_and_not_without_priorities():
    """Prompt 11 always earns most: its priority is the lowest of 12."""
    shares = {}
    for name, alpha in (("reward", 1.0), ("uniform", 0.0)):
        results = train(2, "drawn_by_priority", 24, None, None, "reward", True, alpha)
        numbers = np.bincount([number for own, *_ in results for number in own], minlength=12)
        shares[name] = numbers[:4].sum() / numbers[-4:].sum()
    assert shares["reward"] > 2 and 0.6 < shares["uniform"] < 1.6
