"""The task DailyDialog: its files, and episodes of one reply and of several."""

import os
import pickle
import sys
import types
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from agents import evaluate
from tests.helpers.dialogues import TALK, made_up, write_dialogues
from tests.helpers.models import N_ROWS, make_ppo, tiny
from tests.helpers.training import tiny_agent, tiny_config
from textenv import CharTokenizer, EndReason, Preds, Prompt
from textenv.episodes.completion import Turn
from textenv.rewards import DROPPED, METEOR, BatchReward, RowReward, Scale, WeightedSum
from textenv.tasks.dailydialog import (
    Conversation,
    DailyDialog,
    Dialogue,
    dialogue_rows,
    intent_and_meteor,
    read_dialogues,
    split_dialogues,
)
from textenv.tasks.each_turn import EachTurn

TOKENIZER = CharTokenizer("\n !?.,abcdefghijklmnopqrstuvwxyz")


class Same(RowReward):
    """A reward with two parts: 1 for the true reply, and a tenth of the wanted intent's number."""

    def score_row(self, prompt, preds):
        return {"same": float(preds.text in prompt.references), "intent": prompt.row["intent"] / 10}


def talk_env(dialogues=TALK, reward=None, **kwargs):
    options = {"max_new_tokens": 40, "order": "sequential", **kwargs}
    return DailyDialog(dialogues, TOKENIZER, reward=reward or Same(), **options)


def write(env, text):
    """Write characters, "/" for the end token; return the last step."""
    for char in text:
        result = env.step(0 if char == "/" else TOKENIZER.encode(char)[0])
    return result


# Reading


def test_files_are_read_as_they_were_written(tmp_path):
    dialogues = made_up(20)
    assert read_dialogues(write_dialogues(tmp_path / "data", dialogues)) == dialogues


def test_white_space_around_and_in_turns(tmp_path):
    (tmp_path / "dialogues_test.txt").write_text(" Hi  there . __eou__   Who\tis it ?__eou__\n\n", encoding="utf-8")
    (tmp_path / "dialogues_act_test.txt").write_text("1 2 \n")
    assert read_dialogues(tmp_path) == [Dialogue(("Hi there .", "Who is it ?"), (0, 1))]


def test_several_splits(tmp_path):
    parts = {"train": made_up(5, seed=1), "test": made_up(3, seed=2)}
    for split, dialogues in parts.items():
        write_dialogues(tmp_path, dialogues, split)
    assert {split: read_dialogues(tmp_path, split) for split in parts} == parts
    for split in (None, "validation"):
        with pytest.raises(ValueError, match=r"Expected `split` to be one of \['test', 'train'\].* got " + repr(split)):
            read_dialogues(tmp_path, split)


@pytest.mark.parametrize(
    ("texts", "acts", "message"),
    [
        ("a __eou__ b __eou__\nc __eou__", "1 1\n1 2", "Expected an act for each turn of line 2 of .*got 2 of 1 turns"),
        ("a __eou__ b __eou__\nc __eou__", "1 1", "Expected as many lines .* got 1, 2"),
        ("a __eou__ b", "1 1", "Expected __eou__ behind each turn of line 1 of .* got 'b' last"),
        ("a __eou__", "0", r"Expected the acts of line 1 of .* in 1 to 4, got \[0\]"),
        ("a __eou__", None, "Expected the acts of dialogues_test.txt beside it, got no file"),
    ],
)
def test_files_that_do_not_match(tmp_path, texts, acts, message):
    (tmp_path / "dialogues_test.txt").write_text(texts)
    if acts is not None:
        (tmp_path / "dialogues_act_test.txt").write_text(acts)
    with pytest.raises(ValueError, match=message):
        read_dialogues(tmp_path)


@pytest.mark.parametrize("columns", [("dialog", "act"), ("utterances", "acts")])
def test_by_name_from_the_hub(monkeypatch, columns):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [dict(zip(columns, (["hi ", "who  is there?"], [1, 2])))]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_dialogues("somebody/talk", "test") == [Dialogue(("hi", "who is there?"), (0, 1))]
    assert asked == [("somebody/talk", "test")]
    monkeypatch.setattr("textenv.tasks.dailydialog.read_dataset", lambda name, split: [{"dialog": ["hi"], "label": 1}])
    with pytest.raises(ValueError, match=r"Expected row 0 of 'x/y' to have one of the columns \('act', 'acts'\), got"):
        read_dialogues("x/y")


