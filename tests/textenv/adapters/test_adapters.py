"""The adapters of other libraries, each tested with a stand-in and, where it is installed, with the library."""

import copy
import logging
import random
import re
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from agents import generate
from tests.helpers import fakes
from tests.helpers.games import PRINTABLE, TOKENIZER, check_envs, plays_the_same_again
from tests.helpers.training import tiny_agent, tiny_config
from textenv.adapters import GameError, TurnEnv
from textenv.adapters.gem import GemGame
from textenv.adapters.openenv import OpenEnvGame
from textenv.adapters.textarena import TextArenaGame
from textenv.adapters.verifiers import VerifiersGame

REAL = pytest.mark.library


def installed(name):
    """Return the library, or skip and name the missing module, which may be one that the library needs."""
    return pytest.importorskip(name)


def test_a_skip_names_the_module_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, missing in (("half_installed", "what_it_needs"), ("not_installed", "not_installed")):
        with pytest.raises(pytest.skip.Exception, match=f"could not import '{name}': No module named '{missing}'"):
            installed(name)


def library(name, fake=None):
    """Make a fixture of two cases: a stand-in for the library, and the library itself."""

    @pytest.fixture(params=["fake", pytest.param("real", marks=REAL)])
    def fixture(request, monkeypatch):
        if request.param == "real":
            return installed(name)
        if fake is not None:
            for module, content in fake().items():
                monkeypatch.setitem(sys.modules, module, content)
        return sys.modules.get(name)

    return fixture


textarena = library("textarena", fakes.textarena)
gem = library("gem", fakes.gem)
vf = library("verifiers.v1", fakes.verifiers)
openenv = library("openenv.core.env_server.interfaces")


# TextArena


def free_cells(text):
    return re.findall(r"'\[(\d)\]'", text.rsplit("Available Moves:", 1)[1])


def at_random(text):
    return f"[{random.choice(free_cells(text))}]"


def first_free(text):
    return f"[{free_cells(text)[0]}]"


guess = partial(TextArenaGame, "GuessTheNumber-v0", to_action="[{}]".format)
tic_tac_toe = partial(TextArenaGame, "TicTacToe-v0", to_action="[{}]".format)


def test_textarena_one_player(textarena):
    game = guess()
    opening, _ = game.reset(seed=0)
    number = random.Random(0).randint(1, 20)
    assert "You have to guess the number between 1 and 20" in opening
    assert game.step(str(number - 1))[:4] == ("The target number is higher.", 0.0, False, False)
    assert game.step(str(number + 1))[:4] == ("The target number is lower.", 0.0, False, False)
    assert "attempted an invalid move" in game.step("x")[0]
    assert game.step(str(number))[1:4] == (1.0, True, False)


def test_textarena_makes_a_fresh_game_for_each_episode(textarena):
    game = guess()
    first = game.reset(seed=0)[0]
    game.step("3")
    assert game.reset(seed=0)[0] == first
    kept = textarena.make("GuessTheNumber-v0")  # the control: a reused game keeps its texts
    for length in (1, 2):
        kept.reset(num_players=1, seed=0)
        assert kept.get_observation()[1].count("[GAME]") == length


def test_textarena_an_invalid_move_twice_loses(textarena):
    game = tic_tac_toe([first_free])
    game.reset(seed=0)
    assert game.step("9")[1:4] == (0.0, False, False)
    assert game.step("9")[1:4] == (-1.0, True, False)


@pytest.mark.parametrize(("seat", "moves", "reward"), [(0, "345", 1.0), (1, "67", -1.0), (1, "246", 1.0)])
def test_textarena_two_players(textarena, seat, moves, reward):
    """The opponent takes the first free cell."""
    game = tic_tac_toe([first_free], seat=seat)
    opening = game.reset(seed=0)[0]
    assert f"You are Player {seat}" in opening and f"You are Player {1 - seat}" not in opening
    assert ("Player 0 placed their symbol (O) in cell 0" in opening) is (seat == 1)
    results = [game.step(move) for move in moves]
    assert [result[2] for result in results] == [False] * (len(moves) - 1) + [True]
    assert [result[1] for result in results] == [0.0] * (len(moves) - 1) + [reward]


def test_textarena_opponents_see_their_own_seat(textarena):
    seen = []

    def remember(text):
        seen.append(text)
        return first_free(text)

    game = tic_tac_toe([remember])
    game.reset(seed=0)
    game.step("4"), game.step("8")
    assert "You are Player 1" in seen[0] and "You are Player 0" not in seen[0]
    assert seen[1].startswith(seen[0]) and "in cell 8" in seen[1] and "in cell 8" not in seen[0]


