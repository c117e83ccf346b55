"""Small turn-based games with the interface of the adapters' games, and functions that play them."""

import random
import warnings

import numpy as np
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from textenv import CharTokenizer, TextVectorEnv, check_text_env
from textenv.adapters import TurnEnv

PRINTABLE = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,?+*-=<>/")
EOS = 0


class Guess:
    """Guess a number from 1 to 9 that the global generator draws, as in TextArena; at most `max_turns` guesses."""

    def __init__(self, max_turns=6):
        self.max_turns = max_turns

    def reset(self, *, seed):
        random.seed(seed)
        self.number, self.n_turns = random.randint(1, 9), 0
        return "guess ", {}

    def step(self, text):
        self.n_turns += 1
        if text == str(self.number):
            return "yes", 1.0, True, self.n_turns == self.max_turns, {"n_turns": self.n_turns}
        hint = "no" if not text.isdigit() else "up" if int(text) < self.number else "down"
        return f" {hint} ", 0.125, False, self.n_turns == self.max_turns, {}


class Noise:
    """Draws from both global generators at every turn, and replies with the numbers; ends at random."""

    def reset(self, *, seed):
        self.opened = f"{random.randrange(100)} {np.random.randint(100)} "
        return self.opened, {"seed": seed}

    def step(self, text):
        number = random.randrange(100)
        return f" {number} {np.random.randint(100)} ", number / 100 + len(text) / 10, number > 90, False, {}


def write(env, text):
    """Step through a text's characters, "/" for the end token; return the results of the steps."""
    return [env.step(EOS if char == "/" else env.tokenizer.encode(char)[0]) for char in text]


def check_envs(make, max_new_tokens=600):
    env = TurnEnv(make, PRINTABLE, turn_tokens=6, max_new_tokens=max_new_tokens, n_games=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_text_env(env)
        gymnasium_check_env(env, skip_render_check=True)
        sb3_check_env(env, warn=True)


def plays_the_same_again(make, turns, seed=3):
    """Return whether a game in lanes is undisturbed by others that seed the global generators in between."""

    def play(disturb):
        game = TurnEnv(make, PRINTABLE, turn_tokens=8, max_new_tokens=2000, n_games=20)
        envs = TextVectorEnv(game, 2)
        envs.reset(options={"prompts": [{"seed": seed}, {"seed": seed + 1}]})
        results = []
        for char in "".join(f"{turn}\0" for turn in turns):
            if disturb:
                random.seed(0), np.random.seed(0)
            token = 0 if char == "\0" else PRINTABLE.encode(char)[0]
            observations, rewards, *_ = envs.step(np.array([token, token]))
            results.append((observations[0].tolist(), rewards[0]))
        return results

    return play(False) == play(True)


def noise_env(**kwargs):
    return TurnEnv(Noise, TOKENIZER, **{"turn_tokens": 2, "max_new_tokens": 40, "n_games": 7, **kwargs})


def guess_env(game=Guess, **kwargs):
    defaults = {"turn_tokens": 3, "max_new_tokens": 24, "n_games": 5}
    return TurnEnv(game, TOKENIZER, **{**defaults, **kwargs})


def begin(env, seed=0):
    env.reset(options={"prompts": [{"seed": seed}]})
    return env
