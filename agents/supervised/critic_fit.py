"""The fit of a critic to rollouts of a policy that does not change, before the policy's first update."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor
from torch.nn import functional

from ..checkpoints.manifest import of_our_making
from ..checkpoints.output_folders import check_output, output_folder
from ..distributed.world import world
from ..models.critic import TrunkCritic, ValueHead
from ..policies.actor_critic import LMActorCritic
from ..policies.flat import FlatLMPolicy
from ..policies.lm_policy import LMPolicy
from ..policies.pretrained_critic import Returns, builder_of, probe, tokens_of, write_critic
from ..policies.value_norm import MIN_DEVIATION, Scale, change_units
from ..small_models.training_loop import fit, similar_lengths
from ..steps.critic_warmup import weights_beside_critic
from ..steps.step import RolloutStep, sequence_buffer, text_vec_env
from .resumable import ResumableFit, States, prepare, remove_states, work_folder
from .valued_texts import ValuedText, as_batch, collect_texts, explained, read_texts, returns_of, write_texts

HEAD_RATE, TRUNK_RATE = 1e-2, 1e-4  # peaks of the learning rate: of a head alone, and of a critic with its own layers


class CriticFit(NamedTuple):
    """The result of `fit_critic`; explained variances are those of held-out texts (see `rollout.explained_variance`).

    Args:
        folder: The folder of the critic, for `PretrainedCritic`.
        losses: The loss of each step, (n_steps,): the mean squared error in units of the returns' deviation.
        n_texts: The number of texts that the critic was fitted to.
        n_held_out: The number of texts that it was measured on.
        returns: The statistics of the returns.
        before: The explained variance before the fit: 0 of a fresh critic; NaN if all returns are equal.
        after: The explained variance after it.
        thirds: The explained variance after it, of the first, middle and last third of the texts.
    """

    folder: Path
    losses: np.ndarray
    n_texts: int
    n_held_out: int
    returns: Returns
    before: float
    after: float
    thirds: dict[str, float]


def fit_critic(
    model: OnPolicyAlgorithm,
    folder: str | os.PathLike[str],
    *,
    steps: Sequence[RolloutStep] = (),
    n_rollouts: int = 8,
    n_epochs: float = 4.0,
    batch_size: int = 16,
    learning_rate: float | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    about: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> CriticFit:
    """Fit the critic of an agent to rollouts of its policy, which does not change, and save it for `PretrainedCritic`.

    The targets are the sums of the rewards that follow each token until the text ends (lambda 1), with scores, shaping
    and penalties as in training: estimated advantages would mix in the values of a critic that knows nothing yet (Yuan
    et al., 2025, "What's Behind PPO's Collapse in Long-CoT?", section 3.2, which fits until the explained variance is
    high). As in `CriticWarmup`, a trunk that policy and critic share counts as the policy's, and only the value head
    learns. The loss is the squared error, by the loop that trains reward models: AdamW with a one-cycle schedule.

    The agent then has the fitted critic, and can train at once; its env is reset.

    Once the rollouts are made they are saved beside the folder, in `.<name>.rollouts.training`, and then the state of
    the fit every 500 steps and after Ctrl-C, SIGTERM or SIGHUP, in `.<name>.training`. `resume=True` continues from the
    newest intact state, on a CPU to the same weights bit for bit. A rollout phase that is interrupted starts anew.

    Args:
        model: An agent of `make_agent`, with any critic that ends in a value head; PPO, MaskablePPO or A2C.
        folder: The folder to write, absent or empty.
        steps: The steps that its training will have between rollout and returns: `KLPenalty`, `RewardShaping`, ...
            Without the penalties of its training the critic would learn other returns.
        n_rollouts: The number of rollouts of `n_steps * n_envs` tokens.
        n_epochs: The number of passes over their texts; may be a fraction.
        batch_size: The number of texts in a minibatch.
        learning_rate: The peak of the schedule; by default 1e-2 for a head alone, 1e-4 for a critic with a trunk.
        held_out: The share of the texts that the critic is not fitted to but measured on, between 0 and 1.
        seed: The seed of the choice of held-out texts and of the order of the others.
        about: A description of what else the rollouts depend on, such as the configuration; a resumed fit must repeat
            it, like the other arguments.
        resume: Whether to continue an interrupted fit of the same arguments; it starts anew if there is none.
        overwrite: Whether an earlier critic in `folder` may be replaced, once the new one is complete.
        progress_bar: Whether to show progress bars.

    Returns:
        The folder, the losses, and the explained variance of held-out texts before and after.

    Raises:
        ValueError: If the critic cannot be fitted exactly: with an advantage that needs none, with texts that are
            truncated, in several processes, with TRPO, or a critic that is no value head; if fewer than two texts have
            ended; if the interrupted fit had other arguments, or the folder holds files that would be lost.
        StageStopped: After a signal, once the state is saved.

    Example:
        >>> from agents import PretrainedCritic, fit_critic, make_agent
        >>> # agent = make_agent(env, "gpt2"); fit_critic(agent, "my-critic", steps=[KLPenalty(0.05)])
        >>> policy_kwargs = dict(critic=PretrainedCritic("my-critic"))  # of the next agent on that env and model
    """
    check_output(folder, "critic", overwrite)  # fail now rather than after the rollouts
    _check(model, n_rollouts, held_out)
    policy = cast("LMPolicy", model.policy)
    tokenizer = text_vec_env(model.get_env()).env.tokenizer
    start = hashlib.sha256(b"".join(_bytes(policy.lm))).hexdigest()
    data = (start, tokens_of(tokenizer), model.n_steps, model.n_envs, model.gamma, n_rollouts, about)
    kept = work_folder(f"{os.fspath(folder)}.rollouts")
    texts = _texts(model, steps, n_rollouts, kept, data, resume, progress_bar)
    if len(texts) < 2:
        raise ValueError(
            f"Expected two texts that end in {n_rollouts} rollouts, got {len(texts)}: raise n_rollouts or n_steps."
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    n_tests = min(len(texts) - 1, max(1, round(held_out * len(texts))))
    tests, rows = ([texts[i] for i in part] for part in (order[:n_tests], order[n_tests:]))
    if learning_rate is None:
        learning_rate = TRUNK_RATE if isinstance(policy.lm.critic, TrunkCritic) else HEAD_RATE
    n_steps = max(1, round(n_epochs * len(rows) / batch_size))
    work = work_folder(folder)
    state = prepare(
        work, (data, returns_of(texts).tobytes(), n_steps, batch_size, learning_rate, held_out, seed), resume
    )
    fitting = _Fitting(policy.lm, rows, sequence_buffer(model).micro_batch_tokens, batch_size)
    with _only_critic_learns(policy):
        fitting.take_units()
        before, _ = fitting.measure(tests)
        fitting.begin()
        losses = fit(
            policy.lm.critic,
            similar_lengths([len(text.tokens) for text in rows], batch_size, np.random.default_rng(seed)),
            fitting.loss,
            n_steps,
            learning_rate,
            description="critic",
            progress_bar=progress_bar,
            run=ResumableFit(work, state),
        )
        fitting.end()
        after, of_thirds = fitting.measure(tests)
    returns = Returns(fitting.mean, fitting.deviation, n_rollouts)
    figures = {"before": before, "after": after}
    with output_folder(folder, "critic", overwrite) as beside:
        finite = {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}
        write_critic(beside, policy.lm, tokenizer, returns, finite)
    if policy.lm.value_norm is not None:
        policy.lm.value_norm.begin_at(*returns, fitting.critic.linear)
    for states in (kept, work):
        remove_states(states)
    return CriticFit(Path(folder), losses.cpu().numpy(), len(rows), n_tests, returns, before, after, of_thirds)


def _check(model: OnPolicyAlgorithm, n_rollouts: int, held_out: float) -> None:
    """Refuse what could not be fitted exactly."""
    buffer, env, policy = sequence_buffer(model), text_vec_env(model.get_env()), cast("LMPolicy", model.policy)
    if n_rollouts < 1 or not 0 < held_out < 1:
        raise ValueError(
            f"Expected `n_rollouts` of 1 or more and `held_out` between 0 and 1, got {n_rollouts} and {held_out}."
        )
    if buffer.advantage != "gae":
        raise ValueError(
            f"Expected advantage='gae', which uses a critic, got {buffer.advantage!r}, which compares samples."
        )
    if env.env.rules.length_limit == "truncate":
        raise ValueError(
            "Expected length_limit='terminate', got 'truncate', which adds the value of a text's end to its reward: "
            "the unfitted critic's. Use CriticWarmup."
        )
    if isinstance(policy, FlatLMPolicy):
        raise ValueError(
            "Expected another algorithm than TRPO to fit a critic, got TRPO, which trains its critic separately: use "
            "its argument n_critic_updates."
        )
    if world() is not None or policy.lm.shards is not None:
        raise ValueError("Expected one process to fit a critic, got several: fit it in one, and train in several.")
    if not isinstance(policy.lm.critic, ValueHead):
        raise ValueError(f"Expected a critic that ends in a ValueHead, got {type(policy.lm.critic).__name__}.")
    if isinstance(policy.lm.critic, TrunkCritic):
        builder_of(policy.lm.critic.trunk)  # refuses a trunk that could not be saved


def _bytes(lm: LMActorCritic) -> Iterator[bytes]:
    """Yield what tells one start from another: what the policy computes, and the critic's weights."""
    yield probe(lm.backbone).numpy().tobytes()
    for weight in lm.critic.state_dict().values():
        yield weight.detach().cpu().float().numpy().tobytes()