def test_textarena_a_random_opponent_plays_the_same_again(textarena):
    assert plays_the_same_again(partial(tic_tac_toe, [at_random]), "048")
    own = random.Random(1)  # the control: a generator that games share
    assert not plays_the_same_again(partial(tic_tac_toe, [lambda text: f"[{own.choice(free_cells(text))}]"]), "048")


class Frozen:
    """An opponent: a copy of the policy that is no longer trained."""

    def __init__(self, policy):
        self.policy = copy.deepcopy(policy)

    def __call__(self, text):
        seed = random.getrandbits(31)  # drawn from the game's own generator
        [move] = generate(self.policy, [text[-40:]], PRINTABLE, max_new_tokens=2, seed=seed, progress_bar=False)
        free = free_cells(text)
        return f"[{free[sum(move.ids) % len(free)]}]"


@pytest.mark.slow
def test_textarena_self_play_against_a_frozen_copy(textarena):
    lm = tiny_config(vocab_size=len(PRINTABLE), n_positions=2048)
    settings = {"turn_tokens": 2, "max_new_tokens": 1000, "n_games": 8}
    plain = TurnEnv(partial(tic_tac_toe, [first_free]), PRINTABLE, **settings)
    frozen = Frozen(tiny_agent(plain, lm=lm, n_envs=2, n_steps=4).policy)
    weights = [weight.clone() for weight in frozen.policy.parameters()]
    make = partial(tic_tac_toe, [frozen], seat=1)
    env = TurnEnv(make, PRINTABLE, **settings)
    assert len({re.search(r"in cell (\d)", prompt).group(1) for prompt in env.prompts}) > 1  # the opponent moves first
    model = tiny_agent(env, lm=lm, n_envs=8, n_steps=4)
    model.learn(64)
    assert all(torch.equal(before, after) for before, after in zip(weights, frozen.policy.parameters()))
    assert not all(torch.equal(before, after) for before, after in zip(weights, model.policy.parameters()))
    assert plays_the_same_again(make, "048")


def test_textarena_seats():
    with pytest.raises(ValueError, match=r"`seat` in \[0, 1\], got 2"):
        tic_tac_toe([first_free], seat=2)


@pytest.mark.parametrize("make", [guess, partial(tic_tac_toe, [at_random], seat=1)])
def test_textarena_check_envs(textarena, make):
    check_envs(make)


# GEM

boxed = partial(GemGame, "game:GuessTheNumber-v0-easy", to_action="\\boxed{{{}}}".format)


def test_gem_a_game(gem):
    game, number = boxed(), random.Random(5).randint(1, 10)
    with_state = random.getstate()
    try:
        opening, _ = game.reset(seed=5)
    finally:
        random.setstate(with_state)
    assert opening.endswith("\nEnter your next guess.") and "between 1 and 10" in opening
    other = number % 10 + 1
    hint = "lower" if other > number else "higher"
    text = f"At turn 1, you guessed {other}, and the target number is {hint} than {other}.\nEnter your next guess."
    assert game.step(str(other))[:4] == (text, 0.0, False, False)
    assert game.step(str(number))[1:4] == (1.0, True, False)


def test_gem_a_game_that_is_terminated_and_truncated_is_terminated(gem):
    game = boxed()
    game.reset(seed=5)
    number = random.Random(5).randint(1, 10)
    wrong = [str(guess) for guess in range(1, 11) if guess != number][:4]
    results = [game.step(guess) for guess in wrong]
    assert results[-1][2:4] == (True, True)
    env = TurnEnv(boxed, PRINTABLE, turn_tokens=2, max_new_tokens=2000, n_games=6)
    env.reset(options={"prompts": [{"seed": 5}]})
    steps = [env.step(token) for guess in wrong for token in (PRINTABLE.encode(guess)[0], 0)]
    assert steps[-1][2:4] == (True, False)


def test_gem_a_wrong_format_ends_the_game(gem):
    game = GemGame("game:GuessTheNumber-v0-easy")
    game.reset(seed=0)
    assert game.step("five")[1:4] == (-0.1, True, False)


def test_gem_leaves_logging_as_it_was(gem):
    root = logging.getLogger()
    before = list(root.handlers), root.level
    boxed()
    assert (list(root.handlers), root.level) == before


def test_gem_plays_the_same_again(gem):
    assert plays_the_same_again(boxed, ["3", "8", "5"])


def test_gem_check_envs(gem):
    check_envs(boxed, max_new_tokens=300)


# OpenEnv


@dataclass
class Move:
    steps: int


