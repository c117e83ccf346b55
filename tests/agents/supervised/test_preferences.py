"""Preference data as people publish it: pairs of conversations, cells that are missing, and pairs of equal texts."""

import re

import numpy as np
import pytest

from agents import Ranking, train_reward_model, word_tokenizer
from agents.supervised.preferences import chat_pair, different_pairs
from tests.helpers.training import tiny_config
from tests.textenv.prompts.test_chat import CHATML, SPACED, TRIMMED, tokenizer_with
from textenv import CharTokenizer
from textenv.prompts.prompts import PromptReader

SYSTEM, USER = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}


def said(text):
    return {"role": "assistant", "content": text}


GOOD, BAD = said("good"), said("bad")
FORMS = {
    "prompt given": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt shared": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt null": {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt given and shared": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt a text": {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
    "prompt a text, and shared": {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "answers as texts": {"prompt": [USER], "chosen": "good", "rejected": "bad"},
}
OPENED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
RENDERED = {  # by template: the prompt, and what stands in front of an answer
    CHATML: (OPENED, ""),
    TRIMMED: (f"<s>{OPENED}", ""),
    SPACED: ("<s>[INST] hi [/INST]", " "),
}


@pytest.mark.parametrize("template", RENDERED, ids=["chatml", "trimmed", "spaced"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pair_of_conversations_is_what_an_env_would_show_and_a_policy_write(form, template):
    prompt, space = RENDERED[template]
    tokenizer = tokenizer_with(template)
    assert chat_pair(FORMS[form], tokenizer, "row 1") == Ranking((f"{space}good", f"{space}bad"), prompt, is_chat=True)
    assert PromptReader(tokenizer).read([USER]) == prompt


def test_earlier_turns_and_a_system_message_belong_to_the_prompt():
    row = {"chosen": [SYSTEM, USER, BAD, USER, GOOD], "rejected": [SYSTEM, USER, BAD, USER, BAD]}
    first = (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nbad<|im_end|>\n"
    )
    for prompt in (None, "hi", [SYSTEM, USER]):
        ranking = chat_pair({**row, "prompt": prompt}, tokenizer_with(CHATML), "row 1")
        assert ranking == Ranking(("good", "bad"), first + OPENED, is_chat=True)


def test_an_answer_may_have_several_turns():
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, USER, BAD]}
    assert chat_pair(row, tokenizer_with(CHATML), "row 1").texts == ("good", f"bad<|im_end|>\n{OPENED}bad")


def test_equal_conversations_have_equal_answers():
    row = {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}
    assert chat_pair(row, tokenizer_with(CHATML), "row 1") == Ranking(("good", "good"), OPENED, is_chat=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [USER, GOOD], "rejected": None}, "a list of messages in the column rejected of row 1, got None"),
        ({"chosen": [], "rejected": [USER, BAD]}, "a list of messages in the column chosen of row 1, got []"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, said("")]},
            "column rejected of row 1 to end with an answer of the",
        ),
        (
            {"chosen": [USER], "rejected": [USER, BAD]},
            "column chosen of row 1 to end with an answer of the assistant, got",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, said(None)]},
            "the column rejected of row 1 to end with an answer",
        ),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "in the prompt beside the column chosen of row 1, got 3"),
        (
            {"prompt": "ho", **FORMS["prompt shared"]},
            "column chosen of row 1 to be an answer, or a conversation with the",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            "the conversations of row 1 to begin with the same",
        ),
        ({"chosen": [USER, USER, GOOD], "rejected": [USER, BAD]}, "the column chosen of row 1 to continue the shared"),
        ({"chosen": [USER, said("a \ud83d")], "rejected": [USER, BAD]}, "in the column chosen of row 1, got a lone"),
        ({"chosen": [{"from": "a"}, GOOD], "rejected": [{"from": "a"}, BAD]}, "message 0 of row 1 to have the texts"),
    ],
)
def test_conversations_that_are_no_pair_are_named_by_row_and_column(row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chat_pair(row, tokenizer_with(CHATML), "row 1")


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template for row 1"):
        chat_pair(FORMS["prompt given"], CharTokenizer(), "row 1")


# Pairs of equal texts


def test_pairs_of_equal_tokens_are_counted_and_left_out():
    data = [Ranking(("a", "b")), Ranking(("a", "b", "a")), Ranking(("ba", "ca"))]
    encoded = [[[1], [2]], [[1], [2], [1]], [[1], [1]]]  # the last is cut to one token
    said = r"2 of 5 pairs of `data` have equal texts, the first in data\[1\] \(1 of them only as tokens, cut to .*=1\)"
    with pytest.warns(UserWarning, match=said):
        assert different_pairs("data", data, encoded, 1) == [[(0, 1)], [(0, 1), (1, 2)], []]
    with pytest.raises(ValueError, match=r"Expected texts that differ, got none: 1 of 1 pairs of `held_out`"):
        different_pairs("held_out", data[2:], encoded[2:], 1)


def test_a_reward_model_learns_and_is_measured_without_pairs_of_equal_texts(tmp_path):
    tokenizer = word_tokenizer(["good", "bad", "so"])
    pairs = [Ranking((" good", " bad"), "so"), Ranking((" bad", " good"), "so so")]
    equal = [Ranking((" good", " good"), "so"), Ranking(("good so so", "bad so so"))]  # the second once it is cut
    options = {"max_tokens": 2, "batch_size": 2, "progress_bar": False}
    config = tiny_config(len(tokenizer))
    alone = train_reward_model(config, tokenizer, pairs, tmp_path / "a", held_out=pairs, **options)
    with pytest.warns(UserWarning) as warned:
        mixed = train_reward_model(
            config, tokenizer, [*pairs, *equal], tmp_path / "b", held_out=[*equal, *pairs], **options
        )
    assert [str(w.message)[:38] for w in warned] == [
        "2 of 4 pairs of `data` have equal text",
        "2 of 4 pairs of `held_out` have equal ",
    ]
    assert np.array_equal(mixed.losses, alone.losses)
    assert mixed.held_out == alone.held_out and mixed.held_out.n_pairs == 2
