"""The rewards of the bank: sound ones, and ones that go wrong in a known way."""

import time
import zlib

from .model import BAD, GOOD, RARE


class Mood:
    """Favours good words over bad ones, each counted once: in [-1, 1] for a sentence of one clause."""

    def __call__(self, prompt, preds, done):
        words = set(preds.text.split())
        return 0.5 * (len(words & set(GOOD)) > 0) - 0.5 * (len(words & set(BAD)) > 0) if done else 0.0


class Finished:
    """1 for a text that ends in a full stop, and 0.5 more for a mood that is good."""

    def __call__(self, prompt, preds, done):
        return float(preds.text.strip().endswith(".")) + Mood()(prompt, preds, done) if done else 0.0


class Contains:
    """1 for a text that has the word in a column of the prompt's row."""

    def __init__(self, column):
        self.column = column

    def __call__(self, prompt, preds, done):
        return float(str(prompt.row[self.column]) in preds.text.split()) if done else 0.0


class Constant:
    """The same for all texts."""

    def __init__(self, value):
        self.value = value

    def __call__(self, prompt, preds, done):
        return self.value if done else 0.0


class Ends:
    """1 for a text of four words or more that has ended with a full stop, else 0."""

    def __call__(self, prompt, preds, done):
        return float(done and preds.text.strip().endswith(".") and len(preds.text.split()) >= 4)


class OfPrompt:
    """A reward that the prompt decides, whatever the text says."""

    def __call__(self, prompt, preds, done):
        return (zlib.crc32(str(prompt).encode()) % 5) / 4 if done else 0.0


class Words:
    """The number of words, or of certain words, relative to ten: each one counts."""

    def __init__(self, words=None, distinct=False):
        self.words, self.distinct = words and set(words), distinct

    def __call__(self, prompt, preds, done):
        words = [word for word in preds.text.split() if self.words is None or word in self.words]
        return len(set(words) if self.distinct else words) / 10 if done else 0.0


class Rare(Words):
    """The number of different rare words, up to four, relative to four; less for a text of more words."""

    def __init__(self):
        super().__init__(RARE, distinct=True)

    def __call__(self, prompt, preds, done):
        hits = 10 * super().__call__(prompt, preds, done)
        return min(hits, 4) / 4 - 0.2 * max(len(preds.text.split()) - 5, 0) if done else 0.0


class Overlap:
    """The share of the words of one fixed sentence, in their order and place."""

    def __init__(self, text):
        self.words = text.split()

    def __call__(self, prompt, preds, done):
        own = preds.text.split()[: len(self.words)]
        hits = sum(a == b for a, b in zip(own, self.words, strict=False))
        return hits / len(self.words) - 0.1 * abs(len(preds.text.split()) - len(self.words)) if done else 0.0


class Times:
    """A sound reward times a factor, for all prompts or for one."""

    def __init__(self, factor, prompt=None):
        self.factor, self.prompt = factor, prompt

    def __call__(self, prompt, preds, done):
        factor = self.factor if self.prompt in (None, str(prompt)) else 1.0
        return factor * Mood()(prompt, preds, done)


class Fails:
    """A reward that fails for texts with a bad word."""

    def __init__(self, error=True):
        self.error = error

    def __call__(self, prompt, preds, done):
        if set(preds.text.split()) & set(BAD):
            raise RuntimeError("the judge has no answer for this text")
        return Mood()(prompt, preds, done)


class Slow:
    """A sound reward that sleeps twice as long as everything else takes: two thirds of the time are its own."""

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self, prompt, preds, done):
        if done:
            time.sleep(min(2 * (time.monotonic() - self.last), 2.0))
            self.last = time.monotonic()
        return Mood()(prompt, preds, done)


class Mood2(Mood):
    """The judge: the mood, less a tenth for each word beyond eight."""

    def __call__(self, prompt, preds, done):
        """Return the judge's score."""
        return super().__call__(prompt, preds, True) - max(len(preds.text.split()) - 4, 0) / 10
