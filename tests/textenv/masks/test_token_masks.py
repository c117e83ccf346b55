"""Token masks: each kind by hand, their intersection, every kind of env, and masks that allow nothing."""

import copy
import json
import pickle
import re

import numpy as np
import pytest
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from agents import TextVecEnv, bpe_tokenizer, word_tokenizer
from textenv import (
    AllowedMask,
    BannedMask,
    CharTokenizer,
    MaskError,
    MinLengthMask,
    RegexMask,
    TextEnv,
    TextVectorEnv,
    check_text_env,
)
from textenv.lanes.lanes import Lanes
from textenv.text.vocabulary import Vocabulary

AB = CharTokenizer("ab")  # 0 ends, "a" is 1, "b" is 2


def no_reward(prompt, preds, done):
    return 0.0


def make(mask, tokenizer=AB, prompts=("a", "b"), max_new_tokens=8, **kwargs):
    kwargs.setdefault("reward", no_reward)
    return TextEnv(prompts, tokenizer, max_new_tokens=max_new_tokens, mask=mask, **kwargs)


def allowed(env):
    return np.flatnonzero(env.action_masks()).tolist()


def write(env, tokens, seed=0):
    """Write tokens; return the allowed ids before the first token and after each."""
    env.reset(seed=seed)
    seen = [allowed(env)]
    for token in tokens:
        env.step(token)
        seen.append(allowed(env))
    return seen


def never_b(prompt, preds):
    return [0, 1]


def never_b_twice(prompt, preds):
    return [0, 1] if preds.text.endswith("b") else [0, 1, 2]


def no_a_after_a(prompt, preds):
    result = np.ones(3, dtype=bool)
    result[1] = not len(preds) or preds[-1] != 1
    return result


class Talking(TextEnv):
    """An env that answers "a"; with `TURNS`, for three turns."""

    def get_reward(self, prompt, preds, done):
        return 0.0

    def respond(self, prompt, preds):
        return "a"


TURNS = {"max_turns": 3, "max_response_tokens": 1}


# Each kind, by hand.


def test_banned_ids():
    assert write(make(BannedMask([2])), [1, 1]) == [[0, 1]] * 3


def test_banned_texts_across_tokens():
    env = make(BannedMask(texts=["aab", "bb"]))
    assert write(env, [1, 1, 1, 2]) == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0, 1]]


def test_banned_texts_equal_a_search_in_the_text():
    """The slow twin appends each token and searches the text; some tokens are pieces of characters."""
    tokenizer = bpe_tokenizer(["the cat sat on the hat", "catty café"] * 4, 300)
    texts = [" cat", "hat", "é", "tt", "t s"]
    env = make(BannedMask(texts=texts), tokenizer, ["on "], max_new_tokens=6)
    random = np.random.default_rng(0)
    words = [i for i in range(256, len(tokenizer))] + tokenizer.encode("cathsé ")
    n_banned = 0
    for _ in range(12):
        env.reset(seed=0)
        written = []
        for _ in range(5):
            now = env.action_masks()
            for token in words:
                raw = b"".join(env.vocabulary.pieces[i] for i in [*written, token])
                assert now[token] == (not any(text.encode() in raw for text in texts)), (written, token)
                n_banned += not now[token]
            written.append(int(random.choice([i for i in words if now[i]])))
            env.step(written[-1])
    assert n_banned > 100


def test_allowed_set_and_stop_ids():
    assert write(make(AllowedMask([2]), stop_ids=[0, 1]), [2]) == [[0, 1, 2]] * 2
    assert write(make(AllowedMask([2])), [2]) == [[0, 2]] * 2


def test_min_length():
    assert write(make(MinLengthMask(2)), [1, 2, 1]) == [[1, 2], [1, 2], [0, 1, 2], [0, 1, 2]]


def test_function_of_ids_or_of_bools():
    assert write(make(never_b), [1]) == [[0, 1]] * 2
    assert write(make(no_a_after_a), [1, 2]) == [[0, 1, 2], [0, 2], [0, 1, 2]]


def test_several_masks_intersect():
    assert write(make([MinLengthMask(1), BannedMask(texts=["aa"]), no_a_after_a]), [1, 2]) == [
        [1, 2],
        [0, 2],
        [0, 1, 2],
    ]


# Nothing allowed, and invalid masks


