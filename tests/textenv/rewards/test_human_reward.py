"""The reward that people give: waiting for answers, not asking twice, and learning from answers during training."""

import pickle
import signal
import threading
import time
import warnings

import pytest

from tests.helpers.models import make_ppo, tiny
from tests.helpers.people import Crowd, Rater
from textenv import CharTokenizer, Preds, Prompt, TextEnv
from textenv.feedback.asked import questions_of
from textenv.feedback.store import FeedbackStore
from textenv.rewards import DROPPED, BatchReward, HumanReward, make_reward
from textenv.rewards import human as human_module

TOKENIZER = CharTokenizer()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look for new answers every 10 ms, as nobody types here."""
    monkeypatch.setattr(human_module, "POLL", 0.01)


@pytest.fixture
def db(tmp_path):
    return str(tmp_path / "answers.db")


def rows(*texts, prompt="p"):
    preds = [Preds(TOKENIZER, TOKENIZER.encode(text)) for text in texts]
    return [Prompt(prompt)] * len(texts), preds, [True] * len(texts)


def by_length(store, rater="ann", scale=2):
    """Answer all open questions: a text's score is its length times `scale`, and longer texts rank first."""
    while (item := store.next(rater)) is not None:
        if item.kind == "score":
            store.score(item, [scale * len(item.completions[0])])
        else:
            store.rank(item, sorted(range(len(item.order)), key=lambda index: -len(item.completions[index])))


class ByLength(BatchReward):
    """A learner that notes the number of answers at each fit, and scores a text by its length."""

    def __init__(self):
        self.fits = []

    def fit(self, answers):
        self.fits.append(len(answers))

    def score(self, prompts, preds, dones):
        return [float(len(completion.text)) for completion in preds]


def test_waits_for_the_mean_of_what_people_give(db):
    reward = HumanReward(db, scale=(0, 10), raters=2)
    with FeedbackStore(db) as store:
        reward.attend = lambda items: [by_length(store, "ann", 2), by_length(store, "bob", 3)]
        assert reward.score(*rows("a", "bc", "a")) == [2.5, 5.0, 2.5]
        assert [question.completions for question in questions_of(db, "training")] == [("a",), ("bc",)]


def test_blocks_until_the_last_answer_is_there(db):
    reward, result = HumanReward(db), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def messages():
            return [str(warning.message) for warning in caught if "waiting for" in str(warning.message)]

        thread = threading.Thread(target=lambda: result.extend(reward.score(*rows("a", "bb"))))
        thread.start()
        # The reward counts the open questions after adding both. An answer before that would make it count one.
        while not messages():
            assert thread.is_alive()
            time.sleep(0.01)
        with FeedbackStore(db) as store:
            for scores in ([1], [4]):
                while (item := store.next("ann")) is None:
                    assert thread.is_alive()
                assert not result
                store.score(item, scores)
        thread.join(60)
    assert result == [1.0, 4.0]
    [message] = messages()
    assert "waiting for 2 answers: textenv rate --db " in message


def test_what_was_asked_before_is_not_asked_again(db):
    with FeedbackStore(db) as store:
        first = HumanReward(db)
        first.attend = lambda items: by_length(store)
        assert first.score(*rows("a", "b")) == [2.0, 2.0]
        resumed = HumanReward(db)  # a resumed run
        resumed.attend = lambda items: pytest.fail(f"asked for {items}")
        assert resumed.score(*rows("b", "a")) == [2.0, 2.0]
        assert len(store.answers()) == 2
        other = HumanReward(db, run="another run")
        other.attend = lambda items: by_length(store, scale=3)
        assert other.score(*rows("b")) == [3.0]


def test_skipped_texts_are_left_out_of_training(db):
    reward = HumanReward(db)

    def skip_short(items):
        with FeedbackStore(db) as store:
            while (item := store.next("ann")) is not None:
                if len(item.completions[0]) < 2:
                    store.skip(item)
                else:
                    store.score(item, [3])

    reward.attend = skip_short
    assert reward.score(*rows("a", "bc")) == [DROPPED, 3.0]


