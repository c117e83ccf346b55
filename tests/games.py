"""Small games of turns for the tests, shaped as the adapters' are, and how tokens are written into them."""

import random

import numpy as np

from textenv import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,?+*-=<>/")
EOS = 0


class Guess:
    """A number from 1 to 9, drawn from the global generator as TextArena does; at most `max_turns` guesses."""

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
    """Draws from both global generators at every turn, and says what it drew; ends by chance."""

    def reset(self, *, seed):
        self.opened = f"{random.randrange(100)} {np.random.randint(100)} "
        return self.opened, {"seed": seed}

    def step(self, text):
        number = random.randrange(100)
        return f" {number} {np.random.randint(100)} ", number / 100 + len(text) / 10, number > 90, False, {}


def write(env, text):
    """Write characters, "/" for the end token; return the results of the steps."""
    return [env.step(EOS if char == "/" else env.tokenizer.encode(char)[0]) for char in text]
