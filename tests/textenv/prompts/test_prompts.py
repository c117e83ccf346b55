"""Prompts: their sources, rows, columns, truncation and order."""

import json

import numpy as np
import pytest

from textenv import CharTokenizer
from textenv.prompts.cursor import PromptCursor
from textenv.prompts.prompts import Prompt, PromptReader

BOS = 33  # the id after the 33 tokens of CharTokenizer


class BosTokenizer(CharTokenizer):
    """Puts BOS in front of a text and EOS behind it; `<s>` in a text is BOS too, as chat templates write it."""

    def __len__(self):
        return super().__len__() + 1

    def encode(self, text, *, add_special_tokens=True):
        pieces = [super(BosTokenizer, self).encode(piece) for piece in text.split("<s>")]
        body = pieces[0] + [token for piece in pieces[1:] for token in [BOS, *piece]]
        return [BOS, *body, self.eos_token_id] if add_special_tokens else body

    def decode(self, token_ids, *, skip_special_tokens=False):
        start = "" if skip_special_tokens else "<s>"
        decode = super().decode
        return "".join(
            start if token == BOS else decode([token], skip_special_tokens=skip_special_tokens) for token in token_ids
        )


@pytest.fixture
def reader(char_tokenizer):
    return PromptReader(char_tokenizer)


# Sources


def test_a_list_of_texts(make_env):
    prompts = make_env(["ab", "c"]).prompts
    assert prompts == ["ab", "c"] and [prompt.number for prompt in prompts] == [0, 1]
    assert [prompt.ids.tolist() for prompt in prompts] == [[1, 2], [3]]
    assert prompts[0].row == {"prompt": "ab"} and prompts[0].references == []


def test_rows_keep_their_columns(make_env):
    prompt = make_env([{"q": "ab", "label": 1}], prompt_column="q").prompts[0]
    assert prompt == "ab" and prompt.row == {"q": "ab", "label": 1}


def test_a_bare_text_becomes_the_prompt_column(make_env):
    assert make_env(["ab"], prompt_column="q").prompts[0].row == {"q": "ab"}


@pytest.mark.parametrize("ids", [[1, 0, 2], (1, 0, 2), np.array([1, 0, 2])], ids=["list", "tuple", "array"])
def test_token_ids_are_taken_as_they_are(make_env, ids):
    """B3: an end token among them is an ordinary one, though the text does not show it."""
    prompt = make_env([{"prompt": ids}]).prompts[0]
    assert prompt.ids.tolist() == [1, 0, 2] and prompt == "ab"


def test_any_sized_sequence_is_a_source(make_env):
    class DataSet:
        """A stand-in for `datasets.Dataset`: it has a length, and rows by number."""

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"prompt": "ab"[i], "i": i}

    assert [prompt.row["i"] for prompt in make_env(DataSet()).prompts] == [0, 1]


# Columns


@pytest.mark.parametrize(
    ("value", "references"),
    [
        ("xy", ["xy"]),
        (["x", "y"], ["x", "y"]),
        ([], []),
        (42, ["42"]),
        ([1, -2.5, "x"], ["1", "-2.5", "x"]),
        (np.array([1, 2]), ["1", "2"]),
        (np.float32(0.5), ["0.5"]),
    ],
)
def test_references_are_one_text_or_a_list(char_tokenizer, value, references):
    reader = PromptReader(char_tokenizer, references_column="answers")
    assert reader.read({"prompt": "a", "answers": value}).references == references


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (["x", None], "None"),
        (True, "True"),
        (float("nan"), "nan"),
        (["x", ["y"]], r"\['y'\]"),
        ({"text": ["x"]}, r"{'text': \['x'\]}"),
        (b"x", "b'x'"),
    ],
)
def test_references_that_are_none(char_tokenizer, value, shown):
    reader = PromptReader(char_tokenizer, references_column="answers")
    with pytest.raises(
        ValueError, match=f"texts or numbers as references in the column 'answers' of prompt 4, got {shown}"
    ):
        reader.read({"prompt": "a", "answers": value}, 4)


@pytest.mark.parametrize("value", [0, -1, "many", 2.5])
def test_a_row_with_a_limit_that_is_none(reader, value):
    with pytest.raises(ValueError, match="Expected the max_new_tokens of prompt 4 to be an integer of at least 1"):
        reader.read({"prompt": "a", "max_new_tokens": value}, 4)


def test_a_prompt_is_a_text_in_every_respect(reader):
    prompt = reader.read("a cab")
    assert (prompt.upper(), prompt.index("c"), prompt.count("a"), {prompt: 1}["a cab"]) == ("A CAB", 2, 2, 1)
    assert isinstance(prompt, str) and json.dumps(prompt) == '"a cab"'
    with pytest.raises(ValueError, match="read-only"):
        prompt.ids[0] = 1


def test_a_prompt_read_again_keeps_its_row(reader):
    again = reader.read(reader.read({"prompt": "a", "label": 1}, 3))
    assert again == "a" and again.row == {"prompt": "a", "label": 1} and again.number == -1


def test_a_row_is_a_copy_of_the_callers(reader):
    row = {"prompt": "a"}
    reader.read(row).row["more"] = 1
    assert row == {"prompt": "a"}


