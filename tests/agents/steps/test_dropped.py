"""Episodes that a reward drops: they are neither trained nor counted in means; other users of an env refuse them."""

import copy
import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from agents import KLPenalty, LMPolicy, RewardShaping, SequenceRolloutBuffer, TextVecEnv, TrainingWarnings, evaluate
from agents.callbacks.checkpoints import Checkpoints
from agents.callbacks.episode_metrics import EpisodeMetrics
from agents.checkpoints.checkpoint import load_checkpoint
from agents.rollout.advantages import group_advantages
from agents.steps.scores import DropEpisodes
from tests.helpers.models import randomise_critic
from tests.helpers.rewards import rows
from tests.helpers.training import (
    PROMPTS,
    TOKENIZER,
    Recorder,
    Trained,
    run_state,
    same_weights,
    tiny_agent,
    tiny_config,
    tiny_env,
    weights,
)
from textenv import CharTokenizer, RewardError, TextEnv, TextVectorEnv
from textenv.episodes.scores import check_rewards
from textenv.masks.token_masks import AllowedMask
from textenv.rewards import DROPPED, BatchReward

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")
slow = pytest.mark.slow
LOWER = CharTokenizer("abc")  # a quarter of all tokens ends an episode


def is_lost(ids):
    """Return whether a text is dropped: about a third of all texts are."""
    return sum(map(int, ids)) % 3 == 0


class Judge(BatchReward):
    """Scores texts by two parts; drops those for which `loses` is true."""

    def __init__(self, score_at="rollout_end", loses=is_lost):
        self.score_at, self.loses = score_at, loses

    def score(self, prompts, preds, dones):
        return [
            DROPPED if self.loses(text.ids) else {"n": 0.1 * len(text), "sum": sum(text.ids) / 30} for text in preds
        ]


def never(ids):
    return False


def always(ids):
    return True


def step_of(env):
    return [] if env.score_at == "rollout_end" else [DropEpisodes()]


# The contract


def test_dropped_stays_itself_and_is_a_checked_reward():
    assert pickle.loads(pickle.dumps(DROPPED)) is DROPPED is copy.deepcopy(DROPPED) and repr(DROPPED) == "DROPPED"
    prompts, preds, dones = rows(["a", "b"])
    one, other = check_rewards([DROPPED, {"x": 2.0}], prompts, preds)
    assert (one.value, one.parts, one.is_dropped, one.score) == (0.0, {}, True, DROPPED)
    assert (other.score, other.is_dropped) == ({"x": 2.0}, False)
    with pytest.raises(RewardError, match="got None"):  # a function without `return` drops nothing
        check_rewards([None, 1.0], prompts, preds)


# Users of an env that cannot leave an episode out


def test_other_consumers_refuse():
    env = tiny_env(Judge("done", always))
    for user in (env, TextVectorEnv(env, 1)):
        user.reset(seed=0)
        with pytest.raises(RewardError, match=r"Expected a reward of every finished row, got DROPPED \(lane 0.*on_fai"):
            for _ in range(4):
                user.step(1 if user is env else np.array([1]))
    settings = {"policy_kwargs": {"lm": tiny_config()}, "n_steps": 8, "batch_size": 8, "device": "cpu"}
    for buffer in ({}, {"rollout_buffer_class": SequenceRolloutBuffer}):
        with pytest.raises(RewardError, match=r"LateScores .* or DropEpisodes"):
            PPO(LMPolicy, TextVecEnv(env, 2), **settings, **buffer).learn(16)


def test_an_evaluation_by_sb3_after_training_refuses():
    model = tiny_agent(tiny_env(Judge()), n_envs=8)
    model.learn(64)
    with pytest.raises(RewardError, match="got DROPPED"):
        evaluate_policy(model, model.get_env(), n_eval_episodes=40, deterministic=False)


def test_a_row_that_goes_on_cannot_be_dropped():
    env = tiny_env(Judge("step", always))
    with pytest.raises(RewardError, match="every unfinished row, got DROPPED"):
        tiny_agent(env).learn(16, callback=DropEpisodes())


# What is trained


class Values(Recorder):
    """Keeps the values and masks of each step as well."""

    def _on_training_start(self):
        super()._on_training_start()
        self.values, self.allowed = [], []

    def _on_step(self):
        self.values.append(self.locals["values"].numpy()[:, 0].copy())
        self.allowed.append(self.locals.get("action_masks"))
        return super()._on_step()


