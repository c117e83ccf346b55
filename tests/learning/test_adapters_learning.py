"""Learning to play games: well above chance, and not without the information or the reward that a game needs."""

import random
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from agents import Pretrained, make_agent, pretrain, word_tokenizer
from tests.helpers import fakes
from tests.helpers.models import seldom
from tests.helpers.training import tiny_config, train_until
from textenv.adapters import Calculator, ToolGame, TurnEnv
from textenv.adapters.gem import GemGame
from textenv.adapters.textarena import TextArenaGame
from textenv.lanes.lanes import Lanes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning"),
]
N_EPISODES = 300


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.library)])
def source(request, monkeypatch):
    """Use stand-ins for the libraries, or the libraries themselves."""
    if request.param == "fake":
        for module, content in {**fakes.textarena(), **fakes.gem()}.items():
            monkeypatch.setitem(sys.modules, module, content)
    return request.param


def won(env, act):
    """Return the share of unseen games whose last reward is 1."""
    lanes = Lanes(env, N_EPISODES)
    observations = lanes.reset(prompts=[{"seed": 10_000 + number} for number in range(N_EPISODES)])
    n_won = 0
    while not lanes.idle.all():
        result = lanes.step(act(observations))
        observations = result.observations
        n_won += sum(result.rewards[lane] == 1.0 for lane in result.final_observations)
    return n_won / N_EPISODES


def play(model, env):
    return won(env, lambda observations: model.predict(observations, deterministic=False)[0])


def agent(env, lm, **kwargs):
    settings = {"n_envs": 128, "n_steps": 6, "batch_size": 192, "n_epochs": 4, "learning_rate": 2e-3, **kwargs}
    return make_agent(env, lm, device="cpu", seed=0, **settings)


