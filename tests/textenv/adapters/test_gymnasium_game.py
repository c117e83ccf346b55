"""Gymnasium environments with text or discrete spaces as games."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from tests.helpers.games import TOKENIZER, check_envs
from textenv.adapters import GameError, TurnEnv
from textenv.adapters.gymnasium import GymnasiumGame


class Corridor(gym.Env):
    """Walk right to the end of a corridor; cells count from 1."""

    observation_space = gym.spaces.Discrete(4, start=1)
    action_space = gym.spaces.Discrete(2, start=-1)  # -1 is left, 0 is right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(1, 3))
        return np.int64(self.cell), {"at": self.cell}

    def step(self, action):
        self.cell = max(1, self.cell + (1 if action == 0 else -1))
        return np.int64(self.cell), np.float32(self.cell == 4), np.bool_(self.cell == 4), False, {}


class Shout(gym.Env):
    observation_space = gym.spaces.Text(20, charset="ab?")
    action_space = gym.spaces.Text(3, charset="ab")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "ab?", {}

    def step(self, action):
        return action, float(len(action)), True, True, {}


def test_gymnasium_discrete_spaces_are_numbers():
    game = GymnasiumGame(Corridor)
    opening, info = game.reset(seed=0)
    assert opening == str(info["at"]) and game.reset(seed=0)[0] == opening
    start = info["at"]
    assert game.step("go 0 and 1")[:4] == (str(start + 1), 0.0, False, False)
    for refused in ("right", "1", "-2", "9" * 30, ""):
        assert game.step(refused) == ("That is no action.", 0.0, False, False, {"refused": True})
    while not (result := game.step("0"))[2]:
        pass
    assert result[:4] == ("4", 1.0, True, False) and isinstance(result[1], float)


def test_gymnasium_text_spaces_are_texts():
    game = GymnasiumGame(Shout, refusal="?")
    assert game.reset(seed=0)[0] == "ab?"
    assert game.step("ac")[0] == "?" and game.step("abab")[0] == "?"
    assert game.step("ab")[:4] == ("ab", 2.0, True, True)


def test_gymnasium_with_functions_and_an_id():
    game = GymnasiumGame(
        "FrozenLake-v1",
        obs_to_text=lambda cell: f"cell {cell}.",
        text_to_action=lambda text: {"left": 0, "down": 1, "right": 2, "up": 3}.get(text),
        is_slippery=False,
    )
    assert game.reset(seed=1)[0] == "cell 0."
    results = [game.step(turn)[:4] for turn in ["down", "fly", "down", "right", "right", "down", "right"]]
    assert [text for text, *_ in results[:3]] == ["cell 4.", "That is no action.", "cell 8."]
    assert results[-1] == ("cell 15.", 1.0, True, False)


def test_gymnasium_time_limits_truncate():
    env = TurnEnv(
        partial(GymnasiumGame, "FrozenLake-v1", refusal="no ", max_episode_steps=2), TOKENIZER, turn_tokens=1, n_games=1
    )
    env.reset()
    left = TOKENIZER.encode("0")[0]
    assert [env.step(left)[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_gymnasium_other_spaces_need_a_function():
    with pytest.raises(
        ValueError, match="`obs_to_text` for an observation space that is neither Text nor Discrete, got Box"
    ):
        GymnasiumGame("CartPole-v1")
    with pytest.raises(
        ValueError, match="`text_to_action` for an action space that is neither Text nor Discrete, got Box"
    ):
        GymnasiumGame("Pendulum-v1", obs_to_text=str)
    with pytest.raises(ValueError, match=r"arguments \['size'\] with an id alone"):
        GymnasiumGame(Corridor, size=3)
    with pytest.raises(GameError, match="`obs_to_text` to return a str, got 1"):
        GymnasiumGame("FrozenLake-v1", obs_to_text=lambda cell: cell + 1).reset(seed=0)


@pytest.mark.parametrize("make", [partial(GymnasiumGame, Corridor), partial(GymnasiumGame, "FrozenLake-v1")])
def test_gymnasium_check_envs(make):
    check_envs(make, max_new_tokens=100)
