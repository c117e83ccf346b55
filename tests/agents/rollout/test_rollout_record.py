"""The record of the episodes that ended in a rollout."""

from agents.rollout.rollout_record import RolloutRecord
from agents.steps.scores import LateScores
from tests.helpers.training import tiny_agent, tiny_env

INFO, DROPPED = {"dropped": False}, {"dropped": True}


def test_scored_are_those_with_a_score_that_were_not_dropped():
    record = RolloutRecord(first_step=10, is_kept=True)
    record.add((10, 0), INFO, is_scored=True)
    record.add((11, 0), INFO, is_scored=False)
    record.add((12, 1), DROPPED, is_scored=True)
    assert list(record.ended) == [(10, 0), (11, 0), (12, 1)] and list(record.scored) == [(10, 0)]
    assert [record.row_of((step, 1)) for step in (9, 10, 12)] == [None, 0, 2]


def test_nothing_is_recorded_unless_a_step_asks_for_it():
    record = RolloutRecord(first_step=0, is_kept=False)
    record.add((0, 0), INFO, is_scored=True)
    assert not record.ended and not record.scored


def test_a_reset_clears_the_requests_of_steps():
    env = tiny_agent(tiny_env(score_at="rollout_end")).get_env()
    env.begin_rollout(defer_scores=True, accept_dropped=True)
    env.begin_rollout()  # a second step that asks for less takes nothing back
    assert env.record.is_kept and env.defers_scores and env.lanes.accepts_dropped
    env.reset()
    assert not env.record.is_kept and not env.defers_scores and not env.lanes.accepts_dropped


def test_late_scores_ask_for_all_of_it():
    model = tiny_agent(tiny_env(score_at="rollout_end"))
    assert [type(step) for step in model.rollout_buffer.before_returns] == [LateScores]
    model.rollout_buffer.reset()
    assert model.get_env().defers_scores and model.get_env().lanes.accepts_dropped
