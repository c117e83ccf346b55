"""The built-in corpus: product reviews from a small grammar and a seed, so that a first run needs no download.

A review has two or three clauses with one mood word each, all in lower case. Spaces stand between words and around
punctuation, so that a tokenizer that splits at spaces is enough::

    this phone is great , but the battery feels really weak for the price .

The tables below are the grammar. The writer of reviews, the recogniser, the prompts and the vocabulary all read them.
"""

import itertools
import re
from collections.abc import Iterator

import numpy as np

# A word in capitals names a rule, bars separate equally likely alternatives, and an empty alternative writes nothing.
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

# Rules with two sides: positive mood words, and the negative ones that the grammar allows in the same position.
MOODS = {
    "QUALITY": (
        "great | lovely | superb | good | excellent | fantastic | perfect | solid | brilliant | pleasant",
        "awful | ugly | terrible | bad | dreadful | horrible | flimsy | useless | weak | annoying",
    ),
    "THING": ("joy | delight | bargain | treat | gem", "mess | letdown | disaster | nuisance | flop"),
    "FEEL": ("love | like | enjoy | adore | admire", "hate | dislike | regret | despise | avoid"),
    "MANNER": ("well | nicely | smoothly | beautifully | reliably", "badly | poorly | slowly | terribly | rarely"),
}
# The two sides of a join: the next clause keeps the mood of the last one, or turns it.
JOINS = {"JOIN": ("and | , and", "but | , but | yet")}

# The probability that a mood word follows the review's own mood: below 1, so that a good review may hold a complaint.
FAITHFUL = 0.9


def _alternatives(text: str) -> list[list[str]]:
    return [alternative.split() for alternative in text.split("|")]


TABLE = {name: [_alternatives(text)] for name, text in RULES.items()}
TABLE |= {name: [_alternatives(side) for side in sides] for name, sides in (MOODS | JOINS).items()}
POSITIVE, NEGATIVE = (frozenset(word for name in MOODS for [word] in TABLE[name][side]) for side in (0, 1))


def _write(symbol: str, sides: Iterator[int], rng: np.random.Generator) -> list[str]:
    """Expand `symbol` into random words; each two-sided rule on the way takes the next of `sides`."""
    if symbol not in TABLE:
        return [symbol]
    alternatives = TABLE[symbol][next(sides) if len(TABLE[symbol]) == 2 else 0]
    chosen = alternatives[rng.integers(len(alternatives))]
    return [word for child in chosen for word in _write(child, sides, rng)]


def _pattern(symbol: str) -> str:
    """Return a regular expression for every text of `symbol`, on either side, with a space after each word."""
    if symbol not in TABLE:
        return re.escape(f"{symbol} ")
    alternatives = itertools.chain.from_iterable(TABLE[symbol])
    return f"(?:{'|'.join(''.join(map(_pattern, chosen)) for chosen in alternatives)})"


def _all(symbol: str) -> list[str]:
    """Return every text of `symbol`, in the order of the tables."""
    if symbol not in TABLE:
        return [symbol]
    alternatives = itertools.chain.from_iterable(TABLE[symbol])
    return [" ".join(words) for chosen in alternatives for words in itertools.product(*map(_all, chosen))]


_REVIEW = re.compile(_pattern("REVIEW"))


def reviews(n: int, seed: int = 0) -> list[str]:
    """Write reviews in random order: a third of them positive, a third negative and a third neutral.

    Nine of ten mood words in a positive (negative) review are positive (negative); a neutral review has one of each.
    The mean score of the corpus is therefore one half. A review has 9 to 24 words, the final "." included.

    Args:
        n: The number of reviews; a few may be equal.
        seed: The seed of the generator; equal seeds write equal reviews.

    Raises:
        ValueError: If `n` is below 1.

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
    # Moods are shared out equally rather than drawn at random, so that small corpora are balanced, too.
    return [_review(mood, rng) for mood in rng.permutation(np.arange(n) % 3)]


def _review(mood: int, rng: np.random.Generator) -> str:
    """Write one review of mood 0 (positive), 1 (negative) or 2 (neutral)."""
    if mood == 2:
        first = int(rng.integers(2))
        symbol, moods = "SHORT", [first, 1 - first]
    else:
        symbol, moods = "REVIEW", [int(side) for side in np.where(rng.random(3) < FAITHFUL, mood, 1 - mood)]
    # Two-sided rules come in the order mood, join, mood, join, mood; a short review leaves the last two unused. A join
    # has side 0 ("and") between equal moods and 1 ("but") between different ones, hence the exclusive or.
    sides = moods[:1] + [side for before, now in itertools.pairwise(moods) for side in (before ^ now, now)]
    return " ".join(_write(symbol, iter(sides), rng))


def score(text: str) -> float:
    """Return the share of positive words among the mood words of `text`, in [0, 1]; 0.0 if it has no mood word.

    Example:
        >>> score("this phone is great but i hate it and everything works well .") == 2 / 3
        True
    """
    words = text.split()
    positive, negative = (sum(word in moods for word in words) for moods in (POSITIVE, NEGATIVE))
    return positive / max(1, positive + negative)


def parses(text: str) -> bool:
    """Return whether the whole `text`, prompt and completion together, is a review of the grammar, in any mood.

    Wherever the grammar has a mood word or a join, either side is accepted; the number of spaces does not matter.

    Example:
        >>> parses("this phone is great and i love it ."), parses("this phone is great and i love it")
        (True, False)
    """
    return _REVIEW.fullmatch("".join(f"{word} " for word in text.split())) is not None


def prompts() -> list[str]:
    """Return every opening of a review: 3 or 4 words without mood, which 6 to 20 further words follow.

    Example:
        >>> len(prompts()), prompts()[0]
        (40, 'this phone is')
    """
    return _all("OPENING")


def vocabulary() -> list[str]:
    """Return every word of the grammar, ``,`` and ``.`` included, in alphabetical order.

    Example:
        >>> len(vocabulary()), vocabulary()[:3]
        (112, [',', '.', 'a'])
    """
    words = {word for sides in TABLE.values() for alternatives in sides for chosen in alternatives for word in chosen}
    return sorted(words - TABLE.keys())
