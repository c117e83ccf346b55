"""The doctor's trials: the reward on two sampled episodes, the time of an iteration, and the memory for training."""

from __future__ import annotations

import sys
import time
from itertools import cycle, islice
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from textenv.episodes.scores import RewardError
from textenv.lanes.lanes import Lanes

from ..distributed.world import world
from ..models.observations import unpack_observations
from ..models.prefix_cache import KEPT_SHARE, PrefixCache
from ..models.prompt_layout import MIN_SAVED
from ..models.seq2seq import Seq2SeqBackbone
from ..models.sequences import SequenceBatch, count_tokens
from ..models.token_sets import AllowedTokens, TokenSets
from ..policies.actor_critic import MAX_LOGITS
from .report import Finding
from .sample import Sample, Subject, observe

N_EPISODES = 2  # few, since a reward may cost seconds or money
TRIAL_TOKENS = 16  # the longest episode of the reward's trial
LARGE_REWARD = 100.0  # with larger rewards the value loss, which grows with their square, outweighs the policy's
DECODE_STEPS = 3  # timed steps, of which the median counts
N_UPDATE_SEQUENCES = 4  # sequences of the timed update, without groups: few enough to fit wherever training fits
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


class Timed(NamedTuple):
    """The seconds of a part of training, and the share of its tokens that the model reads: not those shared."""

    seconds: float
    is_read: float


