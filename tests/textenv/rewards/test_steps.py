"""Step rewards: the token that each step's score lands on, by hand and as of whole texts; the calls of scorers."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

from agents import TextVecEnv, bpe_tokenizer, word_tokenizer
from tests.helpers.rewards import preds_of
from textenv import CharTokenizer, Prompt, RewardError, TextEnv, TextVectorEnv
from textenv.rewards import StepReward, StepwiseReward, WeightedSum, make_reward
from textenv.rewards.process_model import ProcessReward

LETTERS = CharTokenizer("abcx;-")


class Pieces:
    """A tokenizer of whole pieces of text, so that a token can hold a part of a separator, or several."""

    def __init__(self, *pieces):
        self.pieces, self.eos_token_id, self.pad_token_id = ("", *pieces), 0, None

    def __len__(self):
        return len(self.pieces)

    def encode(self, text, **kwargs):
        return [self.pieces.index(text)]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.pieces[i] for i in ids)


class Spy(StepwiseReward):
    """Scores a step by the number of its letters plus a tenth of its place, and remembers the calls."""

    def __init__(self, separator):
        self.separator, self.calls = separator, []

    def score_steps(self, prompts, steps):
        self.calls.append([list(own) for own in steps])
        return [len(own[-1]) + len(own) / 10 for own in steps]


class Long:
    """A scorer that a configuration can name."""

    def __call__(self, prompt, steps):
        return float(len(steps[-1]))


def play(env, actions):
    env.reset(seed=0)
    return [round(env.step(action)[1], 6) for action in actions]


@pytest.mark.parametrize(
    "pieces, separator, expected",
    [
        (["a", "b", ";", "cc", ""], ";", [0, 0, 2.1, 0, 2.2]),  # the last step ends with the text
        (["a", ";", "b", ";", ""], ";", [0, 1.1, 0, 1.2, 0]),  # nothing stands behind the last separator
        (["a", ";", ";", "b", ""], ";", [0, 1.1, 0, 0, 1.2]),  # nothing between two separators
        (["a", "-", "-", "b", "-", ""], "--", [0, 0, 1.1, 0, 0, 2.2]),  # two tokens a separator; "b-" is a step
        (["a-", "-b", "--c", ""], "--", [0, 1.1, 1.2, 1.3]),  # it ends inside of a token
        (["a;b;c", "c;", ""], ";", [1.1 + 1.2, 2.3, 0]),  # a token with two steps, and the start of a third
        (["a", "-", "-", "-", "b", ""], "--", [0, 0, 1.1, 0, 0, 2.2]),  # from the left: "a", "-b"
        ([""], ";", [0]),  # an empty text has no step
    ],
)
def test_the_token_that_ends_a_step_earns_its_score(pieces, separator, expected):
    tokenizer = Pieces(*dict.fromkeys(["p", *filter(None, pieces)]))
    reward = Spy(separator)
    env = TextEnv(["p"], tokenizer, reward=reward, max_new_tokens=8)
    assert env.score_at == "step"
    assert play(env, [tokenizer.pieces.index(piece) for piece in pieces]) == pytest.approx(expected)
    scored = [steps[-1] for call in reward.calls for steps in call]
    assert scored == [step for step in "".join(pieces).split(separator) if step]  # each once, in order
    assert play(env, [tokenizer.pieces.index(piece) for piece in pieces]) == pytest.approx(expected)  # a new episode


def test_steps_that_end_together_are_scored_in_one_call():
    reward = Spy(";")
    env = TextVectorEnv(TextEnv(["a"], LETTERS, reward=reward, max_new_tokens=3, stop_ids=[]), num_envs=3)
    env.reset(seed=0)
    a, sep = LETTERS.encode("a;")
    rewards = [env.step(np.array(actions))[1].tolist() for actions in ([a, a, a], [sep, a, sep], [a, a, sep])]
    assert rewards == pytest.approx(np.array([[0, 0, 0], [1.1, 0, 1.1], [1.2, 3.1, 0]]))
    assert reward.calls == [[["a"], ["a"]], [["a", "a"], ["aaa"]]]


def test_a_turn_ends_its_last_step_and_a_stop_string_is_no_part_of_it():
    class Answers(TextEnv):
        def respond(self, prompt, preds):
            return "x;x"  # the env's own separators count for nothing

    tokenizer, reward = LETTERS, Spy(";")
    rules = {"max_turns": 2, "max_response_tokens": 3, "stop_strings": ["-"], "stop_ids": []}
    env = Answers(["a"], tokenizer, reward=reward, max_new_tokens=9, **rules)
    assert play(env, tokenizer.encode("a;bb-c;a-")) == pytest.approx([0, 1.1, 0, 0, 2.2, 0, 1.3, 0, 1.4])
    env = TextEnv(["a"], tokenizer, reward=reward, max_new_tokens=8, stop_strings=[";;"])
    assert play(env, tokenizer.encode("aa;;")) == pytest.approx([0, 0, 2.1, 0])  # ended by ";", and not again


@pytest.mark.parametrize("separator", ["\n", " ", "\n\n", "the", "é", "ab"])
def test_it_equals_the_slow_way(separator):
    """Random ids of a byte-level tokenizer, with tokens of half a character and of several: at each token, the steps of
    the text so far, decoded from its start, that the text before it did not have."""
    tokenizer = bpe_tokenizer(["the film\n\nthe plot é the end\n ab ab\n"] * 4, vocab_size=300)
    rng, reward = np.random.default_rng(0), Spy(separator)
    for _ in range(12):
        pieces = rng.choice(["the", " the", "\n", "\n\n", " film", "é", "ab", "a", "b", "\n\n\n", "e\n"], size=12)
        ids = [i for piece in pieces for i in tokenizer.encode(str(piece), add_special_tokens=False)]
        env = TextEnv(["the"], tokenizer, reward=reward, max_new_tokens=len(ids), stop_ids=[])
        earned, seen, expected = play(env, ids), [], []
        for n in range(1, len(ids) + 1):
            pieces_so_far = tokenizer.decode(ids[:n]).split(separator)
            steps = [s for s in (pieces_so_far if n == len(ids) else pieces_so_far[:-1]) if s.strip()]
            assert steps[: len(seen)] == seen  # what has ended stays as it was
            expected.append(sum(len(steps[k]) + (k + 1) / 10 for k in range(len(seen), len(steps))))
            seen = steps
        assert earned == pytest.approx(expected)
        at_the_end = TextEnv(["the"], tokenizer, reward=reward, max_new_tokens=len(ids), stop_ids=[], score_at="done")
        late = play(at_the_end, ids)
        assert late[-1] == pytest.approx(sum(earned)) and not any(late[:-1])


def test_two_rewards_of_one_separator_and_a_call_that_is_repeated():
    """Each scores each step; a failed call may be made again."""
    ones, twos = StepReward(lambda prompt, steps: 1.0, separator=";"), StepReward(lambda *_: 2.0, separator=";")
    env = TextEnv(["a"], LETTERS, reward=WeightedSum({"ones": ones, "twos": twos}), max_new_tokens=3, stop_ids=[])
    assert play(env, LETTERS.encode("a;b")) == [0, 3, 3]
    preds = preds_of("a;b", state={})
    assert ones(Prompt("a"), preds, True) == ones(Prompt("a"), preds, True) == 2.0


def test_a_scorer_that_fails_costs_its_own_row_alone():
    def fails(prompt, steps):
        return 1 / steps.count("a")

    reward = StepReward(fails, separator=";")
    env = TextVectorEnv(
        TextEnv(["a"], LETTERS, reward=reward, max_new_tokens=4, stop_ids=[], on_failure=-5.0), num_envs=2
    )
    env.reset(seed=0)
    both = list(zip(LETTERS.encode("b;a;"), LETTERS.encode("a;b;")))
    with pytest.warns(UserWarning, match="The reward has no score of 1 of 2 rows"):
        rewards = [env.step(np.array(actions))[1].tolist() for actions in both]
    assert rewards == [[0, 0], [-5.0, 1.0], [0, 0], [1.0, 1.0]]
    strict = TextEnv(["a"], LETTERS, reward=reward, max_new_tokens=4)
    with pytest.raises(RewardError, match="raised ZeroDivisionError"):
        play(strict, LETTERS.encode("b;"))
    with pytest.raises(RewardError, match="Expected a reward to be a finite number, got nan"):
        play(TextEnv(["a"], LETTERS, reward=StepReward(lambda *_: float("nan"), separator=";")), LETTERS.encode("b;"))


def test_a_running_episode_is_saved_and_goes_on():
    """The note in the episode's state is JSON; another process goes on from it, and scores no step again."""
    actions = LETTERS.encode("a;b;c;")

    def make():
        return TextVecEnv(TextEnv(["a"], LETTERS, reward=Spy(";"), max_new_tokens=6, stop_ids=[]), 1)

    def earned(env, some):
        return [env.step(np.array([action]))[1].item() for action in some]

    first, second = make(), make()
    first.reset()
    assert earned(first, actions[:3]) == pytest.approx([0, 1.1, 0])
    arrays, meta = first.state_dict()
    second.load_state_dict(arrays, json.loads(json.dumps(meta)))
    assert earned(second, actions[3:]) == earned(first, actions[3:]) == pytest.approx([1.2, 0, 1.3])


