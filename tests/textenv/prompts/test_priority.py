"""Prioritized prompts: probabilities by hand, draws, late scores, resumed runs, and faster learning."""

import json

import numpy as np
import pytest

from agents import LateScores, TextVecEnv, generate
from agents.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from agents.checkpoints.manifest import CheckpointError
from tests.helpers.training import length_and_letters, run_state, tiny_agent, tiny_config, tiny_env
from textenv import CharTokenizer, PrioritySampling, TextEnv, TextVectorEnv
from textenv.lanes.lanes import Lanes

LETTERS = "abcd"
PAYS = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.75}  # the reward of each prompt
EOS = 0


def pay(prompt, preds, done):
    return PAYS[str(prompt)] if done else 0.0


def cursor(n=4, seed=0, **kwargs):
    return PrioritySampling(**{"staleness": 0.0, "epsilon": 0.0, **kwargs}).cursor(n, seed)


# Probabilities by hand


def test_low_rewards_by_hand():
    """The rewards fall short of the best by 0, 1, 1/2 and 1/4 of the range."""
    prompts = cursor(alpha=1.0)
    for number, reward in enumerate(PAYS.values()):
        prompts.observe(number, reward)
    np.testing.assert_allclose(prompts.priorities(), [0, 1, 0.5, 0.25])
    np.testing.assert_allclose(prompts.probabilities(), np.array([0, 4, 2, 1]) / 7)
    two = cursor(alpha=2.0, epsilon=0.5)
    for number, reward in enumerate(PAYS.values()):
        two.observe(number, 10 * reward - 3)  # neither the scale nor the zero of a reward matters
    np.testing.assert_allclose(two.probabilities(), np.array([4, 36, 16, 9]) / 65)


def test_the_recent_reward_is_a_moving_average():
    prompts = cursor(2, rate=0.25)
    for reward in (1.0, 0.0, 2.0):
        prompts.observe(0, reward)
    assert prompts.mean[0] == 0.75 + 0.25 * (2 - 0.75)  # 1, 0.75, 1.0625


def test_spread_by_hand():
    """At rate 1/2, (0, 2) has variance 1/2 * (0 + 1/2 * 4) = 1, and (0, 2, 0) then 1/2 * (1 + 1/2 * 1) = 3/4."""
    prompts = cursor(3, by="spread", rate=0.5)
    for number, reward in [(0, 0), (0, 2), (1, 0), (1, 2), (1, 0), (2, 5), (2, 5)]:
        prompts.observe(number, reward)
    np.testing.assert_allclose(prompts.variance, [1, 0.75, 0])
    np.testing.assert_allclose(prompts.priorities(), [1, np.sqrt(0.75), 0])


def test_novelty_by_hand():
    prompts = cursor(3, by="novelty", alpha=2.0)
    prompts.draws[:] = [0, 1, 3]
    np.testing.assert_allclose(prompts.probabilities(), np.array([1, 1 / 2, 1 / 4]) * 4 / 7)


def test_prompts_with_unknown_priority_come_first():
    """One reward does not tell a prompt's spread, as its deviation is always 0."""
    prompts = cursor(3, by="reward")
    np.testing.assert_allclose(prompts.probabilities(), [1 / 3] * 3)
    prompts.observe(0, 1.0)
    prompts.observe(1, 0.0)
    np.testing.assert_allclose(prompts.probabilities(), [0, 1 / 2, 1 / 2])
    two = cursor(3, by="spread")
    two.observe(0, 1.0)
    np.testing.assert_allclose(two.probabilities(), [1 / 3] * 3)
    two.observe(0, 1.0)
    np.testing.assert_allclose(two.probabilities(), [0, 1 / 2, 1 / 2])


def test_staleness_by_hand():
    """After draws 2, 0, 2 of four prompts the counts since are 1, 3, 0, 3."""
    prompts = cursor(staleness=0.25, alpha=0.0)
    np.testing.assert_allclose(prompts.probabilities(), [0.25] * 4)  # before the first draw
    prompts.last_draw[:], prompts.n_draws = [2, 0, 3, 0], 3
    np.testing.assert_allclose(prompts.probabilities(), 0.75 / 4 + 0.25 * np.array([1, 3, 0, 3]) / 7)


def test_staleness_starves_none():
    prompts = cursor(20, staleness=0.1)
    gaps = {number: 0 for number in range(20)}
    longest = 0
    for _ in range(2_000):
        number = prompts.advance()
        prompts.observe(number, 1.0 if number else 0.0)  # prompt 0 alone falls short
        gaps = {other: 0 if other == number else gap + 1 for other, gap in gaps.items()}
        longest = max(longest, *gaps.values())
    assert prompts.draws[0] > 1_700 and prompts.draws.min() >= 4 and longest < 700


