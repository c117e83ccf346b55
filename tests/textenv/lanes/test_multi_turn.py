"""Episodes of several turns: the environment's answers are observed, and are never the policy's actions."""

import json

import numpy as np
import pytest

from textenv import EndReason, TextEnv, TextVectorEnv, Turn

EOS = 0
OK = [15, 11]


class Talk(TextEnv):
    """An env that answers "ok" until the policy writes "bye"; it logs its calls in the episode's state."""

    answer = "ok"

    def get_reward(self, prompt, preds, done):
        preds.state.setdefault("log", []).append(("reward", preds.text, done))
        return 1.0 + 10.0 * len(preds.turns)

    def respond(self, prompt, preds):
        preds.state.setdefault("log", []).append(("respond", preds.turns[-1].text, preds.end_reason))
        return None if preds.turns[-1].text == "bye" else self.answer


@pytest.fixture
def make_talk(make_env):
    def make(prompts=("a",), cls=Talk, **kwargs):
        defaults = {"max_new_tokens": 6, "max_turns": 3, "max_response_tokens": 2}
        return make_env(list(prompts), cls=cls, **{**defaults, **kwargs})

    return make


def write(env, text):
    """Write characters, "/" for the end token; return the results of the steps."""
    return [env.step(EOS if char == "/" else env.tokenizer.encode(char)[0]) for char in text]


def test_observation_by_hand(make_talk):
    env = make_talk()
    room = 6 + (3 - 1) * 2
    assert env.observation_space.shape == (1 + 1 + room,)
    env.reset()
    steps = write(env, "h/b/")
    assert [step[0].tolist() for step in steps] == [
        [1, -2, 8] + 9 * [-1],
        [1, -2, 8, EOS, *OK] + 6 * [-1],
        [1, -2, 8, EOS, *OK, 2] + 5 * [-1],
        [1, -2, 8, EOS, *OK, 2, EOS, *OK] + 2 * [-1],
    ]
    assert all(step[0] in env.observation_space for step in steps)


def test_only_none_ends_the_episode(make_talk):
    env = make_talk(max_new_tokens=20)
    env.reset()
    steps = write(env, "hi/bye/")
    assert [step[2] for step in steps] == [False] * 6 + [True]
    assert steps[-1][4]["end_reason"] is EndReason.ENV
    assert steps[-1][4]["text"] == "hi\nbye"
    assert steps[-1][4]["episode"]["l"] == 7
    log = env._lanes.state.episodes[0].state["log"]
    assert [done for kind, _, done in log if kind == "reward"] == [False] * 6 + [True]
    assert [entry for entry in log if entry[0] == "respond"] == [
        ("respond", "hi", EndReason.EOS),
        ("respond", "bye", EndReason.EOS),
    ]


def test_turns_tell_who_said_what(make_talk):
    seen = []

    class Look(Talk):
        def get_reward(self, prompt, preds, done):
            seen.append((preds.turns, preds.text))
            return 0.0

    env = make_talk(cls=Look)
    env.reset()
    write(env, "h/b")
    assert seen == [
        ((Turn("h", None),), "h"),
        ((Turn("h", "ok"),), "h"),  # the reward is computed after the answer, and sees it
        ((Turn("h", "ok"), Turn("b", None)), "h\nb"),
    ]


def test_a10_ids_are_the_policys_alone(make_talk):
    seen = []

    class Look(Talk):
        def get_reward(self, prompt, preds, done):
            seen.append(preds.ids.tolist())
            return 0.0

    env = make_talk(cls=Look)
    env.reset()
    write(env, "h/b/c")
    assert seen == [[8], [8, EOS], [8, EOS, 2], [8, EOS, 2, EOS], [8, EOS, 2, EOS, 3]]


def test_d5_an_answer_earns_nothing_of_its_own(make_talk):
    """Each token of the policy has one reward; the token before an answer has the reward after it."""
    env = make_talk()
    env.reset()
    steps = write(env, "h/b/c/")
    assert [step[1] for step in steps] == [11.0, 11.0, 21.0, 21.0, 31.0, 31.0]
    assert steps[-1][4]["episode"] == {"r": 126.0, "l": 6}


