"""The explained variance of a critic's values, by the third of the text in which a token is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..distributed.collectives import moments
from .trained_sequences import TrainedSequences

THIRDS = ("first", "middle", "last")


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float | None:
    """Return 1 - Var(returns - values) / Var(returns) over the tokens of all processes, which must all call it.

    It is what SB3 `utils.explained_variance` returns, in float64: 1 where values are the returns, 0 or less where they
    explain nothing, and NaN where all returns are equal.

    Args:
        values: The values of this process, (N,).
        returns: The returns of this process, (N,).

    Returns:
        None if no process has a token.

    Example:
        >>> import numpy as np
        >>> from agents.rollout.explained_variance import explained_variance
        >>> explained_variance(np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.0, 0.0, 2.0, 2.0]))
        0.5
    """
    n, _, of_returns = moments("returns of a third", returns)
    _, _, of_errors = moments("errors of a third", np.asarray(returns, dtype=np.float64) - values)
    if n == 0:
        return None
    return 1.0 - of_errors / of_returns if of_returns > 0 else float("nan")


def thirds(cols: np.ndarray, n_prompt: int) -> np.ndarray:
    """Return the third of its text in which each token of a whole or ended text is, 0, 1 or 2, (n,).

    Token i of the n tokens behind the prompt, replies of another speaker included, is in the third in which its middle
    (i + 1/2) / n is. So texts of any length are cut alike at both ends: the only token of a text is in the middle, and
    of two tokens one is in the first and one in the last third.

    Args:
        cols: The column of the row before each token of the policy, (n,), the text's last one included.
        n_prompt: The number of tokens of the prompt.

    Example:
        >>> import numpy as np
        >>> from agents.rollout.explained_variance import thirds
        >>> thirds(np.array([4, 5, 6, 7]), n_prompt=5).tolist()  # four tokens behind a prompt of five
        [0, 1, 1, 2]
    """
    positions = cols.astype(np.int64) + 1 - n_prompt
    return 3 * (2 * positions + 1) // (2 * (positions[-1] + 1))


def by_third(texts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return the explained variance of each third of some texts, by the names of `THIRDS`.

    Args:
        texts: The values, the returns and the `thirds` of the tokens of each text of this process, (n,) each.

    Returns:
        No entry for a third without a token.
    """
    rows = [np.zeros((3, 0)), *(np.stack(text) for text in texts)]
    values, returns, places = np.concatenate(rows, axis=1)  # (N,) each
    figures = {}
    for third, name in enumerate(THIRDS):
        figure = explained_variance(values[places == third], returns[places == third])
        if figure is not None:
            figures[name] = figure
    return figures


def of_trained(trained: TrainedSequences) -> dict[str, float]:
    """Return the explained variance of each third of the texts that a rollout trains, by the names of `THIRDS`.

    Values are those of the rollout, in units of reward, and returns the critic's targets. A text that goes on in the
    next rollout is left out, since its length is not known yet. A third without a token has no entry.
    """
    ended = [i for i in range(len(trained)) if trained.segment(i).is_finished]
    parts = [(trained.transitions(i), trained.segment(i).n_prompt) for i in ended]
    return by_third((part.values, part.returns, thirds(part.cols, n_prompt)) for part, n_prompt in parts)
