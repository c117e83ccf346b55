"""The rollout buffer of whole sequences, each of which an update reads in one forward."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from textenv.lanes.finished_episodes import Place

from ..distributed.world import world
from ..models.sequences import SequenceBatch
from ..models.token_sets import AllowedTokens, TokenSets
from ..policies.actor_critic import LMActorCritic
from ..policies.kl_loss import KLLoss
from ..policies.tensor_notes import ALLOWED, READ_BY
from ..policies.value_norm import Scale, scales_of
from .advantages import GROUPED, NORMALISED, Advantage, AdvantageFunction, check_advantage, mean_and_deviation
from .aggregation import Aggregation, check_aggregation, token_factors
from .before_returns import BeforeReturns, missing_steps
from .ended_episodes import EndedEpisode, RolloutGroups
from .estimation import Estimation
from .idle_update import idle_samples
from .importance import Correction
from .minibatches import deal
from .segments import SegmentRecorder
from .trained_sequences import FinishedRollout, check_some_left, choose_groups, choose_sequences
from .transitions import RolloutView, Segment, SequenceSamples, Transitions, batch_of, joined

DATA_PARALLEL = "DataParallel"  # the key of the step without which several processes do not train


class SequenceRolloutBuffer(RolloutBuffer):
    """Stores a rollout as token sequences and numbers, and yields minibatches of whole sequences.

    The stock buffer stores the whole prefix with every token, and the update reads each prefix. Here a sequence is
    stored once, and read in one forward per epoch, with the same loss and gradient. The buffer works under unmodified
    PPO and A2C, with `LMPolicy`, and stores nothing of the size of the vocabulary.

    `batch_size` still counts transitions: each epoch has exactly `n_steps * n_envs / batch_size` minibatches, of whole
    sequences and about equal numbers of transitions, in a new random order.

    A critic with a trunk of its own does not run at every step, but over whole sequences when the rollout ends. With
    `value_norm` the `old_values` and `returns` of minibatches are in the critic's units; the buffer's own `values` and
    `returns`, from which SB3 computes advantages and the explained variance, are in units of reward.

    Args:
        buffer_size: The number of steps of a rollout, T.
        observation_space: The env's.
        action_space: The env's, `Discrete(V)`.
        device: The device of minibatches.
        gae_lambda: The trade-off of generalized advantage estimation (Schulman et al., 2016, equation 16).
        gamma: Discount factor; 1.0 suits text.
        n_envs: The number of lanes, B.
        normalize_advantage: Normalise advantages to mean 0 and deviation 1 over the whole rollout. Pass
            `normalize_advantage=False` to PPO with it: within a minibatch of few sequences it destroys learning.
        complete_episodes: Train only episodes that have ended. Segments of the others wait, with the log-probabilities
            with which they were sampled, for the rollout in which their episode ends. Only then does a score at the end
            of an episode reach all its tokens.
        micro_batch_tokens: The most tokens, padding included, of one forward in the update; see `SequenceBatch`.
        advantage: "gae", or one that needs no critic (pass `vf_coef=0`). "grpo", "grpo_mean", "rloo" and
            "reinforce++_baseline" compare the episodes of a prompt, for an env with `samples_per_prompt` and the step
            `SampleGroups`; "reinforce++" is what is still to come of rewards minus penalties; a function gets the
            episodes, each a `Trajectory`, and returns a number for each, or for each of its tokens. All but "gae" imply
            `complete_episodes`, and "reinforce++" and its baseline form `normalize_advantage`; a critic's targets stay
            those of "gae". See `episode_advantages` and docs/losses.md.
        aggregation: The mean that the policy loss of a minibatch is: "token" over tokens, "sequence" over sequences of
            their means, "constant" over sequences of their sums, divided by `aggregation_length` (see `token_factors`).
            Values and entropies stay means over tokens.
        aggregation_length: The divisor of "constant": the most tokens of an episode.
        expected_steps: The keys of the steps that must be in `before_returns`; each step adds its own.
        critic_lambda: The lambda of the critic's targets, `returns`; None for `gae_lambda`, which is the policy's.
        lambda_alpha: With "gae", the policy's lambda is 1 - 1 / (lambda_alpha n), at least 0, for an episode of n
            tokens, in place of `gae_lambda`; implies `complete_episodes`.

    Attributes:
        before_returns: The steps that run on the complete rollout, in order, before returns are computed: late scores,
            a KL penalty. Callbacks attach them (see `RolloutStep`). A saved model does not hold them, and its training
            raises until they are attached again.
        rewards: The rewards, (T, B): of the task while `before_returns` run, minus `penalties` from then on.
        penalties: The penalty of each token, (T, B), in reward, to which `KLPenalty` adds its own. A step that changes
            `rewards` changes the score that a group compares; a step that changes `penalties` does not.
        log_probs: The log-probabilities by the policy, (T, B), in nats.
        behaviour_log_probs: The log-probabilities by the model that sampled, (T, B): the same array, unless an engine
            sampled (see `EngineRollouts`). Importance weights then multiply the advantages of minibatches.
        trained: The sequences of the complete rollout that are trained.
        advantage_mean, advantage_deviation: What `normalize_advantage` subtracts from their advantages, and divides by.

    Raises:
        ValueError: For an unknown `advantage` or `aggregation`, an `aggregation_length` that is missing or not used, a
            lambda out of range, or settings that the `advantage` does not suit.

    Example:
        >>> from agents import SequenceRolloutBuffer
        >>> from stable_baselines3 import PPO
        >>> options = dict(rollout_buffer_class=SequenceRolloutBuffer,
        ...                rollout_buffer_kwargs=dict(normalize_advantage=True), normalize_advantage=False)
    """

    penalties: np.ndarray

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
        normalize_advantage: bool = False,
        complete_episodes: bool = False,
        micro_batch_tokens: int | None = None,
        advantage: Advantage | AdvantageFunction = "gae",
        aggregation: Aggregation = "token",
        aggregation_length: int | None = None,
        expected_steps: Sequence[str] = (),
        critic_lambda: float | None = None,
        lambda_alpha: float | None = None,
    ) -> None:
        check_advantage(advantage, normalize_advantage, critic_lambda, lambda_alpha)
        check_aggregation(aggregation, aggregation_length)
        self.aggregation, self.aggregation_length = aggregation, aggregation_length
        self.normalize_advantage = normalize_advantage or advantage in NORMALISED
        self.advantage: Advantage | AdvantageFunction = advantage
        self.critic_lambda, self.lambda_alpha = critic_lambda, lambda_alpha
        self.complete_episodes = complete_episodes or advantage != "gae" or lambda_alpha is not None
        self.micro_batch_tokens = micro_batch_tokens
        self.expected_steps = list(expected_steps)
        self.before_returns: list[BeforeReturns] = []
        self.correction: Correction | None = None  # set if another engine samples; see `EngineRollouts`
        self.waiting: dict[int, Transitions] = {}  # by lane: the earlier segments of its unfinished episode
        self.waiting_episodes: dict[Place, EndedEpisode] = {}  # ended episodes of groups with unfinished members
        # By key: the states of steps from a checkpoint, until the steps are attached.
        self.saved_steps: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.remembering: dict[str, Any] = {}  # by key: callbacks whose observations checkpoints keep
        self.remembered: dict[str, dict[str, Any]] = {}  # by key: these observations from a checkpoint, until asked for
        # Seeded from numpy's global generator, which SB3 `utils.set_random_seed` has seeded, and separate from then on:
        # an evaluation or a user's reward that draws from the global generator leaves the order of minibatches alone.
        self.rng = np.random.default_rng(np.random.randint(2**31))
        assert isinstance(action_space, spaces.Discrete)
        self.token_sets = TokenSets(int(action_space.n))
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Make room for a new rollout; segments that wait for the end of their episode stay."""
        # `pos` is 0 after SB3 `buffers.BaseBuffer.__init__`, and `buffer_size` after a complete rollout. In between, a
        # rollout was broken off, and the tokens that would have joined the waiting segments are lost. Episodes of an
        # env that `set_env` has replaced go with it: another's have the same lanes, places and numbers of groups.
        is_replaced = any([step.follow_env() for step in self.before_returns])  # a list: every step follows
        if is_replaced or 0 < self.pos < self.buffer_size:
            self.waiting.clear()
            self.waiting_episodes.clear()
        self.token_sets = self.token_sets.only(self.waiting_sets())
        self.is_masked = len(self.token_sets.sets) > 1  # whether a transition could not sample the whole vocabulary
        shape = (self.buffer_size, self.n_envs)
        self.observations = np.zeros((0,), dtype=np.int64)  # not stored: the segments have the tokens
        self.actions = np.zeros(shape, dtype=np.int32)
        self.cols = np.zeros(shape, dtype=np.int32)  # the column of the row at which logits and value are read
        self.allowed = np.zeros(shape, dtype=np.int32)  # the number of the token set; 0 is the whole vocabulary
        for name in ("rewards", "penalties", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, np.zeros(shape, dtype=np.float32))
        self.reference_log_probs = np.full(shape, np.inf, dtype=np.float32)
        self.task_rewards = self.rewards
        self.behaviour_log_probs = self.log_probs
        self._device_values: list[Tensor] = []  # (B,) each
        self._device_log_probs: list[Tensor] = []  # (B,) each
        self._lm: LMActorCritic | None = None  # the model of the policy, while the rollout is collected
        self._value_scale = self._return_scale = Scale()
        self._recorder = SegmentRecorder(self.n_envs)
        self.segments: list[Segment] = []  # filled when the rollout is complete
        self._view: RolloutView | None = None
        self.groups: RolloutGroups | None = None
        self.dropped: set[tuple[int, int]] = set()  # the last step and the lane of episodes that are not trained
        self.kl_loss: KLLoss | None = None  # of a `KLPenalty` in the loss
        self.dones = np.zeros(self.n_envs, dtype=bool)
        self.generator_ready = False
        self.pos, self.full = 0, False
        for step in self.before_returns:
            step.begin()

    def waiting_sets(self) -> list[np.ndarray]:
        """Return the token-set numbers of each waiting segment: the segments' own arrays, for `TokenSets.only`."""
        parts = [*self.waiting.values(), *(episode.part for episode in self.waiting_episodes.values())]
        return [part.allowed for part in parts]

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Add one step of all lanes; values and log-probabilities stay on their device until the rollout ends.

        SB3 `on_policy_algorithm.collect_rollouts` calls it after the env's step, with the observations before it.

        Args:
            obs: The observations, (B, L).
            action: The tokens, (B,) or (B, 1).
            reward: The rewards, (B,).
            episode_start: Whether the observations begin an episode, (B,).
            value: The values, (B, 1), with the note `READ_BY`.
            log_prob: The log-probabilities of the tokens, (B,), with the note `ALLOWED` if some were not allowed.
        """
        if self.pos == 0:
            self._lm = READ_BY.read(value)
            if self._lm is not None:
                self._lm.defer_values()
        # Each array of the buffer is (T, B), and `pos` is its row of this step, (B,).
        self.actions[self.pos] = np.asarray(action).reshape(self.n_envs)  # (B,) or (B, 1) to (B,)
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = episode_start
        self.cols[self.pos] = self._recorder.add(self.pos, obs, episode_start) - 1
        allowed = ALLOWED.read(log_prob)
        if allowed is not None:
            self.is_masked = True
            self.allowed[self.pos] = self.token_sets.add(allowed.cpu().numpy())
        self._device_values.append(value.detach().flatten())  # (B, 1) to (B,)
        self._device_log_probs.append(log_prob.detach().flatten())  # (B,)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Run `before_returns`, compute returns as SB3 does, and choose the sequences that are trained.

        Args:
            last_values: The values of the observations after the last step, (B,) or (B, 1), in units of reward.
            dones: Whether each lane's last step ended an episode, (B,).

        Raises:
            RuntimeError: If a step that the model was trained with is missing from `before_returns`, or `SampleGroups`
                with an advantage within groups.
            RewardError: If all episodes that ended were dropped.
        """
        self.values = torch.stack(self._device_values).float().cpu().numpy()  # (T, B)
        self.log_probs = torch.stack(self._device_log_probs).float().cpu().numpy()  # (T, B)
        self.behaviour_log_probs = self.log_probs
        self._device_values, self._device_log_probs = [], []
        self.dones = np.asarray(dones, dtype=bool)
        self.segments = self._recorder.finish(self.buffer_size, self.dones)
        if self._lm is not None:
            self._value_sequences(self._lm)
        if missing := missing_steps(self.expected_steps, self.before_returns):
            raise RuntimeError(
                f"Expected the steps {missing} before returns: the model was trained with them. Pass them as callbacks "
                "to learn() again, or continue without them after model.rollout_buffer.expected_steps.clear()."
            )
        for step in self.before_returns:
            step(self)
        if self.advantage in GROUPED and self.groups is None:
            raise RuntimeError(
                f"Expected the step SampleGroups with advantage={self.advantage!r}: pass it as a callback to learn()."
            )
        self.task_rewards, self.rewards = self.rewards, self.rewards - self.penalties
        self._estimate(last_values.float(), dones)
        self._choose_sequences()
        if self._lm is not None:
            returns = [part.returns for part in self.trained]
            self._value_scale, self._return_scale = scales_of(self._lm.value_norm, self._lm.critic, returns)
        self._lm = None

    @property
    def estimation(self) -> Estimation:
        """The settings by which advantages and returns are estimated."""
        critic_lambda = self.gae_lambda if self.critic_lambda is None else self.critic_lambda
        return Estimation(self.gamma, self.gae_lambda, critic_lambda, self.lambda_alpha)

    def _estimate(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Compute advantages and returns as SB3 does: with two lambdas, the returns by the critic's."""
        targets, policy_lambda = None, self.gae_lambda
        if self.estimation.has_two_lambdas:
            self.gae_lambda = self.estimation.critic_lambda  # SB3's method reads this attribute
            super().compute_returns_and_advantage(last_values, dones)
            targets, self.gae_lambda = self.returns, policy_lambda
        super().compute_returns_and_advantage(last_values, dones)
        # SB3 `ppo.PPO.train` logs the explained variance of `returns` by `values`: that of the critic's own targets.
        self.returns = self.returns if targets is None else targets

    def _value_sequences(self, lm: LMActorCritic) -> None:
        """Compute the values that were deferred, in one forward per sequence."""
        if lm.settle_values():
            view = self.view()
            with torch.no_grad():
                values = lm.in_reward_units(lm.sequence_values(view.batch))
            self.values[view.steps, view.lanes] = values.cpu().numpy()

    def view(self) -> RolloutView:
        """Return the rollout as whole sequences, for steps of `before_returns` that run a model over them.

        All callers get the same view, which is built once and dropped when the update begins.
        """
        if self._view is None:
            counts = [segment.end - segment.start for segment in self.segments]
            steps = np.concatenate([np.arange(segment.start, segment.end) for segment in self.segments])  # (N,)
            lanes = np.repeat([segment.lane for segment in self.segments], counts)  # (N,)
            batch = self._batch(self.segments, np.array(counts), self.cols[steps, lanes], self.allowed[steps, lanes])
            actions = torch.as_tensor(self.actions[steps, lanes], device=self.device).long()  # (N,)
            self._view = RolloutView(batch, actions, steps, lanes)
        return self._view

    def _batch(self, segments: list[Segment], n: np.ndarray, cols: np.ndarray, sets: np.ndarray) -> SequenceBatch:
        """Return segments with `n` transitions each, (S,), whose columns and numbers of token sets are given, (N,)."""
        rows = np.repeat(np.arange(len(n)), n)  # (N,)
        allowed = AllowedTokens(self.token_sets, sets) if self.is_masked else None
        return batch_of(segments, rows, cols, self.micro_batch_tokens, allowed, self.device)

    def set_policy_log_probs(self, view: RolloutView, log_probs: np.ndarray) -> None:
        """Store the policy's log-probabilities, (N,), of a rollout that another engine sampled.

        Those of the engine stay in `behaviour_log_probs`.
        """
        self.log_probs = np.zeros_like(self.behaviour_log_probs)  # a new array: until now the two were one
        self.log_probs[view.steps, view.lanes] = log_probs

    def _choose_sequences(self) -> None:
        """Choose the sequences that are trained, and compute the mean and deviation of their advantages."""
        rollout = FinishedRollout(
            self.segments, self._transitions, self.episode_starts, self.dropped, self.estimation, self.advantage
        )
        if self.groups is None:
            self.trained = choose_sequences(rollout, self.waiting if self.complete_episodes else None)
        else:
            self.trained, self.waiting_episodes = choose_groups(
                rollout, self.waiting, self.waiting_episodes, self.groups
            )
        check_some_left(self.trained)
        self.advantage_mean: float | np.float32 = 0.0
        self.advantage_deviation: float | np.float32 = 1.0
        if self.normalize_advantage:
            parts = np.concatenate([np.zeros(0, dtype=np.float32), *(part.advantages for part in self.trained)])
            self.advantage_mean, self.advantage_deviation = mean_and_deviation(parts)

    def _transitions(self, segment: Segment) -> Transitions:
        steps_of_lane = (slice(segment.start, segment.end), segment.lane)
        return Transitions(*(getattr(self, name)[steps_of_lane] for name in Transitions._fields))

    def get(self, batch_size: int | None = None) -> Generator[SequenceSamples, None, None]:  # type: ignore[override]
        """Yield one epoch of minibatches of whole sequences.

        Args:
            batch_size: The transitions of a minibatch of all processes, on average; None yields all at once.

        Raises:
            ValueError: If it does not divide the rollout, or if there are fewer sequences than minibatches. Where
                dropped episodes are the cause, or groups that are not whole, there are fewer minibatches instead; if no
                group is trained, one that changes nothing (see `idle_samples`).
            RuntimeError: In several processes without the step `DataParallel`.
        """
        assert self.full, "the rollout is not complete"
        self._view = None  # frees the memory: minibatches are made from the segments
        if world() is not None and not any(step.key == DATA_PARALLEL for step in self.before_returns):
            raise RuntimeError(
                "Expected the callback DataParallel() in several processes, got none: build the model with make_agent, "
                "or pass it to learn(). It checks settings, and logs for all."
            )
        counts, n_transitions = self.trained.counts, self.buffer_size * self.n_envs
        can_wait = self.groups is not None and self.groups.can_wait
        n_dropped, members = self.trained.n_dropped, self.trained.members
        groups = deal(counts, n_dropped, n_transitions, batch_size, self.rng, can_wait, members)
        if not groups:
            yield idle_samples(self.groups, not self.generator_ready, self.actions, self.log_probs, self.device)
        self.generator_ready = True
        counts = self.trained.or_segments().counts
        factors = token_factors(self.aggregation, self.aggregation_length, counts, groups)
        for (group, share), factor in zip(groups, factors, strict=True):
            samples = self._samples(group, factor)
            samples.observations.share, samples.observations.old_log_probs = share, samples.old_log_prob
            samples.observations.advantages = samples.advantages
            yield samples

    def _samples(self, group: np.ndarray, factor: np.ndarray | float) -> SequenceSamples:
        trained = self.trained.or_segments()
        part = joined([trained.transitions(i) for i in group])
        segments = [trained.segment(i) for i in group]
        batch = self._batch(segments, trained.counts[group], part.cols, part.allowed)
        weights = np.broadcast_to(factor, len(batch))
        if self.correction is not None:
            weights = weights * self.correction.weights(part.log_probs, part.behaviour_log_probs, batch.rows)
        if self.kl_loss is not None:
            batch.term = self.kl_loss.term(weights, part.log_probs, part.reference_log_probs, self.device)
        # After the normalisation: the subtracted mean is an unbiased baseline only if it is weighted as well.
        advantages = (part.advantages - self.advantage_mean) / self.advantage_deviation * weights  # (N,)
        values, returns = self._value_scale.of(part.values), self._return_scale.of(part.returns)
        numbers = (values, part.log_probs, advantages.astype(np.float32), returns)
        return SequenceSamples(
            batch,
            torch.as_tensor(part.actions, device=self.device).long(),
            *(torch.as_tensor(array, device=self.device) for array in numbers),  # type: ignore[arg-type]
        )