# What a model continues


def test_opening_special_tokens_are_kept_and_closing_ones_are_not():
    assert PromptReader(BosTokenizer()).read("ab").ids.tolist() == [BOS, 1, 2]


def test_a_text_that_begins_with_bos_gets_one():
    assert PromptReader(BosTokenizer()).read("<s>ab").ids.tolist() == [BOS, 1, 2]


def test_token_ids_get_no_bos():
    assert PromptReader(BosTokenizer()).read([1, 2]).ids.tolist() == [1, 2]


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Odd(CharTokenizer):
        def encode(self, text, *, add_special_tokens=True):
            ids = super().encode(text)
            return [token + 1 for token in ids] if add_special_tokens else ids

    with pytest.raises(ValueError, match=r"special tokens around a text only, but 'ab' encodes to \[2, 3\] with"):
        PromptReader(Odd()).read("ab")


# B8: a prompt that is too long


@pytest.mark.parametrize(("side", "ids"), [("left", [4, 5, 6]), ("right", [1, 2, 3])])
def test_b8_left_keeps_the_end_right_the_start(char_tokenizer, side, ids):
    prompt = PromptReader(char_tokenizer, max_prompt_tokens=3, truncation_side=side).read("abcdef")
    assert prompt.ids.tolist() == ids
    assert prompt == "abcdef"  # the text stays whole


@pytest.mark.parametrize("text", ["abcdef", "<s>abcdef"])
@pytest.mark.parametrize(("side", "ids"), [("left", [BOS, 5, 6]), ("right", [BOS, 1, 2])])
def test_b8_bos_is_kept_on_either_side(text, side, ids):
    assert PromptReader(BosTokenizer(), max_prompt_tokens=3, truncation_side=side).read(text).ids.tolist() == ids


def test_b8_without_a_side_it_raises(char_tokenizer):
    reader = PromptReader(char_tokenizer, max_prompt_tokens=3)
    assert reader.read("abc").ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"prompt 2 to have at most max_prompt_tokens=3 tokens, got 4: 'abcd'.*'left'"):
        reader.read("abcd", 2)


def test_b8_a_cut_that_leaves_no_text_raises():
    reader = PromptReader(BosTokenizer(), max_prompt_tokens=1, truncation_side="left")
    with pytest.raises(ValueError, match="leave room behind the 1 special tokens that open prompt 0, got 1"):
        reader.read("ab", 0)


def test_b8_holds_for_rows_given_to_reset(make_env):
    env = make_env(["abc"], truncation_side="left")
    assert env.reset(options={"prompts": ["uvwxyz"]})[0][:4].tolist() == [24, 25, 26, -2]
    with pytest.raises(ValueError, match="at most max_prompt_tokens=3 tokens, got 6"):
        make_env(["abc"]).reset(options={"prompts": ["uvwxyz"]})


# The order


def test_each_prompt_once_an_epoch_in_a_new_order():
    cursor = PromptCursor(50, "shuffle", seed=0)
    epochs = [[cursor.advance() for _ in range(50)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sequential_keeps_the_order():
    cursor = PromptCursor(3, "sequential", seed=0)
    assert [cursor.advance() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_follows_from_seed_and_epoch():
    first, same, other = (PromptCursor(50, "shuffle", seed) for seed in (1, 1, 2))
    orders = [[cursor.advance() for _ in range(120)] for cursor in (first, same, other)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("n", [0, 3, 5, 7])  # before, in, at the end of, and after the first epoch
def test_the_cursors_state_is_epoch_and_position(n):
    cursor = PromptCursor(5, "shuffle", seed=4)
    for _ in range(n):
        cursor.advance()
    state = json.loads(json.dumps(cursor.state_dict()))
    assert state == {"seed": 4, "epoch": (n - 1) // 5 if n else 0, "position": n - 5 * ((n - 1) // 5) if n else 0}
    resumed = PromptCursor(5, "shuffle", seed=9)
    resumed.load_state_dict(state)
    assert [resumed.advance() for _ in range(12)] == [cursor.advance() for _ in range(12)]


def test_a_prompt_by_itself():
    prompt = Prompt("ab", ids=[1, 2])
    assert prompt.row == {"prompt": "ab"} and prompt.number == -1 and prompt.max_new_tokens is None


@pytest.mark.parametrize(("n", "size"), [(10, 2), (7, 3), (2, 3), (5, 1)])
def test_a_shared_order_is_dealt_without_repeats(n, size):
    """Cursor i mod w makes draw i of the whole order; a saved state loads into any number of cursors."""
    single = PromptCursor(n, "shuffle", seed=3)
    expected = [single.advance() for _ in range(6 * size)]
    cursors = [PromptCursor(n, "shuffle", 3, (rank, size)) for rank in range(size)]
    assert [cursor.advance() for _ in range(6) for cursor in cursors] == expected
    assert max(cursor.n_drawn for cursor in cursors) == single.n_drawn
    alone = PromptCursor(n, "shuffle", seed=0)
    alone.load_state_dict(cursors[-1].state_dict())
    assert [alone.advance() for _ in range(9)] == [single.advance() for _ in range(9)]