def test_a_split_is_of_whole_dialogues():
    dialogues = made_up(40)
    again = [dialogue._replace(intents=(3,) * len(dialogue.turns)) for dialogue in dialogues[:5]]
    train, held_back = split_dialogues(dialogues + again, 0.25, seed=1)
    assert (len(train), len(held_back)) == (30, 10)  # duplicates count once
    assert not set(train) & set(held_back) and set(train) | set(held_back) == set(dialogues)
    assert split_dialogues(dialogues, 0.25, seed=1)[1] == held_back != split_dialogues(dialogues, 0.25, seed=2)[1]
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"Expected `held_back` to leave dialogues on both sides, got .* of 40"):
            split_dialogues(dialogues, share)


def test_rows_by_hand():
    rows = dialogue_rows(TALK, history=2)
    assert [(row["prompt"], row["references"], row["intent"]) for row in rows] == [
        ("hi\n", ["who is there?"], 1),
        ("hi\nwho is there?\n", ["me"], 0),
        ("who is there?\nme\n", ["come in!"], 2),
        ("me\ncome in!\n", ["thanks"], 3),
        ("yes\n", ["no"], 0),
    ]
    assert rows[0]["exchanges"] == [{"other": "me", "reply": "come in!", "intent": 2}]
    assert rows[1]["exchanges"] == [{"other": "come in!", "reply": "thanks", "intent": 3}]
    assert [row["exchanges"] for row in rows[2:]] == [[], [], []]
    assert dialogue_rows(TALK[1:], separator=" | ")[0]["prompt"] == "yes | "
    with pytest.raises(ValueError, match="Expected `history` to be at least 1, got 0"):
        dialogue_rows(TALK, history=0)


# One reply


def test_a_reply_ends_with_the_separator_or_the_end_token():
    env = talk_env()
    for text, reason in (("who is there?\n", EndReason.STOP), ("me/", EndReason.EOS)):
        env.reset()
        *_, terminated, _, info = write(env, text)
        assert terminated and info["end_reason"] is reason and info["text"] == text[:-1]
        assert info["reward_parts"]["same"] == 1.0
    assert not env.is_multi_turn and env.rules.room == 40


def test_gymnasium_makes_it_from_a_folder(tmp_path):
    options = {"data": write_dialogues(tmp_path / "data", TALK), "tokenizer": TOKENIZER, "reward": Same()}
    env = gymnasium.make("textenv/DailyDialog-v0", **options).unwrapped
    assert [str(prompt) for prompt in env.prompts] == [row["prompt"] for row in dialogue_rows(TALK)]
    assert type(env) is DailyDialog
    vector = gymnasium.make_vec("textenv/DailyDialog-v0", num_envs=3, max_turns=2, **options)
    assert type(vector.lanes.env) is Conversation and vector.reset(seed=0)[0].shape[0] == 3


def test_long_prompts_lose_their_start():
    env = talk_env(max_prompt_tokens=6)
    assert [TOKENIZER.decode(prompt.ids) for prompt in env.prompts][:2] == ["hi\n", "there?\n"[-6:]]


def test_the_default_reward_is_that_of_the_classifier_and_meteor(monkeypatch):
    """A name stands for the library's classifier, which is replaced by one that looks for a question mark."""

    class ByMark(RowReward):
        def __init__(self, model, tokenizer, label_column, output):
            assert (model, tokenizer, label_column, output) == ("my/intents", None, "intent", "label")

        def score_row(self, prompt, preds):
            return float(("?" in preds.text) == (prompt.row["intent"] == 1))

    monkeypatch.setattr("textenv.rewards.classifier.Classifier", ByMark)
    env = DailyDialog(TALK, TOKENIZER, classifier="my/intents", score_at="done", order="sequential")
    env.reset()
    info = write(env, "who is there\n")[-1]
    prompt, preds = env.prompts[0], Preds(TOKENIZER, TOKENIZER.encode("who is there"))
    meteor = METEOR(wordnet=False)(prompt, preds, True)
    assert 0.5 < meteor < 1
    assert info["reward_parts"] == {"intent": 0.0, "meteor": pytest.approx(meteor)}
    weighted = intent_and_meteor("my/intents", weights={"intent": 0.5})
    assert isinstance(weighted, WeightedSum) and weighted(prompt, preds, True)["meteor"] == pytest.approx(meteor)
    assert weighted(env.prompts[1], preds, True)["intent"] == 0.5


