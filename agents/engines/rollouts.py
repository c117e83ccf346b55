"""The step that has another engine write rollouts, and weights their tokens in the update."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from textenv.episodes.rules import PADDING, SEPARATOR

from ..distributed.collectives import gather, raise_together
from ..distributed.world import world
from ..models.critic import TrunkCritic
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.importance import Correction, Per, effective_share
from ..rollout.transitions import RolloutView
from ..rollout.vec_env import TextVecEnv
from ..steps.step import Order, RolloutStep, sequence_buffer, text_vec_env
from .next_texts import NextTexts
from .protocol import BackgroundEngine, Completion, Request, RolloutEngine, check_completions, named_weights
from .refusal import refusal

# Tokens that an engine has written, the next token first, with log-probabilities and the age of the engine's weights.
Plan = deque[tuple[int, float, int]]


class EngineRollouts(RolloutStep):
    """Has another engine write the tokens of rollouts; values, log-probabilities and updates stay the policy's.

    In a rollout the policy's `forward` takes the next token of each lane from the text that the engine has written for
    it, as long as the lane's row is its last row plus that token. All other rows (a new episode, a reply of the
    environment, a turn cut short by a stop string) are sent to the engine in one call, each as the prompt of a request.
    The first call of a rollout also sends the next prompts of the env, as many as the last rollout began, so that their
    text is ready when a lane ends early. If these are too few, the next call sends as many as the rest of the rollout
    will begin at its pace so far. After an update the engine gets the new weights before the next rollout, and the text
    that old weights wrote is thrown away. `predict`, evaluations and sample tables sample from the policy itself.

    With `ahead`, what the first call of a rollout would request is requested when the rollout before ends, and the
    engine writes it while the policy is updated. The weights that write it are one update older than the policy that
    trains on it, which the importance weights correct as any other difference. What else a rollout needs is written by
    weights that are new. Checkpoints hold the texts of the next rollout, for which the end of `learn` waits.

    In several processes each has an engine of its own for its lanes, or all share one (`LocalEngine(shared=True)`),
    which gets the weights once per update.

    At the end of a rollout the policy reads each sequence once. Its log-probabilities become the buffer's `log_probs`,
    from which PPO's ratio starts at 1 and which penalties and warnings read; those of the engine stay in
    `behaviour_log_probs`. Their ratio, truncated, multiplies the advantages of minibatches (see `Correction`), after
    their normalisation: the subtracted mean is an unbiased baseline only if it is weighted as well.

    Logged under `engine/`: `weight` (the mean ratio, before truncation and masking; 1 except for noise if the engine
    reports the log-probabilities that it samples with), `truncated` (the share of tokens whose ratio is above
    `truncation`), `masked` (the share of tokens whose weight is 0), `effective` (the effective sample size of the
    weights, as a share of the tokens: see `agents.rollout.importance.effective_share`), `kl_k1` and `kl_k3` (estimates
    of KL(engine, policy), nats per token), `calls`, `used` (the share of the written tokens that lanes took), `seconds`
    (spent waiting for the engine) and `age` (the number of updates between the weights that wrote a token and those of
    the policy at the rollout's end, mean over the tokens; 0 without `ahead`).

    Args:
        engine: The engine, which the caller closes.
        truncation: The largest weight; `math.inf` for no truncation.
        per: "token" weights each token by its own ratio, "sequence" by the product over its sequence.
        band: The smallest and the largest ratio that is trained on, such as (0.5, 5.0); tokens outside get weight 0.
            With "sequence", these are whole sequences. None trains on all.
        ahead: Have the engine write the texts of the next rollout during the update; for a `BackgroundEngine`, such as
            `LocalEngine`.

    Raises:
        ValueError: With `ahead`, if the engine does not write in the background. When attached, if the model or env
            uses something that an engine cannot follow: masks, top_k, top_p, min_p, repetition penalties, an
            encoder-decoder, a model that is not transformers', TRPO, sharded weights, or the algorithm's own
            `normalize_advantage`.
        EngineLost: In `learn`, if the engine ends. The other processes of the job raise `ProcessLost`, with its text.

    Example:
        >>> from agents import EngineRollouts, LocalEngine
        >>> # with LocalEngine("gpt2", vocab_size=len(tokenizer)) as engine:
        >>> #     model.learn(100_000, callback=[EngineRollouts(engine), KLPenalty(0.02)])
    """

    key = "EngineRollouts"
    order = Order.ENGINE

    def __init__(
        self,
        engine: RolloutEngine,
        truncation: float = 2.0,
        per: Per = "token",
        band: tuple[float, float] | None = None,
        ahead: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if ahead and not isinstance(engine, BackgroundEngine):
            raise ValueError(
                f"Expected an engine that writes in the background with ahead=True, such as LocalEngine, got "
                f"{type(engine).__name__}, which has no `start`: the update would wait for its texts."
            )
        self.engine, self.ahead = engine, ahead
        self.correction = Correction(truncation, per, band)
        self._n_more = 0  # the number of episodes that began during the last rollout
        self._next: NextTexts | None = None  # the texts that were asked for ahead, until a rollout takes them

    def _clear(self) -> None:
        self._expected = np.full((self.env.num_envs, 1), PADDING)  # (B, L) the next rows, if lanes follow their plans
        self._plans: list[Plan] = [deque() for _ in range(self.env.num_envs)]
        self._spare: dict[bytes, deque[Plan]] = defaultdict(deque)  # by prompt, for the lanes that will begin with it
        self._is_first = True  # no text of the engine has been asked for or taken in this rollout
        self._is_outdated = True  # an update has changed the weights since the engine got them
        self._n_steps = self._n_calls = self._n_written = self._n_begun = self._sum_of_ages = 0
        self._seconds = 0.0

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that an engine can write the model's rollouts, and give its buffer the correction."""
        env, self.algorithm = text_vec_env(model.get_env()), cast("OnPolicyAlgorithm", model)
        self.policy = cast("LMPolicy", model.policy)
        reason = refusal(model)
        if reason is not None:
            raise ValueError(reason)
        self.buffer = sequence_buffer(model)
        self.buffer.correction = self.correction
        # From an earlier call of `learn`, if there was one. Texts for another env, or that an engine which may have
        # ended has not handed over, are forgotten.
        earlier = [step for step in self.buffer.before_returns if isinstance(step, EngineRollouts)]
        self._n_more = earlier[-1]._n_more if earlier else 0
        kept = earlier[-1]._next if earlier and self.ahead and earlier[-1].env is env else None
        self._next = kept if kept and (kept.are_here or earlier[-1].engine is self.engine) else None
        self.env: TextVecEnv = env

    def begin(self) -> None:
        """Forget the text that older weights wrote, but for that of `ahead`, and have the engine write the rollout."""
        self._clear()
        self.policy.take_tokens_from(self.next_tokens)

    def _on_training_end(self) -> None:
        self.policy.sample_itself()  # `__call__` did not, if a callback has broken the last rollout off
        if self._next is not None:
            self._next = self._next.settled()  # the caller may close the engine now

    def next_tokens(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next token of each lane and its log-probability by the engine, in nats, (B,) each, on the host.

        Raises:
            ValueError: If there is not one row per lane, or the engine's answers are wrong.
        """
        rows = observations.cpu().numpy()
        if len(rows) != self.env.num_envs:
            raise ValueError(
                f"Expected the rows of all {self.env.num_envs} lanes in a rollout that an engine writes, got "
                f"{len(rows)}: `policy.predict` samples from the policy itself."
            )
        follows = np.asarray((rows == self._expected).all(axis=1))  # (B,): whether each lane follows its plan
        try:
            self._take_next_texts()
            self._send_weights()  # in the first step, so that processes that share an engine meet
            self._plan(rows, [lane for lane, plan in enumerate(self._plans) if not (follows[lane] and plan)])
        except BaseException as error:
            self.policy.sample_itself()  # the rollout is over, and SB3 calls no callback after an error
            if isinstance(error, Exception):
                raise_together(error)  # other processes, which may need no text now, learn why this one ends
            raise
        tokens, log_probs, ages = zip(*(plan.popleft() for plan in self._plans), strict=True)
        self._expected, ends = rows.copy(), (rows != PADDING).sum(axis=1)  # (B, L), (B,)
        inside = np.flatnonzero(ends < rows.shape[1])  # lanes whose row has room for the token
        self._expected[inside, ends[inside]] = np.array(tokens)[inside]
        self._n_steps += 1
        self._sum_of_ages += sum(ages)
        return torch.tensor(tokens), torch.tensor(log_probs, dtype=torch.float32)

    def _plan(self, rows: np.ndarray, lanes: list[int]) -> None:
        """Give lanes a plan: one that was written ahead for their prompt if there is one, else a new one."""
        missing, is_short = [], False
        for lane in lanes:
            spare = self._spare.get(_key(rows[lane]))
            # A row that ends with the separator is a new episode's. The episodes of a rollout's first step are not
            # counted: they began before it.
            is_new = self._n_steps > 0 and rows[lane][rows[lane] != PADDING][-1] == SEPARATOR
            self._n_begun += is_new
            if spare:
                self._plans[lane] = spare.popleft()
            else:
                missing.append(lane)
                is_short = is_short or is_new
        if missing:
            self._ask_for(rows, missing, self._how_far_ahead(is_short))

    def _how_far_ahead(self, is_short: bool) -> int:
        """Return the number of prompts to send besides the missing rows.

        Args:
            is_short: Whether an episode has begun without a text that was written ahead.
        """
        if self._is_first:
            return self._n_more
        # The number of episodes that will begin in the remaining steps, at the pace of this rollout so far.
        left = self.buffer.buffer_size - self._n_steps
        return math.ceil(self._n_begun / self._n_steps * left) if is_short else 0

    def _ask_for(self, rows: np.ndarray, lanes: list[int], n_ahead: int) -> None:
        """Have the engine write for some lanes, and for the `n_ahead` prompts after those that it has written ahead."""
        start = time.perf_counter()
        n_spare = sum(len(plans) for plans in self._spare.values())
        keys, requests = self._requests(rows, lanes, n_spare, n_ahead, self.buffer.buffer_size - self._n_steps)
        self._is_first = False
        completions = self.engine.generate(requests, self.policy.lm.sampling.temperature, self._seed())
        check_completions(requests, completions, self.policy.backbone.vocab_size)
        self._seconds += time.perf_counter() - start
        plans = self._plans_of(completions, age=0)
        for lane, plan in zip(lanes, plans, strict=False):
            self._plans[lane] = plan
        for key, plan in zip(keys[len(lanes) :], plans[len(lanes) :], strict=True):
            self._spare[_key(key)].append(plan)

    def _requests(
        self, rows: np.ndarray, lanes: Sequence[int], n_spare: int, n_ahead: int, left: int
    ) -> tuple[list[np.ndarray], list[Request]]:
        """Return requests for lanes, and for the `n_ahead` prompts after the next `n_spare`, with the rows they go on.

        Args:
            rows: The observations of all lanes, (B, L).
            lanes: The lanes that need a text.
            n_spare: The number of prompts that have a text already.
            n_ahead: The number of prompts after these.
            left: The number of steps that the rollout has left.
        """
        # The rows may be older than the env's lanes, since SB3 keeps `_last_obs` after a rollout that was broken off:
        # hence the bound by each row's own width.
        width = rows.shape[1] - (rows != PADDING).sum(axis=1)
        room = np.minimum(np.minimum(self.env.lanes.most_new_tokens(), left), width).clip(min=1)
        stop_ids = self.env.env.rules.stop_ids
        requests = [Request(rows[lane][rows[lane] >= 0], int(room[lane]), stop_ids) for lane in lanes]
        keys = [rows[lane][rows[lane] != PADDING] for lane in lanes]
        for prompt in self.env.lanes.dealer.coming(n_spare + n_ahead)[n_spare:]:
            most_new = min(self.env.lanes.turn_limit(prompt), left)
            requests.append(Request(np.asarray(prompt.ids, dtype=np.int64), most_new, stop_ids))
            keys.append(np.append(prompt.ids, SEPARATOR))
        return keys, requests

    def _send_weights(self) -> None:
        """Send the weights of this rollout's policy, once."""
        if self._is_outdated:
            start = time.perf_counter()
            with named_weights(self.policy.backbone) as weights:
                self.engine.load_weights(weights)
            self._is_outdated = False
            self._seconds += time.perf_counter() - start

    def _seed(self) -> int:
        """Draw a seed from the policy's generator, which checkpoints keep: a resumed run draws the same seeds."""
        return int(torch.randint(2**31, (), generator=self.policy.generator))

    def _plans_of(self, completions: list[Completion], age: int) -> list[Plan]:
        self._n_calls += 1
        self._n_written += sum(len(completion.tokens) for completion in completions)
        return [
            deque((token, log_prob, age) for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True))
            for tokens, log_probs in completions
        ]

    def _ask_ahead(self) -> None:
        """Have the engine write, from now on, what the first call of the next rollout would request.

        SB3 `on_policy_algorithm.collect_rollouts` has set `_last_obs` to the rows with which that rollout begins.
        """
        assert isinstance(self.engine, BackgroundEngine), "checked when the step was made"
        start, rows = time.perf_counter(), np.asarray(self.algorithm._last_obs)  # (B, L)
        keys, requests = self._requests(rows, range(len(rows)), 0, self._n_more, self.buffer.buffer_size)
        answer = self.engine.start(requests, self.policy.lm.sampling.temperature, self._seed())
        vocab_size = self.policy.backbone.vocab_size

        def checked() -> list[Completion]:
            completions = answer()
            check_completions(requests, completions, vocab_size)
            return completions

        self._next = NextTexts(keys, checked)
        self._seconds += time.perf_counter() - start

    def _take_next_texts(self) -> None:
        """Wait for the texts that were asked for ahead, if there are any, for lanes that have their rows."""
        if self._next is None:
            return
        start, (texts, self._next) = time.perf_counter(), (self._next, None)
        for row, plan in zip(texts.rows, self._plans_of(texts.texts(), age=1), strict=True):
            self._spare[_key(row)].append(plan)
        self._is_first = False
        self._seconds += time.perf_counter() - start

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Compute the policy's log-probabilities, and its values, for which the buffer has zeros so far."""
        self.policy.sample_itself()
        self._n_more = self._n_begun
        if self.ahead:
            try:
                self._ask_ahead()
            except Exception as error:
                raise_together(error)
        view, lm = buffer.view(), self.policy.lm
        with torch.no_grad():
            if isinstance(lm.critic, TrunkCritic):  # the buffer has computed the values already
                log_probs = lm.log_probs(view.batch, view.actions)
            else:
                values, log_probs, _ = lm.evaluate(view.batch, view.actions)
                buffer.values[view.steps, view.lanes] = lm.in_reward_units(values).cpu().numpy()
        buffer.set_policy_log_probs(view, log_probs.cpu().numpy())
        self._log(buffer, view)

    def _log(self, buffer: SequenceRolloutBuffer, view: RolloutView) -> None:
        by_policy = buffer.log_probs[view.steps, view.lanes]  # (N,)
        by_engine = buffer.behaviour_log_probs[view.steps, view.lanes]  # (N,)
        weights = self.correction.weights(by_policy, by_engine, view.batch.rows)  # (N,)
        ratios = replace(self.correction, truncation=math.inf, band=None).weights(by_policy, by_engine, view.batch.rows)
        log_ratios = (by_policy - by_engine).astype(np.float64)
        figures = {
            "weight": float(ratios.mean()),
            "truncated": float((ratios > self.correction.truncation).mean()),
            "masked": float((weights == 0).mean()),
            "effective": effective_share(weights),
            "kl_k1": float(-log_ratios.mean()),
            "kl_k3": float((np.expm1(log_ratios) - log_ratios).mean()),
            "calls": self._n_calls,
            "used": buffer.actions.size / max(self._n_written, 1),
            "seconds": self._seconds,
            "age": self._sum_of_ages / buffer.actions.size,
        }
        for name, value in figures.items():
            self.algorithm.logger.record(f"engine/{name}", value)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return, for each process, the number of prompts to send ahead and the texts of its next rollout.

        It waits for the texts; all processes must call it. The engine itself has no state between rollouts.
        """
        if self._next is not None:
            self._next = self._next.settled()
        texts = {} if self._next is None else self._next.tensors()
        states = gather("the texts of the next rollout", (texts, self._n_more))
        tensors = {f"{rank}.{name}": t for rank, (own, _) in enumerate(states) for name, t in own.items()}
        return tensors, {"n_more": [n_more for _, n_more in states]}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, list[int]]) -> None:
        """Restore what `state_dict` returned; without `ahead`, the texts of older weights are not used.

        On another number of processes the texts are not used either, since the episodes begin anew.
        """
        here, saved = world(), meta["n_more"]
        rank, size = (0, 1) if here is None else (here.rank, here.size)
        is_same = len(saved) == size
        self._n_more = saved[rank] if is_same else sum(saved) // size
        own = {name.removeprefix(f"{rank}."): t for name, t in tensors.items() if name.startswith(f"{rank}.")}
        self._next = NextTexts.of_tensors(own) if own and is_same and self.ahead else None


def _key(row: np.ndarray) -> bytes:
    """Return a row without padding as bytes: the key under which an episode finds the text for its prompt."""
    return row[row != PADDING].astype(np.int64).tobytes()
