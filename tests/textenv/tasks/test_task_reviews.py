"""The task Reviews: reading, the held-out part, and the environments of its gym id."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification

from agents import word_tokenizer
from tests.helpers.rewards import ALPHABET
from textenv import CharTokenizer, TextEnv, check_text_env
from textenv.tasks import reviews
from textenv.tasks.reviews import FILES, Review, Reviews, part_of, read_reviews

LETTERS = ALPHABET + "\xe9\N{EN DASH}"
TOKENIZER = CharTokenizer(LETTERS)
NEGATIVE = ["a sad  mess . ", "the plot is flat", "bad", "so very dull a film", "no fun at all"]
POSITIVE = ["a clich\xe9 that works", "a great joy \x96 to see", "", "funny , warm and wise", "a film to love"]
MADE = "textenv/Reviews-v0"


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "latin-1")
    return tmp_path


def write(folder, encoding):
    for name, lines in zip(FILES, (NEGATIVE, POSITIVE)):
        (folder / name).write_bytes("\n".join([*lines, ""]).encode(encoding))


def count_a(prompt, preds, done):
    return float(preds.text.count("a")) if done else 0.0


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_a_folder_is_read_in_either_encoding(tmp_path, encoding):
    write(tmp_path, encoding)
    read = read_reviews(tmp_path)
    assert read[0] == Review("a sad mess .", 0) and read[5] == Review("a clich\xe9 that works", 1)
    assert read[6].text == "a great joy \N{EN DASH} to see"
    assert [review.label for review in read] == [0] * 5 + [1] * 4  # an empty line is no review


def test_a_name_is_read_from_the_hub_in_the_columns_of_rotten_tomatoes(monkeypatch):
    asked = []

    def read(name, split):
        asked.append(name)
        return [{"text": f"{part}  film ", "label": 1} for part in split.split("+")]

    monkeypatch.setattr(reviews, "read_dataset", read)
    name = "cornell-movie-review-data/rotten_tomatoes"
    assert read_reviews(name) == [Review(f"{split} film", 1) for split in ("train", "validation", "test")]
    assert read_reviews(name, split="test") == [Review("test film", 1)] and asked == [name, name]


@pytest.mark.parametrize("row", [{"text": "good"}, {"text": "good", "label": 4}, {"review": "good", "label": 1}])
def test_rows_of_another_data_set_are_refused(row, monkeypatch):
    monkeypatch.setattr(reviews, "read_dataset", lambda name, split: [{"text": "a", "label": 0}, row])
    with pytest.raises(ValueError, match="Expected row 1 of 'some/name' to have a `text` and a `label` of 0 or 1, got"):
        read_reviews("some/name")


def test_a_tenth_is_held_out_always_the_same_and_nothing_is_in_both():
    all_of_them = [Review(str(i), i % 2) for i in range(200)]
    train, test = part_of(all_of_them, "train"), part_of(all_of_them, "held_out")
    assert sorted(train + test) == sorted(all_of_them) and len(test) == 20
    assert part_of(all_of_them, "train") == train
    assert train != sorted(train) and 5 <= sum(review.label for review in test) <= 15  # mixed
    with pytest.raises(ValueError, match="Expected `part` to be one of"):
        part_of(all_of_them, "test")


def test_prompts_are_first_words_and_rows_keep_the_review(folder):
    parts = [Reviews(folder, TOKENIZER, reward=count_a, part=part) for part in ("train", "held_out")]
    prompts = [prompt for env in parts for prompt in env.prompts]
    assert sorted(prompts)[:3] == ["a clich\xe9 that", "a film to", "a great joy"]
    for prompt in prompts:
        assert prompt.row["text"].startswith(prompt + " ") and prompt.row["label"] in (0, 1)
    assert len(prompts) == 8 and [len(env.prompts) for env in parts] != [8, 0]  # "bad" has no words after the prompt
    assert {len(prompt.split()) for prompt in Reviews(folder, TOKENIZER, reward=count_a, n_words=1).prompts} == {1}


def test_gym_makes_single_and_vector_envs(folder):
    options = {"data": folder, "tokenizer": TOKENIZER, "reward": count_a, "max_new_tokens": 4}
    env = gym.make(MADE, **options)
    assert isinstance(env.unwrapped, Reviews)
    check_text_env(env.unwrapped)
    env.reset(seed=0)
    a = TOKENIZER.encode("a")[0]
    rewards = [env.step(a)[1] for _ in range(4)]
    assert rewards == [0, 0, 0, 4]
    envs = gym.make_vec(MADE, num_envs=3, **options)
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(np.full(3, a))
    np.testing.assert_array_equal(envs.step(np.full(3, a))[1], [4, 4, 4])


def test_the_reward_is_what_a_classifier_says_of_the_whole_text(folder, tmp_path):
    words = word_tokenizer(sorted({word for line in NEGATIVE + POSITIVE for word in line.split()}))
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, initializer_range=1.0)
    model = BertForSequenceClassification(
        BertConfig(**shape, vocab_size=len(words), id2label={0: "negative", 1: "positive"})
    ).eval()
    model.save_pretrained(tmp_path / "mood")
    words.save_pretrained(tmp_path / "mood")
    env = Reviews(folder, words, classifier=tmp_path / "mood", max_new_tokens=1)
    assert env.score_at == "rollout_end"
    env.reset(seed=0)
    *_, reward, _, _, info = env.step(5)
    ids = words(f"{info['prompt']} {info['text']}", return_tensors="pt")
    assert reward == pytest.approx(float(model(**ids).logits.softmax(-1)[0, 1].detach()), abs=1e-6)
    assert info["text"]


def test_torch_is_loaded_for_a_classifier_only(folder):
    code = (
        "import sys; from textenv import CharTokenizer; from textenv.tasks.reviews import Reviews;"
        f"Reviews({str(folder)!r}, CharTokenizer({LETTERS!r}), reward=dict(name='length', target=3));"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"classifier": "mood", "reward": count_a}, "either `classifier` or `reward`, got both"),
        ({}, "exactly one reward.*got neither"),
        ({"reward": count_a, "n_words": 0}, "`n_words` to be at least 1, got 0"),
        ({"reward": count_a, "n_words": 9}, "more than n_words=9 words"),
        ({"reward": count_a, "part": "test"}, "`part` to be one of"),
    ],
)
def test_wrong_options_are_refused(folder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Reviews(folder, TOKENIZER, **kwargs)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rt-polarity.neg and rt-polarity.pos in .*without rt-polarity.neg"):
        read_reviews(tmp_path)


def test_a_subclass_may_have_a_reward_of_its_own(folder):
    class Short(Reviews):
        def get_reward(self, prompt, preds, done):
            return -1.0

    assert isinstance(Short(folder, TOKENIZER), TextEnv)


def test_the_data_set_itself_is_read():
    if "TEXTENV_DATA" not in os.environ:
        pytest.skip("needs the environment variable TEXTENV_DATA, a folder with the data set's folder rt_polarity")
    read = read_reviews(Path(os.environ["TEXTENV_DATA"]) / "rt_polarity")
    assert len(read) == 10662 and sum(review.label for review in read) == 5331
    assert not any(ord(char) in range(0x80, 0xA0) for review in read for char in review.text)
    assert any("\xe9" in review.text for review in read)  # é
    assert len(part_of(read, "held_out")) == 1066
