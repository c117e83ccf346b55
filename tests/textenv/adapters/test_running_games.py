"""Running games: one per lane, isolated from the rest of the process, and replayed where the game object is gone."""

import copy
import json
import pickle
import random
from contextlib import nullcontext

import numpy as np
import pytest

from agents.callbacks.checkpoints import Checkpoints
from agents.checkpoints.checkpoint import load_checkpoint
from tests.helpers.games import EOS, TOKENIZER, Guess, begin, guess_env, noise_env, write
from tests.helpers.training import Recorder, run_state, tiny_agent, tiny_config
from textenv import TextVectorEnv
from textenv.adapters import GameError
from textenv.adapters.randomness import OwnRandomness
from textenv.adapters.running import RunningGames
from textenv.lanes.lanes import Lanes

NUMBERS = [random.Random(seed).randint(1, 9) for seed in range(50)]


def play(envs, n_steps=60, seed=0):
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(len(TOKENIZER), size=envs.num_envs))[:4] for _ in range(n_steps)]


def same(first, second):
    return all(np.array_equal(a, b) for steps in zip(first, second) for a, b in zip(*steps))


def test_every_lane_has_its_own_game():
    envs = TextVectorEnv(noise_env(), 3)
    envs.reset(seed=0)
    singles = [noise_env() for _ in range(3)]
    for single, prompt in zip(singles, envs.lanes.prompts):
        single.reset(options={"prompts": [prompt.row]})
    rng, n_ended = np.random.default_rng(1), 0
    for _ in range(80):
        actions = rng.integers(len(TOKENIZER), size=3)
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        for lane, single in enumerate(singles):
            observation, reward, *ended, _ = single.step(actions[lane])
            assert (reward, *ended) == (rewards[lane], terminated[lane], truncated[lane])
            assert np.array_equal(observation, infos["final_obs"][lane] if any(ended) else observations[lane])
            if any(ended):
                n_ended += 1
                single.reset(options={"prompts": [envs.lanes.prompts[lane].row]})
    assert n_ended > 10


def test_members_of_a_group_play_the_same_game():
    envs = TextVectorEnv(guess_env(samples_per_prompt=3), 3)
    envs.reset(seed=0)
    [seed] = {prompt.row["seed"] for prompt in envs.lanes.prompts}
    token = TOKENIZER.encode(str(NUMBERS[seed]))[0]
    envs.step(np.full(3, token))
    assert envs.step(np.full(3, EOS))[1].tolist() == [1.0] * 3


def test_games_leave_the_global_generators_alone():
    random.seed(5), np.random.seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    envs = TextVectorEnv(noise_env(), 2)
    envs.reset(seed=0)
    play(envs)
    assert (random.random(), np.random.rand()) == expected


def test_use_of_the_global_generators_does_not_change_a_game(monkeypatch):
    def run(disturb):
        envs = TextVectorEnv(noise_env(), 2)
        envs.reset(seed=0)
        if disturb:
            random.seed(1), np.random.seed(1)
        return play(envs)

    assert same(run(False), run(True))
    monkeypatch.setattr(OwnRandomness, "inside", lambda self: nullcontext())  # the control
    with pytest.raises(GameError, match="must follow from the seed"):
        run(True)


# Replayed games: copies, evaluations in between, checkpoints


def test_a_restored_game_continues_as_the_original():
    envs = TextVectorEnv(noise_env(), 3)
    envs.reset(seed=0)
    play(envs)
    arrays, meta = envs.lanes.state_dict()
    assert any(len(turns) > 1 for turns in meta["closed"])
    restored = TextVectorEnv(noise_env(), 3)
    restored.lanes.load_state_dict(arrays, json.loads(json.dumps(meta)))
    assert same(play(envs, seed=2), play(restored, seed=2))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_play_independently(make_copy):
    env = begin(noise_env(), 3)
    write(env, "a/b/")
    twin = make_copy(env)
    assert [step[1] for step in write(env, "c/dd")] == [step[1] for step in write(twin, "c/dd")]


def test_an_evaluation_in_between_changes_nothing():
    def run(evaluate):
        env = noise_env()
        envs = TextVectorEnv(env, 2)
        envs.reset(seed=0)
        play(envs)
        if evaluate:
            others = Lanes(env, 2)
            others.reset(prompts=[{"seed": 100}, {"seed": 101}])
            others.step(np.array([EOS, EOS]))
        return play(envs, seed=3)

    assert same(run(False), run(True))


def test_each_turn_is_played_once():
    class Counting(Guess):
        n_steps = 0

        def step(self, text):
            Counting.n_steps += 1
            return super().step(text)

    write(begin(guess_env(Counting)), "1/2/3/4/")
    assert Counting.n_steps == 4


class Unseeded(Guess):
    calls = 0

    def step(self, text):
        Unseeded.calls += 1
        return f"{Unseeded.calls}", 0.0, False, False, {}


def test_a_game_that_does_not_play_the_same_again_is_named():
    env = begin(guess_env(Unseeded))
    write(env, "1/2/")
    env.games = RunningGames(Unseeded)  # new game objects, as after loading a checkpoint
    with pytest.raises(GameError, match=r"seed \d+ to play the same again.*after turn 1.*must follow from the seed"):
        write(env, "3/")


def test_resume_is_exact(tmp_path):
    """A resumed run is equal bit for bit, with running games that draw from the global generators."""

    def build(seed=0):
        env = noise_env(max_new_tokens=20, seed=3)
        lm = tiny_config(vocab_size=len(TOKENIZER), n_positions=64)
        return tiny_agent(env, lm=lm, n_envs=4, n_steps=6, seed=seed)

    model, uninterrupted = build(), Recorder()
    model.learn(4 * 24, callback=[uninterrupted, Checkpoints(tmp_path, every=2)])
    resumed, continued = build(seed=7), Recorder()
    random.seed(99), np.random.seed(99)
    load_checkpoint(resumed, tmp_path / f"step_{2 * 24:012d}")
    assert any(episode.turns for episode in resumed.get_env().lanes.state.episodes)  # games are running
    resumed.learn(2 * 24, callback=continued, reset_num_timesteps=False)
    assert np.array_equal(np.concatenate(uninterrupted.actions[12:]), np.concatenate(continued.actions))
    assert run_state(resumed) == run_state(model)