# Several


def test_the_other_speaker_says_the_true_turns():
    env = talk_env(max_turns=3)
    assert type(env) is Conversation and env.is_multi_turn
    env.reset()
    observation, reward, terminated, *_ = write(env, "what\n")
    assert (reward, terminated) == (0.0, False)
    since = observation[np.flatnonzero(observation == -2)[0] + 1 :]
    assert TOKENIZER.decode(since[since >= 0]) == "what\nme\n"
    *_, terminated, _, info = write(env, "come in!\n")
    assert terminated and info["end_reason"] is EndReason.ENV and info["text"] == "what\ncome in!"
    assert info["reward_parts"] == {"same": 0.5, "intent": pytest.approx((0.1 + 0.2) / 2)}
    assert info["episode"]["l"] == len("what\ncome in!\n")  # the other speaker's turn is no action


def test_after_an_end_token_the_separator_comes_with_the_answer():
    env = talk_env(max_turns=2)
    env.reset()
    observation, *_ = write(env, "what/")
    since = observation[np.flatnonzero(observation == -2)[0] + 1 :]
    assert TOKENIZER.decode(since[since >= 0]) == "what</s>\nme\n"


def test_each_reply_is_compared_with_the_true_reply_of_its_turn():
    """True replies in the wrong order earn nothing."""
    for text, earned in (("who is there?\ncome in!\n", 1.0), ("come in!\nwho is there?\n", 0.0)):
        env = talk_env(max_turns=2)
        env.reset()
        assert write(env, text)[-1]["reward_parts"]["same"] == earned


def test_turns_without_room_earn_nothing():
    env = talk_env(max_turns=2, max_new_tokens=14)
    env.reset()
    *_, terminated, _, info = write(env, "who is there?\n")
    assert terminated and info["end_reason"] is EndReason.STOP and info["reward_parts"]["same"] == 0.5


def test_an_episode_ends_before_a_turn_that_is_too_long():
    env = talk_env(max_turns=3, max_response_tokens=5)
    assert [len(prompt.row["exchanges"]) for prompt in env.prompts] == [1, 0, 0, 0, 0]
    env.reset()
    env.reset()  # the second prompt: "come in!", the other's turn, is too long
    *_, terminated, _, info = write(env, "me\n")
    assert terminated and info["reward_parts"]["same"] == 1.0
    assert [len(prompt.row["exchanges"]) for prompt in talk_env(max_turns=3).prompts] == [1, 1, 0, 0, 0]


def test_each_turn_sees_the_conversation_up_to_it():
    seen = []

    def look(prompt, preds, done):
        seen.append((str(prompt), preds.text, prompt.references, prompt.row["intent"], done))
        return 0.0

    env = talk_env(max_turns=2, reward=look)
    assert env.score_at == "done"
    env.reset()
    write(env, "what\nwell\n")
    assert seen == [
        ("hi\n", "what", ["who is there?"], 1, True),
        ("hi\nwhat\nme\n", "well", ["come in!"], 2, True),
    ]


def test_each_turn_keeps_when_its_reward_is_scored():
    late = Same()
    late.score_at = "rollout_end"
    assert [EachTurn(reward, TOKENIZER).score_at for reward in (late, Same(), lambda *_: 0.0)] == [
        "rollout_end",
        "done",
        "done",
    ]


def test_conversations_pickle():
    again = pickle.loads(pickle.dumps(talk_env(max_turns=2)))
    assert type(again) is Conversation
    again.reset()
    assert write(again, "what\ncome in!\n")[-1]["reward_parts"]["same"] == 0.5


