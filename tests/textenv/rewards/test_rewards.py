"""The batched contract of rewards: calls from an env and from compositions, names and pickling."""

import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests.helpers.rewards import rows, scores
from textenv import RewardError, TextEnv, TextVectorEnv, check_text_env
from textenv.rewards import (
    DROPPED,
    BatchReward,
    Cached,
    Clip,
    Ensemble,
    Format,
    Gate,
    Keyword,
    Length,
    Regex,
    Repetition,
    RowReward,
    Scale,
    WeightedSum,
    make_reward,
    read_reward,
    register_reward,
    score_rows,
)

EOS, A, B = 0, 1, 2


@dataclass
class Counting(BatchReward):
    """A reward of the text's length, which remembers its calls."""

    score_at: str = "done"

    def __post_init__(self):
        self.calls = []

    def score(self, prompts, preds, dones):
        self.calls.append(([str(prompt) for prompt in prompts], [text.text for text in preds], list(dones)))
        return [float(len(text.text)) for text in preds]


def stepwise(prompt, preds, done):
    return 1.0


def play(env, actions):
    env.reset(seed=0)
    return [env.step(action)[1] for action in actions]


# In an env.


def test_one_call_for_all_finished_rows(make_env):
    reward = Counting()
    env = TextVectorEnv(make_env(["a", "b", "c"], reward=reward, order="sequential"), 3)
    env.reset(seed=0)
    for actions in ([A, A, A], [EOS, A, EOS]):
        _, rewards, *_ = env.step(np.array(actions))
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    assert reward.calls == [(["a", "c"], ["a", "a"], [True, True])]


def test_a_stepwise_reward_sees_every_row(make_env):
    reward = Counting(score_at="step")
    assert play(make_env(["a"], reward=reward), [A, B, EOS]) == [1.0, 2.0, 2.0]
    assert [dones for _, _, dones in reward.calls] == [[False], [False], [True]]


@pytest.mark.parametrize("own", ["step", "done", "rollout_end"])
def test_the_reward_sets_when_it_is_scored(make_env, own):
    assert make_env(reward=Counting(score_at=own)).score_at == own
    assert make_env(reward=Counting(score_at=own), score_at="done").score_at == "done"
    assert make_env().score_at == "step"


def test_a_reward_of_finished_texts_never_sees_others(make_env):
    reward = Counting()
    assert play(make_env(["a"], reward=reward, score_at="step"), [A, B, EOS]) == [0.0, 0.0, 2.0]
    assert reward.calls == [(["a"], ["ab"], [True])]


def test_a_batch_earns_what_its_rows_earn_one_by_one(make_env):
    env = make_env(reward=WeightedSum({"step": stepwise, "length": Length(2)}))
    batch = rows(["a", "bc", "def"])
    together = env.get_rewards(*batch)
    assert together == [env.get_reward(*row) for row in zip(*batch)]
    assert together[1] == {"step": 1.0, "length": 1.0}


def test_parts_reach_the_info(make_env):
    env = make_env(["a"], reward=WeightedSum({"step": stepwise, "length": Length(4)}, {"length": 2.0}))
    env.reset(seed=0)
    rewards = [env.step(action) for action in (A, B, EOS)]
    assert [step[1] for step in rewards] == [1.0, 1.0, 2.5]
    assert rewards[-1][4]["reward_parts"] == {"step": 3.0, "length": 1.5}


@pytest.mark.parametrize("value", [[1.0], [float("nan"), 1.0], [None, 1.0], 1.0])
def test_a_wrong_result_is_named(make_env, value):
    class Wrong(BatchReward):
        def score(self, prompts, preds, dones):
            return value

    with pytest.raises(RewardError, match=r"Expected (a reward to be a finite number|`get_rewards` to return)"):
        make_env(reward=Wrong()).get_rewards(*rows(["a", "b"]))


def test_c7_a_failing_part_names_its_row():
    def fails_on_b(prompt, preds, done):
        return 1 / (preds.text != "b")

    with pytest.raises(RewardError, match=r"ZeroDivisionError.*text 'b'"):
        scores(WeightedSum({"part": fails_on_b}), ["a", "b"])


@pytest.mark.filterwarnings("ignore:.*cannot be pickled")
@pytest.mark.parametrize("reward", [Counting(), Cached(Counting()), "repetition", {"name": "length", "target": 3}])
def test_envs_with_rewards_keep_the_contract(make_env, reward):
    check_text_env(make_env(["a", "b"], reward=reward))


def test_an_env_takes_one_reward(make_env):
    class Own(TextEnv):
        def get_reward(self, prompt, preds, done):
            return 0.0

    with pytest.raises(ValueError, match="exactly one reward"):
        make_env(cls=Own, reward=Length(1))
    with pytest.raises(TypeError, match="an instance of BatchReward"):
        make_env(reward=Counting)
    with pytest.raises(TypeError, match="Expected a reward"):
        make_env(reward=3)


# Names.