def test_the_last_of_max_turns_ends_without_an_answer(make_talk):
    env = make_talk(max_turns=2, max_new_tokens=9)
    env.reset()
    steps = write(env, "h/b/")
    assert [step[2] for step in steps] == [False, False, False, True]
    assert steps[-1][4]["end_reason"] is EndReason.ENV
    assert sum(kind == "respond" for kind, *_ in env._lanes.state.episodes[0].state["log"]) == 1


@pytest.mark.parametrize(("length_limit", "ends"), [("terminate", (True, False)), ("truncate", (False, True))])
def test_max_new_tokens_counts_the_policys_tokens_over_the_episode(make_talk, length_limit, ends):
    env = make_talk(max_new_tokens=4, length_limit=length_limit)
    env.reset()
    steps = write(env, "h/bc")
    assert [step[2:4] for step in steps] == [(False, False)] * 3 + [ends]
    assert steps[-1][4]["end_reason"] is EndReason.LENGTH and steps[-1][4]["episode"]["l"] == 4


def test_the_last_token_allowed_leaves_no_room_for_an_answer(make_talk):
    env = make_talk(max_new_tokens=2)
    env.reset()
    steps = write(env, "h/")
    assert steps[-1][2] and steps[-1][4]["end_reason"] is EndReason.EOS
    assert all(kind == "reward" for kind, *_ in env._lanes.state.episodes[0].state["log"])


def test_a_stop_string_ends_a_turn_and_is_cut_off(make_talk):
    env = make_talk(stop_strings=["!"], max_new_tokens=12)
    env.reset()
    steps = write(env, "hi!x!bye!")
    assert [step[2] for step in steps] == [False] * 5 + [False] * 3 + [True]
    assert steps[-1][4]["text"] == "hi\nx\nbye"


def test_c7_the_last_text_has_neither_stop_string_nor_stop_token(make_talk):
    """This also holds if the environment ends the episode, and if the stop token is an ordinary token."""
    env = make_talk(max_turns=2, stop_strings=["!"], stop_ids=[26], max_new_tokens=12)
    for text, clean in (("hi!x!", "hi\nx"), ("hizxz", "hi\nx")):
        env.reset()
        assert write(env, text)[-1][4]["text"] == clean
        assert env._lanes.state.episodes[0].state["log"][-1] == ("reward", clean, True)


def test_a_stop_string_in_an_answer_ends_nothing(make_talk):
    env = make_talk(stop_strings=["k"], max_new_tokens=9)
    env.reset()
    assert [step[2] for step in write(env, "h/b")] == [False] * 3


def test_an_empty_answer_continues_the_episode(make_talk):
    class Silent(Talk):
        answer = ""

    env = make_talk(cls=Silent)
    env.reset()
    steps = write(env, "h/b")
    assert steps[-1][0][:6].tolist() == [1, -2, 8, EOS, 2, -1] and not steps[-1][2]


def test_an_answer_that_is_too_long(make_talk):
    class Verbose(Talk):
        answer = "yes"

    env = make_talk(cls=Verbose)
    env.reset()
    write(env, "h")
    with pytest.raises(ValueError, match=r"at most max_response_tokens=2 tokens, got 3 \(lane 0, prompt 'a', text 'h'"):
        write(env, "/")


@pytest.mark.parametrize("answer", [7, b"ok", ["ok"]])
def test_an_answer_that_is_no_text(make_talk, answer):
    class Wrong(Talk):
        pass

    Wrong.answer = answer
    env = make_talk(cls=Wrong)
    env.reset()
    with pytest.raises(TypeError, match="Expected `respond` to return a str or None, got"):
        write(env, "/")


def test_an_answer_is_encoded_without_special_tokens(make_talk, char_tokenizer):
    asked = []

    class Spy(type(char_tokenizer)):
        def encode(self, text, *, add_special_tokens=True):
            asked.append((text, add_special_tokens))
            return super().encode(text)

    env = make_talk(tokenizer=Spy())
    env.reset()
    asked.clear()
    write(env, "/")
    assert asked[-1] == ("ok", False)