def gradient_by_hand(policy, recorder, model):
    """Return the gradient of PPO's loss over the episodes that were not dropped, computed token by token."""
    values, rewards = np.stack(recorder.values), recorder.stacked("rewards")
    transitions, advantages = [], []
    for info, episode in recorder.episodes():
        if info["dropped"]:
            continue
        follows, advantage = 0.0, 0.0
        for transition in reversed(episode):
            advantage = rewards[transition] + follows - values[transition] + 0.95 * advantage
            follows = values[transition]
            transitions.append(transition)
            advantages.append(advantage)
    raw = np.array(advantages)
    returns = raw + [values[transition] for transition in transitions]
    normal = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-8) if model.rollout_buffer.normalize_advantage else raw
    policy.set_training_mode(True)
    for transition, advantage, target in zip(transitions, normal, returns):
        observation = torch.as_tensor(recorder.observations[transition[0]][transition[1]][None])
        masks = (
            {}
            if recorder.allowed[0] is None
            else {"action_masks": recorder.allowed[transition[0]][transition[1]][None]}
        )
        action = torch.tensor([int(recorder.actions[transition[0]][transition[1]])])
        value, log_prob, _ = policy.evaluate_actions(observation, action, **masks)
        ratio = torch.exp(log_prob - float(recorder.stacked("log_probs")[transition]))
        loss = -advantage * ratio + model.vf_coef * (value.flatten() - target) ** 2
        (loss.sum() / len(transitions)).backward()
    return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("algorithm", "score_at", "normalize"),
    [
        (PPO, "rollout_end", True),
        (MaskablePPO, "done", False),
        pytest.param(PPO, "done", False, marks=slow),
        pytest.param(PPO, "done", True, marks=slow),
        pytest.param(MaskablePPO, "rollout_end", True, marks=slow),
    ],
)
def test_the_gradient_is_that_of_a_rollout_without_the_dropped_episodes(algorithm, score_at, normalize):
    """Compared with one forward per token of the kept episodes; one SGD step at rate 1 shows the gradient."""
    mask = {"mask": AllowedMask(range(1, 20))} if algorithm is MaskablePPO else {}
    env = tiny_env(Judge(score_at), stop_ids=(), **mask)
    model = tiny_agent(
        env, algorithm=algorithm, n_steps=8, n_epochs=1, batch_size=32, learning_rate=1.0, max_grad_norm=1e9,
        policy_kwargs={"optimizer_class": torch.optim.SGD},
        rollout_buffer_kwargs={"normalize_advantage": normalize},
    )  # fmt: skip
    randomise_critic(model.policy)
    before, recorder = copy.deepcopy(model.policy), Values()
    model.learn(32, callback=[*step_of(env), recorder])
    dropped = [info["dropped"] for info, _ in recorder.episodes()]
    assert 0 < sum(dropped) < len(dropped) == 8
    expected = gradient_by_hand(before, recorder, model)
    after = dict(model.policy.named_parameters())
    for name, weight in before.named_parameters():
        if name in expected:
            np.testing.assert_allclose(weight.detach() - after[name].detach(), expected[name], atol=2e-5)
    assert max(float(grad.abs().max()) for grad in expected.values()) > 0.05


@pytest.mark.parametrize("score_at", ["done", pytest.param("rollout_end", marks=slow)])
def test_nothing_changes_where_nothing_is_dropped(score_at):
    trained = []
    for callback in ([], [DropEpisodes()]):
        env = TextEnv(("ab", "c"), LOWER, reward=Judge(score_at, never), max_new_tokens=5)
        model = tiny_agent(env, lm=tiny_config(vocab_size=len(LOWER)), n_steps=8)
        model.learn(4 * 8 * 3, callback=[KLPenalty(0.1), *callback])
        trained.append(weights(model))
    assert same_weights(*trained)


@pytest.mark.parametrize("algorithm", [PPO, pytest.param(A2C, marks=slow)])
@pytest.mark.parametrize("score_at", ["rollout_end", "done"])
def test_episodes_that_straddle_rollouts_are_dropped_whole(algorithm, score_at):
    env = TextEnv(("ab", "c"), LOWER, reward=Judge(score_at), max_new_tokens=7)
    options = {"complete_episodes": True, "normalize_advantage": False}
    lm = tiny_config(vocab_size=len(LOWER))
    model = tiny_agent(env, 8, algorithm, lm, n_steps=6, rollout_buffer_kwargs=options)
    recorder, trained = Recorder(), Trained()
    model.learn(48 * 5, callback=[*step_of(env), recorder, trained])
    log_probs, expected, straddling = recorder.stacked("log_probs"), [], 0
    for info, transitions in recorder.episodes():
        assert info["dropped"] == is_lost([recorder.actions[step][lane] for step, lane in transitions])
        straddling += info["dropped"] and transitions[0][0] // 6 != transitions[-1][0] // 6
        expected += [] if info["dropped"] else [float(log_probs[transition]) for transition in transitions]
    assert straddling >= 2
    assert sorted(row[0] for rollout in trained.rollouts for row in rollout) == sorted(expected)


