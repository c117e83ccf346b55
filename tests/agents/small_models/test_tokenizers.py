"""The tokenizers of small models: characters and words, and the same words in the tokenizer that needs no torch."""

from transformers import AutoTokenizer

from agents import char_tokenizer, word_tokenizer
from textenv import Prompt, demo
from textenv.prompts.prompts import PromptReader
from textenv.text.named_tokenizer import WordTokenizer
from textenv.text.tokenizer import decode_continuation


def test_a_token_is_a_character_and_texts_come_back_without_spaces_between(tmp_path):
    texts = ["很好，很好！", "a b\u3000c\td\n👍🏽é"]
    tokenizer = char_tokenizer(texts)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts:
            assert len(loaded.encode(text)) == len(text)
            assert loaded.decode(loaded.encode(text)) == text
            assert loaded.decode([*loaded.encode(text), loaded.eos_token_id], skip_special_tokens=True) == text
        ids = loaded.encode("很好贵")
        assert ids[-1] == loaded.unk_token_id and loaded.decode(ids, skip_special_tokens=True) == "很好"
        assert decode_continuation(loaded, loaded.encode("很"), loaded.encode("好！")) == "好！"
        assert PromptReader(loaded).read("很好").ids.tolist() == ids[:2] and isinstance(
            PromptReader(loaded).read("很"), Prompt
        )


def test_rare_characters_are_unknown():
    tokenizer = char_tokenizer(["很好", "很贵"], min_count=2)
    assert len(tokenizer) == 3
    assert tokenizer.encode("很好") == [2, tokenizer.unk_token_id]


def test_the_demos_tokenizer_by_name_is_that_of_its_model():
    ours, theirs = WordTokenizer(demo.vocabulary()), word_tokenizer(demo.vocabulary())
    for text in [*demo.reviews(20), "an unknown word", ""]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)
    assert ours.decode([0, 5, 1], skip_special_tokens=True) == theirs.decode([0, 5, 1], skip_special_tokens=True)
    assert len(ours) == len(theirs) and ours.eos_token_id == theirs.eos_token_id