def check_time(subject: Subject, sample: Sample) -> list[Finding]:
    """Time decoding and an update, and estimate an iteration without reward, reference and optimizer step.

    Rows and sequences begin with the prompts that training has: `samples_per_prompt` with each of them.
    """
    env, model = subject.env, subject.model
    n_rows = N_UPDATE_SEQUENCES if model is None else model.n_envs
    prefill, step = _time_decoding(subject, n_rows)
    token = _time_update(subject)
    measured = f"decode {1e3 * step:.2f} ms a step of {n_rows} rows, prefill {1e3 * prefill.seconds:.1f} ms, "
    measured += f"update {1e3 * token.seconds:.3f} ms a token"
    if model is not None:
        episodes = -(-model.n_steps // env.rules.max_new_tokens)
        rollout = model.n_steps * step + episodes * prefill.seconds
        update = vars(model).get("n_epochs", 1) * model.n_steps * model.n_envs * token.seconds
        measured += f": about {rollout + update:.2g} s an iteration ({rollout:.2g} rollout, {update:.2g} update)"
    shares = {"the prefill": prefill.is_read, "the update": token.is_read}
    if env.samples_per_prompt > 1 and min(shares.values()) < 1:
        read = " and ".join(f"{share:.0%} of the tokens of {name}" for name, share in shares.items() if share < 1)
        measured += f"; each prompt is read once for its {env.samples_per_prompt} samples: {read} are read"
    return [Finding("time", "ok", measured)]


@torch.no_grad()
def _time_decoding(subject: Subject, n_rows: int) -> tuple[Timed, float]:
    """Return the seconds for reading all prompts, and for one decoding step afterwards."""
    policy, env = subject.policy, subject.env
    assert policy.observation_space.shape is not None
    # As lanes begin them: the samples of a prompt side by side, and the first prompts again if there are no more.
    drawn = islice(cycle(env.prompts), -(-n_rows // env.samples_per_prompt))
    prompts = [prompt.ids for prompt in drawn for _ in range(env.samples_per_prompt)][:n_rows]
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
    cache, is_read = policy.lm.rollout_cache, 1.0
    if policy.lm.use_cache and isinstance(cache, PrefixCache):
        is_read = cache.prefill_tokens / max(cache.prefill_tokens + cache.shared_tokens, 1)
    return Timed(seconds[0], is_read), float(np.median(seconds[1:] or seconds))


def _time_update(subject: Subject) -> Timed:
    """Return the seconds per token of a forward and a backward pass on sequences of full length."""
    policy, n_new = subject.policy, subject.env.rules.max_new_tokens
    longest = max((prompt.ids for prompt in subject.env.prompts), key=len)
    tokens = np.concatenate([longest, np.resize(longest, n_new)])
    n_sequences, n_samples = _update_groups(subject, len(longest))
    ids = torch.as_tensor(np.stack([tokens[:-1]] * n_sequences), device=policy.device)  # (B, T)
    # The row and column that predict each of the N = B * n_new tokens: the column before the token's own.
    rows = np.repeat(np.arange(n_sequences), n_new)  # (N,)
    cols = np.tile(np.arange(n_new) + len(longest) - 1, n_sequences)  # (N,)
    batch = SequenceBatch(
        ids,
        np.full(n_sequences, ids.shape[1]),
        rows,
        cols,
        None if subject.model is None else vars(subject.model.rollout_buffer).get("micro_batch_tokens"),
        n_prompt=np.full(n_sequences, len(longest)),
        prompts=np.arange(n_sequences) // n_samples,  # equal texts, but only the samples of a group share their prompt
    )
    if policy.lm.sampling.has_support:
        # With top-k and the like each token has a set of allowed tokens; set 0 is the whole vocabulary.
        batch.allowed = AllowedTokens(TokenSets(policy.lm.backbone.vocab_size), rows * 0)
    actions = torch.as_tensor(np.tile(tokens[len(longest) :], n_sequences), device=policy.device)
    policy.train(True)
    n_read, n_tokens = count_tokens(policy.lm.chunks(batch))
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
    return Timed(seconds / len(actions), n_read / n_tokens)


def _update_groups(subject: Subject, n_prompt: int) -> tuple[int, int]:
    """Return the number of sequences of the timed update, and how many of them have a prompt in common.

    With groups there are so many that sharing prompts is worth it (see `prompt_layout`) if it is in a minibatch of
    training, and no more than a minibatch has.
    """
    n_samples, most = subject.env.samples_per_prompt, sys.maxsize
    if subject.model is not None:
        size, processes = vars(subject.model).get("batch_size"), world()
        if size is None:  # SB3 `A2C.train` has the whole rollout as one batch
            size = subject.model.n_steps * subject.model.n_envs
        elif processes is not None:  # `batch_size` counts the transitions of all processes
            size //= processes.size
        most = max(1, size // subject.env.rules.max_new_tokens)
    if n_samples == 1 or most == 1:
        return N_UPDATE_SEQUENCES, 1
    n_samples = min(n_samples, most)
    n_groups = max(N_UPDATE_SEQUENCES // n_samples, -(-MIN_SAVED // ((n_samples - 1) * max(n_prompt, 1))), 1)
    return n_samples * min(n_groups, most // n_samples), n_samples


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
    a_column = _bytes_a_column(subject, sample) if policy.lm.use_cache else 0
    parts = {
        "weights": sum(weight.numel() * weight.element_size() for weight in policy.parameters()),
        "gradients": 4 * n_trained,  # 4 bytes of float32 each, the dtype of trained weights
        "optimizer": 4 * moments * n_trained,
        "keys and values": a_column * n_rows * columns,
        "kept prompts": a_column * _kept_columns(subject, n_rows, columns),
        "logits": 3 * 4 * min(n_tokens * backbone.vocab_size, most),  # logits, log-probabilities, gradients: float32
    }
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return [Finding("memory", "ok", f"{_size(sum(parts.values()))} and activations: {listed}")]


def _kept_columns(subject: Subject, n_rows: int, columns: int) -> int:
    """Return the most tokens whose keys and values wait for other rows with the same prompt (see `PrefixCache`)."""
    env, model = subject.env, subject.model
    most = n_rows * columns // KEPT_SHARE
    if env.is_multi_turn:  # a row behind a reply is kept like a prompt
        return most
    n_episodes = n_rows * (1 if model is None else -(-model.n_steps // env.rules.max_new_tokens))
    n_prompts = min(len(env.prompts), -(-n_episodes // env.samples_per_prompt))
    return min(most, n_prompts * env.max_prompt_tokens)


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
