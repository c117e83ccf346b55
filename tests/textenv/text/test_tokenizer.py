"""Tokenizers of all kinds: opening and closing tokens, characters in pieces, and ids that are never encoded again."""

import warnings

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from textenv import CharTokenizer, TextEnv, TextVectorEnv, Tokenizer
from textenv.testing import check_text_env
from textenv.text.tokenizer import decode_continuation

CHINESE = ["今天天气很好", "你好世界", "这部电影非常好看", "手机的屏幕很好"]
EMOJI = "🙂"  # four bytes, and not in the corpus: four tokens


def no_reward(prompt, preds, done):
    return 0.0


def bert():
    """Make the tokenizer of many a Chinese GPT-2: BERT's, which puts [CLS] in front of a text and [SEP] behind."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set("".join(CHINESE))), "film", "##ing", "great"]
    fast = Fast(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()  # puts spaces around Chinese characters
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sentence_piece(template, **special):
    """Make a tokenizer like SentencePiece's, whose words include the space in front of them."""
    words = ["<pad>", "</s>", "<unk>", "<s>", "▁the", "▁film", "▁was", "▁great", "ly", "."]
    fast = Fast(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1), ("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>", **special)


@pytest.fixture(scope="module")
def byte_level():
    """Make a byte-level BPE like GPT-2's, in which unseen characters are split into bytes."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CHINESE * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<eos>")


def play(env, ids, **reset):
    """Write the ids; return the last observation and info."""
    observation, _ = env.reset(**reset)
    for token in ids:
        observation, *_, info = env.step(token)
    return observation, info


# Opening special tokens are kept, closing ones are not


def test_bert_does_not_end_the_prompt():
    tokenizer = bert()
    cls, sep = 2, 3
    assert tokenizer.encode("你好")[-1] == sep
    good = tokenizer.convert_tokens_to_ids("好")
    env = TextEnv(["你好"], tokenizer, reward=no_reward, max_new_tokens=3, stop_ids=[sep])
    observation, info = play(env, [good, sep])
    assert observation.tolist() == [cls, tokenizer.convert_tokens_to_ids("你"), good, -2, good, sep, -1]
    assert info["text"] == " 好" and info["prompt"] == "你好" and info["end_reason"] == "eos"


def test_bert_pieces_of_a_word_are_joined():
    tokenizer = bert()
    env = TextEnv(["film"], tokenizer, reward=no_reward, max_new_tokens=2)
    observation, info = play(env, tokenizer.convert_tokens_to_ids(["##ing", "great"]))
    assert info["text"] == "ing great"


def test_t5_does_not_end_the_prompt_and_keeps_the_space():
    tokenizer = sentence_piece("$A </s>")
    assert tokenizer.encode("the film") == [4, 5, 1]
    env = TextEnv(["the film"], tokenizer, reward=no_reward, max_new_tokens=5)
    observation, info = play(env, [6, 7, 8, 1])
    assert observation.tolist() == [4, 5, -2, 6, 7, 8, 1, -1]
    assert info["prompt"] + info["text"] == "the film was greatly"


def test_bos_is_kept_and_shown_once():
    tokenizer = sentence_piece("<s> $A", bos_token="<s>")
    env = TextEnv(["the film"], tokenizer, reward=no_reward, max_new_tokens=2, render_mode="ansi")
    observation, info = play(env, [6])
    assert observation.tolist() == [3, 4, 5, -2, 6, -1]
    assert env.render().count("the film") == env.render().count("<s>") == 1
    assert env.render().endswith("| was")


def test_bos_survives_a_cut_on_the_left():
    env = TextEnv(["the film was"], sentence_piece("<s> $A", bos_token="<s>"), reward=no_reward, max_new_tokens=2,
                  max_prompt_tokens=3, truncation_side="left")  # fmt: skip
    assert env.reset()[0][:4].tolist() == [3, 5, 6, -2]


# Characters in pieces


def test_the_emoji_falls_into_bytes(byte_level):
    assert len(byte_level.encode(EMOJI)) == 4


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_character_split_at_the_prompts_end_reads_right(byte_level, cut):
    ids = byte_level.encode("好" + EMOJI + "好")
    begin = len(byte_level.encode("好"))
    prompt, rest = ids[: begin + cut], ids[begin + cut :]
    env = TextEnv([prompt], byte_level, reward=no_reward, max_new_tokens=len(rest))
    assert play(env, rest)[1]["text"] == (EMOJI + "好" if cut < 4 else "好")


def test_a_prompt_that_begins_in_one_character_and_ends_in_another(byte_level):
    first, second = byte_level.encode("🙂"), byte_level.encode("🙃")
    env = TextEnv([first[-1:] + second[:3]], byte_level, reward=no_reward, max_new_tokens=1)
    assert play(env, second[3:])[1]["text"] == "🙃"


def test_a_character_is_whole_as_soon_as_its_last_byte_is_written(byte_level):
    texts = []
    env = TextEnv(
        ["你好"], byte_level, reward=lambda prompt, preds, done: texts.append(preds.text) or 0.0, max_new_tokens=5
    )
    play(env, [*byte_level.encode(EMOJI), byte_level.eos_token_id])
    assert texts[3:] == [EMOJI, EMOJI]
    assert all(EMOJI not in text and set(text) == {"\ufffd"} for text in texts[:3])


@pytest.mark.parametrize("text", ["今天 天气🙂很好!", "🙂🙃", "你好, world"])
def test_every_cut_of_a_text_reads_as_the_whole(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    for cut in range(len(ids) + 1):
        before = byte_level.decode(ids[:cut]).rstrip("\ufffd")
        assert before + decode_continuation(byte_level, ids[:cut], ids[cut:]) == text


def test_a_stop_string_of_several_bytes(byte_level):
    ids = byte_level.encode("你" + EMOJI)
    env = TextEnv(["你好"], byte_level, reward=no_reward, max_new_tokens=9, stop_strings=[EMOJI])
    info = play(env, ids)[1]
    assert info["end_reason"] == "stop" and info["text"] == "你"


def test_a_decoder_that_changes_what_came_before_gives_the_ids_alone():
    class Tidy(CharTokenizer):
        """Its `decode` removes the space in front of 's."""

        def decode(self, token_ids, *, skip_special_tokens=False):
            return super().decode(token_ids).replace(" 's", "'s")

    tokenizer = Tidy()
    assert decode_continuation(tokenizer, tokenizer.encode("it '"), tokenizer.encode("s on")) == "s on"


