"""Rollouts without a whole group of samples: their episodes wait for a later one, and their update changes nothing."""

import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import KLPenalty
from agents.callbacks.checkpoints import Checkpoints
from agents.checkpoints.checkpoint import load_checkpoint
from tests.helpers.training import Recorder, Trained, run_state, same_weights, tiny_agent, tiny_env, weights
from textenv import AllowedMask

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 4 in each:UserWarning")


def fours(algorithm=PPO, n_envs=2, **kwargs):
    """Return an agent whose texts of 4 tokens fill a rollout: of groups of 4, every second rollout ends one."""
    mask = {"mask": AllowedMask(tuple(range(1, 33)))} if algorithm is MaskablePPO else {}
    env = tiny_env(samples_per_prompt=4, stop_ids=(), **mask)
    settings = {"batch_size": 4} if algorithm in (PPO, MaskablePPO) else {}
    options = {"advantage": "gae", "normalize_advantage": True}
    # Whatever else could move weights: the entropy bonus, the value loss, momentum and weight decay.
    pull = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    pull = {} if algorithm is TRPO else {"ent_coef": 0.1, "vf_coef": 0.5, "policy_kwargs": pull}
    return tiny_agent(env, n_envs, algorithm, **{"rollout_buffer_kwargs": options, **settings, **pull, **kwargs})


class States(BaseCallback):
    """Keeps the weights and the optimizer's state before each rollout."""

    def _on_training_start(self):
        self.seen = []

    def _on_rollout_start(self):
        optimizer = self.model.policy.optimizer.state_dict()["state"]
        moments = {f"{i}.{name}": tensor.clone() for i, entry in optimizer.items() for name, tensor in entry.items()}
        self.seen.append(weights(self.model) | moments)

    def _on_step(self):
        return True


@pytest.mark.parametrize("algorithm", [PPO, A2C, MaskablePPO])
def test_d9_a_rollout_without_a_whole_group_waits_and_its_update_changes_nothing(algorithm):
    model, states, trained = fours(algorithm), States(), Trained()
    with pytest.warns(UserWarning, match="No group of 4 samples is whole.*: its episodes wait") as said:
        model.learn(6 * 8, callback=[states, trained])
    assert sum("No group" in str(warning.message) for warning in said) == 3, "one for each update, not each epoch"
    for i in (0, 2, 4):  # these rollouts end half a group, the next ones the other half
        assert same_weights(states.seen[i], states.seen[i + 1])
        assert not any(advantage for _, advantage, *_ in trained.rollouts[i])
    assert not same_weights(states.seen[1], states.seen[2]) and not same_weights(states.seen[3], states.seen[4])
    assert [len(rollout) for rollout in trained.rollouts[1::2]] == [16, 16, 16]
    assert model.num_timesteps == 48


@pytest.mark.filterwarnings("ignore:No group of 4 samples")
def test_what_such_an_update_logs_is_no_loss_and_the_rollouts_entropy():
    model, recorder = fours(), Recorder()
    model.learn(8, callback=recorder, log_interval=None)
    logged = model.logger.name_to_value
    zeros = ("policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction")
    assert [logged[f"train/{name}"] for name in zeros] == [0.0] * 4
    assert logged["train/entropy_loss"] == pytest.approx(recorder.stacked("log_probs").mean())


@pytest.mark.filterwarnings("ignore:No group of 4 samples")
def test_e8_resumed_after_an_update_that_changed_nothing(tmp_path):
    model = fours()
    model.learn(4 * 8, callback=[KLPenalty(0.1), Checkpoints(tmp_path, every=1, keep=9)])
    resumed = fours(seed=5)
    load_checkpoint(resumed, tmp_path / "step_000000000024")  # after the third rollout, whose update changed nothing
    assert len(resumed.rollout_buffer.waiting_episodes) == 2
    resumed.learn(8, callback=KLPenalty(0.1), reset_num_timesteps=False)
    assert run_state(resumed) == run_state(model)


def test_fewer_whole_groups_than_minibatches_make_fewer_minibatches():
    model, steps = fours(n_envs=8, batch_size=2), []  # 8 episodes in 16 minibatches
    model.policy.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    model.learn(32)
    assert len(steps) == 2 * 8


def test_trpo_cannot_wait():
    with pytest.raises(ValueError, match=r"one sequence for each of 1 minibatches, got 0: .* n_steps or n_envs"):
        fours(TRPO).learn(8)