def trained(folder, texts, tokenizer, width=32, n_epochs=2.0, learning_rate=1e-2):
    """Train a tiny model to continue texts; return its spec."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config(vocab_size=len(tokenizer), n_embd=width))
    pretrain(model, tokenizer, texts, n_epochs=n_epochs, learning_rate=learning_rate, progress_bar=False)
    model.save_pretrained(folder)
    return Pretrained(str(folder))


# GuessTheNumber, of 3 numbers in 2 guesses: with the hint all are found, without it at most 2 of 3

NUMBERS = ["1", "2", "3"]
GUESSES = word_tokenizer([*NUMBERS, "guess", "higher", "lower", "invalid"])


def hint(text):
    return next((word for word in ("higher", "lower", "invalid") if word in text), "guess")


def no_hint(text):
    return "invalid" if "invalid" in text else "guess"


class Won(TurnEnv):
    """A game that pays only for a win: TextArena also pays for near misses, even after invalid moves."""

    def get_reward(self, prompt, preds, done):
        return float(done and self.outcome(prompt, preds).reward == 1.0)


def guess_env(library, to_text):
    make = {
        "textarena": partial(TextArenaGame, "GuessTheNumber-v0", max_number=3, to_action="[{}]".format),
        "gem": partial(GemGame, "game:GuessTheNumber-v0-easy", max_number=3, to_action="\\boxed{{{}}}".format),
    }[library]
    room = {"turn_tokens": 1, "max_new_tokens": 3, "length_limit": "terminate"}  # two guesses and a hint
    return Won(partial(make, to_text=to_text), GUESSES, **room)


def random_guesses(seed):
    rng = random.Random(seed)
    # Most texts open with the middle number. After another one a hint helps little, and training may stop at 2 of 3.
    return " ".join(["guess", rng.choice(["1", *3 * ["2"], "3"]), rng.choice(["higher", "lower"]), rng.choice(NUMBERS)])


@pytest.mark.parametrize("library", seldom(["textarena", "gem"]))
def test_guess_the_number(source, library, tmp_path):
    if source == "real":
        pytest.importorskip(library)
    env = guess_env(library, hint)
    rng, ids = np.random.default_rng(0), [GUESSES.convert_tokens_to_ids(number) for number in NUMBERS]
    at_random = won(env, lambda observations: rng.choice(ids, size=len(observations)))
    lm, shares = trained(tmp_path, [random_guesses(seed) for seed in range(2000)], GUESSES), {}
    for to_text in (hint, no_hint):
        env = guess_env(library, to_text)
        model = agent(env, lm, n_steps=4, batch_size=128, ent_coef=0.05)
        shares[to_text.__name__] = train_until(model, partial(play, model, env), 40, enough=0.8, n_checks=5)
    print(library, at_random, shares)
    assert at_random < 0.65
    assert shares["hint"] > 0.75  # without reading the hint, no policy exceeds 2 of 3
    assert shares["no_hint"] < 0.75


# Tic-tac-toe against a random opponent

CELLS = [str(cell) for cell in range(9)]
MOVES = word_tokenizer([*CELLS, "go", "invalid"])
LINES = fakes.ArenaTicTacToe.LINES


def random_game(seed):
    """Return a game of random legal moves, as the policy would see it."""
    rng = random.Random(seed)
    moves = rng.sample(CELLS, 9)
    for n_moves in range(5, 10):
        own = moves[(n_moves - 1) % 2 : n_moves : 2]
        if any(set(line) <= set(own) for line in LINES):
            return " ".join(["go", *moves[:n_moves]])
    return " ".join(["go", *moves])


def random_opponent(text):
    free = re.findall(r"\[\d\]", text.rsplit("Available Moves:", 1)[1])
    return random.choice(free)


def last_move(text):
    if "invalid move" in text:
        return "invalid"
    return (re.findall(r"Player 1 placed their symbol \(X\) in cell (\d)", text) or ["go"])[-1]


class Unpaid(TurnEnv):
    """The control: all rewards are 0."""

    def get_reward(self, prompt, preds, done):
        return 0.0


@pytest.mark.long
def test_tic_tac_toe(source, tmp_path):
    if source == "real":
        pytest.importorskip("textarena")
    make = partial(TextArenaGame, "TicTacToe-v0", [random_opponent], to_text=last_move, to_action="[{}]".format)
    env, unpaid = (cls(make, MOVES, turn_tokens=1, max_new_tokens=20) for cls in (TurnEnv, Unpaid))
    lm = trained(tmp_path, [random_game(seed) for seed in range(2000)], MOVES, 64, 8.0, 2e-3)
    shares = [play(agent(env, lm), env)]
    for training, n_iterations in ((env, 48), (unpaid, 6)):
        model = agent(training, lm, learning_rate=1e-3)
        shares.append(train_until(model, partial(play, model, env), n_iterations, enough=0.7, n_checks=4))
    print("tic-tac-toe", shares)
    start, end, control = shares
    assert start < 0.4
    assert end > 0.65  # random legal moves win 0.58
    assert control < 0.4


# A product in two turns: the tool has to be called, and its result to be written

PRODUCTS = word_tokenizer([*map(str, range(100)), "*", "=", "<calc>", "</calc>"])


class Product:
    def reset(self, *, seed):
        self.a, self.b = random.randint(2, 9), random.randint(2, 9)
        return f"{self.a} * {self.b} =", {}

    def step(self, text):
        return "", float(text == str(self.a * self.b)), True, False, {}


def product_text(seed):
    """Return a guessed answer for odd seeds, else a call of the tool and its result."""
    rng = random.Random(seed)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if seed % 2:
        return f"{a} * {b} = {rng.randint(4, 81)}"
    return f"{a} * {b} = <calc> {a} * {b} </calc> {a * b} {a * b}"


@pytest.mark.long
def test_a_tool_is_used(tmp_path):
    settings = {"turn_tokens": 6, "max_new_tokens": 18, "stop": ["</calc>"], "length_limit": "terminate"}
    with_tool = TurnEnv(partial(ToolGame, Product, {"calc": Calculator()}, reply="{}"), PRODUCTS, **settings)
    without = TurnEnv(Product, PRODUCTS, **settings)
    lm = trained(tmp_path, [product_text(seed) for seed in range(3000)], PRODUCTS, 64, 8.0, 2e-3)
    shares = [play(agent(with_tool, lm), with_tool)]
    for env, n_iterations in ((with_tool, 32), (without, 16)):
        model = agent(env, lm, n_envs=64, n_steps=12, learning_rate=1e-3)
        shares.append(train_until(model, partial(play, model, env), n_iterations, enough=0.7, n_checks=4))
    print("product", shares)
    start, end, control = shares
    assert start < 0.4
    assert end > 0.6
    assert control < end - 0.1  # without the tool, it memorises some of the 36 products
