"""The cost of an answer on the rating page: in a store of 100,000 items, against one of 100.

    python benchmarks/feedback.py [--quick]

An answer is what the page does for it: show the next item, store the answer, count the rater's progress, and take the
answer back. In both stores the rater has answered half of the items, which other raters are still to answer, and a
tenth are gold. The files lie in memory where there is such a folder, since a disk takes the same time for both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from work import Row, Settings, pairs, run_script

from textenv.feedback.store import FeedbackStore

SIZES = (100, 100_000)
SMOKE_SIZES = (40, 400)
ANSWERS = 50  # per measurement
MOST = 2.0  # the target: with 1,000 times the items, an answer takes at most twice as long
MEMORY = Path("/dev/shm")


def measure(settings: Settings) -> list[Row]:
    """Measure all rows."""
    small, large = SMOKE_SIZES if settings.smoke else SIZES
    claim = f"rating page, an answer, {large:,} items against {small:,}, time"
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        few, many = (filled(Path(folder) / f"{n}.db", n) for n in (small, large))
        with few, many:
            result = pairs(lambda: answers(few), lambda: answers(many), settings.n_pairs)
    each = [f"{1000 / speed:,.2f} ms/answer" for speed in (result.b, result.a)]
    target = f"<= {MOST:.2f}x (less is better)"
    return [Row(claim, *each, result.ratio, result.spread, target, result.ratio <= MOST)]


def filled(path: Path, n: int) -> FeedbackStore:
    """Return a store of n items, of which a rater has answered half."""
    store = FeedbackStore(path, seed=0)
    for number in range(n):
        store.add(f"prompt {number}", [" good.", " bad."], "compare", raters=2, gold=number % 10 == 0)
    for _ in range(n // 2):
        answer(store)
    return store


def answer(store: FeedbackStore) -> None:
    """Answer the next item."""
    shown = store.next("ann")
    assert shown is not None
    store.choose(shown, "a", seconds=1.5)


def answers(store: FeedbackStore) -> int:
    """Answer as the page does, and take each answer back, so that all measurements start alike; return their number."""
    for _ in range(ANSWERS):
        answer(store)
        assert store.progress("ann").left > 0
        assert store.undo("ann", store.last_answer("ann")) is not None
    return ANSWERS


if __name__ == "__main__":
    run_script(__doc__, measure)
