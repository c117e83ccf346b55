"""Episodes that several processes run together, each its share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..distributed.collectives import gather
from ..distributed.world import world

SHARE = 256  # rows that one process runs: enough to keep its lanes busy, since a lane that ends takes the next row

Row = TypeVar("Row")
Result = TypeVar("Result")


def run_shares(
    run: Callable[[Sequence[Row], int], list[Result]], rows: Sequence[Row], size: int = SHARE, first: int = 0
) -> list[Result]:
    """Return the results of all rows, in their order, in each process; all processes must call it.

    The shares do not depend on the number of processes, and so the results do not either: each share is run by one
    process, which runs it as it would alone.

    Args:
        run: A function from the rows of a share, and the number of rows before it, to one result or more for each row.
        rows: The rows.
        size: The number of rows in a share.
        first: The rank of the process that takes the first share; the others follow in turn.

    Example:
        >>> run_shares(lambda rows, start: [(start, row) for row in rows], "abc", size=2)
        [(0, 'a'), (0, 'b'), (2, 'c')]
    """
    here = world()
    rank, n_processes = (0, 1) if here is None else (here.rank, here.size)
    starts = range(0, len(rows), size)
    mine = [start for number, start in enumerate(starts) if (number + first) % n_processes == rank]
    own = {start: run(rows[start : start + size], start) for start in mine}
    found = {start: results for of_rank in gather("shares", own) for start, results in of_rank.items()}
    return [result for start in starts for result in found[start]]
