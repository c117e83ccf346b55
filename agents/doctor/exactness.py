"""The proof that a model is trained exactly: its rollouts and updates against the model alone, one prefix at a time."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor
from transformers import PreTrainedModel

from textenv.env import TextEnv
from textenv.text.tokenizer import CharTokenizer

from ..models.critic import ValueHead
from ..models.pretrained import LMSpec
from ..models.sequences import SequenceBatch
from ..models.trainable import merged_state_dict
from ..policies.actor_critic import LMActorCritic
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.transitions import RolloutView
from ..rollout.vec_env import TextVecEnv

# By check, the largest difference that rounding makes, in nats or units of reward: float32 rounds by about 1e-6. A
# gradient, measured as a share of its largest entry, adds up many such differences. "" is for all other checks.
TOLERANCE = {"": 1e-4, "gradient": 1e-3, "gradient after an update": 1e-3}
# Two prompts that several lanes have, at once and one after the other: long enough that sharing them saves 64 tokens in
# a rollout (see `prompt_layout`), and shorter than half of the positions that small models have.
LONG, OTHER = "defghijklmnopqrstuvw", [0, 21, 5, 0, 9, 17, 30, 2, 11, 26, 7, 19, 3, 28, 14, 8, 23]
# Token 0 is the pad and the end token. At the start of a prompt, as BOS, and inside one it is read like any other.
PROMPTS = (LONG, LONG, OTHER, "a", [0, 14, 15], OTHER, "efghijklm", LONG, [21, 0, 3], OTHER, "bcd", LONG)
N_LANES, N_STEPS, MAX_NEW_TOKENS = 5, 10, 7  # episodes end, restart beside others, and straddle updates


def reward(prompt: Any, preds: Any, done: bool) -> float:
    """Return a reward that differs from token to token."""
    return float(preds[-1] % 5) / 5


def exactness_agent(lm: LMSpec, **policy_kwargs: Any) -> PPO:
    """Return PPO on prompts of mixed lengths; the value head is random, for at zero all values would agree."""
    env = TextEnv(PROMPTS, CharTokenizer(), reward=reward, max_new_tokens=MAX_NEW_TOKENS, order="sequential")
    agent = PPO(
        LMPolicy,
        TextVecEnv(env, N_LANES),
        n_steps=N_STEPS,
        batch_size=N_STEPS * N_LANES // 2,
        n_epochs=1,
        learning_rate=0.05,
        normalize_advantage=False,
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_kwargs={"lm": lm, "optimizer_class": torch.optim.SGD, **policy_kwargs},
        seed=0,
        device="cpu",
    )
    policy = agent.policy
    assert isinstance(policy, LMPolicy)
    critic = cast("ValueHead", policy.lm.critic)
    torch.nn.init.normal_(critic.linear.weight, generator=torch.Generator().manual_seed(5))
    return agent


class Exactness(BaseCallback):
    """Compares each rollout of `learn`, before it is trained on, with a plain copy of the model.

    Args:
        plain: The same model, built apart from the policy; it gets the policy's weights before each comparison.
        with_gradient: Whether to compare gradients, too: of a model without adapters, whose weights have other names.

    Attributes:
        differences: By check, the largest difference of the first rollout, and as "... after an update" that of the
            last: "rollout", "ratio", "values" and "padding" in nats or units of reward, "gradient" as a share of the
            largest gradient.
    """

    def __init__(self, plain: PreTrainedModel, with_gradient: bool = True) -> None:
        super().__init__()
        self.plain, self.with_gradient = plain, with_gradient
        self.differences: dict[str, float] = {}
        self.n_rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, PPO)
        policy, buffer = self.model.policy, self.model.rollout_buffer
        assert isinstance(policy, LMPolicy) and isinstance(buffer, SequenceRolloutBuffer)
        self.plain.load_state_dict(merged_state_dict(policy.backbone.model))
        self.plain.eval()
        suffix = "" if self.n_rollouts == 0 else " after an update"
        self.n_rollouts += 1
        view = buffer.view()
        differences = compare(self.plain, policy, buffer, view)
        if self.with_gradient:
            differences["gradient"] = difference_of_gradients(self.plain, policy, view)
        self.differences |= {name + suffix: value for name, value in differences.items()}


@torch.no_grad()
def compare(
    plain: PreTrainedModel, policy: LMPolicy, buffer: SequenceRolloutBuffer, view: RolloutView
) -> dict[str, float]:
    """Return the largest differences between a rollout, the update's reading of it and a plain model, by check."""
    sampled = torch.as_tensor(buffer.log_probs[view.steps, view.lanes])  # (N,)
    values = torch.as_tensor(buffer.values[view.steps, view.lanes])  # (N,)
    was_training = policy.training
    policy.train(True)  # as in an update; `set_training_mode` would also begin one
    now_values, now, _ = policy.evaluate_actions(view.batch, view.actions)
    _, by_padding = differences_by_padding(policy.lm, view.batch, view.actions)
    policy.train(was_training)
    return {
        "rollout": largest(sampled - prefix_log_probs(plain, view)),
        "ratio": largest(now - sampled),
        "values": largest(now_values.flatten() - values),
        "padding": by_padding,
    }