# A10: the ids are the actions


class Lossy(CharTokenizer):
    """Capital letters decode to small ones, so that `encode(decode(ids))` is another text's ids."""

    def __init__(self):
        super().__init__("abcABC")

    def decode(self, token_ids, *, skip_special_tokens=False):
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens).lower()


class OnlyAtFirst(Lossy):
    """Refuses to encode after the env has been built."""

    built = False

    def encode(self, text, *, add_special_tokens=True):
        assert not self.built, f"{text!r} was encoded again"
        return super().encode(text)


def test_a10_ids_are_the_actions_where_the_text_is_not():
    tokenizer, seen = OnlyAtFirst(), []
    reward = lambda prompt, preds, done: seen.append(preds) or 0.0  # noqa: E731
    env = TextEnv([[4, 1, 0]], tokenizer, reward=reward, max_new_tokens=4)
    actions = [4, 1, 5, 0]
    assert tokenizer.encode(tokenizer.decode(actions[:3])) != actions[:3]
    tokenizer.built = True
    observation, info = play(env, actions)
    assert observation.tolist() == [4, 1, 0, -2, *actions]
    assert seen[-1].ids.tolist() == actions and info["text"] == "aab"


def test_a10_in_lanes_and_over_turns():
    class Talk(TextEnv):
        def get_reward(self, prompt, preds, done):
            return 0.0

        def respond(self, prompt, preds):
            return "c"

    env = Talk(["a"], Lossy(), max_new_tokens=6, max_turns=3, max_response_tokens=1)
    envs = TextVectorEnv(env, 2)
    envs.reset(seed=0)
    for actions in ([4, 5], [0, 0], [6, 4]):
        observations, *_ = envs.step(np.array(actions))
    assert observations[:, 2:6].tolist() == [[4, 0, 3, 6], [5, 0, 3, 4]]
    assert [envs.lanes.preds(lane).ids.tolist() for lane in (0, 1)] == [[4, 0, 6], [5, 0, 4]]


def test_a10_byte_level_pieces_are_not_merged(byte_level):
    ((symbols, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("今天")  # one a byte
    pieces = byte_level.convert_tokens_to_ids(list(symbols))
    assert byte_level.decode(pieces) == "今天" and byte_level.encode("今天") != pieces
    env = TextEnv([pieces], byte_level, reward=no_reward, max_new_tokens=6)
    observation, info = play(env, pieces)
    assert observation.tolist() == [*pieces, -2, *pieces] and info["text"] == "今天"


# The Protocol, and our own tokenizer


def test_tokenizers_of_transformers_and_ours_fit_the_protocol(byte_level):
    assert isinstance(byte_level, Tokenizer) and isinstance(CharTokenizer(), Tokenizer)
    assert not isinstance(object(), Tokenizer)


class Length(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float(len(preds.text))


@pytest.mark.parametrize("make", [bert, lambda: sentence_piece("$A </s>")], ids=["bert", "t5"])
def test_check_text_env_accepts_them(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_text_env(Length([[4, 5], "the film" if make is not bert else "你好"], make(), max_new_tokens=5))


def test_check_text_env_accepts_a_byte_level_one(byte_level):
    check_text_env(Length(["你好", "🙂"], byte_level, max_new_tokens=5))


def test_char_tokenizer_by_hand():
    tokenizer = CharTokenizer("ab ")
    assert len(tokenizer) == 4 and tokenizer.eos_token_id == 0
    assert tokenizer.encode("ba b") == [2, 1, 3, 2]
    assert tokenizer.decode([2, 1, 0]) == "ba</s>"
    assert tokenizer.decode([2, 1, 0], skip_special_tokens=True) == "ba"


def test_char_tokenizer_refuses_what_it_cannot_encode():
    with pytest.raises(ValueError, match=r"Expected characters of 'ab', got \['x'\] in 'axb'"):
        CharTokenizer("ab").encode("axb")
    with pytest.raises(ValueError, match="Expected each character of `alphabet` once, got 'aba'"):
        CharTokenizer("aba")


def test_a_stop_string_that_begins_with_a_space_at_the_first_token():
    """Decoded alone, a SentencePiece token loses the space that the stop string has."""
    tokenizer = sentence_piece("$A </s>")
    env = TextEnv(["the film"], tokenizer, reward=no_reward, max_new_tokens=9, stop_strings=[" was"])
    _, info = play(env, tokenizer.convert_tokens_to_ids(["▁was"]))
    assert info["end_reason"] == "stop" and info["text"] == ""
