"""Tasks of reasoning-gym: answers found in texts, scores by hand, items of two parts, refusals, and learning."""

import inspect
import pickle
import re
import sys
from importlib import import_module
from types import SimpleNamespace

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.utils import LinearSchedule

from agents import evaluate, make_agent, word_tokenizer
from agents.configuration.config import EnvConfig
from agents.errors import CommandError
from agents.runs.assemble import make_env
from agents.supervised.sft_data import encode_sample
from tests.helpers import fakes
from tests.helpers.models import tiny
from tests.textenv.adapters.test_adapters import REAL, installed
from tests.textenv.prompts.test_chat import CHATML, tokenizer_with
from tests.textenv.tasks.test_synthetic import Shuffled
from textenv import CharTokenizer, Preds, Prompt, TextEnv, Turn, check_text_env
from textenv.adapters.reasoning_gym import EVALUATED, ReasoningGym, ReasoningItems, ReasoningScore, extract_answer
from textenv.checks.trust import Trust

SMALL = {"max_terms": 2, "max_digits": 1}
FEW = dict(config=SMALL, size=20, n_held_out=10)
TOKENIZER = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
ITEM = {"question": "Add: 20 + 22 =", "answer": "42", "metadata": {"num_terms": 2}}


@pytest.fixture(autouse=True, params=["fake", pytest.param("real", marks=REAL)])
def library(request, monkeypatch):
    """Run each test with the stand-in and with the library."""
    if request.param == "real":
        installed("reasoning_gym")
    else:
        for module, content in fakes.reasoning_gym().items():
            monkeypatch.setitem(sys.modules, module, content)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        (" 42 \n\n", "42"),
        ("20 and 22\nmake\n42", "42"),  # the last line
        ("Answer: 42", "42"),
        ("Answer: 42\nI am sure.", "42"),  # the line behind the mark
        ("Answer: 7\nno, Answer:\n 42\n", "42"),  # the last mark, and the first line behind it
        ("It is 42.", "It is 42."),  # a sentence is no number
        ("", None),
        (" \n", None),
        ("7\nAnswer: ", None),  # a mark without an answer
    ],
)
def test_the_answer_by_the_default_rule(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"-?\d+", "it is 7, no, -42.", "-42"),  # the last match
        (r"\[(.*?)\]", "[7] [ 42 ]", "42"),  # its first group
        (r"\[(.*?)\]", "42", None),
        (r"(a)|b", "b", None),  # a group that took no part
        (r"(?s).+", "1 2\n3 4\n", "1 2\n3 4"),  # all lines
    ],
)
def test_the_answer_by_a_pattern(pattern, text, answer):
    assert extract_answer(text, pattern) == answer


def score(reward, text, item=ITEM):
    return reward(Prompt("a", row=item), Preds(TOKENIZER, [], closed=[Turn(text, None)]), True)