def test_names(make_env):
    assert make_reward("length", target=3) == Length(3)
    assert read_reward({"name": "regex", "pattern": "a"}) == Regex("a")
    nested = {
        "name": "sum",
        "parts": {"short": {"name": "length", "target": 1}, "own": "tests.textenv.rewards.test_rewards:stepwise"},
    }
    assert scores(read_reward(nested), ["a"]) == [2.0]
    assert play(make_env(["a"], reward="tests.textenv.rewards.test_rewards:stepwise"), [A, EOS]) == [1.0, 1.0]
    assert make_reward("tests.textenv.rewards.test_rewards:Counting", score_at="step").score_at == "step"


def test_own_names():
    register_reward("counting", "tests.textenv.rewards.test_rewards:Counting")
    register_reward("counting", "tests.textenv.rewards.test_rewards:Counting")
    assert scores(make_reward("counting"), ["abc"]) == [3.0]
    with pytest.raises(ValueError, match="a name that is not taken, got 'length'"):
        register_reward("length", "tests.textenv.rewards.test_rewards:Counting")
    with pytest.raises(ValueError, match="Expected a name and a 'module:name'"):
        register_reward("other", "no_colon")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lenght", {}, "or one of .*'length'"),
        ("tests.textenv.rewards.test_rewards:nothing", {}, "class or function"),
        ("tests.textenv.rewards.test_rewards:stepwise", {"target": 1}, "Expected a class at"),
    ],
)
def test_wrong_names(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_reward(name, **options)


def test_rewards_are_imported_without_torch_and_scorers():
    code = (
        "import sys, textenv.rewards; "
        "textenv.rewards.make_reward('length', target=3); "
        "print({'torch', 'transformers', 'nltk', 'sacrebleu', 'vaderSentiment'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Composition.


def test_weighted_sum_by_hand_and_nested_names():
    inner = WeightedSum({"length": Length(4, "characters"), "one": stepwise}, {"one": 0.5})
    reward = WeightedSum({"rules": inner, "form": Regex("a+")}, {"rules": 2.0, "form": -1.0})
    [parts] = reward.score(*rows(["aaa"]))
    assert parts == {"rules/length": 1.5, "rules/one": 1.0, "form": -1.0}


@pytest.mark.parametrize(
    ("kinds", "whole"),
    [(["done"], "done"), (["done", "rollout_end"], "rollout_end"), (["step", "rollout_end"], "step")],
)
def test_a_composition_is_scored_as_often_as_a_part_needs(kinds, whole):
    parts = [Counting(score_at=kind) for kind in kinds]
    assert WeightedSum(dict(zip("abc", parts))).score_at == whole
    assert Ensemble(parts).score_at == whole
    assert Ensemble([*parts, stepwise]).score_at == "step"


def test_a_heavy_part_of_a_stepwise_sum_sees_finished_rows_only():
    heavy = Counting(score_at="rollout_end")
    prompts, preds, _ = rows(["a", "bb", "ccc"])
    WeightedSum({"heavy": heavy, "each": stepwise}).score(prompts, preds, [False, True, False])
    assert heavy.calls == [(["p "], ["bb"], [True])]


def test_clip_scale_and_ensemble_by_hand():
    texts = ["a", "abc", "abcdefgh"]
    assert scores(Counting(), texts) == [1.0, 3.0, 8.0]
    assert scores(Clip(Counting(), 2.0, 5.0), texts) == [2.0, 3.0, 5.0]
    assert scores(Clip(Counting(), low=2.0), texts) == [2.0, 3.0, 8.0]
    assert scores(Scale(Counting(), -0.5), texts) == [-0.5, -1.5, -4.0]
    assert scores(Ensemble([Counting(), stepwise]), texts) == [1.0, 2.0, 4.5]
    assert scores(Ensemble([Counting(), lambda *_: 3.0], by="minimum"), texts) == [1.0, 3.0, 3.0]
    [parts] = Scale(WeightedSum({"n": Counting()}), 2.0).score(*rows(["abc"]))
    assert parts == {"n": 6.0}


def test_a_gate_asks_only_where_it_is_open():
    judge = Counting()
    assert scores(Gate(Regex("a+"), judge, otherwise=-1.0), ["aa", "b", "aaa"]) == [2.0, -1.0, 3.0]
    assert [texts for _, texts, _ in judge.calls] == [["aa", "aaa"]]


def test_a_gate_of_finished_texts_charges_them_alone(make_env):
    for reward in (stepwise, Counting()):
        env = make_env(["a"], reward=Gate(Regex("b"), reward, otherwise=-1.0), score_at="step")
        assert play(env, [A, A, EOS]) == [0.0, 0.0, -1.0]


def test_the_cache_asks_once_and_answers_the_same():
    plain, inner = Counting(), Counting()
    cached = Cached(inner, size=2)
    batches = [["a", "bb", "a"], ["bb", "ccc"], ["a"]]  # "a" is the oldest, and gone before the third batch
    assert [scores(cached, batch) for batch in batches] == [scores(plain, batch) for batch in batches]
    assert [texts for _, texts, _ in inner.calls] == [["a", "bb"], ["ccc"], ["a"]]
    assert cached.n_asked == 4


def test_the_cache_tells_prompts_and_rows_apart():
    cached = Cached(lambda prompt, preds, done: float(prompt.row["label"]))
    assert scores(cached, ["a"], row={"label": 1}) == [1.0]
    assert scores(cached, ["a"], row={"label": 2}) == [2.0]
    assert scores(cached, ["a"], prompts=["q"], row={"label": 2}) == [2.0]
    assert cached.n_asked == 3


def test_the_cache_does_not_remember_unfinished_texts():
    cached = Cached(lambda prompt, preds, done: float(done))
    prompts, preds, _ = rows(["a", "a"])
    assert cached.score(prompts, preds, [False, True]) == [0.0, 1.0]
    assert cached.score(prompts, preds, [False, False]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "reward",
    [
        Length(3, "words"),
        Repetition(2),
        Keyword(["a"]),
        Regex("a|b"),
        Format(["a"]),
        WeightedSum({"n": Length(2)}, {"n": 2.0}),
        Clip("repetition", low=-0.5),
        Scale("repetition", 3.0),
        Gate(Regex("a.*"), "repetition"),
        Ensemble([Length(1), Length(2)], "minimum"),
        Cached(Repetition(1)),
    ],
)
def test_rewards_pickle(reward):
    texts = ["a a a a", "b", "a"]
    assert scores(pickle.loads(pickle.dumps(reward)), texts) == scores(reward, texts)


def drops_b(prompt, preds, done):
    return DROPPED if preds.text == "b" else float(len(preds.text))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (drops_b, [2.0, DROPPED]),
        (WeightedSum({"one": drops_b, "two": lambda *_: 1.0}), [{"one": 2.0, "two": 1.0}, DROPPED]),
        (Clip(drops_b, high=1.0), [1.0, DROPPED]),
        (Scale(drops_b, 3.0), [6.0, DROPPED]),
        (Gate(drops_b, lambda *_: 5.0, otherwise=-1.0), [5.0, DROPPED]),
        (Gate(lambda *_: 1.0, drops_b), [2.0, DROPPED]),
        (Ensemble([drops_b, lambda *_: 4.0]), [3.0, DROPPED]),
        (Ensemble([drops_b, lambda *_: 4.0], by="minimum"), [2.0, DROPPED]),
        (Cached(drops_b), [2.0, DROPPED]),
    ],
)
def test_a_row_that_a_part_drops_is_dropped(reward, expected):
    assert [row.score for row in score_rows(reward, *rows(["aa", "b"]))] == expected


