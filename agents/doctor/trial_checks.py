"""The doctor's trials: the reward on two sampled episodes, the time of an iteration, and the memory for training."""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from textenv.episodes.scores import RewardError
from textenv.lanes.lanes import Lanes

from ..models.observations import unpack_observations
from ..models.seq2seq import Seq2SeqBackbone
from ..models.sequences import SequenceBatch
from ..models.token_sets import AllowedTokens, TokenSets
from ..policies.actor_critic import MAX_LOGITS
from .report import Finding
from .sample import Sample, Subject, observe

N_EPISODES = 2  # few, since a reward may cost seconds or money
TRIAL_TOKENS = 16  # the longest episode of the reward's trial
LARGE_REWARD = 100.0  # with larger rewards the value loss, which grows with their square, outweighs the policy's
DECODE_STEPS = 3  # timed steps, of which the median counts
N_UPDATE_SEQUENCES = 4  # sequences of the timed update: few enough to fit wherever training fits
GIB = 2**30
MOMENTS = (  # how many numbers the optimizer keeps per weight; 2 for any other optimizer, such as AdamW
    (torch.optim.RMSprop, 1),
    (torch.optim.Adagrad, 1),
    (torch.optim.SGD, 0),
)


@torch.no_grad()
def check_reward(subject: Subject) -> list[Finding]:
    """Let the policy write two short episodes, and call the env's reward on them."""
    lm, env = subject.policy.lm, subject.env
    lanes = Lanes(env, N_EPISODES)  # lanes of its own: the VecEnv's episodes stay as they are
    prompts = list(islice(cycle(env.prompts), N_EPISODES))
    observations = lanes.reset(seed=0, prompts=prompts)
    np.minimum(lanes.state.limits, TRIAL_TOKENS, out=lanes.state.limits)
    totals, cache, reward_seconds = [], lm.backbone.new_cache(), 0.0
    generator = torch.Generator().manual_seed(0)
    subject.policy.set_training_mode(False)
    while not lanes.idle.all():
        batch = torch.as_tensor(observations, device=subject.policy.device)  # (B, L)
        allowed = torch.as_tensor(lanes.allowed(), device=batch.device) if env.masks else None  # (B, V)
        actions = lm.act(batch, generator=generator, cache=cache, allowed=allowed)[0].cpu().numpy()
        start = time.perf_counter()
        try:
            result = lanes.step(actions)
        except RewardError as error:
            cure = "Return a finite number, or a dict of them, for any text, the empty one too."
            return [Finding("reward", "failed", "the reward raised an error on a sampled text", str(error), cure)]
        reward_seconds += time.perf_counter() - start
        observations = result.observations
        totals += [info["episode"]["r"] for info in result.infos if info]
    shown = ", ".join(f"{total:.4g}" for total in totals)
    measured = f"{shown} for {N_EPISODES} short episodes, {1e3 * reward_seconds / N_EPISODES:.1f} ms each"
    if max(map(abs, totals)) <= LARGE_REWARD:
        return [Finding("reward", "ok", measured)]
    cause = "The value head starts at 0 and learns slowly; its loss outweighs the policy's where rewards are large."
    return [Finding("reward", "warning", measured, cause, "Scale rewards to about -1 to 1.")]


