"""Forks of a running episode: lanes that continue it apart, each with what the episode remembers."""

import numpy as np

from textenv import CharTokenizer, TextEnv
from textenv.lanes.lanes import Lanes

TOKENIZER = CharTokenizer()


class Counting(TextEnv):
    """The reward is the number of calls that an episode remembers."""

    def get_reward(self, prompt, preds, done):
        preds.state["calls"] = [*preds.state.get("calls", []), preds.ids[-1]]
        return float(len(preds.state["calls"]))


def test_forks_share_nothing_and_become_idle_when_they_end():
    env = Counting(["ab", "c"], TOKENIZER, max_new_tokens=4)
    lanes = Lanes(env, 1)
    lanes.reset(0, [env.prompts[0]])
    states = [lanes.state.state_dict()]
    lanes.step(np.array([5]))
    states.append(lanes.state.state_dict())
    before = lanes.state.episodes[0].state["calls"].copy()
    forks = Lanes(env, 3)
    observations = forks.fork([states[0], states[1], states[1]], lanes.prompts[0])
    assert observations[:, :5].tolist() == [[1, 2, -2, -1, -1], [1, 2, -2, 5, -1], [1, 2, -2, 5, -1]]
    assert forks.step(np.array([6, 7, 0])).rewards.tolist() == [1.0, 2.0, 2.0]
    assert [episode.state.get("calls") for episode in forks.state.episodes] == [[6], [5, 7], None]
    assert forks.idle.tolist() == [False, False, True]
    result = forks.step(np.array([0, 0, 9]))
    assert [result.infos[lane]["episode"]["r"] for lane in (0, 1)] == [3.0, 6.0]  # 1 + 2, and 1 + 2 + 3 with the prefix
    assert [result.infos[lane]["group"] for lane in (0, 1)] == [0, 1] and forks.idle.all()
    assert lanes.state.episodes[0].state["calls"] == before == [5]
