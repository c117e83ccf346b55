"""The built-in corpus: a small seeded grammar of product reviews, so that the main job runs with no download.

A review is two or three clauses with one mood word each, in lower-case words with spaces between (punctuation is a
word too), so that a tokenizer that splits at spaces is enough::

    this phone is great , but the battery feels really weak for the price .

The tables below are the grammar, and the only place where it is written: the writer of reviews, the recogniser, the
prompts and the vocabulary are all read from them.
"""

import itertools
import re
from collections.abc import Iterator

import numpy as np

# Capitals name a rule, bars divide its alternatives (equally likely), and an empty alternative writes nothing.
RULES = {
    "REVIEW": "SHORT | LONG",
    "SHORT": "OPENING VERDICT JOIN CLAUSE TAIL .",
    "LONG": "OPENING VERDICT JOIN CLAUSE JOIN CLAUSE TAIL .",
    "OPENING": "this PRODUCT is | the PRODUCT was | my new PRODUCT is | our old PRODUCT was",
    "PRODUCT": "phone | camera | laptop | tablet | watch | radio | printer | speaker | kettle | lamp",
    "VERDICT": "DEGREE QUALITY | DEGREE QUALITY | a THING",
    "CLAUSE": "the PART LOOKS DEGREE QUALITY | the PART is a THING | WHO FEEL OBJECT | everything RUNS MANNER",
    "PART": "screen | battery | sound | design | case | cable | manual | handle | lens | finish | charger",
    "LOOKS": "is | looks | feels | seems",
    "DEGREE": "| very | really | quite",
    "WHO": "i | we | they | people",
    "OBJECT": "it | its PART",
    "RUNS": "works | runs | performs",
    "TAIL": "| for the price | in daily use | so far | every day | at home",
}

# Rules with two sides: positive and negative mood words that may stand in each other's place.
MOODS = {
    "QUALITY": (
        "great | lovely | superb | good | excellent | fantastic | perfect | solid | brilliant | pleasant",
        "awful | ugly | terrible | bad | dreadful | horrible | flimsy | useless | weak | annoying",
    ),
    "THING": ("joy | delight | bargain | treat | gem", "mess | letdown | disaster | nuisance | flop"),
    "FEEL": ("love | like | enjoy | adore | admire", "hate | dislike | regret | despise | avoid"),
    "MANNER": ("well | nicely | smoothly | beautifully | reliably", "badly | poorly | slowly | terribly | rarely"),
}
# The sides of a join: the mood of the clause before goes on, or it turns.
JOINS = {"JOIN": ("and | , and", "but | , but | yet")}

# Share of mood words that follow the review's own mood, so that a good review may have a complaint in it.
FAITHFUL = 0.9


def _alternatives(text: str) -> list[list[str]]:
    return [alternative.split() for alternative in text.split("|")]


TABLE = {name: [_alternatives(text)] for name, text in RULES.items()}
TABLE |= {name: [_alternatives(side) for side in sides] for name, sides in (MOODS | JOINS).items()}
POSITIVE, NEGATIVE = (frozenset(word for name in MOODS for [word] in TABLE[name][side]) for side in (0, 1))


def _write(symbol: str, sides: Iterator[int], rng: np.random.Generator) -> list[str]:
    """Writes `symbol` as words, at random; every two-sided rule on the way takes the next of `sides`."""
    if symbol not in TABLE:
        return [symbol]
    alternatives = TABLE[symbol][next(sides) if len(TABLE[symbol]) == 2 else 0]
    chosen = alternatives[rng.integers(len(alternatives))]
    return [word for part in chosen for word in _write(part, sides, rng)]


def _pattern(symbol: str) -> str:
    """Returns the regular expression of all that `symbol` can write on either side, a space after each word."""
    if symbol not in TABLE:
        return re.escape(f"{symbol} ")
    alternatives = itertools.chain.from_iterable(TABLE[symbol])
    return f"(?:{'|'.join(''.join(map(_pattern, chosen)) for chosen in alternatives)})"


def _all(symbol: str) -> list[str]:
    """Returns every text that `symbol` can write, in the order of the tables."""
    if symbol not in TABLE:
        return [symbol]
    alternatives = itertools.chain.from_iterable(TABLE[symbol])
    return [" ".join(words) for chosen in alternatives for words in itertools.product(*map(_all, chosen))]


_REVIEW = re.compile(_pattern("REVIEW"))


def reviews(n: int, seed: int = 0) -> list[str]:
    """Writes reviews, a third each of positive, negative and neutral mood, in random order.

    In a positive (negative) review nine mood words of ten are positive (negative); a neutral one has one of each.
    The mean score of the corpus is therefore one half. A review has 9 to 24 words, the final "." among them.

    Args:
        n: How many reviews; a few may be alike.
        seed: Equal seeds write equal reviews.

    Example:
        >>> corpus = reviews(3000, seed=1)
        >>> all(parses(review) for review in corpus)
        True
        >>> abs(sum(map(score, corpus)) / len(corpus) - 0.5) < 0.02
        True
    """
    if n < 1:
        raise ValueError(f"Expected `n` to be positive, got {n}.")
    rng = np.random.default_rng(seed)
    # Counted out rather than drawn, so that small corpora are balanced too.
    return [_review(mood, rng) for mood in rng.permutation(np.arange(n) % 3)]


def _review(mood: int, rng: np.random.Generator) -> str:
    """Writes one review of mood 0 (positive), 1 (negative) or 2 (neutral)."""
    if mood == 2:
        first = int(rng.integers(2))
        symbol, moods = "SHORT", [first, 1 - first]
    else:
        symbol, moods = "REVIEW", [int(side) for side in np.where(rng.random(3) < FAITHFUL, mood, 1 - mood)]
    # In the order of the text: mood, join, mood, join, mood. A short review leaves the last two unread.
    sides = moods[:1] + [side for before, now in itertools.pairwise(moods) for side in (before ^ now, now)]
    return " ".join(_write(symbol, iter(sides), rng))


def score(text: str) -> float:
    """Returns positive / (positive + negative) mood words in `text`; 0.0 where it has neither.

    Example:
        >>> score("this phone is great but i hate it and everything works well .") == 2 / 3
        True
    """
    words = text.split()
    positive, negative = (sum(word in moods for word in words) for moods in (POSITIVE, NEGATIVE))
    return positive / max(1, positive + negative)


def parses(text: str) -> bool:
    """Returns whether the whole `text`, prompt and completion, is a review of the grammar, whatever its mood.

    Mood words of one slot stand in for each other, and so do the joins; how the words are spaced does not matter.

    Example:
        >>> parses("this phone is great and i love it ."), parses("this phone is great and i love it")
        (True, False)
    """
    return _REVIEW.fullmatch("".join(f"{word} " for word in text.split())) is not None


def prompts() -> list[str]:
    """Returns every opening, of 3 or 4 words and no mood; each review begins with one and goes on for 6 to 20 words.

    Example:
        >>> len(prompts()), prompts()[0]
        (40, 'this phone is')
    """
    return _all("OPENING")


def vocabulary() -> list[str]:
    """Returns every word (and ``,`` and ``.``) that a review may have, sorted.

    Example:
        >>> len(vocabulary()), vocabulary()[:3]
        (112, [',', '.', 'a'])
    """
    words = {word for sides in TABLE.values() for alternatives in sides for chosen in alternatives for word in chosen}
    return sorted(words - TABLE.keys())
