"""The task ZhReviews: reading and splitting rankings, the environment, and the whole example."""

import json
import os
import random
from pathlib import Path

import gymnasium
import pytest

from agents import char_tokenizer
from tests.docs.test_examples import run
from textenv import check_text_env
from textenv.feedback.store import FeedbackStore
from textenv.tasks.zh_reviews import PROMPTS, ZhReviews, openings, read_rankings, split_rankings

LINES = "质量很好，满意\t还行\t太差\n物流快\t垃圾\n"


def folder_of(tmp_path, text, encoding="utf-8"):
    (tmp_path / "ranked.tsv").write_bytes(text.encode(encoding))
    return tmp_path


def no_reward(prompt, preds, done):
    return 0.0


def test_reads_lists_of_any_length_best_first(tmp_path):
    assert read_rankings(folder_of(tmp_path, LINES)) == [("质量很好，满意", "还行", "太差"), ("物流快", "垃圾")]


@pytest.mark.parametrize("text", [LINES.replace("\n", "\r\n"), "\n" + LINES + "\n\n", LINES.rstrip("\n"), LINES * 2])
def test_line_ends_empty_lines_and_repeated_lines_change_nothing(tmp_path, text):
    expected = read_rankings(folder_of(tmp_path, LINES))
    assert read_rankings(folder_of(tmp_path, text)) == expected
    assert read_rankings(folder_of(tmp_path, text, "utf-8-sig")) == expected


