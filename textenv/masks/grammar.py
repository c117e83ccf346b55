"""Masks that constrain a turn to a regular expression, a JSON schema or a grammar.

The engine is llguidance 1.9 (MIT, 8 MB, requires nothing), chosen over xgrammar 0.2.8 and outlines-core 0.2.14 (both
Apache 2.0). All three take the bytes of any tokenizer and are deterministic. With 152,000 tokens on one CPU core:

=============  ==========================  ==============  ==============  ==================  ==================
engine         requires                    compile schema  compile regex   mask of the schema  mask of the regex
=============  ==========================  ==============  ==============  ==================  ==================
llguidance     nothing                     3 ms            2 ms            0.09 ms             2.0 ms
xgrammar       torch, transformers, triton 3.5 s           4.3 s           0.16 ms             9.3 ms
outlines-core  nothing                     7.3 s           2.2 s           0.33 ms             0.17 ms
=============  ==========================  ==============  ==============  ==================  ==================

(The schema has two strings, an integer and an array; the regex is a phrase and then `[a-z ]{5,60}`, which allows
thousands of tokens.) outlines-core computes every state in advance, so it supports neither recursive schemas nor
grammars.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from textenv.checks.extras import needs
from textenv.episodes.completion import Preds
from textenv.episodes.scores import describe
from textenv.masks.token_masks import Allowed, MaskError
from textenv.prompts.prompts import Prompt
from textenv.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# By default llguidance forces a text that is certain to follow into a single tokenization, that of its own tokenizer.
HEADER = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class GrammarMask:
    r"""A mask that constrains each turn of the policy to a context-free grammar.

    The grammar describes the text of the turn, as in `preds.text`, without the end token but with the stop string.
    After a prompt, the first token of a word tokenizer writes a space. The env's stop ids are allowed once the text is
    complete, special tokens never. A text that `max_new_tokens` cuts short may be incomplete. After a forbidden token
    nothing is allowed.

    Args:
        grammar: A grammar in llguidance's dialect of Lark; its first rule is `start`.

    Raises:
        ValueError: If llguidance cannot read the grammar; the message shows the position.
        ImportError: If llguidance is not installed: `pip install "textenv[grammar]"`.

    Example:
        >>> from textenv import CharTokenizer, TextEnv
        >>> mask = GrammarMask('start: "a" start "b" | "b"')
        >>> env = TextEnv(["b"], CharTokenizer("ab"), reward=lambda prompt, preds, done: 0.0, mask=mask)
        >>> _ = env.reset(seed=0), env.step(2)
        >>> env.action_masks()
        array([ True, False, False])
    """

    grammar: str

    def __post_init__(self) -> None:
        _check(self._lark(), self)

    def _lark(self) -> str:
        return HEADER + self.grammar

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        return _Matching(self, self._lark(), vocabulary)


@dataclass(frozen=True)
class RegexMask:
    r"""A mask that constrains each turn of the policy to full matches of a regular expression; see `GrammarMask`.

    Args:
        pattern: A regular expression in the syntax of Rust's `regex` crate: no look-around, no back references.

    Raises:
        ValueError: If llguidance cannot read the pattern.
        ImportError: If llguidance is not installed: `pip install "textenv[grammar]"`.

    Example:
        >>> RegexMask(r"(yes|no)\.")
        RegexMask(pattern='(yes|no)\\.')
    """

    pattern: str

    def __post_init__(self) -> None:
        _check(self._lark(), self)

    def _lark(self) -> str:
        return f"{HEADER}start: /{_llguidance().regex_to_lark(self.pattern)}/"

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        return _Matching(self, self._lark(), vocabulary)


@dataclass(frozen=True)
class JSONSchemaMask:
    """A mask that constrains each turn of the policy to JSON of a schema; see `GrammarMask`.

    Args:
        schema: The JSON schema, a dict or its JSON text.
        whitespace: Whether the policy may write white space between the parts of the JSON.

    Raises:
        ValueError: If llguidance cannot read the schema.
        ImportError: If llguidance is not installed: `pip install "textenv[grammar]"`.

    Example:
        >>> JSONSchemaMask({"type": "integer"})
        JSONSchemaMask(schema='{"type": "integer"}', whitespace=False)
    """

    schema: Mapping[str, Any] | str
    whitespace: bool = False

    def __post_init__(self) -> None:
        schema = self.schema if isinstance(self.schema, str) else json.dumps(self.schema)
        object.__setattr__(self, "schema", schema)  # a text, since the mask is hashed: a key of `Vocabulary.remember`
        _check(self._lark(), self)

    def _lark(self) -> str:
        assert isinstance(self.schema, str), "`__post_init__` made the schema a text"
        schema = json.loads(self.schema)
        if not isinstance(schema, dict):
            raise ValueError(f"Expected a JSON schema to be a dict, got {schema!r:.80}.")
        options = {"whitespace_flexible": self.whitespace, **schema.get("x-guidance", {})}
        return f"{HEADER}start: %json {json.dumps({**schema, 'x-guidance': options})}"

    def start(self, vocabulary: Vocabulary) -> Allowed:
        """Return the function of one lane."""
        return _Matching(self, self._lark(), vocabulary)


def _llguidance() -> Any:
    with needs("grammar", "llguidance", "RegexMask, JSONSchemaMask and GrammarMask"):
        import llguidance
    return llguidance


def _check(lark: str, mask: GrammarMask | RegexMask | JSONSchemaMask) -> None:
    # llguidance finds some errors only with a tokenizer, so it gets one of a single token.
    matcher = _llguidance().LLMatcher(_engine_tokenizer([b"a"]), lark, log_level=0)
    if matcher.is_error():
        raise ValueError(f"Expected a grammar that llguidance can read, got {mask!r}: {matcher.get_error()}")


class _Tokens:
    """The tokens as bytes, with the attributes that `llguidance.TokenizerWrapper` reads.

    An additional last token represents all stop ids, since llguidance has a single end token.
    """

    bos_token_id = None

    def __init__(self, pieces: list[bytes]) -> None:
        self.tokens = [*pieces, b""]
        self.eos_token_id = len(pieces)
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        """Return no tokens: llguidance encodes only texts that it forces, and `HEADER` switches forcing off."""
        return []


def _engine_tokenizer(pieces: list[bytes]) -> LLTokenizer:
    llguidance = _llguidance()
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(pieces)))


class _Matching:
    """The mask function of one lane, whose matcher reads only the tokens that are new since the last call.

    If the turn does not begin with the tokens that the matcher has read, a new matcher reads it from its start.
    """

    def __init__(self, mask: GrammarMask | RegexMask | JSONSchemaMask, lark: str, vocabulary: Vocabulary) -> None:
        self.mask, self.lark, self.vocabulary = mask, lark, vocabulary
        self.stops = vocabulary.pack(vocabulary.stop_ids)
        self.matcher: LLMatcher | None = None
        self.ids: list[int] = []  # the tokens that the matcher has read

    def __call__(self, prompt: Prompt, preds: Preds) -> np.ndarray:
        ids = preds.turn_ids.tolist()
        if self.matcher is None or ids[: len(self.ids)] != self.ids:
            self.matcher, self.ids = self._fresh().deep_copy(), []  # another episode or turn
        new = ids[len(self.ids) :]
        n_read = self.matcher.try_consume_tokens(new)  # fewer than `new` if one of them is forbidden
        self.ids += new[:n_read]
        # (W,), or one word longer for the additional token; lowest bit first, as in `Vocabulary.pack`
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        if self.matcher.is_error():
            error, self.matcher = self.matcher.get_error().partition("\n")[0], None
            raise MaskError(f"{self.mask!r} failed: {error} ({describe(prompt, preds)}).")
        if n_read < len(new):
            return np.zeros_like(self.stops)
        # The bit after the vocabulary's last token is that of the additional end token, see `_Tokens`.
        is_complete = bits[self.vocabulary.size // 8] >> self.vocabulary.size % 8 & 1
        return bits[: len(self.stops)] | self.stops if is_complete else bits[: len(self.stops)]

    def _fresh(self) -> LLMatcher:
        """Return a matcher that has read nothing; the vocabulary caches it, since compiling takes milliseconds."""
        stop = set(self.vocabulary.stop_ids)
        remember, pieces = self.vocabulary.remember, self.vocabulary.pieces
        tokenizer = remember(
            _Tokens, lambda: _engine_tokenizer([b"" if i in stop else piece for i, piece in enumerate(pieces)])
        )
        return remember(self.mask, lambda: _llguidance().LLMatcher(tokenizer, self.lark, log_level=0))
