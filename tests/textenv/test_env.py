"""`TextEnv` with one row: observations, ends, rewards, and the checks of Gymnasium and SB3."""

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.wrappers import OrderEnforcing, RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from textenv import CharTokenizer, EndReason, TextEnv

EOS = 0


def play(env, text_or_ids, **reset):
    """Reset and write all characters or ids; return the results of the steps."""
    env.reset(**reset)
    ids = env.tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    return [env.step(token) for token in ids]


def prompts_of(env, n, **reset):
    """Return the prompts of the next n episodes, which end at once by EOS."""
    return [play(env, [EOS], **(reset if i == 0 else {}))[0][4]["prompt"] for i in range(n)]


class Recorder:
    """A reward function that keeps its calls."""

    def __init__(self, value=1.0):
        self.value = value
        self.calls = []

    def __call__(self, prompt, preds, done):
        self.calls.append((prompt, preds, done))
        return self.value


# The observation


def test_observation_by_hand(make_env):
    env = make_env(["ab"], max_new_tokens=3)
    observation, info = env.reset(seed=0)
    assert observation.tolist() == [1, 2, -2, -1, -1, -1]
    assert observation.dtype == np.int64 and info == {}
    assert env.step(3)[0].tolist() == [1, 2, -2, 3, -1, -1]
    assert env.step(EOS)[0].tolist() == [1, 2, -2, 3, 0, -1]


def test_width_follows_from_the_longest_prompt_or_the_limit(make_env):
    assert make_env(["ab", "cde"], max_new_tokens=4).observation_space.shape == (3 + 1 + 4,)
    assert make_env(["ab", "cde"], max_new_tokens=4, max_prompt_tokens=9).observation_space.shape == (9 + 1 + 4,)


def test_spaces(make_env):
    env = make_env()
    assert env.action_space == gym.spaces.Discrete(len(env.tokenizer))
    assert env.observation_space == gym.spaces.Box(-2, len(env.tokenizer) - 1, (8,), np.int64)


@pytest.mark.parametrize("action", [2, np.int64(2), np.array(2), np.array([2], dtype=np.int32)])
def test_an_action_is_any_integer(make_env, action):
    env = make_env(["a"])
    env.reset()
    assert env.step(action)[0][2] == 2


# The checkers of Gymnasium and SB3