@pytest.mark.parametrize(
    "kwargs",
    [{"max_turns": 1}, {"max_response_tokens": 0}, {"max_turns": 1, "max_response_tokens": 0}],
)
def test_respond_needs_room(make_talk, kwargs):
    with pytest.raises(ValueError, match="max_turns >= 2 and max_response_tokens >= 1, since Talk defines `respond`"):
        make_talk(**kwargs)


@pytest.mark.parametrize("kwargs", [{"max_turns": 2}, {"max_response_tokens": 3}])
def test_room_needs_respond(make_env, kwargs):
    with pytest.raises(ValueError, match="Expected `respond` to be defined where max_turns or max_response_tokens"):
        make_env(**kwargs)


# In lanes


def test_state_lives_one_episode_and_lanes_do_not_share_it(make_talk):
    class Counting(Talk):
        def get_reward(self, prompt, preds, done):
            return float(preds.state.get("answers", 0))

        def respond(self, prompt, preds):
            preds.state["answers"] = preds.state.get("answers", 0) + 1
            return "ok"

    envs = TextVectorEnv(make_talk(cls=Counting, max_new_tokens=20, max_turns=4), 2)
    envs.reset(seed=0)
    rewards = [envs.step(np.array(actions))[1].tolist() for actions in ([0, 1], [0, 0], [1, 1], [0, 0], [0, 0], [1, 0])]
    assert rewards == [[1, 0], [2, 1], [2, 1], [3, 2], [3, 3], [0, 3]]  # lane 0 ends in step 5


def test_lanes_answer_only_where_a_turn_ended(make_talk):
    envs = TextVectorEnv(make_talk(["a", "b"], order="sequential"), 2)
    envs.reset(seed=0)
    observations, *_ = envs.step(np.array([EOS, 5]))
    assert observations[:, :6].tolist() == [[1, -2, EOS, *OK, -1], [2, -2, 5, -1, -1, -1]]


def test_n_rows_are_n_single_rows(make_talk):
    random = np.random.default_rng(0)
    prompts = ["a", "bc", "def"]
    envs = TextVectorEnv(make_talk(prompts, max_new_tokens=9), 3)
    envs.reset(seed=0)
    singles = [make_talk(prompts, max_new_tokens=9) for _ in range(3)]
    for single, prompt in zip(singles, envs.lanes.prompts):
        single.reset(options={"prompts": [str(prompt)]})
    n_ended = 0
    for _ in range(60):
        actions = random.integers(1, 26, size=3) * (random.random(3) < 0.7)
        observations, rewards, terminated, _, infos = envs.step(actions)
        for lane, single in enumerate(singles):
            observation, reward, ended, _, info = single.step(actions[lane])
            assert (reward, ended) == (rewards[lane], terminated[lane])
            assert np.array_equal(observation, infos["final_obs"][lane] if ended else observations[lane])
            if ended:
                n_ended += 1
                assert info["text"] == infos["final_info"]["text"][lane]
                single.reset(options={"prompts": [str(envs.lanes.prompts[lane])]})
    assert n_ended > 10


def test_a_conversation_goes_through_json(make_talk):
    """A checkpoint keeps closed turns; test_lanes.py tests the other state."""
    envs = TextVectorEnv(make_talk(), 1)
    envs.reset(seed=0)
    for action in (8, EOS, 2):
        envs.step(np.array([action]))
    arrays, meta = envs.lanes.state_dict()
    again = TextVectorEnv(make_talk(), 1).lanes
    again.load_state_dict(arrays, json.loads(json.dumps(meta)))
    assert again.preds(0).turns == (Turn("h", "ok"), Turn("b", None))
    assert again.preds(0).ids.tolist() == [8, EOS, 2]


def test_render_shows_both_speakers(make_talk):
    env = make_talk(render_mode="ansi")
    env.reset()
    write(env, "h/b")
    assert env.render() == "a |h</s>okb"