@dataclass
class Seen:
    at: int
    done: bool = False
    reward: float | None = None
    metadata: dict = field(default_factory=dict)


class Walk:
    """A game like an `openenv` Environment: reward and end are part of the observation."""

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.at = random.Random(seed).randrange(3)
        return Seen(self.at)

    def step(self, action, timeout_s=None, **kwargs):
        self.at += action.steps
        return Seen(self.at, done=self.at == 5, reward=1.0 if self.at == 5 else None, metadata={"steps": action.steps})


def real_walk():
    """Return the same game and its action, as classes of the library."""
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Step(Action):
        steps: int

    class Place(Observation):
        at: int

    class RealWalk(Environment[Step, Place, State]):
        def reset(self, seed=None, episode_id=None, **kwargs):
            self.at = random.Random(seed).randrange(3)
            return Place(at=self.at)

        def step(self, action, timeout_s=None, **kwargs):
            self.at += action.steps
            is_end = self.at == 5
            return Place(at=self.at, done=is_end, reward=1.0 if is_end else None, metadata={"steps": action.steps})

        @property
        def state(self):
            return State()

    return RealWalk, Step


def read_steps(action):
    return lambda text: action(steps=int(text)) if text.isdigit() else None


def test_openenv_a_game(openenv):
    env, action = (Walk, Move) if openenv is None else real_walk()
    make = partial(OpenEnvGame, env, to_action=read_steps(action), to_text=lambda seen: f"at {seen.at} ", refusal="no ")
    game = make()
    start = random.Random(0).randrange(3)
    assert game.reset(seed=0)[0] == f"at {start} "
    assert game.step("1") == (f"at {start + 1} ", 0.0, False, False, {"steps": 1})
    assert game.step("x") == ("no ", 0.0, False, False, {"refused": True})
    assert game.step(str(4 - start)) == ("at 5 ", 1.0, True, False, {"steps": 4 - start})
    env = TurnEnv(make, TOKENIZER, turn_tokens=2, max_new_tokens=50, n_games=3)
    env.reset(options={"prompts": [{"seed": 0}]})
    assert [env.step(token)[1:4] for token in (TOKENIZER.encode(str(5 - start))[0], 0)][-1] == (1.0, True, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env, skip_render_check=True)
        sb3_check_env(env, warn=True)


def test_openenv_texts_are_texts():
    with pytest.raises(GameError, match="`to_text` to return a str, got"):
        OpenEnvGame(Walk, read_steps(Move), lambda seen: seen.at).reset(seed=0)


# verifiers


@pytest.fixture
def tasks(vf):
    class Data(vf.TaskData):
        answer: str

    class Copy(vf.Task if vf.__spec__ is None else vf.Task[Data]):
        @vf.reward(weight=2.0)
        async def exact(self, task, trace):
            return float(trace.last_reply == task.answer)

        @vf.reward
        async def short(self, trace):
            return 0.5 if len(trace.last_reply) < 3 else 0.0

    class Boxed(Copy):
        @vf.reward
        async def checked(self, runtime):
            return 1.0

    def make(kind="copy", **fields):
        return (Boxed if kind == "boxed" else Copy)(Data(**{"prompt": "say ab", "answer": "ab", **fields}))

    return make


def test_verifiers_a_task(tasks):
    games = [tasks(), tasks(prompt="say cd", answer="cd", system_prompt="be brief")]
    game = VerifiersGame(games)
    assert [game.reset(seed=seed)[0] for seed in (0, 1)] == ["say ab", "be brief\n\nsay cd"]
    assert game.step("cd")[:4] == ("", 2.5, True, False)
    assert game.step("ab")[:4] == ("", 0.5, True, False)
    assert game.step("long")[4]["rewards"] == {"exact": 0.0, "short": 0.0}
    with pytest.raises(GameError, match=r"seeds below the number of tasks, 2, got 2: set `n_games`"):
        game.reset(seed=2)


def test_verifiers_tasks_of_several_turns_or_with_tools_are_refused(tasks):
    with pytest.raises(ValueError, match="its reward 'checked' wants a runtime"):
        VerifiersGame([tasks(kind="boxed")])
    with pytest.raises(ValueError, match="to have a prompt, got none"):
        VerifiersGame([tasks(prompt=None)])
    with pytest.raises(ValueError, match="one with a container or tools"):
        VerifiersGame([tasks(image="box")])


def test_verifiers_check_envs(tasks):
    env = TurnEnv(partial(VerifiersGame, [tasks()]), TOKENIZER, turn_tokens=4, max_new_tokens=4, n_games=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env, skip_render_check=True)
        sb3_check_env(env, warn=True)
