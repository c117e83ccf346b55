"""Masks of a pattern, a schema or a grammar: checked by enumeration, against a slow twin, and on random walks."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from agents import bpe_tokenizer, word_tokenizer
from textenv import CharTokenizer, GrammarMask, JSONSchemaMask, MaskError, RegexMask, TextEnv
from textenv.lanes.lanes import Lanes
from textenv.masks.lane_masks import LaneMasks

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Pieces:
    """A tokenizer whose tokens are given texts, possibly of several characters or repeated; token 0 ends a text."""

    eos_token_id = 0

    def __init__(self, texts):
        self.texts = ["", *texts]

    def __len__(self):
        return len(self.texts)

    def encode(self, text, *, add_special_tokens=True):
        return [self.texts.index(char) for char in text]

    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(self.texts[i] for i in token_ids)


def make(mask, tokenizer, prompts=("a",), max_new_tokens=60, **kwargs):
    return TextEnv(prompts, tokenizer, reward=lambda prompt, preds, done: 0.0, max_new_tokens=max_new_tokens, mask=mask,
                   **kwargs)  # fmt: skip


def walk(env, random, n_tokens, prefer=None):
    """Write random allowed tokens, mostly those of `prefer`; return the text and the reason of its end."""
    env.reset()
    for _ in range(n_tokens):
        allowed = env.action_masks()
        if prefer is not None and (allowed & prefer).any() and random.random() < 0.8:
            allowed &= prefer
        _, _, terminated, _, info = env.step(random.choice(np.flatnonzero(allowed)))
        if terminated:
            return info["text"], str(info["end_reason"])
    raise AssertionError("the episode did not end")


@pytest.mark.parametrize(
    "pattern", ["(ab|ba)*", "a+b?", "ab(ab)?b", "a/b|aa", "(a|b){2,3}", "[^b]b", "abababb", "", "a{3}|/{2}"]
)
def test_regex_is_reachability_by_enumeration(pattern):
    """A token is allowed if some text that continues with it matches; a stop id, if the text itself matches."""
    tokenizer, longest = Pieces(["a", "b", "/", "ab", "bab", "a"]), 8
    texts = ["".join(chars) for n in range(longest + 1) for chars in itertools.product("ab/", repeat=n)]
    matching = {text for text in texts if re.fullmatch(pattern, text)}
    prefixes = {text[:n] for text in matching for n in range(len(text) + 1)}
    masks = LaneMasks((RegexMask(pattern),), make(None, tokenizer).vocabulary, 1)
    lanes = Lanes(make(RegexMask(pattern), tokenizer), 1)
    waiting, n_states = [([], "")], 0
    while waiting:
        ids, text = waiting.pop()
        if len(text) > longest - 4 or text not in prefixes:
            continue
        lanes.reset(seed=0)
        for token in ids:
            lanes.step(np.array([token]))
        allowed = masks.allowed([(lanes.prompts[0], lanes.preds(0))])[0]
        expected = [text in matching, *(text + piece in prefixes for piece in tokenizer.texts[1:])]
        assert allowed.tolist() == expected, (pattern, text, allowed)
        n_states += 1
        waiting += [([*ids, i], text + tokenizer.texts[i]) for i in range(1, len(tokenizer)) if allowed[i]]
    assert n_states


def test_grammar_by_hand():
    env = make(GrammarMask('start: "a" start "b" | "c"'), CharTokenizer("abc"))
    env.reset(seed=0)
    seen = []
    for token in [1, 1, 3, 2, 2]:
        seen.append(np.flatnonzero(env.action_masks()).tolist())
        env.step(token)
    assert seen == [[1, 3], [1, 3], [1, 3], [2], [2]]
    assert np.flatnonzero(env.action_masks()).tolist() == [0]


def test_several_stop_ids_end_a_whole_text_and_none_writes_its_character():
    env = make(RegexMask("ab?"), CharTokenizer("abc"), stop_ids=[0, 2])  # "b" is a stop id, so it is never text
    env.reset(seed=0)
    assert np.flatnonzero(env.action_masks()).tolist() == [1]
    env.step(1)
    assert np.flatnonzero(env.action_masks()).tolist() == [0, 2]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_json_walks_parse_and_fit(kind):
    if kind == "bpe":
        tokenizer = bpe_tokenizer([json.dumps({"name": "ann", "age": 3, "tags": ["red", "blue"]})] * 4, 300)
    else:
        tokenizer = CharTokenizer('abcdefghijklmnopqrstuvwxyz0123456789{}[]":, \\-.')
    env = make(JSONSchemaMask(SCHEMA), tokenizer, max_new_tokens=200)
    prefer = np.array([i == 0 or piece in (b'"', b"}", b"]") for i, piece in enumerate(env.vocabulary.pieces)])
    random = np.random.default_rng(0)
    ages = set()
    for _ in range(100):
        text, reason = walk(env, random, 200, prefer)
        value = json.loads(text)
        assert reason == "eos" and list(value) == ["name", "age", "tags"]
        assert isinstance(value["name"], str) and len(value["name"]) <= 6
        assert type(value["age"]) is int and 0 <= value["age"] <= 150
        assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"red", "blue"}
        ages.add(value["age"])
    assert len(ages) > 10


def test_json_walks_do_not_parse_without_the_mask():
    """The negative control: the same walk with nothing masked."""
    tokenizer = CharTokenizer('abcdefghijklmnopqrstuvwxyz0123456789{}[]":, \\-.')
    env, random, n_good = make(lambda prompt, preds: np.ones(48, bool), tokenizer), np.random.default_rng(0), 0
    for _ in range(20):
        text, _ = walk(env, random, 60)
        try:
            n_good += isinstance(json.loads(text), dict)
        except ValueError:
            continue
    assert n_good == 0


def test_json_whitespace_is_a_choice():
    tokenizer = CharTokenizer('{}":0123456789a ')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    space = tokenizer.encode(" ")[0]
    for whitespace in (False, True):
        env = make(JSONSchemaMask(schema, whitespace=whitespace), tokenizer)
        env.reset(seed=0)
        env.step(tokenizer.encode("{")[0])
        assert env.action_masks()[space] == whitespace


def test_words_include_their_leading_space():
    tokenizer = word_tokenizer(["the", "film", "was", "good", "bad"])
    env = make(RegexMask("( good| bad)+"), tokenizer, ["the film was"], max_new_tokens=4)
    texts = {walk(env, np.random.default_rng(i), 4)[0] for i in range(9)}
    assert " good" in {text[:5] for text in texts} and all(re.fullmatch("( good| bad)+", text) for text in texts)


def test_incremental_equals_from_scratch_in_any_order_of_calls():
    """Lanes that are refilled, or asked rarely, twice or in another order, get the result of a new mask."""
    tokenizer = bpe_tokenizer(["abc abd 12 bac"] * 4, 270)
    env = make(RegexMask(r"([a-d]+ ?|[0-9]{1,3},)+"), tokenizer, max_new_tokens=5, prompts=["a", "b c", "d"])
    lanes, random = Lanes(env, 4), np.random.default_rng(0)
    lanes.reset(seed=0)
    for step in range(40):
        anew = LaneMasks(env.masks, env.vocabulary, 4)
        rows = [(lanes.prompts[lane], lanes.preds(lane)) for lane in range(4)]
        expected = anew.allowed(rows)
        if step % 3:
            lanes.allowed()
        if step % 5 == 4:  # another episode in between, on the same lanes' masks
            lanes.masks.allowed(rows[::-1])
        assert (lanes.allowed() == expected).all()
        lanes.step(np.array([random.choice(np.flatnonzero(row)) for row in expected]))


def test_a_step_reads_only_new_tokens():
    env = make(RegexMask("[ab]*"), CharTokenizer("ab"))
    lanes = Lanes(env, 1)
    lanes.reset(seed=0)
    lanes.allowed()
    (matching,) = lanes.masks.lanes[0]

    class Counting:
        n_read = 0

        def __init__(self, matcher):
            self.matcher = matcher

        def try_consume_tokens(self, tokens):
            Counting.n_read += len(tokens)
            return self.matcher.try_consume_tokens(tokens)

        def __getattr__(self, name):
            return getattr(self.matcher, name)

    matching.matcher = Counting(matching.matcher)
    for token in [1, 2, 2, 1, 1]:
        lanes.step(np.array([token]))
        lanes.allowed()
        lanes.allowed()
    assert Counting.n_read == 5


def test_a_forbidden_token_leaves_nothing_to_allow():
    env = make(RegexMask("ab"), CharTokenizer("ab"))
    env.reset(seed=0)
    env.action_masks()
    env.step(2)
    for _ in range(2):
        with pytest.raises(
            MaskError, match=r"none from \[RegexMask\(pattern='ab'\)\] \(lane 0, prompt 'a', text 'b'\)"
        ):
            env.action_masks()
    env.reset()
    assert np.flatnonzero(env.action_masks()).tolist() == [1]


def test_a_whole_text_needs_a_stop_id():
    env = make(RegexMask("a"), CharTokenizer("ab"), stop_ids=[])
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(MaskError, match="a stop id is missing"):
        env.action_masks()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RegexMask("("), "unclosed group"),
        (lambda: RegexMask("a(?=b)"), "look-around"),
        (lambda: RegexMask("a$b"), "lookaround"),
        (lambda: GrammarMask("start: foo"), "unknown name"),
        (lambda: JSONSchemaMask({"type": "nonsense"}), "nonsense"),
        (lambda: JSONSchemaMask("[]"), "to be a dict"),
    ],
)
def test_wrong_grammars_are_refused_at_once(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_import_textenv_loads_no_engine():
    code = "import sys, textenv; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