@pytest.mark.parametrize(
    ("text", "whole", "partial"),
    [
        ("42", 1.0, 1.0),
        ("42.0", 1.0, 1.0),  # the library's tolerance for numbers
        ("so\nAnswer: 42", 1.0, 1.0),
        ("43", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("4242", 0.0, 2 / 4),  # a part for a text that has the answer in it
        ("42 43 44", 0.0, 2 / 8),
    ],
)
def test_scores_by_hand(text, whole, partial):
    assert score(ReasoningScore("chain_sum"), text) == whole
    assert score(ReasoningScore("chain_sum", partial_credit=True), text) == pytest.approx(partial)


def test_a_text_that_the_library_cannot_read_earns_nothing():
    factors = {"question": "?", "answer": "2 × 3", "metadata": {"factors": [2, 3]}}
    reward = ReasoningScore("prime_factorization", partial_credit=True)
    assert [score(reward, text, factors) for text in ("3 × 2", "6", "5", "zzz")] == [1.0, 0.5, 0.01, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x"])
def test_a_score_that_is_no_finite_number_counts_as_nothing(value, monkeypatch):
    reward = ReasoningScore("chain_sum", partial_credit=True)
    monkeypatch.setattr(reward._dataset, "score_answer", lambda answer, entry: value, raising=False)
    assert score(reward, "42") == 0.0


def test_the_score_can_be_pickled():
    assert score(pickle.loads(pickle.dumps(ReasoningScore("chain_sum", SMALL))), "42") == 1.0


def questions(part, **kwargs):
    return [row["question"] for row in ReasoningItems("chain_sum", **{**FEW, **kwargs}).rows(part)]


def test_items_by_hand():
    """The library's first draws of seed 0: 0 - 4, 4 - 1, 1 + 5."""
    [first, *_], rows = (ReasoningItems("chain_sum", SMALL, 2, 1).rows(part) for part in ("held_out", "train"))
    asked = "State the final answer to the following arithmetic problem: {} ="
    assert (first["question"], first["answer"]) == (asked.format("0 - 4"), "-4")
    assert [(row["prompt"], row["answer"]) for row in rows] == [
        (asked.format("4 - 1") + "\nAnswer:", "3"),
        (asked.format("1 + 5") + "\nAnswer:", "6"),
    ]
    assert rows[0]["metadata"]["expression"] == "4 - 1"


@pytest.mark.parametrize("data_seed", [0, 1, 7])
def test_no_question_is_in_both_parts(data_seed):
    train, held_out = (questions(part, size=130, n_held_out=50, data_seed=data_seed) for part in ("train", "held_out"))
    assert (len(train), len(held_out), len(set(held_out))) == (130, 50, 50)
    assert not {*train} & {*held_out}


@pytest.mark.parametrize("data_seed", [0, 1])
def test_both_parts_have_a_similar_mix(data_seed):
    """Sums of one digit have few questions, each of them frequent: 0.41 of all draws; no part may run out of them."""
    sizes = {"config": {"max_terms": 2, "max_digits": 2}, "size": 2000, "n_held_out": 300, "data_seed": data_seed}
    shares = []
    for part in ("train", "held_out"):
        numbers = [re.findall(r"\d+", question) for question in questions(part, **sizes)]
        shares.append(sum(max(map(len, row)) == 1 for row in numbers) / len(numbers))
    assert shares[0] > 0.2 and abs(shares[0] - shares[1]) < 0.2


def test_items_are_the_same_again_and_held_out_ones_for_any_size():
    assert questions("train") == questions("train") != questions("train", data_seed=5)
    assert questions("held_out") == questions("held_out", size=100)
    assert questions("train") == questions("train", size=100)[:20]


def test_prompts_are_texts_or_chats_of_a_template():
    def prompt(**kwargs):
        return ReasoningItems("chain_sum", **FEW, **kwargs).rows("train")[0]

    row = prompt(template="Q: {question}\nA:")
    assert row["prompt"] == f"Q: {row['question']}\nA:"
    assert prompt(chat=True)["prompt"] == [{"role": "user", "content": row["question"]}]
    assert prompt(chat=True, template="{question} Be brief.")["prompt"][0]["content"] == f"{row['question']} Be brief."


def test_solved_items_are_read_and_end_as_the_policy_sees_them():
    """The tokens of a solved item are the environment's prompt, the answer and the end token."""
    for options, tokenizer in (({"chat": True}, tokenizer_with(CHATML, opens=True)), ({}, tokenizer_with(opens=True))):
        env = ReasoningGym("chain_sum", tokenizer, **FEW, **options)
        for prompt, pair in zip(env.prompts, ReasoningItems("chain_sum", **FEW, **options).solved("train")):
            [sample] = encode_sample(tokenizer, pair, tokenizer.eos_token_id, 999)
            assert sample.ids[: sample.n_read] == prompt.ids.tolist()
            text = tokenizer.decode(sample.ids[sample.n_read : -1])
            assert text == prompt.references[0] if options else text == f" {prompt.references[0]}"
            assert score(env.reward, text, prompt.row) == 1.0


def test_the_environment_keeps_to_the_rules():
    env = ReasoningGym("chain_sum", TOKENIZER, **FEW, max_new_tokens=6)
    check_text_env(env)
    gymnasium_check_env(env, skip_render_check=True)
    sb3_check_env(env, warn=True)
    made = gym.make("textenv/ReasoningGym-v0", name="chain_sum", tokenizer=TOKENIZER, **FEW).unwrapped
    assert [str(prompt) for prompt in made.prompts] == [str(prompt) for prompt in env.prompts]
    assert [prompt.references for prompt in env.prompts] == [[prompt.row["answer"]] for prompt in env.prompts]


def test_an_episode_of_the_right_answer_earns_one_at_its_end():
    env = ReasoningGym("chain_sum", TOKENIZER, **FEW)
    for text, total in (("{}", 1.0), ("Answer: {}", 1.0), ("{}7", 0.0)):
        env.reset(options={"prompts": [env.prompts[3]]})
        ids = [*TOKENIZER.encode(text.format(env.prompts[3].row["answer"])), TOKENIZER.eos_token_id]
        rewards = [env.step(token)[1] for token in ids]
        assert (sum(rewards[:-1]), rewards[-1]) == (0.0, total)


def test_a_configuration_names_it_with_its_held_out_part():
    args = {"name": "chain_sum", **FEW}
    train, held_out = (
        make_env(EnvConfig("ReasoningGym", {**args, "part": part}), TOKENIZER, 3, Trust())
        for part in ("train", "held_out")
    )
    assert (len(train.prompts), len(held_out.prompts), train.seed) == (20, 10, 3)
    with pytest.raises(CommandError, match=r"Expected --env\.args\.name VALUE for the task ReasoningGym, got none"):
        make_env(EnvConfig("ReasoningGym"), TOKENIZER, 0, Trust())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, r"Expected a task of reasoning-gym, got 'chain_sums': did you mean 'chain_sum'\?"),
        ("n_queens", {}, r"without running it, got 'n_queens': .* Take another task"),
        ("chain_sum", {"config": {"max_term": 2}}, r"of 'chain_sum', got 'max_term': did you mean 'max_terms'\?"),
        ("chain_sum", {"config": {"seed": 2}}, r"for `config` of 'chain_sum', got 'seed'"),
        ("chain_sum", {"config": {"min_terms": 0}}, r"'chain_sum' takes, got \{'min_terms': 0\}: min_terms must"),
        ("chain_sum", {"config": {"max_terms": "x"}}, r"a `config` that 'chain_sum' takes, got \{'max_terms': 'x'\}"),
        ("chain_sum", {"config": 3}, r"`config` to be keys with values, got 3"),
        ("chain_sum", {"config": SMALL}, r"Expected 300 different .* and 1000 others .*, got 200 and 0 in 6200 draws"),
        ("chain_sum", {"size": 0}, r"`size` to be a whole number of at least 1, got 0"),
        ("chain_sum", {"data_seed": -1}, r"`data_seed` to be a whole number of at least 0, got -1"),
        ("chain_sum", {"part": "test"}, r"`part` to be one of \['train', 'held_out'\], got 'test'"),
        ("chain_sum", {"template": "Q:"}, r"`template` to have '\{question\}' in it, got 'Q:'"),
        ("chain_sum", {"pattern": "("}, r"`pattern` to be a regular expression, got '\('"),
        ("chain_sum", {"chat": True}, r"a tokenizer with a chat template"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_change(name, options, message):
    with pytest.raises(ValueError, match=message):
        ReasoningGym(name, TOKENIZER, **options)


def test_python_without_assertions_is_refused(monkeypatch):
    """basic_arithmetic evaluates an expression with the configuration's operators, which an `assert` checks."""
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=1))
    with pytest.raises(ValueError, match=r"Expected Python with assertions, .* got -O"):
        ReasoningScore("chain_sum")