def test_the_cache_asks_again_for_what_was_dropped():
    cached = Cached(drops_b)
    for _ in range(2):
        score_rows(cached, *rows(["aa", "b"]))
    assert cached.n_asked == 3


# Rules.


def test_rules_by_hand():
    assert scores(Length(2), ["", "a", "ab", "abc", "abcdefgh"]) == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert scores(Length(2, "words"), ["a", "a b", "a b c"]) == [0.5, 1.0, 0.5]
    assert scores(Repetition(1), ["", "a", "a b", "a a", "a b a a"]) == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert scores(Repetition(2), ["a", "a b a b", "a b c"]) == [0.0, pytest.approx(-1 / 3), 0.0]
    assert scores(Keyword(["good", "C++"]), ["Good C++", "goodness", "so good."]) == [1.0, 0.0, 0.5]
    assert scores(Keyword("good", ignore_case=False), ["Good", "good"]) == [0.0, 1.0]
    assert scores(Keyword(column="wanted"), ["a b"], row={"wanted": ["a", "c"]}) == [0.5]
    assert scores(Regex("a+"), ["aa", "ab"]) == [1.0, 0.0]
    assert scores(Regex("a+", whole=False), ["ba", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>x\ny</think>\n<answer>4</answer>", True),
        (" <think></think><answer></answer> ", True),
        ("<think>x</think> so <answer>4</answer>", False),
        ("<answer>4</answer><think>x</think>", False),
        ("<think>x</think>", False),
        ("<think>x<answer></think>4</answer>", False),
        ("<think>x</think><answer>4</answer><answer>4</answer>", False),
    ],
)
def test_format(text, fits):
    assert scores(Format(), [text]) == [float(fits)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Length(0),
        lambda: Length(3, "lines"),
        lambda: Repetition(0),
        lambda: Keyword(),
        lambda: Keyword(["a"], column="b"),
        lambda: Regex("("),
        lambda: Format([]),
        lambda: WeightedSum({"a": stepwise}, {"b": 1.0}),
        lambda: Clip(stepwise, 2.0, 1.0),
        lambda: Ensemble([]),
        lambda: Ensemble([stepwise], by="median"),
        lambda: Cached(stepwise, size=0),
    ],
)
def test_wrong_options(build):
    with pytest.raises(ValueError, match=r"Expected .*got"):
        build()


def test_a_row_reward_needs_one_method():
    class Shout(RowReward):
        def score_row(self, prompt, preds):
            return float(preds.text.isupper())

    assert [row.value for row in score_rows(Shout(), *rows(["A", "a"]))] == [1.0, 0.0]
