"""The notes that ride on tensors through Stable-Baselines3: from policy to buffer, and from env to policy.

SB3 hands the policy's three results to the buffer and nothing else, and terminal observations to the policy one by one.
Further information is written on these very tensors, as an attribute. It arrives because SB3 passes on the same
objects, without a copy, in these lines:

- `ALLOWED` and `READ_BY`: stable_baselines3 `common/on_policy_algorithm.py`, `OnPolicyAlgorithm.collect_rollouts` (PPO,
  A2C, TRPO) and sb3_contrib `ppo_mask/ppo_mask.py`, `MaskablePPO.collect_rollouts`: both assign
  `actions, values, log_probs = self.policy(...)` and call `rollout_buffer.add(..., values, log_probs)`.
- `TERMINAL`: the same two functions call `terminal_obs = self.policy.obs_to_tensor(info["terminal_observation"])[0]`
  and then `self.policy.predict_values(terminal_obs)`.

Any operation of torch or numpy, `clone()` and `[...]` among them, returns a tensor without notes.
`tests/agents/policies/test_tensor_notes.py` runs these lines of each algorithm and fails where a note does not arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .actor_critic import LMActorCritic

Value = TypeVar("Value")


@dataclass(frozen=True)
class Note(Generic[Value]):
    """A kind of note that a tensor can carry, under an attribute of its own.

    Args:
        name: The attribute of the tensor.

    Example:
        >>> import torch
        >>> note, tensor = Note[str]("origin"), torch.zeros(2)
        >>> note.write(tensor, "the policy")
        >>> note.read(tensor), note.read(tensor.clone())
        ('the policy', None)
    """

    name: str

    def write(self, tensor: Tensor, value: Value) -> None:
        """Write the note on a tensor."""
        setattr(tensor, self.name, value)

    def read(self, tensor: Tensor) -> Value | None:
        """Return the note on a tensor, or None if it carries none."""
        return vars(tensor).get(self.name)


class TerminalObservation(np.ndarray):
    """The last observation of a truncated episode, (L,), with those of all lanes that were truncated in the same step.

    SB3 asks for their values one after the other; the siblings let the policy value all of them in one forward.

    Attributes:
        siblings: The terminal observations of that step, (K, L); None in a copy, whose numbers may have been changed:
            SB3 `vec_normalize.VecNormalize.normalize_obs` copies, then normalises.
        index: The row of `siblings` that holds this observation.
    """

    siblings: np.ndarray | None = None
    index: int = 0

    @classmethod
    def of_step(cls, observations: list[np.ndarray]) -> list[TerminalObservation]:
        """Return the terminal observations of one step, (L,) each, with their siblings."""
        siblings = np.stack(observations)  # (K, L)
        rows = [observation.view(cls) for observation in observations]
        for index, row in enumerate(rows):
            row.siblings, row.index = siblings, index
        return rows


@dataclass(frozen=True)
class TerminalRow:
    """The position of a tensor's observation among the terminal observations of its step.

    Attributes:
        siblings: The terminal observations of that step, (K, L).
        index: The row of `siblings` that the tensor holds.
    """

    siblings: np.ndarray
    index: int


# On the log-probabilities of `LMPolicy.forward`: the tokens that each row could sample, (B, V) bool; no note if all.
ALLOWED: Note[Tensor] = Note("allowed")
# On the values of `LMPolicy.forward`: the model that computed them, by which the buffer reads whole sequences.
READ_BY: Note[LMActorCritic] = Note("read_by")
# On the tensor that `LMPolicy.obs_to_tensor` makes from a `TerminalObservation`.
TERMINAL: Note[TerminalRow] = Note("terminal")


def read_observations(
    observation: np.ndarray | dict[str, np.ndarray], device: torch.device | str
) -> tuple[Tensor, bool]:
    """Return observations as a tensor, (B, L), with the note `TERMINAL`, and whether they were given as a batch.

    Raises:
        ValueError: If they are not token ids.
    """
    rows = np.asarray(observation)
    if rows.ndim not in (1, 2) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"Expected an observation of token ids, (L,) or (B, L), got {rows.dtype} of {rows.shape}.")
    tensor = torch.as_tensor(rows.reshape(-1, rows.shape[-1]), device=device)  # (L,) to (1, L)
    if isinstance(observation, TerminalObservation) and observation.siblings is not None:
        TERMINAL.write(tensor, TerminalRow(observation.siblings, observation.index))
    return tensor, rows.ndim == 2