def _texts(
    model: OnPolicyAlgorithm,
    steps: Sequence[RolloutStep],
    n_rollouts: int,
    kept: Path,
    arguments: object,
    resume: bool,
    progress_bar: bool,
) -> list[ValuedText]:
    """Return the texts of an interrupted fit, or of new rollouts, which are then kept."""
    state = prepare(kept, arguments, resume)
    if state is not None:
        with of_our_making(state):
            return read_texts(state)
    texts = collect_texts(model, steps, n_rollouts, progress_bar)
    if texts:
        States(kept).save(n_rollouts, lambda folder: write_texts(texts, folder))
    return texts


@contextmanager
def _only_critic_learns(policy: LMPolicy) -> Iterator[None]:
    """Take the policy's weights out of the gradient within, as `CriticWarmup` does; after an error undo the fit."""
    weights, critic = weights_beside_critic(policy), policy.lm.critic
    before = {name: weight.detach().cpu().clone() for name, weight in critic.state_dict().items()}
    policy.lm.drop_caches()
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    except BaseException:
        critic.load_state_dict(before)
        raise
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        policy.train(False)


class _Fitting:
    """The critic in the units of the fit, in which returns have mean 0 and deviation 1.

    Args:
        lm: The policy's model.
        texts: The texts to fit to.
        micro_batch_tokens: The most tokens of a forward.
        batch_size: The number of texts in a forward.
    """

    def __init__(
        self, lm: LMActorCritic, texts: Sequence[ValuedText], micro_batch_tokens: int | None, batch_size: int
    ) -> None:
        self.lm, self.texts, self.micro_batch_tokens, self.batch_size = lm, texts, micro_batch_tokens, batch_size
        self.critic = cast("ValueHead", lm.critic)
        returns = returns_of(texts)
        self.mean, self.deviation = float(returns.mean()), max(float(returns.std()), MIN_DEVIATION)

    def take_units(self) -> None:
        """Give the critic units of reward in place of those of the policy's `value_norm`."""
        own = Scale() if self.lm.value_norm is None else self.lm.value_norm.scale()
        change_units(self.critic.linear, own.mean, own.deviation, 0.0, 1.0)

    def outputs(self, texts: Sequence[ValuedText]) -> Tensor:
        """Return the critic's outputs at all tokens of texts, (N,)."""
        return self.lm.sequence_values(as_batch(texts, self.micro_batch_tokens, self.lm.backbone.device))

    @torch.no_grad()
    def values(self, texts: Sequence[ValuedText]) -> Iterator[np.ndarray]:
        """Yield the critic's outputs of each text, (n,)."""
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            ends = np.cumsum([len(text.cols) for text in part])[:-1]
            yield from np.split(self.outputs(part).cpu().numpy(), ends)

    def measure(self, texts: Sequence[ValuedText]) -> tuple[float, dict[str, float]]:
        """Return the explained variance of texts, and that of their thirds."""
        whole, of_thirds = explained(texts, self.values(texts))
        return float("nan") if whole is None else whole, of_thirds

    def begin(self) -> None:
        """Give the critic the units of the fit, and a mean error of 0, which the bias would reach in small steps."""
        change_units(self.critic.linear, 0.0, 1.0, self.mean, self.deviation)
        with torch.no_grad():
            self.critic.linear.bias.sub_(float(np.concatenate(list(self.values(self.texts))).mean()))

    def loss(self, indices: list[int]) -> Tensor:
        """Return the mean squared error of the tokens of some texts."""
        texts = [self.texts[i] for i in indices]
        targets = ((returns_of(texts) - self.mean) / self.deviation).astype(np.float32)  # (N,)
        outputs = self.outputs(texts)
        return functional.mse_loss(outputs, torch.as_tensor(targets, device=outputs.device))

    def end(self) -> None:
        """Give the critic units of reward again."""
        change_units(self.critic.linear, self.mean, self.deviation, 0.0, 1.0)