# Draws


@pytest.mark.parametrize("by", ["reward", "spread"])
def test_frequencies_follow_the_probabilities(by):
    prompts = cursor(5, seed=3, by=by, epsilon=0.1)
    for number in range(5):
        prompts.observe(number, 0.0)
        prompts.observe(number, float(number))
    expected = prompts.probabilities()
    counts = np.bincount([prompts.advance() for _ in range(3_000)], minlength=5)
    deviations = np.sqrt(3_000 * expected * (1 - expected))
    assert (np.abs(counts - 3_000 * expected) < 4 * deviations).all() and expected.max() > 3 * expected.min()


def test_exponent_zero_is_uniform_for_any_rewards():
    bare, paid = cursor(alpha=0.0, seed=5), cursor(alpha=0.0, seed=5)
    draws = []
    for _ in range(2_000):
        draws.append((bare.advance(), paid.advance()))
        paid.observe(paid.number, PAYS[LETTERS[paid.number]])
        assert (paid.probabilities() == 0.25).all()
    assert all(first == second for first, second in draws)
    counts = np.bincount([number for number, _ in draws], minlength=4)
    assert (np.abs(counts - 500) < 4 * np.sqrt(2_000 * 3 / 16)).all()


def test_the_draws_follow_from_the_seed():
    first, same, other = ([c.advance() for _ in range(50)] for c in (cursor(seed=1), cursor(seed=1), cursor(seed=2)))
    assert first == same != other


