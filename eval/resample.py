"""What chance could have done: the interval of a mean, and two means over the same cases compared in pairs."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.schemas import Difference
from ingest.schemas import Frozen

Numbers = NDArray[np.float64]
DRAWS = 10_000
BLOCK = 4_000_000  # numbers drawn at a time, for memory


class Estimate(Frozen):
    """With its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(scores: ArrayLike, seed: int = 0, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean over cases; the percentile interval over resampled cases (Efron, 1979), or over whole `groups` of them."""
    held = np.asarray(scores, np.float64)
    sums, counts = _units(held, groups)

    def draw(random: np.random.Generator, times: int) -> Numbers:
        picks = random.integers(0, len(sums), (times, len(sums)))
        return np.asarray(sums[picks].sum(1) / counts[picks].sum(1))

    low, high = np.percentile(_drawn(len(sums), seed, draw), [2.5, 97.5])
    return Estimate(value=float(held.mean()), low=float(low), high=float(high))


def compared(
    metric: str,
    ids: Sequence[str],
    before: ArrayLike,
    after: ArrayLike,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Difference:
    """Means over the same cases. p: of the paired randomisation test, two-sided, each case's two scores exchanged by the toss
    of a coin (Smucker et al., 2007); the observed assignment counts as one of them, so p is never 0.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    differences = new - old
    observed = estimate(differences, seed, groups)
    sums, _ = _units(differences, groups)

    def draw(random: np.random.Generator, times: int) -> Numbers:
        return np.asarray((random.choice((-1.0, 1.0), (times, len(sums))) * sums).sum(1) / len(differences))

    flipped = _drawn(len(sums), seed, draw)
    by_size = sorted(zip(differences, ids, strict=True), key=lambda one: (-abs(one[0]), one[1]))
    at_least = int((np.abs(flipped) >= abs(observed.value) - 1e-12).sum())
    return Difference(
        metric=metric,
        before=float(old.mean()),
        after=float(new.mean()),
        difference=observed.value,
        low=observed.low,
        high=observed.high,
        p=(at_least + 1) / (len(flipped) + 1),
        cases=len(differences),
        won=tuple(name for one, name in by_size if one > 0),
        lost=tuple(name for one, name in by_size if one < 0),
    )


def _units(held: Numbers, groups: Sequence[Hashable] | None) -> tuple[Numbers, Numbers]:
    """-> (sums, counts) of what is drawn as a whole."""
    if groups is None:
        return held, np.ones_like(held)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    which = [places[group] for group in groups]
    return np.bincount(which, held).astype(np.float64), np.bincount(which).astype(np.float64)


def _drawn(units: int, seed: int, draw: Callable[[np.random.Generator, int], Numbers]) -> Numbers:
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // max(units, 1))
    return np.concatenate([draw(random, min(block, DRAWS - start)) for start in range(0, DRAWS, block)])