# Groups


def grouped(score_at="rollout_end", n=4):
    texts = [{"prompt": "abcdef"[:i], "max_new_tokens": i + 1} for i in range(1, 6)]
    return TextEnv(texts, TOKENIZER, reward=Judge(score_at), max_new_tokens=7, samples_per_prompt=n)


@pytest.mark.parametrize("score_at", ["rollout_end", "done"])
@pytest.mark.parametrize("advantage", ["rloo", *(pytest.param(name, marks=slow) for name in ("grpo", "grpo_mean"))])
def test_a_group_is_compared_without_its_dropped_members(advantage, score_at):
    env, recorder, trained = grouped(score_at), Recorder(), Trained()
    options = {"advantage": advantage, "normalize_advantage": False}
    model = tiny_agent(env, n_envs=7, n_steps=5, rollout_buffer_kwargs=options)
    model.learn(35 * 7, callback=[*step_of(env), recorder, trained])
    members = defaultdict(list)
    for info, transitions in recorder.episodes():
        members[info["group"]].append((info, transitions))
    log_probs, expected, sizes = recorder.stacked("log_probs"), defaultdict(list), []
    for group in members.values():
        kept = [(info, transitions) for info, transitions in group if not info["dropped"]]
        if len(group) == 4:
            sizes.append(len(kept))
            each = group_advantages(np.array([i["episode"]["r"] for i, _ in kept]), np.zeros(len(kept)), advantage)
            rollout = max(transitions[-1][0] for _, transitions in group) // 5
            expected[rollout] += [(float(log_probs[p]), float(a)) for (_, ps), a in zip(kept, each) for p in ps]
    assert len(set(sizes)) >= 3 and sum(4 - size for size in sizes) > 5
    for i, rollout in enumerate(trained.rollouts):
        np.testing.assert_allclose(sorted(row[:2] for row in rollout), sorted(expected[i]), atol=1e-4)


@pytest.mark.parametrize("score_at", ["done", pytest.param("rollout_end", marks=slow)])
def test_e8_resumed_while_a_dropped_member_waits_for_its_group(score_at, tmp_path):
    """Bit for bit."""

    def build(**kwargs):
        return tiny_agent(grouped(score_at), n_envs=7, n_steps=5, rollout_buffer_kwargs={"advantage": "grpo"}, **kwargs)

    model = build()
    steps = step_of(model.get_env().env)
    model.learn(35 * 6, callback=[KLPenalty(0.1), *steps, Checkpoints(tmp_path, every=3, keep=9)])
    expected = run_state(model)
    resumed = build(seed=5)
    load_checkpoint(resumed, tmp_path / f"step_{35 * 3:012d}")
    n_dropped = sum(episode.is_dropped for episode in resumed.rollout_buffer.waiting_episodes.values())
    resumed.learn(35 * 3, callback=[KLPenalty(0.1), *step_of(resumed.get_env().env)], reset_num_timesteps=False)
    assert run_state(resumed) == expected
    assert n_dropped > 0 or score_at == "rollout_end"  # waiting episodes have no score yet with "rollout_end"


# Logs


@pytest.mark.parametrize("score_at", ["rollout_end", "done"])
def test_no_mean_has_a_dropped_episode(score_at):
    env, recorder = tiny_env(Judge(score_at)), Recorder()
    model = tiny_agent(env, n_envs=12)
    shaping = RewardShaping(scale=True)
    model.learn(48, callback=[EpisodeMetrics(), shaping, *step_of(env), recorder], log_interval=None)
    logged = dict(model.logger.name_to_value)
    model.logger.dump = lambda step: logged.update(model.logger.name_to_value)
    model.dump_logs()  # SB3's `OnPolicyAlgorithm.learn` calls it between rollout and update
    infos = [info for info, _ in recorder.episodes()]
    kept = [info for info in infos if not info["dropped"]]
    scores = [info["episode"]["r"] for info in kept]
    assert logged["episode/dropped"] == len(infos) - len(kept) > 0 == logged["episode/failed"]
    assert logged["reward/task"] == pytest.approx(np.mean(scores)) == logged["rollout/ep_rew_mean"]
    assert logged["reward/sum"] == pytest.approx(np.mean([info["reward_parts"]["sum"] for info in kept]))
    assert logged["episode/length"] == pytest.approx(np.mean([info["episode"]["l"] for info in kept]))
    assert (shaping.count, shaping.mean) == (len(kept), pytest.approx(np.mean(scores)))


