"""Simulated raters with a known taste, who answer the questions of a real store."""

import threading

import numpy as np

from textenv import demo


def mood(text):
    """Return the taste: the share of positive words among a text's mood words."""
    return demo.score(text)


class Rater:
    """Ranks, compares and scores texts by its taste with noise, or at random.

    A ranking sorts by taste plus Gumbel noise of standard deviation 1.28 / `care` (the Plackett-Luce model). A score
    is the taste mapped to the scale, plus normal noise of a tenth of the scale, rounded to a quarter.
    """

    def __init__(self, store, name="ann", care=6.0, is_random=False, seed=0):
        self.store, self.name, self.care, self.is_random = store, name, care, is_random
        self.rng = np.random.default_rng(seed)

    def answer_one(self):
        item = self.store.next(self.name)
        if item is None:
            return False
        tastes = np.array([mood(item.prompt + text) for text in item.completions])
        if self.is_random:
            tastes = self.rng.random(len(tastes))
        if item.kind == "score":
            low, high = item.scale
            wanted = low + (high - low) * (tastes + 0.1 * self.rng.normal(size=len(tastes)))
            self.store.score(item, np.clip(np.round(4 * wanted) / 4, low, high).tolist())
            return True
        order = np.argsort(-(self.care * tastes + self.rng.gumbel(size=len(tastes))))
        if item.kind == "rank":
            self.store.rank(item, order.tolist())
        else:
            self.store.choose(item, "ab"[order[0]])
        return True

    def answer_all(self):
        n = 0
        while self.answer_one():
            n += 1
        return n


class Crowd(threading.Thread):
    """A rater that answers in a thread of its own until the `with` block ends."""

    def __init__(self, rater):
        super().__init__(daemon=True)
        self.rater, self.n_answers = rater, 0
        self._stop_asked = threading.Event()

    def run(self):
        while not self._stop_asked.is_set():
            if self.rater.answer_one():
                self.n_answers += 1
            else:
                self._stop_asked.wait(0.02)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self._stop_asked.set()
        self.join()