@torch.no_grad()
def differences_by_padding(lm: LMActorCritic, batch: SequenceBatch, actions: Tensor) -> tuple[float, float]:
    """Return how far values and log-probabilities of sequences are from those beside the longest sequence."""
    # `evaluate` groups rows of similar length and cuts each group to its longest row. Here all rows claim the length
    # of the longest, so that one forward reads all the padding.
    padded = batch[:]
    padded.lengths = np.full(len(batch.lengths), batch.tokens.shape[1])  # (B,)
    together = lm.evaluate(padded, actions)
    off = [0.0, 0.0]
    for row in range(len(batch.lengths)):
        own, positions = batch.of_sequences(np.array([row]))
        of_row = torch.as_tensor(positions, device=actions.device)  # (n,): the row's transitions among all N
        alone = lm.evaluate(own, actions[of_row])
        pairs = zip(off, alone[:2], together[:2], strict=True)
        off = [max(so_far, largest(a - b[of_row])) for so_far, a, b in pairs]
    return off[0], off[1]


def largest(differences: Tensor) -> float:
    """Return the largest absolute difference; infinity where one is NaN."""
    return float(differences.detach().abs().nan_to_num(nan=float("inf")).max())


def prefix_log_probs(plain: PreTrainedModel, view: RolloutView) -> Tensor:
    """Return the log-probability of each action, (N,), from one forward of the model alone for each prefix."""
    result = []
    for row, col, action in zip(view.batch.rows, view.batch.cols, view.actions.tolist(), strict=True):
        logits = plain_logits(plain, view.batch, int(row), int(col) + 1)[-1]  # (V,)
        result.append(logits.log_softmax(-1)[action])
    return torch.stack(result)


def plain_logits(plain: PreTrainedModel, batch: SequenceBatch, row: int, length: int) -> Tensor:
    """Return the logits (T, V) of the first tokens of one row; of an encoder-decoder, those of its decoder."""
    n_tokens = len(CharTokenizer())
    ids = batch.tokens[row, :length][None]  # (1, T)
    if not plain.config.is_encoder_decoder:
        return plain(input_ids=ids, use_cache=False).logits[0, :, :n_tokens].float()
    assert batch.n_prompt is not None
    n = int(batch.n_prompt[row])
    start = ids.new_full((1, 1), plain.config.decoder_start_token_id)
    written = torch.cat([start, ids[:, n:]], dim=1)  # (1, 1 + T - n)
    # Masks of ones: without them, T5Gemma passes over tokens that equal pad.
    masks = {"attention_mask": torch.ones_like(ids[:, :n]), "decoder_attention_mask": torch.ones_like(written)}
    logits = plain(input_ids=ids[:, :n], decoder_input_ids=written, use_cache=False, **masks).logits  # (1, T, V)
    return logits[0, :, :n_tokens].float()


def difference_of_gradients(plain: PreTrainedModel, policy: LMPolicy, view: RolloutView) -> float:
    """Return how far the update's gradient is from the plain model's, as a share of the largest gradient."""
    weights = torch.linspace(-1, 1, len(view.actions))  # (N,): an advantage for each transition
    was_training = policy.training
    policy.train(True)
    policy.zero_grad()
    (policy.evaluate_actions(view.batch, view.actions)[1] * weights).sum().backward()
    policy.train(was_training)
    plain.zero_grad()
    batch = view.batch
    for row, length in enumerate(batch.lengths):
        here = np.flatnonzero(batch.rows == row)
        cols = torch.as_tensor(batch.cols[here])
        if plain.config.is_encoder_decoder:
            assert batch.n_prompt is not None
            cols = cols + 1 - int(batch.n_prompt[row])
        log_probs = plain_logits(plain, batch, row, int(length)).log_softmax(-1)  # (T, V)
        (log_probs[cols, view.actions[here]] * weights[here]).sum().backward()
    pairs = zip(policy.backbone.model.parameters(), plain.parameters(), strict=True)
    both = [(_gradient(ours), _gradient(theirs)) for ours, theirs in pairs]
    policy.zero_grad()
    scale = max(float(expected.abs().max()) for _, expected in both)
    return max(largest(got - expected) for got, expected in both) / max(scale, 1e-6)


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()


@torch.no_grad()
def sensitivity(plain: PreTrainedModel) -> float:
    """Return by how much, in nats, the first of three tokens moves the distribution after the last."""
    ids = torch.tensor([[3, 5, 7], [4, 5, 7]])
    batch = SequenceBatch(ids, np.array([3, 3]), np.arange(2), np.full(2, 2), n_prompt=np.array([2, 2]))
    first, second = (plain_logits(plain.eval(), batch, row, 3)[-1].log_softmax(-1) for row in range(2))
    return largest(first - second)
