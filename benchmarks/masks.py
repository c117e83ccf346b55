"""The cost of masks: the time of a masked step in a rollout, and the bytes that hold the masks.

    python benchmarks/masks.py [--quick]

The same model takes the same rollout with MaskablePPO under a mask, and with PPO without one, in turns; a step is all
of it: the mask, the model, the env and the buffer. A constant mask bans one token. The JSON schema has a string of at
most 8 characters, an integer and a list of such strings: a step allows from one token to nearly all.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice, product
from string import ascii_letters, digits, printable

from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from work import Row, Settings, Work, pairs, rollout, run_script

from agents.models.token_sets import TokenSets
from textenv import BannedMask, JSONSchemaMask, TokenMask

VOCABULARIES = (50_000, 152_000)
NEW_TOKENS = 16
MOST = 2.0  # the target: a masked step takes at most twice as long
MOST_BYTES = 0.05  # of the bytes that sb3-contrib stores
TEXT = {"type": "string", "maxLength": 8}
SCHEMA = {
    "type": "object",
    "properties": {"a": TEXT, "b": {"type": "integer"}, "c": {"type": "array", "items": TEXT}},
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    return [row for size in VOCABULARIES for row in both_masks(settings, size)]


def both_masks(settings: Settings, vocab_size: int) -> list[Row]:
    """Return the rows of a vocabulary: a mask that stays the same, and one that depends on the text."""
    work = settings.work(vocab_size=vocab_size, new_tokens=NEW_TOKENS)
    tokenizer = WordTokenizer(work.vocab_size)
    bare = work.agent(tokenizer=tokenizer, stop_ids=[0])
    rows = compare(settings, work, bare, tokenizer, "a constant mask", BannedMask([1]))
    if find_spec("llguidance") is None:
        claim = f"masked step, a JSON schema, V={work.vocab_size:,}"
        return [*rows, Row.missing(claim, 'pip install "textenv[grammar]"', "-")]
    return [*rows, *compare(settings, work, bare, tokenizer, "a JSON schema", JSONSchemaMask(SCHEMA))]


def compare(
    settings: Settings, work: Work, bare: PPO, tokenizer: WordTokenizer, kind: str, mask: TokenMask
) -> list[Row]:
    """Alternate rollouts without and with a mask, and count what the last one has stored."""
    masked = work.agent(tokenizer=tokenizer, stop_ids=[0], mask=mask, algorithm=MaskablePPO)
    result = pairs(lambda: rollout(bare), lambda: rollout(masked), settings.n_pairs, settings.device)
    buffer = masked.rollout_buffer
    assert buffer.is_masked
    stored = (n_bytes(buffer.token_sets) + buffer.allowed.nbytes) / buffer.allowed.size
    stock = 4 * work.vocab_size
    claim = f"{kind}, V={work.vocab_size:,}"
    steps = [f"{1000 * work.n_lanes / speed:,.1f} ms/step" for speed in (result.b, result.a)]
    share = stored / stock
    return [
        Row(
            f"masked step, {claim}, time against no mask",
            *steps,
            result.ratio,
            result.spread,
            f"<= {MOST:.2f}x (less is better)",
            result.ratio <= MOST,
        ),
        Row(
            f"masks stored, {claim}",
            f"{stored:,.1f} bytes/token; {len(buffer.token_sets.sets) - 1:,} sets for {buffer.allowed.size:,} tokens",
            f"{stock:,} bytes/token (sb3-contrib's float32)",
            share,
            "-",
            f"<= {MOST_BYTES:.2f} (less is better)",
            share <= MOST_BYTES,
        ),
    ]


def n_bytes(sets: TokenSets) -> int:
    """Return the bytes of the sets, and of the keys by which they are looked up."""
    return sum(allowed.nbytes for allowed in sets.sets) + sum(map(len, sets._numbers))


class WordTokenizer:
    """A tokenizer of characters and, for the rest of the vocabulary, of a space with three letters or digits."""

    eos_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        words = (" " + "".join(word) for word in product(ascii_letters + digits, repeat=3))
        characters = dict.fromkeys('{}[]":,-' + printable)  # JSON's characters first, for the smallest vocabulary
        self.words = ["", *islice((*characters, *words), vocab_size - 1)]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.words.index(character) for character in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(self.words[token] for token in token_ids)


if __name__ == "__main__":
    run_script(__doc__, measure)
