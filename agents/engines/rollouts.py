"""The step that has another engine write rollouts, and weights their tokens in the update."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from textenv.episodes.rules import PADDING, SEPARATOR

from ..distributed.world import world
from ..models.critic import TrunkCritic
from ..policies.flat import FlatLMPolicy
from ..policies.lm_policy import LMPolicy
from ..rollout.buffer import SequenceRolloutBuffer
from ..rollout.importance import Correction, Per, effective_share
from ..rollout.transitions import RolloutView
from ..steps.step import Order, RolloutStep, sequence_buffer, text_vec_env
from .protocol import Completion, Request, RolloutEngine, check_completions, named_weights

Plan = deque[tuple[int, float]]  # tokens that an engine has written, the next token first, with log-probabilities


class EngineRollouts(RolloutStep):
    """Has another engine write the tokens of rollouts; values, log-probabilities and updates stay the policy's.

    In a rollout the policy's `forward` takes the next token of each lane from the text that the engine has written for
    it, as long as the lane's row is its last row plus that token. All other rows (a new episode, a reply of the
    environment, a turn cut short by a stop string) are sent to the engine in one call, each as the prompt of a request.
    The first call of a rollout also sends the next prompts of the env, as many as the last rollout began, so that their
    text is ready when a lane ends early. If these are too few, the next call sends as many as the rest of the rollout
    will begin at its pace so far. After an update the engine gets the new weights before the next rollout, and the text
    that old weights wrote is thrown away. `predict`, evaluations and sample tables sample from the policy itself.

    At the end of a rollout the policy reads each sequence once. Its log-probabilities become the buffer's `log_probs`,
    from which PPO's ratio starts at 1 and which penalties and warnings read; those of the engine stay in
    `behaviour_log_probs`. Their ratio, truncated, multiplies the advantages of minibatches (see `Correction`), after
    their normalisation: the subtracted mean is an unbiased baseline only if it is weighted as well.

    Logged under `engine/`: `weight` (the mean ratio, before truncation and masking; 1 except for noise if the engine
    reports the log-probabilities that it samples with), `truncated` (the share of tokens whose ratio is above
    `truncation`), `masked` (the share of tokens whose weight is 0), `effective` (the effective sample size of the
    weights, as a share of the tokens: see `agents.rollout.importance.effective_share`), `kl_k1` and `kl_k3` (estimates
    of KL(engine, policy), nats per token), `calls`, `used` (the share of the written tokens that lanes took) and
    `seconds` (spent waiting for the engine).

    Args:
        engine: The engine, which the caller closes.
        truncation: The largest weight; `math.inf` for no truncation.
        per: "token" weights each token by its own ratio, "sequence" by the product over its sequence.
        band: The smallest and the largest ratio that is trained on, such as (0.5, 5.0); tokens outside get weight 0.
            With "sequence", these are whole sequences. None trains on all.

    Raises:
        ValueError: When attached, if the model or env uses something that an engine cannot follow: masks, top_k, top_p,
            min_p, repetition penalties, an encoder-decoder, a model that is not transformers', TRPO, several
            processes, or the algorithm's own `normalize_advantage`.

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
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.engine = engine
        self.correction = Correction(truncation, per, band)
        self._n_more = 0  # the number of episodes that began during the last rollout

    def _clear(self) -> None:
        self._expected = np.full((self.env.num_envs, 1), PADDING)  # (B, L) the next rows, if lanes follow their plans
        self._plans: list[Plan] = [deque() for _ in range(self.env.num_envs)]
        self._spare: dict[bytes, deque[Plan]] = defaultdict(deque)  # by prompt, for the lanes that will begin with it
        self._is_first = True  # no call to the engine has been made in this rollout
        self._n_steps = self._n_calls = self._n_written = self._n_begun = 0
        self._seconds = 0.0

    def prepare(self, model: BaseAlgorithm) -> None:
        """Check that an engine can write the model's rollouts, and give its buffer the correction."""
        self.algorithm, self.env = cast("OnPolicyAlgorithm", model), text_vec_env(model.get_env())
        self.policy = cast("LMPolicy", model.policy)
        refusal = _refusal(model)
        if refusal is not None:
            raise ValueError(refusal)
        self.buffer = sequence_buffer(model)
        self.buffer.correction = self.correction
        earlier = [step for step in self.buffer.before_returns if isinstance(step, EngineRollouts)]
        self._n_more = earlier[-1]._n_more if earlier else 0  # from an earlier call of `learn`

    def begin(self) -> None:
        """Forget the text that older weights wrote, and have the engine write until the end of the rollout."""
        self._clear()
        self.policy.take_tokens_from(self.next_tokens)

    def _on_training_end(self) -> None:
        self.policy.sample_itself()  # `__call__` did not, if a callback has broken the last rollout off

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
            self._plan(rows, [lane for lane, plan in enumerate(self._plans) if not (follows[lane] and plan)])
        except BaseException:
            self.policy.sample_itself()  # the rollout is over, and SB3 calls no callback after an error
            raise
        tokens, log_probs = zip(*(plan.popleft() for plan in self._plans), strict=True)
        self._expected, ends = rows.copy(), (rows != PADDING).sum(axis=1)  # (B, L), (B,)
        inside = np.flatnonzero(ends < rows.shape[1])  # lanes whose row has room for the token
        self._expected[inside, ends[inside]] = np.array(tokens)[inside]
        self._n_steps += 1
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
        left = self.buffer.buffer_size - self._n_steps
        # The rows may be older than the env's lanes, since SB3 keeps `_last_obs` after a rollout that was broken off:
        # hence the bound by each row's own width.
        width = rows.shape[1] - (rows != PADDING).sum(axis=1)
        room = np.minimum(np.minimum(self.env.lanes.most_new_tokens(), left), width).clip(min=1)
        stop_ids = self.env.env.rules.stop_ids
        requests = [Request(rows[lane][rows[lane] >= 0], int(room[lane]), stop_ids) for lane in lanes]
        n_spare = sum(len(plans) for plans in self._spare.values())
        coming = self.env.lanes.dealer.coming(n_spare + n_ahead)[n_spare:]
        for prompt in coming:
            most_new = min(self.env.lanes.turn_limit(prompt), left)
            requests.append(Request(np.asarray(prompt.ids, dtype=np.int64), most_new, stop_ids))
        written = self._ask(requests)
        for lane, plan in zip(lanes, written, strict=False):
            self._plans[lane] = plan
        for prompt, plan in zip(coming, written[len(lanes) :], strict=True):
            self._spare[_key(np.append(prompt.ids, SEPARATOR))].append(plan)

    def _ask(self, requests: list[Request]) -> list[Plan]:
        start = time.perf_counter()
        if self._is_first:  # an update has changed the weights since the last rollout
            with named_weights(self.policy.backbone) as weights:
                self.engine.load_weights(weights)
            self._is_first = False
        # From the policy's generator, which checkpoints keep: a resumed run draws the same seeds.
        seed = int(torch.randint(2**31, (), generator=self.policy.generator))
        completions = self.engine.generate(requests, self.policy.lm.sampling.temperature, seed)
        check_completions(requests, completions, self.policy.backbone.vocab_size)
        self._seconds += time.perf_counter() - start
        self._n_calls += 1
        self._n_written += sum(len(completion.tokens) for completion in completions)
        return [_plan_of(completion) for completion in completions]

    def __call__(self, buffer: SequenceRolloutBuffer) -> None:
        """Compute the policy's log-probabilities, and its values, for which the buffer has zeros so far."""
        self.policy.sample_itself()
        self._n_more = self._n_begun
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
        }
        for name, value in figures.items():
            self.algorithm.logger.record(f"engine/{name}", value)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the number of prompts to send ahead; the engine itself has no state between rollouts."""
        return {}, {"n_more": self._n_more}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict[str, int]) -> None:
        """Restore the number that `state_dict` returned."""
        self._n_more = meta["n_more"]


def _plan_of(completion: Completion) -> Plan:
    return deque(zip(completion.tokens.tolist(), completion.log_probs.tolist(), strict=True))


def _key(row: np.ndarray) -> bytes:
    """Return a row without padding as bytes: the key under which an episode finds the text for its prompt."""
    return row[row != PADDING].astype(np.int64).tobytes()


def _refusal(model: BaseAlgorithm) -> str | None:
    """Return the reason why an engine cannot write the rollouts of a model; None where it can."""
    policy, env = cast("LMPolicy", model.policy), text_vec_env(model.get_env()).env
    sampling = policy.lm.sampling
    if sampling.has_support or sampling.repetition_penalty != 1:
        return (
            f"Expected a temperature alone with EngineRollouts, got {sampling}: an engine does not answer which tokens "
            "it has left out or penalised, so the policy could not score under the same distribution."
        )
    if env.masks:
        return (
            "Expected an env without `mask` with EngineRollouts, got one with: the engine writes many tokens ahead, "
            "and what a mask allows depends on each of them."
        )
    if policy.backbone.is_encoder_decoder:
        return (
            "Expected a causal language model with EngineRollouts, got an encoder-decoder: a request is one row of "
            "tokens, and does not say which of them the encoder reads."
        )
    if isinstance(policy, FlatLMPolicy):
        return (
            "Expected PPO or A2C with EngineRollouts, got TRPO: it bounds its steps by a divergence over states, which "
            "would be those of the engine, unweighted."
        )
    if world() is not None:
        return (
            "Expected one process with EngineRollouts, got several: they would send their weights to one engine, or "
            "start one each."
        )
    if vars(model).get("normalize_advantage"):
        return (
            "Expected normalize_advantage=False of the algorithm with EngineRollouts, got True, which subtracts a mean "
            "after the weights and is biased: pass rollout_buffer_kwargs=dict(normalize_advantage=True)."
        )
    return None
