"""Tokenizers of models from scratch: one token per word or character, or byte-pair encoding trained on texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "</s>"  # ends a text and also pads it: padding is recognised by lengths, never by this id
UNKNOWN_TOKEN = "<unk>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, for texts whose words are separated by spaces.

    Token 0 is the end token; a word that is not in the list becomes `<unk>`.

    Args:
        words: The words, each once.

    Example:
        >>> from agents import word_tokenizer
        >>> word_tokenizer(["good", "film"]).encode("good film")
        [2, 3]
    """
    vocabulary = {word: i for i, word in enumerate([EOS_TOKEN, UNKNOWN_TOKEN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, unk_token=UNKNOWN_TOKEN, pad_token=EOS_TOKEN
    )


def char_tokenizer(texts: Sequence[str], min_count: int = 1) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character; it decodes them without spaces in between, as Chinese needs.

    Token 0 is the end token. The most frequent characters have the lowest ids.

    Args:
        texts: The texts whose characters become tokens.
        min_count: Characters that are rarer than this in `texts` become `<unk>`.

    Example:
        >>> from agents import char_tokenizer
        >>> tokenizer = char_tokenizer(["很好，很好", "很贵"])
        >>> tokenizer.encode("很贵，好"), tokenizer.decode([2, 3, 0], skip_special_tokens=True)
        ([2, 5, 4, 3], '很好')
    """
    counts = Counter(char for text in texts for char in text)
    chars = [char for char, count in counts.most_common() if count >= min_count]
    vocabulary = {token: i for i, token in enumerate([EOS_TOKEN, UNKNOWN_TOKEN, *chars])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins tokens without spaces, unlike a tokenizer that has no decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on texts; token 0 is the end token.

    Args:
        texts: The texts to train on.
        vocab_size: The number of tokens, at least 257: the end token and the 256 bytes.

    Example:
        >>> from agents import bpe_tokenizer
        >>> tokenizer = bpe_tokenizer(["good film, good plot"], vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("a good film"))
        'a good film'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN)