def test_counts_are_logged_from_the_first_failure_on():
    judge, logged = Judge(loses=never), []

    class Note(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            logged.append(self.logger.name_to_value.get("episode/dropped"))
            judge.loses = is_lost if len(logged) == 1 else never

    tiny_agent(tiny_env(judge), n_envs=8).learn(32 * 3, callback=[EpisodeMetrics(), Note()])
    assert logged[0] is None and logged[1] > 0 and logged[2] == 0


def test_equal_rewards_of_what_is_left_are_warned_of():
    class Same(Judge):
        def score(self, prompts, preds, dones):
            return [DROPPED if is_lost(text.ids) else 1.0 for text in preds]

    with pytest.warns(UserWarning, match=r"all \d+ last episodes earned 1\."):
        tiny_agent(tiny_env(Same()), n_envs=64).learn(256, callback=TrainingWarnings())


# Texts that were cut off


@pytest.mark.parametrize("score_at", ["done", "rollout_end"])
@pytest.mark.parametrize("groups", [1, 2])
def test_c13_texts_that_were_cut_off_are_not_trained_and_stay_in_the_logs(score_at, groups):
    """The trained tokens are those of the texts that ended by themselves, of whole groups if there are groups (C13)."""
    env = tiny_env(prompts=["ab"], max_new_tokens=4, stop_ids=range(0, 33, 4), score_at=score_at,
                   samples_per_prompt=groups)  # fmt: skip
    model = tiny_agent(env, n_envs=12, n_steps=4, rollout_buffer_kwargs={"complete_episodes": True}, batch_size=48)
    recorder, trained = Recorder(), Trained()
    model.learn(48 * 4, callback=[DropEpisodes(cut=True), EpisodeMetrics(), recorder, trained], log_interval=None)
    log_probs, episodes = recorder.stacked("log_probs"), list(recorder.episodes())
    members = Counter(info["group"] for info, _ in episodes)
    whole = [(info, places) for info, places in episodes if members[info["group"]] == groups]
    kept = [places for info, places in whole if str(info["end_reason"]) != "length"]
    got = sorted(row[0] for rollout in trained.rollouts for row in rollout)
    np.testing.assert_allclose(got, sorted(float(log_probs[place]) for places in kept for place in places), atol=1e-6)
    assert 5 < len(kept) < len(whole) - 5
    last = [info for info, places in episodes if places[-1][0] >= 12 and info["scored"]]
    if groups == 1:  # a group's score may come later
        assert model.logger.name_to_value["reward/task"] == pytest.approx(np.mean([i["episode"]["r"] for i in last]))


def test_c13_where_every_text_is_cut_off_the_limit_is_named():
    with pytest.raises(RewardError, match=r"all 4 that ended were dropped.*max_new_tokens where cut texts are dropped"):
        tiny_agent(tiny_env(stop_ids=())).learn(16, callback=DropEpisodes(cut=True))


# Too few are left


def test_a_rollout_of_which_all_is_dropped_is_refused():
    with pytest.raises(RewardError, match=r"Expected an episode to train on, got none: all 4 that ended were dropped"):
        tiny_agent(tiny_env(Judge(loses=always), stop_ids=())).learn(16)


def test_fewer_sequences_than_minibatches_make_fewer_minibatches():
    env = tiny_env(Judge(loses=lambda ids: ids[0] > 4), prompts=PROMPTS[:1], stop_ids=())
    model, counts = tiny_agent(env, n_envs=16, batch_size=4, n_epochs=1), []

    class Count(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            counts.append((len(buffer.trained), len(list(buffer.get(4)))))

    model.learn(64, callback=Count())
    assert 0 < counts[0][0] == counts[0][1] < 16


# Evaluation


def test_evaluate_leaves_dropped_texts_out_of_the_means():
    model = tiny_agent(tiny_env(Judge()))
    options = {"max_new_tokens": 4, "n": 8}
    result = evaluate(model, list(PROMPTS), TOKENIZER, reward=Judge("done"), **options)
    ids = [TOKENIZER.encode(generation.text) for generation in result.generations]
    sums = [sum(row) for row in ids]  # the end token is 0
    lost = [total % 3 == 0 for total in sums]
    assert 0 < sum(lost) < len(lost) == 40
    assert result.figures["dropped"].value == pytest.approx(np.mean(lost))
    kept = [total / 30 for total, is_out in zip(sums, lost) if not is_out]
    assert result.figures["reward/sum"].value == pytest.approx(np.mean(kept))
    assert "dropped" not in evaluate(model, list(PROMPTS), TOKENIZER, reward=Judge("done", never), **options).figures
