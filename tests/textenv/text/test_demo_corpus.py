"""The built-in corpus: reviews, parser, score, prompts and vocabulary follow one grammar."""

import numpy as np
import pytest

from textenv import demo

GOOD = "this phone is great and i love it ."


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return demo.reviews(4000)


def share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def test_every_review_parses(corpus):
    assert all(demo.parses(review) for review in corpus)


def test_a_review_has_9_to_24_lower_case_words_and_ends_in_a_full_stop(corpus):
    assert {len(review.split()) for review in corpus} == set(range(9, 25))
    assert all(review == " ".join(review.split()).lower() and review.endswith(" .") for review in corpus)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_score_is_one_half(seed):
    assert np.mean([demo.score(review) for review in demo.reviews(4000, seed)]) == pytest.approx(0.5, abs=0.02)


def test_a_third_of_the_reviews_is_of_each_mood(corpus):
    scores = [demo.score(review) for review in corpus]
    assert share(score > 0.6 for score in scores) == pytest.approx(1 / 3, abs=0.04)
    assert share(score < 0.4 for score in scores) == pytest.approx(1 / 3, abs=0.04)


def test_equal_seeds_repeat_and_other_seeds_differ(corpus):
    assert demo.reviews(4000, seed=0) == corpus
    assert len(set(demo.reviews(4000, seed=1)) & set(corpus)) < 40


def test_reviews_are_distinct():
    assert len(set(demo.reviews(12_000))) > 11_900


def test_positive_words_alone_leave_room_for_thousands_of_texts():
    rosy = {review for review in demo.reviews(12_000) if demo.score(review) == 1.0}
    assert len(rosy) > 2000


@pytest.mark.parametrize("n", [0, -1])
def test_no_reviews_are_refused(n):
    with pytest.raises(ValueError, match=f"Expected `n` to be positive, got {n}."):
        demo.reviews(n)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("the lamp was a mess but everything works well .", 1 / 2),
        ("my new radio is weak , and they hate it yet the case is a joy so far .", 1 / 3),
        ("our old kettle was ugly and i regret its design .", 0.0),
        ("this phone is", 0.0),
        ("", 0.0),
    ],
)
def test_the_score_worked_by_hand(text, expected):
    assert demo.score(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "this phone is great and i love it",
        "this phone is great and i love it . .",
        "this phone is great .",
        "this phone is great and i love it and i love it and i love it .",
        "this phone is a great and i love it .",
        "this phone is great and i well it .",
        "this phone is great and i love it.",
        "This phone is great and i love it .",
        f"{GOOD} {GOOD}",
        f"so {GOOD}",
        "great great great great great great great great .",
    ],
)
def test_what_is_no_review_does_not_parse(text):
    assert not demo.parses(text)


@pytest.mark.parametrize(
    "text",
    [GOOD, "this phone is awful and i love it .", "this phone is great yet i love it .", f" {GOOD}\n"],
    ids=["as written", "other mood", "other join", "other spaces"],
)
def test_mood_join_and_spacing_do_not_matter_to_the_parse(text):
    assert demo.parses(text)


def corrupt_by_dropping(words, rng):
    del words[rng.integers(len(words))]
    return words


def corrupt_by_doubling(words, rng):
    at = rng.integers(len(words))
    return [*words[:at], words[at], *words[at:]]


def corrupt_by_cutting_the_end(words, rng):
    return words[:-1]


def corrupt_by_shuffling(words, rng):
    return list(rng.permutation(words))


@pytest.mark.parametrize(
    ("corrupt", "at_most"),
    [
        # A degree ("very"), a comma or an "it" may be dropped here and there and leave a review.
        (corrupt_by_dropping, 0.15),
        (corrupt_by_doubling, 0.0),
        (corrupt_by_cutting_the_end, 0.0),
        (corrupt_by_shuffling, 0.01),
    ],
)
def test_corrupted_reviews_mostly_do_not_parse(corpus, corrupt, at_most):
    rng = np.random.default_rng(0)
    assert share(demo.parses(" ".join(corrupt(review.split(), rng))) for review in corpus) <= at_most


def test_every_review_begins_with_a_prompt_and_every_prompt_begins_reviews(corpus):
    openings = demo.prompts()
    begun = [[prompt for prompt in openings if review.startswith(f"{prompt} ")] for review in corpus]
    assert all(len(prompts) == 1 for prompts in begun)
    assert {prompt for [prompt] in begun} == set(openings)


def test_a_completion_has_6_to_20_words(corpus):
    lengths = {
        len(review.removeprefix(prompt).split())
        for prompt in demo.prompts()
        for review in corpus
        if review.startswith(f"{prompt} ")
    }
    assert lengths == set(range(6, 21))


def test_prompts_are_short_distinct_openings_with_no_mood():
    openings = demo.prompts()
    assert 20 <= len(openings) == len(set(openings)) <= 60
    for prompt in openings:
        assert 2 <= len(prompt.split()) <= 4
        assert demo.parses(f"{prompt} great and i love it .")
        assert not (demo.POSITIVE | demo.NEGATIVE) & set(prompt.split())


def test_the_vocabulary_is_the_words_of_the_corpus(corpus):
    words = demo.vocabulary()
    assert words == sorted({word for review in corpus for word in review.split()})
    assert 80 <= len(words) <= 150


def test_a_word_has_one_mood_or_none():
    plain = {word for alternatives in demo.RULES.values() for word in alternatives.split()}
    joins = {word for sides in demo.JOINS.values() for side in sides for word in side.split()}
    assert len(demo.POSITIVE) == len(demo.NEGATIVE) > 0
    assert not demo.POSITIVE & demo.NEGATIVE
    assert not (demo.POSITIVE | demo.NEGATIVE) & (plain | joins)