@pytest.fixture(params=[50, 151_936])
def vocabulary(request):
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + request.param - 1)))
    tokenizer = CharTokenizer(alphabet)
    assert len(tokenizer) == request.param
    return tokenizer


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_gymnasium_check_env(vocabulary, length_limit, capsys):
    kwargs = dict(prompts=[vocabulary.alphabet[:3]], tokenizer=vocabulary, reward=Recorder(0.5), max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("textenv/Text-v0", length_limit=length_limit, render_mode="ansi", **kwargs)
        gymnasium_check_env(env.unwrapped)  # also makes and renders it in each render mode


def test_sb3_check_env(vocabulary):
    env = TextEnv([vocabulary.alphabet[:3]], vocabulary, reward=Recorder(0.5), max_new_tokens=4, render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(env, warn=True, skip_render_check=False)


def test_gym_make_runs_an_episode(char_tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(
            "textenv/Text-v0", prompts=["a"], tokenizer=char_tokenizer, reward=Recorder(2.0), max_new_tokens=2
        )
        observation, _ = env.reset(seed=0)
        assert env.step(5)[1:4] == (2.0, False, False)
        observation, reward, terminated, truncated, info = env.step(6)
    assert isinstance(env.unwrapped, TextEnv) and env.spec.max_episode_steps is None
    assert observation.tolist() == [1, -2, 5, 6] and (reward, terminated, truncated) == (2.0, True, False)
    assert info["episode"] == {"r": 4.0, "l": 2}


def test_statistics_of_gymnasium_need_another_key_as_documented(make_env):
    env = RecordEpisodeStatistics(make_env(reward=Recorder(1.0)), stats_key="statistics")
    env.reset()
    info = env.step(EOS)[4]
    assert info["statistics"]["r"] == info["episode"]["r"] == 1.0


@pytest.mark.parametrize("wrap", [lambda env: env, OrderEnforcing])
def test_statistics_of_gymnasium_with_their_default_key_are_refused_with_the_cure(make_env, wrap):
    env = wrap(RecordEpisodeStatistics(wrap(make_env(reward=Recorder(1.0)))))
    with pytest.raises(
        ValueError, match=r"RecordEpisodeStatistics\(env, stats_key='statistics'\) around a TextEnv.*got"
    ):
        env.reset()


# The order of the prompts


def test_seed_decides_the_order(make_env):
    prompts = ["a" * n for n in range(1, 21)]
    first, again, other = (prompts_of(make_env(prompts), 20, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert sorted(first) == sorted(other) == prompts


def test_reset_without_seed_continues_the_order(make_env):
    prompts = ["a" * n for n in range(1, 21)]
    env = make_env(prompts)
    assert prompts_of(env, 10, seed=3) + prompts_of(env, 10) == prompts_of(make_env(prompts), 20, seed=3)


def test_seed_of_the_constructor_holds_until_reset_gives_another(make_env):
    prompts = ["a" * n for n in range(1, 21)]
    assert prompts_of(make_env(prompts, seed=3), 20) == prompts_of(make_env(prompts, seed=3), 20)
    assert prompts_of(make_env(prompts, seed=3), 20, seed=7) == prompts_of(make_env(prompts), 20, seed=7)


def test_the_seed_leaves_numpys_global_generator_alone(make_env):
    np.random.seed(0)
    expected = np.random.RandomState(0).rand()
    prompts_of(make_env(), 3, seed=1)
    assert np.random.rand() == expected


def test_sequential_order_keeps_the_source_and_starts_again(make_env):
    assert prompts_of(make_env(["a", "b", "c"], order="sequential"), 5, seed=9) == ["a", "b", "c", "a", "b"]


def test_reset_runs_given_rows_each_once_then_its_own(make_env):
    env = make_env(["a", "b"], order="sequential", max_prompt_tokens=3)
    assert prompts_of(env, 1) == ["a"]
    assert prompts_of(env, 4, options={"prompts": ["xyz", {"prompt": "y", "label": 1}, [3, 4]]}) == [
        "xyz", "y", "cd", "b"
    ]  # fmt: skip


def test_given_rows_replace_the_rest_of_earlier_ones(make_env):
    env = make_env(["a"])
    env.reset(options={"prompts": ["x", "y"]})
    assert prompts_of(env, 2, options={"prompts": ["z"]}) == ["z", "a"]


# How an episode ends


def test_info_at_the_end_and_only_there(make_env):
    env = make_env(["ab"], reward=lambda prompt, preds, done: {"length": 1.0, "end": float(done)})
    first, last = play(env, [3, EOS])
    assert first[1:] == (1.0, False, False, {})
    assert last[1:4] == (2.0, True, False)
    assert last[4] == {
        "text": "c",
        "prompt": "ab",
        "group": 0,
        "end_reason": EndReason.EOS,
        "reward_parts": {"length": 2.0, "end": 1.0},
        "scored": True,
        "dropped": False,
        "episode": {"r": 3.0, "l": 2},
    }


def test_end_reason_reads_as_a_word(make_env):
    reason = play(make_env(), [EOS])[0][4]["end_reason"]
    assert reason == "eos" and f"{reason}" == "eos"


def test_d4_the_limit_terminates_by_default_and_truncates_when_asked(make_env):
    steps = play(make_env(max_new_tokens=2), "xy")
    assert [step[2:4] for step in steps] == [(False, False), (True, False)]
    steps = play(make_env(max_new_tokens=2, length_limit="truncate"), "xy")
    assert [step[2:4] for step in steps] == [(False, False), (False, True)]
    assert steps[-1][4]["end_reason"] is EndReason.LENGTH


def test_d4_an_end_token_as_the_last_one_allowed_terminates(make_env):
    *_, terminated, truncated, info = play(make_env(max_new_tokens=2, length_limit="truncate"), [1, EOS])[-1]
    assert (terminated, truncated, info["end_reason"]) == (True, False, EndReason.EOS)


def test_a_row_may_carry_its_own_limit(make_env):
    env = make_env([{"prompt": "a", "max_new_tokens": 2}, {"prompt": "b"}], order="sequential", max_new_tokens=3)
    assert [step[2] for step in play(env, "xy")] == [False, True]
    assert [step[2] for step in play(env, "xyz")] == [False, False, True]


def test_b4_several_stop_ids_and_none_of_them_in_the_prompt_counts(make_env):
    env = make_env([[1, EOS, 2]], stop_ids=[EOS, 2])
    env.reset()
    assert not env.step(1)[2]
    assert env.step(2)[4]["end_reason"] is EndReason.EOS
    assert play(env, [EOS])[0][4]["text"] == ""


def test_b4_without_stop_ids_only_the_limit_ends(make_env):
    steps = play(make_env(stop_ids=[], max_new_tokens=3), [EOS, EOS, EOS])
    assert [step[2] for step in steps] == [False, False, True]
    assert steps[-1][4]["end_reason"] is EndReason.LENGTH and steps[-1][4]["episode"]["l"] == 3


def test_b3_pad_may_be_the_end_token_and_stand_in_the_prompt(make_env, char_tokenizer):
    """Lengths tell the padding: an EOS in the prompt is an ordinary token, and the final one an ordinary action."""
    char_tokenizer.pad_token_id = EOS
    reward = Recorder()
    env = make_env([[EOS, 1, EOS]], reward=reward)
    assert env.reset()[0].tolist() == [EOS, 1, EOS, -2, -1, -1, -1, -1]
    env.step(5)
    observation, _, terminated, _, info = env.step(EOS)
    assert terminated and observation.tolist() == [EOS, 1, EOS, -2, 5, EOS, -1, -1]
    assert [preds.ids.tolist() for _, preds, _ in reward.calls] == [[5], [5, EOS]]
    assert info["episode"] == {"r": 2.0, "l": 2}


@pytest.mark.parametrize(
    ("written", "text"),
    [("xend", "x"), ("end", ""), ("eend", "e"), ("xy!", "xy"), ("xabc", "x")],
)
def test_a_stop_string_ends_at_once_and_is_no_part_of_the_text(make_env, written, text):
    steps = play(make_env(stop_strings=["end", "!", "bc", "abc"], max_new_tokens=9), written)
    assert [step[2] for step in steps] == [False] * (len(written) - 1) + [True]
    assert (steps[-1][4]["text"], steps[-1][4]["end_reason"]) == (text, EndReason.STOP)


def test_a_stop_string_that_began_in_the_prompt_does_not_count(make_env):
    assert not play(make_env(["the en"], stop_strings="end"), "d")[0][2]


def test_a_stop_string_comes_before_the_limit_and_the_end_token_before_it(make_env):
    assert play(make_env(stop_strings=["xy"], max_new_tokens=2), "xy")[-1][4]["end_reason"] is EndReason.STOP
    assert play(make_env(stop_strings=["</s>"]), [EOS])[-1][4]["end_reason"] is EndReason.EOS


def test_a_long_stop_string_fits_the_bounded_tail(make_env):
    stop = "abcdefghijklmnopqrstuvwxyz"
    info = play(make_env(stop_strings=[stop], max_new_tokens=99), "z" * 40 + stop)[-1][4]
    assert info["text"] == "z" * 40 and info["end_reason"] is EndReason.STOP


# What the hooks see and what an episode earns


def test_c7_the_reward_sees_the_row_the_text_without_its_end_and_done(make_env):
    reward = Recorder()
    env = make_env(
        [{"q": "ab", "label": 7, "answers": ["x", "y"]}], reward=reward, prompt_column="q", references_column="answers"
    )
    play(env, [3, 4, EOS])
    assert [preds.text for _, preds, _ in reward.calls] == ["c", "cd", "cd"]
    assert [done for *_, done in reward.calls] == [False, False, True]
    prompt = reward.calls[0][0]
    assert prompt == "ab" and prompt.upper() == "AB" and prompt.index("b") == 1
    assert prompt.row == {"q": "ab", "label": 7, "answers": ["x", "y"]} and prompt.references == ["x", "y"]


def test_preds_are_the_actions_and_safe_to_keep(make_env):
    reward = Recorder()
    play(make_env(reward=reward), [3, 4, EOS])
    first, _, last = (preds for _, preds, _ in reward.calls)
    assert list(first) == [3] and list(last) == last.ids.tolist() == [3, 4, EOS]
    assert (len(last), last[-1], last[:2], 4 in last) == (3, EOS, [3, 4], True)
    with pytest.raises(ValueError, match="read-only"):
        last.ids[0] = 9


def test_text_is_decoded_only_when_looked_at(make_env, char_tokenizer):
    decoded = []

    class Spy(CharTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=False):
            decoded.append(list(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    env = make_env(["a"], tokenizer=Spy())
    env.reset()
    env.step(1)
    assert decoded == []
    env.step(EOS)  # the final info holds the text
    assert decoded != []


def test_state_lives_one_episode(make_env):
    class Counting(TextEnv):
        def get_reward(self, prompt, preds, done):
            preds.state["calls"] = preds.state.get("calls", 0) + 1
            return preds.state["calls"]

    env = make_env(cls=Counting)
    assert [step[1] for step in play(env, [1, 2, EOS])] == [1, 2, 3]
    assert [step[1] for step in play(env, [1, EOS])] == [1, 2]


class ByRow(TextEnv):
    def get_reward(self, prompt, preds, done):
        return preds[-1] * (10.0 if done else 1.0)


class Batched(TextEnv):
    def get_rewards(self, prompts, preds, dones):
        return np.array([text[-1] * (10.0 if done else 1.0) for text, done in zip(preds, dones)])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cls": ByRow},
        {"cls": Batched},
        {"reward": lambda prompt, preds, done: preds[-1] * (10.0 if done else 1.0)},
        {"reward": lambda prompt, preds, done: {"a": preds[-1], "b": 9 * preds[-1] * done}},
    ],
    ids=["subclass", "batched", "function", "parts"],
)
def test_c10_rewards_by_hand_and_their_sum(make_env, kwargs):
    steps = play(make_env(max_new_tokens=3, **kwargs), [2, 3, 4])
    assert [step[1] for step in steps] == [2.0, 3.0, 40.0]
    assert all(type(step[1]) is float for step in steps)
    assert steps[-1][4]["episode"]["r"] == 45.0
    if "b" in steps[-1][4]["reward_parts"]:
        assert steps[-1][4]["reward_parts"] == {"a": 9.0, "b": 36.0}


@pytest.mark.parametrize("score_at", ["step", "done", "rollout_end"])
def test_score_at(make_env, score_at):
    """A single env knows no rollouts: "rollout_end" scores at done."""
    reward = Recorder()
    steps = play(make_env(reward=reward, score_at=score_at), [1, 2, EOS])
    each = score_at == "step"
    assert [done for *_, done in reward.calls] == ([False, False, True] if each else [True])
    assert [step[1] for step in steps] == ([1.0, 1.0, 1.0] if each else [0.0, 0.0, 1.0])
    assert steps[-1][4]["episode"]["r"] == (3.0 if each else 1.0)


def test_infos_survive_the_deep_copy_that_sb3_makes(make_env):
    info = copy.deepcopy(play(make_env([{"prompt": "ab", "label": 3}]), [EOS])[0][4])
    assert info["prompt"].row["label"] == 3 and info["prompt"].ids.tolist() == [1, 2]


def test_the_env_can_be_deep_copied_in_the_middle_of_an_episode(make_env):
    env = make_env(max_new_tokens=3, reward=None, cls=ByRow)
    play(env, [1], seed=0)
    twin = copy.deepcopy(env)
    env.step(2)
    assert twin.step(5)[0].tolist()[-5:-2] != env.step(5)[0].tolist()[-5:-2]
    assert twin.step(6)[4]["episode"] == {"r": 1 + 5 + 60, "l": 3}


# Rendering


def test_render_separates_prompt_and_completion(make_env):
    env = make_env(["ab"], render_mode="ansi")
    play(env, "cd")
    assert env.render() == "ab |cd"
    env.step(EOS)
    assert env.render() == "ab |cd</s>"


def test_human_rendering_prints_each_step(make_env, capsys):
    env = make_env(["ab"], render_mode="human")
    play(env, "cd")
    assert capsys.readouterr().out == "ab |\nab |c\nab |cd\n"
    assert env.render() is None