def test_a_review_may_stand_in_several_lines_and_have_spaces_inside(tmp_path):
    text = "很 好\u3000呀\t差\n很 好\u3000呀\t贵\n"
    assert read_rankings(folder_of(tmp_path, text)) == [("很 好\u3000呀", "差"), ("很 好\u3000呀", "贵")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("很好", "Expected two reviews or more on line 3 of .*ranked.tsv, with tabs between, got '很好'"),
        ("很好\t\t太差", "Expected no empty review on line 3 of .*ranked.tsv, got one in place 2"),
        ("很好\t", "Expected no empty review on line 3 of .*ranked.tsv, got one in place 2"),
        ("很好\t太差\t很好", "Expected each review once on line 3 of .*ranked.tsv, got '很好' in two places"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=words):
        read_rankings(folder_of(tmp_path, LINES + line + "\n" + LINES))


def test_folders_without_rankings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a folder that holds ranked.tsv, got 'uer/chinese'.*not on the Hugging"):
        read_rankings("uer/chinese")
    with pytest.raises(ValueError, match=r"Expected the file ranked.tsv in .*, got a folder without it"):
        read_rankings(tmp_path)
    with pytest.raises(ValueError, match=r"Expected .*ranked.tsv' in UTF-8, got bytes that are not"):
        read_rankings(folder_of(tmp_path, LINES, "gb18030"))


def texts_of(part):
    return {text for texts in part for text in texts}


def test_no_review_is_in_two_parts_also_through_others():
    chain = [(f"a{i}", f"a{i + 1}") for i in range(10)]  # each line shares a review with the next
    alone = [(f"b{i}", f"c{i}", f"d{i}") for i in range(70)]
    mixed = chain + alone
    random.Random(0).shuffle(mixed)
    parts = split_rankings(mixed, {"one": 0.5, "two": 0.4, "held_out": 0.1}, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"one": 40, "two": 32, "held_out": 8}
    assert sorted(texts for part in parts.values() for texts in part) == sorted(mixed)
    assert not texts_of(parts["one"]) & texts_of(parts["two"]) and len(texts_of(chain) & texts_of(parts["one"])) in (
        0,
        11,
    )
    assert not texts_of(parts["held_out"]) & (texts_of(parts["one"]) | texts_of(parts["two"]))


def test_the_seed_decides_the_split():
    rankings = [(f"b{i}", f"c{i}") for i in range(40)]
    first, again, other = (split_rankings(rankings, {"a": 1, "b": 1}, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_part_that_would_be_empty_is_refused():
    with pytest.raises(ValueError, match=r"Expected rankings in every part of .*got \{'a': 2, 'b': 0\} of 2 rankings"):
        split_rankings([("a", "b"), ("b", "c")], {"a": 0.9, "b": 0.1})


def test_openings_are_of_longer_reviews_and_each_is_there_once():
    assert openings([("质量好", "质量"), ("质量太差", "物流快")], 2) == ["质量", "物流"]
    with pytest.raises(ValueError, match="more than n_characters=9 characters, got none"):
        openings([("质量好", "差")], 9)
    with pytest.raises(ValueError, match="`n_characters` to be at least 1, got 0"):
        openings([("质量好", "差")], 0)


def test_the_env_by_its_id(tmp_path):
    data = folder_of(tmp_path, LINES)
    tokenizer = char_tokenizer([LINES, *PROMPTS])
    options = {"data": str(data), "tokenizer": tokenizer, "n_characters": 2, "max_new_tokens": 4}
    env = gymnasium.make("textenv/ZhReviews-v0", reward=no_reward, **options).unwrapped
    assert isinstance(env, ZhReviews)
    assert [str(prompt) for prompt in env.prompts] == ["质量", PROMPTS[0], "物流", PROMPTS[1]]
    check_text_env(env)
    env.reset(options={"prompts": ["质量"]})
    for char in "很好！":
        *_, info = env.step(tokenizer.encode(char)[0])
    *_, info = env.step(tokenizer.eos_token_id)
    assert info["text"] == "很好"  # "！" is no character of the corpus
    assert gymnasium.make_vec("textenv/ZhReviews-v0", num_envs=2, reward=no_reward, **options).num_envs == 2


def made_up(folder, n_lines=60):
    """Write rankings whose order is told by four phrases; return the folder."""
    choose = random.Random(0)
    folder.mkdir(exist_ok=True)
    things, moods = ["手机", "衣服", "酒店", "苹果", "电影"], ["很好，非常满意", "还可以吧", "不太好", "太差了，垃圾"]
    lines = ["\t".join(f"{choose.choice(things)}{mood}{number}" for mood in moods) for number in range(n_lines)]
    return folder_of(folder, "\n".join(lines) + "\n")


@pytest.mark.slow
def test_the_example_runs_and_skips_finished_stages_of_rankings(tmp_path):
    pytest.importorskip("snownlp")
    out = tmp_path / "out"
    command = ("examples/zh_reviews.py", "--data", made_up(tmp_path / "data"), "--smoke", "--out", out)
    printed = run(*command)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["accuracies"]["character n-grams"]["accuracy"] == 1.0  # on unseen reviews
    assert results["accuracies"]["judge"]["n_pairs"] == 6 * 6
    for name in ("beginnings of held-out reviews", "the four prompts"):
        shown = {"judge", "reward", "kl", "length", "perplexity", "distinct_2", "blank", "broken"}
        assert shown <= results[name]["differences"].keys()
        assert " " not in "".join(sample["text"] for sample in results[name]["texts"])
    log = (out / "samples.log").read_text(encoding="utf-8")
    assert log in printed and log.count("Random Sample 5 text(s) of model output:\n1. ") == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "policy" / "model.safetensors").is_file()

    table = (out / "results.md").read_text(encoding="utf-8")
    assert "rated: nothing yet" in table
    with FeedbackStore(out / "ratings.db") as store:  # a rater of the pairs that the table of samples does not show
        for better in ("before", "after", None):
            shown = store.next("ann")
            number = store.choose(shown, "tie")
            if better is not None:
                store.undo("ann", number)
                first = shown.order[0] == ("before", "after").index(better)
                store.choose(store.next("ann"), "a" if first else "b")
        assert store.next("ann") is None
    (out / "results.md").unlink()
    again = run(*command)
    assert all(f"{name}: found in" in again for name in ("tune", "judge", "accuracies"))
    rated = "rated: after is better in 0.500 [0.095, 0.905] of 2 pairs; 1 tied"
    assert "mean-reward" not in again and rated in again
    texts = (out / "results.md").read_text(encoding="utf-8").splitlines()
    assert texts[:-1] == table.splitlines()[:-1] and texts[-1] == rated


@pytest.mark.skipif("TEXTENV_DATA" not in os.environ, reason="TEXTENV_DATA names no folder of data sets")
def test_the_real_rankings():
    rankings = read_rankings(Path(os.environ["TEXTENV_DATA"]) / "zh_reviews")
    assert len(rankings) == 2500 and {len(texts) for texts in rankings} == {4}
    parts = split_rankings(rankings, {"a": 0.45, "b": 0.45, "held_out": 0.1})
    assert [len(part) for part in parts.values()] == [1125, 1125, 250]
    assert not texts_of(parts["held_out"]) & (texts_of(parts["a"]) | texts_of(parts["b"]))
    tokenizer = char_tokenizer([text for texts in rankings for text in texts])
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in rankings[0])
