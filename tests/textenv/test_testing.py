"""`check_text_env`: correct environments pass silently, and each kind of error is named."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TransformReward

from textenv import CharTokenizer, RewardError, TextEnv
from textenv.testing import check_text_env


def length(prompt, preds, done):
    return float(len(preds))


class Good(TextEnv):
    def get_reward(self, prompt, preds, done):
        return {"length": len(preds) / 10, "end": float(done and prompt.row["label"])}


class Remembering(TextEnv):
    """Rewards the gain since the last token, with its memory in `preds.state`, as allowed."""

    def get_reward(self, prompt, preds, done):
        score = preds.text.count("a")
        gained, preds.state["score"] = score - preds.state.get("score", 0), score
        return gained


class Pipeline:
    """A scorer like those of libraries: it counts its calls, which is allowed."""

    calls = 0

    def __call__(self, text):
        self.calls += 1
        return float(len(text))


class Loading(TextEnv):
    """Loads its scorer when an episode first ends, which is allowed."""

    scorer = None

    def get_reward(self, prompt, preds, done):
        if not done:
            return 0.0
        if self.scorer is None:
            self.scorer = Pipeline()
        return self.scorer(preds.text)


class Both(TextEnv):
    def get_reward(self, prompt, preds, done):
        return self.get_rewards([prompt], [preds], [done])[0]

    def get_rewards(self, prompts, preds, dones):
        return np.array([float(len(text)) for text in preds])


class Talking(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float(len(preds.turns))

    def respond(self, prompt, preds):
        preds.state["asked"] = preds.state.get("asked", 0) + 1
        return None if preds.state["asked"] == 3 else "ok"


TURNS = {"max_turns": 4, "max_response_tokens": 2}


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (TextEnv, {"reward": length}),
        (TextEnv, {"reward": length, "stop_ids": [], "length_limit": "truncate"}),
        (TextEnv, {"reward": length, "stop_strings": ["e", "t"]}),
        (TextEnv, {"reward": length, "score_at": "done"}),
        (TextEnv, {"reward": length, "score_at": "rollout_end"}),
        (Good, {}),
        (Remembering, {}),
        (Loading, {}),
        (Both, {}),
        (Talking, TURNS),
    ],
)
def test_correct_envs_pass_silently(char_tokenizer, cls, kwargs):
    rows = [{"prompt": "the ", "label": 1}, {"prompt": "a", "label": 0, "max_new_tokens": 3}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_text_env(cls(rows, char_tokenizer, max_new_tokens=9, **kwargs))


def test_what_gym_make_returns_passes(char_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("textenv/Text-v0", prompts=["a"], tokenizer=char_tokenizer, reward=length, max_new_tokens=4)
        check_text_env(env)
    env.reset()
    env.step(1)


# Each kind of error


class Stepping(TextEnv):
    def step(self, action):
        return super().step(action)

    def get_reward(self, prompt, preds, done):
        return 0.0


class Counting(TextEnv):
    n_calls = 0

    def get_reward(self, prompt, preds, done):
        self.n_calls += 1
        return 0.0


class KeepingInAList(TextEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts = {"all": []}

    def get_reward(self, prompt, preds, done):
        self.texts["all"].append(preds.text)
        return 0.0


class TalkingFromMemory(Talking):
    last = ""

    def respond(self, prompt, preds):
        self.last = preds.text
        return "ok"


class WritingTheRow(TextEnv):
    def get_reward(self, prompt, preds, done):
        prompt.row["seen"] = prompt.row.get("seen", 0) + 1
        return 0.0


class Random(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float(self.np_random.random())


class RandomTalk(Talking):
    def respond(self, prompt, preds):
        return "".join(self.np_random.choice(list("abcdefgh"), size=2))


class Ranking(TextEnv):
    """Scores a row in comparison with the other rows of its batch."""

    def get_rewards(self, prompts, preds, dones):
        return [sum(other[-1] for other in preds) - len(preds) * text[-1] for text in preds]


class Disagreeing(Both):
    def get_reward(self, prompt, preds, done):
        return 1.0 + len(preds)


class DisagreeingInParts(TextEnv):
    def get_reward(self, prompt, preds, done):
        return {"length": 1.0}

    def get_rewards(self, prompts, preds, dones):
        return [{"size": 1.0} for _ in preds]


class Nan(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float("nan") if done else 0.0


class NoneBeforeTheEnd(TextEnv):
    def get_reward(self, prompt, preds, done):
        return 1.0 if done else None


class Raising(TextEnv):
    def get_reward(self, prompt, preds, done):
        assert not done, "my own assertion"
        return 0.0


class ByLane(TextEnv):
    def get_reward(self, prompt, preds, done):
        return float(preds.lane)


class Shouting(Talking):
    def respond(self, prompt, preds):
        return 5


class LongWinded(Talking):
    def respond(self, prompt, preds):
        return "okay"


class Respaced(TextEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space = gym.spaces.Box(0, 1, self.observation_space.shape, np.int64)

    def get_reward(self, prompt, preds, done):
        return 0.0


class Unpickled(TextEnv):
    def get_reward(self, prompt, preds, done):
        return 0.0

    def __reduce__(self):
        raise TypeError("it holds a lock")


@pytest.mark.parametrize(
    ("cls", "error", "words"),
    [
        (Stepping, TypeError, "Stepping overrides `step`"),
        (Counting, AssertionError, r"the reward to change neither the instance.*changed \['n_calls'\].*`preds.state`"),
        (KeepingInAList, AssertionError, r"the reward to change neither the instance.*changed \['texts'\]"),
        (TalkingFromMemory, AssertionError, r"`respond` to change neither the instance.*changed \['last'\]"),
        (WritingTheRow, AssertionError, r"nor `prompt.row`.*changed \['prompt.row'\]"),
        (Random, AssertionError, r"the same reward.*when asked again \(lane 0, .*draw no random numbers"),
        (RandomTalk, AssertionError, "`respond` to answer the same again"),
        (Ranking, AssertionError, "of a row alone as in a batch .*score each row by itself"),
        (Disagreeing, AssertionError, "from `get_reward` as from `get_rewards` .*define only one"),
        (DisagreeingInParts, AssertionError, "{'sum': 1.0, 'size': 1.0}, got {'sum': 1.0, 'length': 1.0}, from"),
        (Nan, RewardError, "to be a finite number, got nan"),
        (NoneBeforeTheEnd, RewardError, "to be a finite number, got None"),
        (Raising, RewardError, "`get_reward` raised AssertionError: my own assertion"),
        (ByLane, AssertionError, "Expected the same actions to lead to the same alone as in one of several lanes"),
        (Shouting, TypeError, "Expected `respond` to return a str or None, got 5"),
        (Respaced, AssertionError, "is not within the observation space"),
        (LongWinded, ValueError, "a response of at most max_response_tokens=2 tokens, got 4"),
    ],
)
def test_wrong_envs_are_named(char_tokenizer, cls, error, words):
    kwargs = TURNS if issubclass(cls, Talking) else {}
    env = cls(["the ", "an "], char_tokenizer, max_new_tokens=9, **kwargs)
    with pytest.raises(error, match=f"(?s){words}"):
        check_text_env(env)


def test_a_wrapper_is_named(char_tokenizer):
    env = TextEnv(["a"], char_tokenizer, reward=length, max_new_tokens=3)
    with pytest.raises(TypeError, match="inside TransformReward"):
        check_text_env(TransformReward(env, abs))


@pytest.mark.parametrize("reward", [lambda prompt, preds, done: 0.0])
def test_a_lambda_warns(char_tokenizer, reward):
    with pytest.warns(UserWarning, match=r"TextEnv cannot be pickled, as .* \(a lambda never can\): .*lambda"):
        check_text_env(TextEnv(["a"], char_tokenizer, reward=reward, max_new_tokens=3))


def test_an_env_that_cannot_be_copied_warns_with_the_reason(char_tokenizer):
    with pytest.warns(UserWarning) as caught:
        check_text_env(Unpickled(["a"], char_tokenizer, max_new_tokens=3))
    words = [str(warning.message) for warning in caught]
    assert [" cannot be copied, " in words[0], " cannot be pickled, " in words[1]] == [True, True]
    assert all("it holds a lock" in word for word in words)


# Tokenizers


class Gaps(CharTokenizer):
    """Has ids that it cannot decode."""

    def decode(self, token_ids, *, skip_special_tokens=False):
        if any(token > 30 for token in token_ids):
            raise KeyError("no such token")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


class Bytes(CharTokenizer):
    def decode(self, token_ids, *, skip_special_tokens=False):
        return super().decode(token_ids).encode()


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (Gaps(), r"Expected `decode` to take ids in \[0, 33\), but 3[12] raised KeyError"),
        (Bytes(), "Expected `decode` to return a str, got b'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_tokenizer_that_does_not_fit(tokenizer, words):
    env = TextEnv(["a'"], tokenizer, reward=length, max_new_tokens=3)
    with pytest.raises(ValueError, match=words):
        check_text_env(env)


def test_a_tokenizer_that_grew_after_the_env_was_built(char_tokenizer):
    env = TextEnv(["a"], char_tokenizer, reward=length, max_new_tokens=3)
    char_tokenizer.alphabet += "#"
    with pytest.raises(ValueError, match=r"as many actions as tokens, 34, got Discrete\(33\): add tokens first"):
        check_text_env(env)
