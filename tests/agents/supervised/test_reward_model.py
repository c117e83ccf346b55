"""`train_reward_model`: losses worked out by hand, the token a score is read at, learning, and saved folders."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from agents import Labelled, Ranking, RewardModelCritic, hh_pairs, score_texts, train_reward_model, word_tokenizer
from agents.supervised.accuracy import calibration, pair_accuracy, wilson_interval
from agents.supervised.preferences import encode_texts
from agents.supervised.ranking_data import Example
from agents.supervised.reward_losses import bradley_terry
from agents.supervised.reward_model import _loss, build_reward_model, read_scores
from tests.helpers.models import tiny
from textenv import CharTokenizer
from textenv.rewards.reward_stats import RewardStats
from textenv.rewards.text_reader import TextReader

WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "is"]
TOKENIZER = word_tokenizer(WORDS)  # its pad token is its end token, 0
GOOD, BAD, FILM, THE = (TOKENIZER.convert_tokens_to_ids(word) for word in ("good", "bad", "film", "the"))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def some_texts(n, seed=0):
    """Return different texts of 3 to 8 words by their merit."""
    rng = np.random.default_rng(seed)
    texts = {" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(4 * n)}
    by_merit = {}
    for text in sorted(texts):
        by_merit.setdefault(merit(text), []).append(text)
    return by_merit


def merit(text):
    """Return how many more "good" than "bad" a text has."""
    return text.split().count("good") - text.split().count("bad")


def some_pairs(n, seed=0, noise=False):
    """Return pairs of texts, the better one first, or with `noise` in a random order."""
    rng = np.random.default_rng(seed)
    texts = [text for _, same in sorted(some_texts(n, seed).items()) for text in same]
    pairs = []
    while len(pairs) < n:
        first, second = (texts[i] for i in rng.choice(len(texts), 2, replace=False))
        if merit(first) != merit(second):
            better, worse = (first, second) if merit(first) > merit(second) else (second, first)
            pairs.append(Ranking((worse, better) if noise and rng.random() < 0.5 else (better, worse)))
    return pairs


def small(family="gpt2", seed=0):
    return build_reward_model(tiny(family, vocab_size=len(TOKENIZER)), seed)


def test_bradley_terry_worked_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    expected = [-log_sigmoid(1.0 - 0.25) + 0.1 * 1.0, -log_sigmoid(-1.5 - 0.25) + 0.1 * 6.25]
    np.testing.assert_allclose(bradley_terry(chosen, rejected, 0.25, centring=0.1), expected, rtol=1e-6)


def test_a_ranking_is_the_mean_of_all_its_pairs_and_rankings_weigh_the_same():
    model = small()
    triple = [[GOOD, FILM], [FILM], [BAD, FILM, THE]]
    pair = [[THE], [BAD]]
    examples = [Example(triple, [(0, 1), (0, 2), (1, 2)], margin=0.5), Example(pair, [(0, 1)])]
    with torch.no_grad():
        a, b, c, d, e = (float(model(input_ids=torch.tensor([ids])).logits) for ids in triple + pair)
        loss = float(_loss(model, examples, "last", 0.0))
    of_triple = -(log_sigmoid(a - b - 0.5) + log_sigmoid(a - c - 0.5) + log_sigmoid(b - c - 0.5)) / 3
    assert loss == pytest.approx((of_triple - log_sigmoid(d - e)) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "start"),
    [
        ([THE, FILM, GOOD], [THE, FILM, BAD], 2),
        ([THE, GOOD, FILM, GOOD], [THE, BAD], 1),  # after its end, the shorter text keeps its last score
        ([THE, FILM], [THE, FILM, BAD, BAD], 2),  # one is the start of the other
        ([THE, FILM], [THE, FILM], 1),  # equal: only the last token counts
    ],
)
def test_the_loss_of_each_token_is_counted_from_the_first_difference(chosen, rejected, start):
    model = small()

    def scores(ids):
        each = [float(model(input_ids=torch.tensor([ids[: end + 1]])).logits) for end in range(len(ids))]
        return each + [each[-1]] * 9

    with torch.no_grad():
        loss = float(_loss(model, [Example([chosen, rejected], [(0, 1)])], "tokens", 0.0))
        better, worse = scores(chosen), scores(rejected)
    positions = range(start, max(len(chosen), len(rejected)))
    assert loss == pytest.approx(-np.mean([log_sigmoid(better[t] - worse[t]) for t in positions]), abs=1e-5)


def test_the_loss_of_labels_is_the_squared_error():
    model = small()
    with torch.no_grad():
        scores = [float(model(input_ids=torch.tensor([ids])).logits) for ids in ([GOOD], [BAD, FILM])]
        loss = _loss(model, [Example([[GOOD]], [], label=1.0), Example([[BAD, FILM]], [], label=-1.0)], "last", 0.0)
    assert float(loss) == pytest.approx(((scores[0] - 1) ** 2 + (scores[1] + 1) ** 2) / 2, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "bloom", "qwen2", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_b7_scores_are_read_at_the_last_real_token_under_padding_of_either_side(family, side):
    model = small(family)
    texts = [[GOOD, FILM, 0], [0, THE], [BAD], [THE, FILM, 0, 0, GOOD, 0]]  # 0 is pad and end token: lengths decide
    columns = 9
    ids = torch.full((len(texts), columns), FILM)
    is_real = torch.zeros(len(texts), columns, dtype=torch.bool)
    for row, text in enumerate(texts):
        columns_of_text = slice(0, len(text)) if side == "right" else slice(columns - len(text), columns)
        ids[row, columns_of_text] = torch.tensor(text)
        is_real[row, columns_of_text] = True
    with torch.no_grad():
        alone = [float(read_scores(model, torch.tensor([t]), torch.ones(1, len(t), dtype=torch.bool))) for t in texts]
        together = read_scores(model, ids, is_real)
    assert np.ptp(alone) > 1e-3
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_b1_the_gradient_of_a_pair_is_the_same_beside_longer_texts():
    gradients = []
    for others in ([], [Example([[THE] * 20, [FILM] * 17], [])]):  # a ranking without pairs, to pad the others
        model = small()
        example = Example([[GOOD, FILM, 0], [BAD]], [(0, 1)])
        (_loss(model, [example, *others], "last", 0.0) * (1 + len(others))).backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_b8_over_long_texts_lose_as_many_tokens_at_the_start():
    texts = encode_texts(TextReader(CharTokenizer(), 4), ["abcdef", "abcxyz", "abcde"])
    assert texts == [[3, 4, 5, 6], [3, 24, 25, 26], [3, 4, 5]]


def test_held_out_labels_that_say_nothing_are_refused_before_training(tmp_path):
    labelled = [Labelled("good film", 1.0), Labelled("bad film", 0.0)]
    with pytest.raises(ValueError, match="held-out labels that differ"):
        train(labelled, tmp_path / "model", held_out=labelled[:1])
    assert not (tmp_path / "model").exists()


def test_over_long_texts_that_share_nothing_lose_their_own_start():
    """One long text must not empty the others it is ranked with."""
    texts = encode_texts(TextReader(CharTokenizer(), 4), ["abcdefgh", "bcd", "xabcdef"])
    assert texts == [[5, 6, 7, 8], [2, 3, 4], [3, 4, 5, 6]]
    texts = encode_texts(TextReader(CharTokenizer(), 4), ["abcdefgh", "abxy"])  # a shared start of two tokens
    assert texts == [[5, 6, 7, 8], [24, 25]]


def test_scores_do_not_depend_on_the_tokenizers_side_of_padding():
    model, texts = small(), ["good film", "the film was a good film", "bad"]
    scores = []
    for side in ("left", "right"):
        TOKENIZER.padding_side = side
        scores.append(score_texts(model, TOKENIZER, texts))
    np.testing.assert_array_equal(*scores)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    return train(some_pairs(300), folder)


def train(data, folder, held_out=None, **kwargs):
    settings = {"n_epochs": 8, "learning_rate": 1e-2, "progress_bar": False, **kwargs}
    config = tiny(vocab_size=len(TOKENIZER), initializer_range=0.1)
    held_out = some_pairs(200, seed=1) if held_out is None else held_out
    return train_reward_model(config, TOKENIZER, data, folder, held_out=held_out, **settings)


def test_it_learns_pairs(trained):
    figures = trained.held_out
    assert figures.accuracy > 0.95 and figures.low > 0.9 and figures.n_pairs == 200
    assert figures.calibration_error < 0.1 and trained.losses[-5:].mean() < 0.5 * trained.losses[0]


@pytest.mark.slow
def test_it_does_not_learn_pairs_from_shuffled_ones_in_as_many_epochs(tmp_path):
    figures = train(some_pairs(300, noise=True), tmp_path / "m").held_out
    assert figures.accuracy < 0.8 and figures.low < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"loss": "tokens"}, {"centring": 0.05}], ids=str)
def test_other_losses_learn_pairs_too(kwargs, tmp_path):
    assert train(some_pairs(300), tmp_path / "m", n_epochs=5, **kwargs).held_out.accuracy > 0.9


@pytest.mark.slow
def test_the_lower_layers_alone_learn_pairs_and_become_a_critic(tmp_path):
    options = {"first_layers": 1, "learning_rate": 1e-2, "n_epochs": 3, "progress_bar": False}
    start = small()
    trained = train_reward_model(start, TOKENIZER, some_pairs(200), tmp_path, held_out=some_pairs(100, 1), **options)
    assert trained.held_out.low > 0.5
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.n_layer == 1
    score = float(score_texts(start, TOKENIZER, ["good film"])[0])
    critic = RewardModelCritic(str(tmp_path)).build(hidden_size=16)
    hidden = critic.read(torch.tensor([[GOOD, FILM]]), torch.tensor([0]), torch.tensor([1]))
    assert critic(hidden).item() == pytest.approx(score, abs=1e-4)


def test_it_learns_rankings_of_any_length(tmp_path):
    rng = np.random.default_rng(3)
    by_merit = {value: texts for value, texts in some_texts(300).items() if len(texts) > 5}
    rankings = []
    for n in rng.integers(2, 5, 150):
        merits = sorted(rng.choice(sorted(by_merit), n, replace=False), reverse=True)
        rankings.append(Ranking([str(rng.choice(by_merit[value])) for value in merits]))
    assert train(rankings, tmp_path / "m", n_epochs=10).held_out.accuracy > 0.95


@pytest.mark.slow
def test_it_learns_labels(tmp_path):
    texts = [text for same in some_texts(150).values() for text in same][:300]
    data = [Labelled(text, merit(text)) for text in np.random.default_rng(0).permutation(texts)]
    figures = train(data[:250], tmp_path / "m", held_out=data[250:], n_epochs=12).held_out
    assert figures.accuracy > 0.9 and figures.calibration_error is None


def test_the_folder_loads_with_transformers_alone_and_scores_the_same(trained):
    texts = ["good film", "the film was a bad film", "bad plot", "a good good film"]
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    expected = score_texts(model, tokenizer, texts)
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            scores = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
            ).logits
        np.testing.assert_allclose(scores.flatten(), expected, atol=1e-5)
    assert expected[3] > expected[0] > expected[2]


def test_the_stats_are_those_of_the_training_texts(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder)
    scores = score_texts(model, TOKENIZER, [text for pair in some_pairs(300) for text in pair.texts])
    stats = json.loads((trained.folder / "reward_stats.json").read_text())
    assert stats == pytest.approx({"mean": scores.mean(), "std": scores.std()}, abs=1e-4)
    assert stats == asdict(RewardStats.load(trained.folder))


@pytest.mark.parametrize("normalise", [False, True])
def test_e5_a_critic_made_of_the_folder_values_a_text_at_its_score(trained, normalise):
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder)
    score = float(score_texts(model, TOKENIZER, ["good film"])[0])
    expected = RewardStats.load(trained.folder).normalised(score) if normalise else score
    critic = RewardModelCritic(str(trained.folder), normalise=normalise).build(hidden_size=16)
    hidden = critic.read(torch.tensor([[GOOD, FILM, 0]]), torch.tensor([0]), torch.tensor([1]))
    assert critic(hidden).item() == pytest.approx(expected, abs=1e-4)


def test_a_critic_without_stats_is_refused(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Expected reward_stats\.json in the folder"):
        RewardModelCritic(str(tmp_path), normalise=True).build(hidden_size=16)


def test_e10_equal_seeds_train_the_same_and_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(4)
    state = torch.get_rng_state()
    losses = [
        train(some_pairs(20), tmp_path / f"{i}", n_epochs=2, seed=s).losses.tolist() for i, s in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_hh_rows_are_split_behind_the_last_opening_they_share():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: How are you?\n\nAssistant:"
    [pair] = hh_pairs([{"chosen": f"{dialogue} Good.", "rejected": f"{dialogue} Go away."}])
    assert pair == Ranking((" Good.", " Go away."), dialogue)
    assert pair.wholes() == [f"{dialogue} Good.", f"{dialogue} Go away."]
    with pytest.raises(ValueError, match="dialogues of row 1 to share the opening"):
        hh_pairs([{"chosen": dialogue, "rejected": dialogue}, {"chosen": "a", "rejected": dialogue}])


def test_figures_worked_by_hand():
    assert pair_accuracy(np.array([1.0, 0.0, -1.0, 2.0])) == 0.625
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(1.0, 20)[0] == pytest.approx(0.8389, abs=1e-4)
    # Two pairs of confidence 0.9, both right: a gap of 0.1; two of 0.6, one right: also 0.1.
    assert calibration(np.log([9.0, 9.0, 1.5, 1 / 1.5])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "of one kind and at least one, got none"),
        ([Ranking(("a", "b")), Labelled("a", 1.0)], r"one kind and at least one, got \['Labelled', 'Ranking'\]"),
        ([Ranking(("good", "bad")), Ranking(("good",))], "at least two texts, got .* in row 1"),
        ([Ranking(("good", ""))], "texts of at least one token, got ''"),
    ],
)
def test_unusable_data_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_unusable_models_and_losses_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`loss` to be one of \['last', 'tokens'\], got 'mean'"):
        train(some_pairs(4), tmp_path / "m", loss="mean")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="Expected a causal model as critic, got BertModel"):
        build_reward_model(BertConfig(vocab_size=40, **shape))