def test_a5_nothing_allowed_names_mask_prompt_and_text():
    env = make([BannedMask([2]), BannedMask([0, 1, 2])], prompts=["ba"])
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(MaskError, match=r"got none from \[BannedMask\(ids=\(0, 1, 2\).*prompt 'ba', text 'a'"):
        env.action_masks()


def test_a5_nothing_allowed_together_names_all():
    env = make([AllowedMask([1]), BannedMask([0, 1])])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"\[AllowedMask\(ids=\(1,\)\), BannedMask"):
        env.action_masks()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: make(BannedMask([3])), ValueError, "ids in \\[0, 3\\), got 3"),
        (lambda: make(AllowedMask([-1])), ValueError, "got -1"),
        (lambda: BannedMask(), ValueError, "ids or texts"),
        (lambda: BannedMask(texts=["a", ""]), ValueError, "no text empty"),
        (lambda: MinLengthMask(0), ValueError, "at least 1, got 0"),
        (lambda: make(MinLengthMask(2), stop_ids=[]), ValueError, "with `stop_ids`"),
        (lambda: make(MinLengthMask), TypeError, "to be a mask, a function"),
        (lambda: make([1]), TypeError, "to be a mask, a function"),
        (lambda: write(make(lambda prompt, preds: [5]), []), ValueError, "got 5"),
        (lambda: write(make(lambda prompt, preds: np.ones(4, bool)), []), ValueError, "shape \\(3,\\), got bool of sh"),
        (lambda: write(make(lambda prompt, preds: None), []), ValueError, "token ids or a bool array"),
    ],
)
def test_what_cannot_work_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


# During an episode


def test_step_accepts_what_the_mask_forbids():
    env = make(BannedMask([2]))
    env.reset(seed=0)
    assert env.step(2)[0].tolist()[2] == 2
    assert allowed(env) == [0, 1]


def test_idle_and_finished_lanes_allow_everything():
    env = make(BannedMask([2]), max_new_tokens=1)
    assert allowed(env) == [0, 1, 2]  # before the first reset
    env.reset(seed=0)
    assert allowed(env) == [0, 1]
    env.step(1)
    assert allowed(env) == [0, 1, 2]  # the episode is over
    envs = TextVectorEnv(env, 3)
    envs.reset(options={"prompts": ["a"]})
    assert envs.action_masks().tolist() == [[True, True, False], [True] * 3, [True] * 3]


def test_masks_see_the_current_turn():
    env = Talking(["b"], AB, max_new_tokens=9, mask=[MinLengthMask(1), BannedMask(texts=["ba"])], **TURNS)
    # Turns "b" and "ab": each is masked by itself, whatever the reply or the earlier turn ends with.
    assert write(env, [2, 0, 1, 2]) == [[1, 2], [0, 2], [1, 2], [0, 1, 2], [0, 2]]


def test_functions_see_all_turns():
    seen = []

    def look(prompt, preds):
        seen.append((preds.ids.tolist(), preds.turn_ids.tolist()))
        return [0, 1, 2]

    write(Talking(["b"], AB, max_new_tokens=9, mask=look, **TURNS), [2, 0, 1])
    assert seen == [([], []), ([2], [2]), ([2, 0], []), ([2, 0, 1], [1])]


# The front ends.


def test_an_env_without_a_mask_has_no_action_masks():
    env = make(None)
    assert not hasattr(env, "action_masks") and not hasattr(TextVectorEnv(env, 2), "action_masks")
    assert not is_masking_supported(env) and not is_masking_supported(TextVecEnv(env, 2))
    for method in (TextVecEnv(env, 2).get_attr, TextVecEnv(env, 2).env_method):
        with pytest.raises(AttributeError, match="Expected `mask` to be given to TextEnv"):
            method("action_masks")


def test_all_front_ends_agree():
    mask = [no_a_after_a, BannedMask(texts=["bb"])]
    env, envs, vec_env = make(mask, prompts=["a"]), TextVectorEnv(make(mask), 3), TextVecEnv(make(mask), 3)
    assert is_masking_supported(env) and is_masking_supported(vec_env)
    env.reset(seed=0), envs.reset(seed=0), vec_env.reset()
    expected = write(make(mask, prompts=["a"]), [1, 2, 1])
    for token, ids in zip([1, 2, 1, 0], expected):
        rows = [get_action_masks(env), *envs.action_masks(), *get_action_masks(vec_env)]
        rows += [action_masks() for action_masks in vec_env.get_attr("action_masks", [0, 2])]
        assert all(row.dtype == bool and np.flatnonzero(row).tolist() == ids for row in rows)
        env.step(token), envs.step(np.full(3, token)), vec_env.step(np.full(3, token))
    assert len(vec_env.env_method("action_masks", indices=[1])) == 1