def test_ctrl_c_ends_the_waiting(db):
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="waiting for 1 answer"):
        HumanReward(db).score(*rows("a"))
    timer.join()
    with FeedbackStore(db) as store:
        assert store.next("ann").completions == ("a",)


def test_learns_again_after_so_many_answers_and_asks_no_more_than_can_wait(db):
    with FeedbackStore(db) as store:
        for text in ("a", "bb", "cc"):
            store.add("p", [text])
        by_length(store, scale=1)
        learner = ByLength()
        reward = HumanReward(db, learned=learner, every=3, n_asked=2)
        texts = ["f" * n for n in range(1, 8)]
        assert reward.score(*rows(*texts)) == [1, 2, 3, 4, 5, 6, 7]
        assert learner.fits == [3]
        assert [question.completions[0] for question in questions_of(db, "training")] == ["f" * 7, "f"]
        reward.score(*rows("g"))
        assert len(questions_of(db, "training")) == 2  # both questions are still open
        store.score(store.next("ann"), [4])
        reward.score(*rows("g", "hh"))
        assert learner.fits == [3] and len(questions_of(db, "training")) == 3
        for _ in range(2):
            store.score(store.next("ann"), [2])
        store.undo("ann")
        reward.score(*rows("i"))
        assert learner.fits == [3]
        store.score(store.next("ann"), [3])
        reward.score(*rows("j"))
        assert learner.fits == [3, 6]


def test_rankings_are_asked_of_texts_of_one_prompt(db):
    with FeedbackStore(db) as store:
        store.add("p", ["a", "bb"], kind="rank")
        by_length(store)
    reward = HumanReward(db, learned=ByLength(), kind="rank", every=1, n_asked=4)
    first, second = rows("a", "bb", "a", "ccc", prompt="x"), rows("dd", prompt="y")
    reward.score(*(left + right for left, right in zip(first, second)))
    questions = [(question.kind, question.prompt, question.completions) for question in questions_of(db, "training")]
    assert questions == [("rank", "x", ("a", "bb", "ccc"))]


def test_refusals(db, tmp_path):
    with pytest.raises(ValueError, match=r"Expected 5 answers in .* to learn from .*got 0: collect them first"):
        HumanReward(db, learned=ByLength(), every=5)
    with pytest.raises(TypeError, match="with a method `fit`"):
        HumanReward(db, learned={"name": "length", "target": 3})
    with pytest.raises(ValueError, match="kind='score' without `learned`"):
        HumanReward(db, kind="rank")
    with pytest.raises(ValueError, match="at least 1, got 0, 50 and 8"):
        HumanReward(db, raters=0)
    with pytest.raises(ValueError, match="scale"):
        HumanReward(db, scale=(1, 1))
    (tmp_path / "other.db").write_text("no database " * 100)
    with pytest.raises(ValueError, match="Expected a store of feedback"):
        HumanReward(tmp_path / "other.db").score(*rows("a"))


def test_by_name_and_through_pickle(db):
    reward = make_reward("human", db=db, scale=[0, 1])
    reward.attend = lambda items: by_length(reward._open().store, scale=0.5)
    assert reward.score(*rows("a")) == [0.5]
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.score(*rows("a")) == [0.5] and copy.scale == (0.0, 1.0)


def test_ppo_trains_on_what_somebody_answers_meanwhile(db):
    env = TextEnv(["a", "bcd"], TOKENIZER, reward=HumanReward(db, scale=(0, 1)), max_new_tokens=4)
    assert env.score_at == "rollout_end"
    model = make_ppo(tiny(), env=env, n_envs=2, n_steps=8, rollout_buffer_kwargs={"complete_episodes": True})
    from agents import LateScores

    with FeedbackStore(db) as store, Crowd(Rater(store)) as crowd, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(32, callback=LateScores())
    answers = FeedbackStore(db).answers()
    assert crowd.n_answers == len(answers) > 3
    episodes = [episode["r"] for episode in model.ep_info_buffer]
    assert set(episodes) <= {answer.value[0] for answer in answers}