def test_names_and_wrong_arguments():
    reward = make_reward("steps", function=f"{__name__}:Long", separator=";")
    assert reward(Prompt("a"), preds_of("ab;c"), True) == 3.0
    assert pickle.loads(pickle.dumps(reward)).separator == ";"
    with pytest.raises(ValueError, match="Expected `separator` to be a text, got an empty one"):
        StepReward(Long(), separator="")
    with pytest.raises(TypeError, match=r"Expected a function \(prompt, steps\), got 3"):
        StepReward(3)


# Process reward models.

WORDS = ["a", "good", "bad", "film", ";", "so"]
SHAPE = {"vocab_size": 12, "initializer_range": 0.5, "num_labels": 2}
GPT = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
BERT = {
    **SHAPE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 24, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "gpt2": (GPT2ForTokenClassification, GPT2Config, GPT),
    "bert": (BertForTokenClassification, BertConfig, BERT),
    "sequence": (GPT2ForSequenceClassification, GPT2Config, GPT),
}


def build(family, **kwargs):
    model_class, config_class, shape = MODELS[family]
    torch.manual_seed(0)
    return model_class(config_class(**{**shape, **kwargs})).eval()


def rows_of_trl(tokenizer, prompt, steps, separator):
    """Return the ids of a row as TRL's PRMTrainer documents them, and the place of each step's label."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids += tokenizer(prompt, add_special_tokens=False)["input_ids"]
    places = []
    for step in steps:
        ids += tokenizer(step, add_special_tokens=False)["input_ids"] + tokenizer.encode(separator)
        places.append(len(ids) - 1)
    return ids, places


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_each_step_has_the_probability_at_its_separator(family, has_bos, batch_size):
    """A causal model says the same in one forward of the whole text, at all separators; all models, step by step."""
    tokenizer, model = word_tokenizer(WORDS), build(family)
    tokenizer.bos_token = tokenizer.eos_token if has_bos else None
    reward = ProcessReward(model, tokenizer=tokenizer, separator=";", batch_size=batch_size)
    steps, prompts = ["a good film", "so bad", "good"], [Prompt("so "), Prompt("a bad film ")]
    for prompt in prompts:
        ids, places = rows_of_trl(tokenizer, prompt, steps, ";")
        with torch.no_grad():
            slow = []
            for place in places:
                logits = model(input_ids=torch.tensor([ids[: place + 1]])).logits[0]
                slow.append((logits if family == "sequence" else logits[-1]).softmax(-1)[1].item())
            if family == "gpt2":
                whole = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)[places, 1]
                assert whole.tolist() == pytest.approx(slow, abs=1e-6)
        assert np.ptp(slow) > 1e-3
        assert reward.score_steps([prompt] * 3, [steps[: k + 1] for k in range(3)]) == pytest.approx(slow, abs=1e-6)
        assert reward(prompt, preds_of(";".join(steps)), True) == pytest.approx(sum(slow), abs=1e-6)


def test_a_process_model_by_name(tmp_path):
    for family in ("gpt2", "sequence"):
        folder = tmp_path / family
        build(family, num_labels=1 if family == "sequence" else 2).save_pretrained(folder)
        word_tokenizer(WORDS).save_pretrained(folder)
        reward = make_reward("process", model=str(folder), separator=";")
        assert type(reward._model.model) is MODELS[family][0]
        assert isinstance(reward(Prompt("so "), preds_of("good;bad"), True), float)


def test_a_process_model_cuts_the_prompt_and_says_so():
    reward = ProcessReward(build("gpt2"), tokenizer=word_tokenizer(WORDS), separator=";", max_length=4)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=4 tokens"):
        cut = reward.score_steps([Prompt("so so so so ")], [["good film"]])
    assert cut == pytest.approx(reward.score_steps([Prompt("so ")], [["good film"]]))
    with pytest.raises(ValueError, match=r"with one label, or with two \(wrong, right\), got 3"):
        ProcessReward(build("gpt2", num_labels=3), tokenizer=word_tokenizer(WORDS))