def test_returned_masks_may_be_changed():
    env = make(BannedMask([2]))
    env.reset(seed=0)
    env.action_masks()[:] = False
    assert allowed(env) == [0, 1]


def test_lanes_resume_with_the_same_masks():
    mask = [RegexMask("(ab|ba)+"), MinLengthMask(3), no_a_after_a]
    lanes = Lanes(make(mask), 3)
    lanes.reset(seed=0)
    for actions in ([1, 2, 2], [2, 1, 1], [2, 2, 1]):
        lanes.allowed()
        lanes.step(np.array(actions))
    arrays, meta = lanes.state_dict()
    resumed = Lanes(make(mask), 3)
    resumed.load_state_dict(arrays, json.loads(json.dumps(meta)))
    assert resumed.allowed().tolist() == lanes.allowed().tolist()
    assert [np.flatnonzero(row).tolist() for row in resumed.allowed()] == [[1], [1], [2]]


def test_envs_with_masks_copy_and_pickle():
    env = make([RegexMask("(ab)+b?"), never_b_twice, BannedMask(texts=["aa"])])
    assert write(env, [1]) == [[1], [2]]
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert allowed(twin) == [2]
        twin.step(2)
        assert allowed(twin) == [0, 1]
    assert allowed(env) == [2]


# Tokens as bytes.


def test_pieces_of_characters_and_words():
    assert Vocabulary(AB, [0]).pieces == [b"", b"a", b"b"]
    assert Vocabulary(word_tokenizer(["good", "film"]), [0]).pieces == [b"", b"", b" good", b" film"]


def test_pieces_put_together_are_the_text():
    texts = ["a café — naïve 日本 🙂 text", "tabs\tand\nlines, a café"]
    tokenizer = bpe_tokenizer(texts * 4, 290)
    pieces = Vocabulary(tokenizer, [0]).pieces
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([i]) for i in range(256)]
    assert pieces[0] == b""
    for text in texts:
        assert b"".join(pieces[i] for i in tokenizer.encode(text)).decode() == text


def test_pieces_of_byte_fallback():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["</s>", "▁a", "b", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    pieces = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), [0]).pieces
    assert pieces == [b"", b" a", b"b", *(bytes([i]) for i in range(256))]


def test_pieces_of_characters_are_empty_if_the_tokenizer_does_not_tell_them():
    class Bytes:
        eos_token_id = None

        def __len__(self):
            return 256

        def encode(self, text, *, add_special_tokens=True):
            return list(text.encode())

        def decode(self, token_ids, *, skip_special_tokens=False):
            return bytes(token_ids).decode(errors="replace")

    pieces = Vocabulary(Bytes(), []).pieces
    assert pieces == [bytes([i]) if i < 128 else b"" for i in range(256)]


# The conformance check.


def test_check_passes_masks_that_keep_the_contract():
    check_text_env(make([no_a_after_a, RegexMask("[ab]*"), MinLengthMask(2)]))
    check_text_env(Talking(["b"], AB, max_new_tokens=9, mask=RegexMask("(ab)*"), **TURNS))


@pytest.mark.filterwarnings("ignore:.*cannot be pickled")
def test_check_finds_a_mask_with_a_memory():
    class Counting:
        def start(self, vocabulary):
            calls = []

            def ids(prompt, preds):
                calls.append(1)
                return vocabulary.pack([0, 1] if len(calls) < 4 else [0, 2])

            return ids

    with pytest.raises(AssertionError, match=r"computed afresh it differs .*keep no memory"):
        check_text_env(make(Counting()))


def test_check_finds_a_mask_that_allows_nothing():
    with pytest.raises(MaskError, match="got none from"):
        check_text_env(make(AllowedMask([]), stop_ids=[]))


def test_check_warns_of_texts_that_never_end():
    with pytest.warns(UserWarning, match=re.escape("never allowed one of the stop ids [0]")):
        check_text_env(make(MinLengthMask(99)))