def test_training_and_evaluation_of_conversations():
    """PPO trains a tiny model with late scores, and evaluation measures the same rewards."""
    late = Same()
    late.score_at = "rollout_end"
    env = talk_env(max_turns=2, reward=late, max_new_tokens=12)
    assert len(TOKENIZER) <= N_ROWS
    model = make_ppo(tiny(), env=env, n_steps=16, n_envs=4)
    model.learn(2 * 16 * 4)
    result = evaluate(model, env.prompts, TOKENIZER, env=env)
    texts = [sample.text.split("\n") for sample in result.generations]
    expected = []
    for prompt, turns in zip(env.prompts, texts):
        true = [*prompt.references, *(exchange["reply"] for exchange in prompt.row["exchanges"])]
        expected.append(sum(text == reply for text, reply in zip(turns, true)) / len(true))
    assert result.figures["reward/same"].value == pytest.approx(np.mean(expected))


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "learns"), [(1.0, True), (0.0, False)])
def test_a_policy_learns_what_to_say_and_what_to_say_next(factor, learns):
    """The replies are "a" to "c", and "b" to the other's "d"; with rewards scaled to 0, nothing is learned."""
    tokenizer = CharTokenizer("\nabcd")
    dialogue = Dialogue(("c", "a", "d", "b"), (0, 0, 0, 0))
    options = {"reward": Scale(Same(), factor), "max_turns": 2, "max_new_tokens": 4, "max_response_tokens": 3}
    env = DailyDialog([dialogue], tokenizer, **options)
    agent = tiny_agent(env, lm=tiny_config(6), n_envs=32, n_steps=8, batch_size=128)
    agent.learn(256 * 14)
    result = evaluate(agent, env.prompts[:1] * 64, tokenizer, env=env)
    share = np.mean([sample.text == "a\nb" for sample in result.generations])
    assert share > 0.8 if learns else share < 0.2


@pytest.mark.skipif("TEXTENV_DATA" not in os.environ, reason="TEXTENV_DATA names no folder of data sets")
def test_the_real_files():
    dialogues = read_dialogues(Path(os.environ["TEXTENV_DATA"]) / "dailydialog")
    assert len(dialogues) == 1000 and sum(len(dialogue.turns) for dialogue in dialogues) == 8069
    assert Counter(i for dialogue in dialogues for i in dialogue.intents) == {0: 3125, 1: 2244, 2: 1775, 3: 925}
    rows = dialogue_rows(dialogues)
    assert len(rows) == 7069 and rows[0]["references"] == ["There is one . 5 blocks away from here ?"]
    assert all(row["prompt"].count("\n") <= 5 for row in rows)
    train, held_back = split_dialogues(dialogues)
    assert (len(train), len(held_back)) == (895, 100)
    assert not {dialogue.turns for dialogue in train} & {dialogue.turns for dialogue in held_back}


def test_a_prompt_without_exchanges_has_one_reply():
    reward = EachTurn(Same(), TOKENIZER)
    prompt = Prompt("hi\n", row={"exchanges": [], "intent": 2}, references=["me"])
    assert reward(prompt, Preds(TOKENIZER, TOKENIZER.encode("me")), True) == {"same": 1.0, "intent": 0.2}


def test_a_reply_without_a_score_drops_its_conversation():
    class Down(BatchReward):
        may_drop = True

        def score(self, prompts, preds, dones):
            return [DROPPED if pred.text == "bye" else 1.0 for pred in preds]

    reward, chars = EachTurn(Down(), CharTokenizer()), CharTokenizer()
    assert reward.may_drop and not EachTurn(lambda *_: 0.0, chars).may_drop
    prompt = Prompt("hi ", row={"exchanges": [{"other": "ok", "reply": "bye", "intent": 0}]}, references=["yes"])
    rows = [Preds(chars, chars.encode(last), closed=[Turn("no", "ok ")]) for last in ("bye", "yes")]
    assert reward.score([prompt] * 2, rows, [True] * 2) == [DROPPED, 1.0]