def test_a_task_without_answers_is_scored_but_not_shown_as_solved():
    env = ReasoningGym("graph_color", TOKENIZER, size=2, n_held_out=0)
    assert env.prompts[0].references == [] and score(env.reward, "red", env.prompts[0].row) == 0.0
    with pytest.raises(ValueError, match="Expected a task with answers to learn from, got 'graph_color'"):
        ReasoningItems("graph_color", size=2, n_held_out=0).solved("train")


def test_a_library_that_does_not_know_its_own_answer_is_noticed(monkeypatch):
    dataset = type(ReasoningScore("chain_sum")._dataset)
    monkeypatch.setattr(dataset, "score_answer", lambda self, answer, entry: entry["moved"])
    with pytest.raises(ValueError, match=r"Expected 'chain_sum' to give its own answer '.+' a score of 1"):
        ReasoningGym("chain_sum", TOKENIZER, **FEW)


def test_tasks_that_evaluate_texts_are_refused():
    """With the library: the sources of every other task's scoring are free of what evaluates a text."""
    factory = import_module("reasoning_gym.factory")
    if fakes.Sums is factory.DATASETS["chain_sum"][0]:
        pytest.skip("the stand-in evaluates nothing")
    found = set()
    for name, (dataset, _) in factory.DATASETS.items():
        source = inspect.getsource(sys.modules[dataset.__module__])
        # Their own expressions, of numbers, are evaluated by further tasks.
        if re.search(r"eval\(answer\)|\b(sympy|sp)?\.?(parse_expr|sympify)\(answer", source):
            found.add(name)
    assert {*EVALUATED} == found | {"composite"}


NUMBERS = word_tokenizer([str(number) for number in range(19)] + ["+", "-", "="])


@pytest.mark.slow
@pytest.mark.parametrize("is_control", [False, True])
def test_sums_are_learned_and_not_from_shuffled_rewards(is_control):
    """A model from scratch learns the answers to a few questions, each of one token."""
    items = ReasoningItems("chain_sum", SMALL, size=10, n_held_out=0).rows("train")
    # One question for each answer, so that a model that always writes the same earns little.
    different = {row["answer"]: row for row in items if "-" not in row["answer"]}
    rows = [{**row, "prompt": row["metadata"]["expression"] + " ="} for row in different.values()]
    score = ReasoningScore("chain_sum")
    few = TextEnv(rows, NUMBERS, reward=Shuffled(score) if is_control else score, max_new_tokens=1)
    config = tiny(vocab_size=len(NUMBERS), n_layer=1, n_embd=32, initializer_range=0.1)
    options = dict(batch_size=64, learning_rate=LinearSchedule(5e-3, 0.0, 1.0), seed=0, device="cpu", n_steps=8)
    model = make_agent(few, config, n_envs=32, **options)
    judge = TextEnv(rows, NUMBERS, reward=score, max_new_tokens=1)
    before = evaluate(model, rows, NUMBERS, n=20, env=judge).figures["reward"].value
    model.learn(40 * model.n_steps * model.n_envs)
    after = evaluate(model, rows, NUMBERS, n=20, env=judge).figures["reward"].value
    assert before < 0.2
    assert after < 0.35 if is_control else after > 0.6