@pytest.mark.parametrize("by", ["reward", "spread", "novelty"])
def test_a_saved_state_continues_equally(by):
    def run(prompts, n):
        drawn = []
        for step in range(n):
            drawn.append(prompts.advance())
            prompts.observe(prompts.number, np.sin(prompts.number + 0.1 * step))
        return drawn

    original = cursor(6, seed=4, by=by, staleness=0.2)
    run(original, 30)
    state = json.loads(json.dumps(original.state_dict()))
    resumed = cursor(6, seed=9, by=by, staleness=0.2)
    resumed.load_state_dict(state)
    assert resumed.number == original.number
    assert run(resumed, 30) == run(original, 30) and resumed.state_dict() == original.state_dict()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"by": "length"}, r"`by` to be one of \['reward', 'spread', 'novelty'\], got 'length'"),
        ({"alpha": -1}, "`alpha` to be at least 0 and finite, got -1"),
        ({"epsilon": float("nan")}, "`epsilon` to be at least 0 and finite, got nan"),
        ({"staleness": 1.5}, r"`staleness` in \[0, 1\], for it is a share, got 1.5"),
        ({"rate": 0.0}, "`rate` above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_settings_are_refused(kwargs, words):
    with pytest.raises(ValueError, match="Expected " + words):
        PrioritySampling(**kwargs)


# Several processes


def cursors(size, **kwargs):
    return [PrioritySampling(**kwargs).cursor(6, seed=4, shard=(rank, size)) for rank in range(size)]


def agree(together):
    news = [own.news() for own in together]
    [own.agree(news) for own in together]


def paid(together):
    """Let every prompt earn its number, and all agree; return the cursors."""
    for number in range(6):
        together[number % len(together)].observe(number, float(number))
    if len(together) > 1:
        agree(together)
    return together


@pytest.mark.parametrize("by", ["reward", "spread", "novelty"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_draws_of_several_processes_are_those_of_one(by, size):
    together = paid(cursors(size, by=by, staleness=0.3))
    drawn = [own.advance() for _ in range(8) for own in together]
    (one,) = paid(cursors(1, by=by, staleness=0.3))
    assert drawn == [one.advance() for _ in drawn] and len(set(drawn)) > 3
    agree(together)
    assert all(own.state_dict() == one.state_dict() | {"number": own.number} for own in together)
    apart = [PrioritySampling(by, staleness=0.3).cursor(6, seed=4) for _ in range(2)]
    assert [own.advance() for own in apart] != drawn[:2], "the control: without a shard both make the same draw"


def test_processes_that_draw_unequally_often_agree_by_hand():
    """Rank 0 makes draws 0, 2 and 4 of the sequence, and rank 1 draw 1; they count as draws 1, 3, 4 and 2."""
    first, second = paid(cursors(2, staleness=0.3))
    mine, theirs = [first.advance() for _ in range(3)], second.advance()
    assert first.n_draws == 5 and second.n_draws == 2, "each computes the draws of both"
    (one,) = paid(cursors(1, staleness=0.3))
    in_turn = [mine[0], theirs, *mine[1:]]
    sequence = [one.advance() for _ in range(5)]
    assert sequence[:3] + sequence[4:] == in_turn, "draw 3 would have been rank 1's"
    agree([first, second])
    resumed = cursors(2, staleness=0.3)
    [own.load_state_dict(json.loads(json.dumps(first.state_dict()))) for own in resumed]
    for own in (first, second):
        assert own.n_draws == 4 and own.draws.tolist() == np.bincount(in_turn, minlength=6).tolist()
        assert all(own.last_draw[number] == i for i, number in enumerate(in_turn, 1) if number not in in_turn[i:])
        assert own.rng.bit_generator.state == one.rng.bit_generator.state, "of the one that came furthest"
    assert [first.advance(), second.advance()] == [own.advance() for own in resumed]


def test_rewards_of_several_processes_count_in_turns_when_they_agree():
    """At rate 1/2 the rewards 1, 2, 0 of a prompt have the means 1, 3/2 and 3/4; 1, 0, 2 would have 5/4."""
    first, second = cursors(2, rate=0.5)
    first.observe(0, 1.0), first.observe(0, 0.0), second.observe(0, 2.0)
    assert first.mean[0] == second.mean[0] == 0.0, "not before"
    with pytest.raises(RuntimeError, match="Expected processes that have agreed on their draws to be saved"):
        first.state_dict()
    agree([first, second])
    assert first.mean[0] == second.mean[0] == 0.75 and first.n_rewards.tolist() == [3, 0, 0, 0, 0, 0]
    (one,) = cursors(1, rate=0.5)
    [one.observe(0, reward) for reward in (1.0, 2.0, 0.0)]
    assert first.state_dict() == second.state_dict() == one.state_dict()


# In the env


def priority_env(cls=TextEnv, order=None, **kwargs):
    settings = {"reward": pay, "max_new_tokens": 2, **kwargs}
    return cls(list(LETTERS), CharTokenizer(), order=order or PrioritySampling("reward", staleness=0.05), **settings)


def play(step, n_steps, actions):
    """Step with the actions of each step; return the prompts of the episodes that ended."""
    return [str(info["prompt"]) for i in range(n_steps) for info in step(actions(i)) if info]


@pytest.mark.parametrize("n_lanes", [1, 3, 8])
def test_lanes_draw_by_what_their_episodes_earned(n_lanes):
    """With one lane or eight, the frequencies over 1,200 episodes follow the rewards."""
    lanes = Lanes(priority_env(order=PrioritySampling("reward", staleness=0.0, epsilon=0.0)), n_lanes)
    lanes.reset(seed=0)
    ended = play(lambda actions: lanes.step(actions).infos, 1_200 // n_lanes, lambda i: np.full(n_lanes, EOS))
    cursor = lanes.dealer.cursor
    np.testing.assert_allclose(cursor.mean, list(PAYS.values()))
    share = np.array([ended.count(letter) for letter in LETTERS]) / len(ended)
    np.testing.assert_allclose(share, np.array([0, 4, 2, 1]) / 7, atol=0.06)


def test_all_kinds_of_env_draw_alike():
    """A single env, Gymnasium's vector env and SB3's draw the same prompts from the same seed."""
    lone, rows = priority_env(), []
    for episode in range(30):
        lone.reset(seed=0 if episode == 0 else None)
        rows.append(str(lone.step(EOS)[4]["prompt"]))
    gym_env = TextVectorEnv(priority_env(), 1)
    gym_env.reset(seed=0)
    gym_rows = [str(gym_env.step(np.array([EOS]))[4]["final_info"]["prompt"][0]) for _ in range(30)]
    sb3_env = TextVecEnv(priority_env(), 1)
    sb3_env.seed(0)
    sb3_env.reset()
    sb3_rows = [str(sb3_env.step(np.array([EOS]))[3][0]["prompt"]) for _ in range(30)]
    assert rows == gym_rows == sb3_rows and rows.count("b") > 10 > rows.count("a")


def test_groups_are_one_draw_and_earn_together():
    lanes = Lanes(priority_env(samples_per_prompt=3), 4)
    lanes.reset(seed=1)
    infos = [info for _ in range(60) for info in lanes.step(np.full(4, EOS)).infos if info]
    groups = {}
    for info in infos:
        groups.setdefault(info["group"], []).append(str(info["prompt"]))
    assert all(len(set(prompts)) == 1 for prompts in groups.values())
    cursor = lanes.dealer.cursor
    assert cursor.n_draws == lanes.dealer.n_groups == cursor.draws.sum() and cursor.n_rewards.sum() == len(infos) == 240


def test_late_scores_count_when_they_come():
    lanes = Lanes(priority_env(score_at="rollout_end", samples_per_prompt=2), 4)
    lanes.reset(seed=0)
    lanes.begin_rollout(defer_scores=True)
    infos = [info for _ in range(3) for info in lanes.step(np.full(4, EOS)).infos]
    assert len(infos) == 12 and lanes.dealer.cursor.n_rewards.sum() == 0
    lanes.score_unscored()
    assert lanes.dealer.cursor.n_rewards.sum() == 12
    for number, letter in enumerate(LETTERS):
        assert lanes.dealer.cursor.mean[number] == (PAYS[letter] if lanes.dealer.cursor.n_rewards[number] else 0)


def test_rows_given_to_reset_are_not_counted():
    lanes = Lanes(priority_env(), 2)
    lanes.reset(seed=0, prompts=["a", *lanes.env.prompts])
    play(lambda actions: lanes.step(actions).infos, 3, lambda i: np.full(2, EOS))
    assert lanes.idle.all() and lanes.dealer.cursor.n_rewards.sum() == lanes.dealer.cursor.n_draws == 0


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="Expected `order` to be one of"):
        priority_env(order="priority")


# Training


def resumable(order, score_at):
    complete = {"rollout_buffer_kwargs": {"complete_episodes": True}, "batch_size": 32}
    env = tiny_env(length_and_letters, max_new_tokens=7, order=order, score_at=score_at)
    return tiny_agent(env, n_steps=8, **complete)


@pytest.mark.filterwarnings("ignore:.* sequences in 1 minibatches:UserWarning")
@pytest.mark.parametrize(("by", "score_at"), [("reward", "done"), ("spread", "rollout_end"), ("novelty", "done")])
def test_a_resumed_run_is_the_run(by, score_at, tmp_path):
    """The states are equal bit for bit, with episodes that straddle the checkpoint."""
    order = PrioritySampling(by, staleness=0.2)
    model = resumable(order, score_at)
    callbacks = [LateScores()] if score_at == "rollout_end" else []
    model.learn(64, callback=callbacks)
    save_checkpoint(model, tmp_path / "half")
    model.learn(64, callback=callbacks, reset_num_timesteps=False)
    resumed = resumable(order, score_at)
    load_checkpoint(resumed, tmp_path / "half")
    resumed.learn(64, callback=callbacks, reset_num_timesteps=False)
    state = run_state(model)
    assert run_state(resumed) == state and sum(state["env"]["cursor"]["prompts"]["n_rewards"]) > 8
    with pytest.raises(CheckpointError, match="Expected the order of the saved run, got another: order='shuffle'"):
        load_checkpoint(resumable("shuffle", score_at), tmp_path / "half")


ALPHABET = "abcdefghijkl"
HARD = ALPHABET[:6]  # each needs its own letter; for the other prompts, any letter pays
WANTED = {letter: ALPHABET[(5 * i + 3) % 12] for i, letter in enumerate(HARD)}


def right_letter(prompt, preds, done):
    return float(preds.text == WANTED.get(str(prompt), preds.text))


def learned(order, seed, n_tokens=2048):
    """Return the mean reward of the hard prompts, averaged over the four quarters of the training."""
    tokenizer = CharTokenizer(ALPHABET)
    env = TextEnv(list(ALPHABET), tokenizer, reward=right_letter, max_new_tokens=1, order=order)
    settings = {"n_envs": 64, "n_steps": 2, "batch_size": 128, "seed": seed}
    model = tiny_agent(env, lm=tiny_config(vocab_size=len(tokenizer)), **settings)
    rewards = []
    for _ in range(4):
        model.learn(n_tokens // 4, reset_num_timesteps=False)
        written = generate(model, list(HARD), tokenizer, n=16, max_new_tokens=1)
        rewards.append(np.mean([sample.text == WANTED[str(sample.prompt)] for sample in written]))
    return np.mean(rewards)


@pytest.mark.long
def test_unsolved_prompts_are_learned_faster():
    """The budgets are equal; an exponent of 0 learns as fast as an order without priorities."""
    orders = {
        "shuffle": "shuffle",
        "reward": PrioritySampling("reward"),
        "zero": PrioritySampling("reward", alpha=0.0, staleness=0.0),
    }
    means = {name: np.array([learned(order, seed) for seed in range(6)]) for name, order in orders.items()}
    print({name: values.round(3).tolist() for name, values in means.items()})
    gain = means["reward"] - means["shuffle"]
    assert gain.mean() > 0.05 and (gain > 0).sum() >= 5
    assert abs(means["zero"].mean() - means["shuffle"].mean()) < 0.05