def check_time(subject: Subject, sample: Sample) -> list[Finding]:
    """Time decoding and an update, and estimate an iteration without reward, reference and optimizer step."""
    env, model = subject.env, subject.model
    n_rows = N_UPDATE_SEQUENCES if model is None else model.n_envs
    prefill, step = _time_decoding(subject, n_rows)
    token = _time_update(subject)
    measured = f"decode {1e3 * step:.2f} ms a step of {n_rows} rows, prefill {1e3 * prefill:.1f} ms, "
    measured += f"update {1e3 * token:.3f} ms a token"
    if model is not None:
        episodes = -(-model.n_steps // env.rules.max_new_tokens)
        rollout = model.n_steps * step + episodes * prefill
        update = vars(model).get("n_epochs", 1) * model.n_steps * model.n_envs * token
        measured += f": about {rollout + update:.2g} s an iteration ({rollout:.2g} rollout, {update:.2g} update)"
    return [Finding("time", "ok", measured)]


@torch.no_grad()
def _time_decoding(subject: Subject, n_rows: int) -> tuple[float, float]:
    """Return the seconds for reading all prompts, and for one decoding step afterwards."""
    policy, env = subject.policy, subject.env
    assert policy.observation_space.shape is not None
    prompts = [prompt.ids for prompt in islice(cycle(env.prompts), n_rows)]
    width = policy.observation_space.shape[0]
    policy.set_training_mode(False)
    seconds = []
    for extra in range(min(1 + DECODE_STEPS, env.rules.max_new_tokens)):
        # Each row has one token more than in the step before, so that its cached state is reused.
        observations = observe(prompts, width)
        for observation, prompt in zip(observations, prompts, strict=True):
            observation[len(prompt) + 1 : len(prompt) + 1 + extra] = prompt[0]
        batch = torch.as_tensor(observations, device=policy.device)
        start = time.perf_counter()
        policy.forward(batch)[0].cpu()  # the copy waits for the GPU, which computes asynchronously
        seconds.append(time.perf_counter() - start)
    return seconds[0], float(np.median(seconds[1:] or seconds))


def _time_update(subject: Subject) -> float:
    """Return the seconds per token of a forward and a backward pass on sequences of full length."""
    policy, n_new = subject.policy, subject.env.rules.max_new_tokens
    longest = max((prompt.ids for prompt in subject.env.prompts), key=len)
    tokens = np.concatenate([longest, np.resize(longest, n_new)])
    ids = torch.as_tensor(np.stack([tokens[:-1]] * N_UPDATE_SEQUENCES), device=policy.device)  # (B, T)
    # The row and column that predict each of the N = B * n_new tokens: the column before the token's own.
    rows = np.repeat(np.arange(N_UPDATE_SEQUENCES), n_new)  # (N,)
    cols = np.tile(np.arange(n_new) + len(longest) - 1, N_UPDATE_SEQUENCES)  # (N,)
    n_prompt = np.full(N_UPDATE_SEQUENCES, len(longest))
    batch = SequenceBatch(ids, np.full(N_UPDATE_SEQUENCES, ids.shape[1]), rows, cols, n_prompt=n_prompt)
    if policy.lm.sampling.has_support:
        # With top-k and the like each token has a set of allowed tokens; set 0 is the whole vocabulary.
        batch.allowed = AllowedTokens(TokenSets(policy.lm.backbone.vocab_size), rows * 0)
    actions = torch.as_tensor(np.tile(tokens[len(longest) :], N_UPDATE_SEQUENCES), device=policy.device)
    policy.train(True)
    seconds = 0.0
    for _ in range(2):  # the first allocates memory and picks kernels; the second counts
        start = time.perf_counter()
        with torch.enable_grad():
            values, log_probs, _ = policy.evaluate_actions(batch, actions)
            (values.mean() + log_probs.mean()).backward()
        _finish([weight.grad for weight in policy.parameters()])
        seconds = time.perf_counter() - start
        policy.zero_grad(set_to_none=True)
    policy.set_training_mode(False)
    return seconds / len(actions)


def _finish(gradients: list[Tensor | None]) -> None:
    """Wait for the GPU, which computes asynchronously, by copying one number of a gradient to the CPU."""
    for gradient in gradients:
        if gradient is not None:
            gradient.flatten()[:1].cpu()
            return


@torch.no_grad()
def check_memory(subject: Subject, sample: Sample) -> list[Finding]:
    """Estimate the memory for weights, gradients, optimizer, keys and values, and logits; activations come on top."""
    policy, env, model = subject.policy, subject.env, subject.model
    backbone = policy.backbone
    trainable = [weight for weight in policy.parameters() if weight.requires_grad]
    n_trained = sum(weight.numel() for weight in trainable)
    moments = next((n for cls, n in MOMENTS if isinstance(policy.optimizer, cls)), 2)
    n_rows = N_UPDATE_SEQUENCES if model is None else model.n_envs
    columns = env.max_prompt_tokens + env.rules.room
    most = MAX_LOGITS if backbone.head_is_linear else n_rows * columns * backbone.vocab_size
    n_tokens = n_rows * env.rules.max_new_tokens
    parts = {
        "weights": sum(weight.numel() * weight.element_size() for weight in policy.parameters()),
        "gradients": 4 * n_trained,  # 4 bytes of float32 each, the dtype of trained weights
        "optimizer": 4 * moments * n_trained,
        "keys and values": _bytes_a_column(subject, sample) * n_rows * columns if policy.lm.use_cache else 0,
        "logits": 3 * 4 * min(n_tokens * backbone.vocab_size, most),  # logits, log-probabilities, gradients: float32
    }
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return [Finding("memory", "ok", f"{_size(sum(parts.values()))} and activations: {listed}")]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.3g} MiB"


def _bytes_a_column(subject: Subject, sample: Sample) -> int:
    """Return the bytes of the keys and values of one token, over all layers."""
    ids, lengths = unpack_observations(sample.observations[0][:1])
    ids = ids[:, : int(lengths[0])]  # (1, T), without padding
    backbone, ones = subject.policy.backbone, torch.ones_like(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with subject.policy.lm._precision():
        if isinstance(backbone, Seq2SeqBackbone):  # cross-attention keeps as much per token as self-attention
            cache: Cache = backbone.prefill_rows(ids, ones, ids, ones, positions).self_attention_cache
        else:
            cache = backbone.prefill(ids, ones, positions)
    states = [state for layer in cast("list[DynamicLayer]", cache.layers) for state in (layer.keys, layer.values)]
    return sum(state.numel() * state.element_size() for state in states if state is not None) // ids.shape[1]
