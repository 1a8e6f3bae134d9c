"""How far a reward model agrees with preferences, how well it knows that, and whether it goes by length. No training stack."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.resample import Estimate, estimate
from ingest.schemas import Frozen

BINS = 10  # of confidence, from a half to certain
# As `finetune.curve` draws.
_DOTS, _MUTED, _RULE = "#1f5fbf", "#5b6068", "#e3e5e8"


class Bin(Frozen):
    """Pairs of like confidence: the mean of it, and the share in which the chosen answer has the higher score."""

    confidence: float
    accuracy: float
    pairs: int


class Judged(Frozen):
    """`accuracy`: share of the pairs whose chosen answer has the higher score, a tie counting half, with its 95 % interval over
    prompts. `calibration_error`: the expected one (Guo et al., 2017, arXiv 1706.04599), of sigmoid(margin) as the probability
    that the answer with the higher score is the chosen one. `shorter`, `longer`: accuracy where the chosen answer is the one
    of fewer or more tokens; None where there is no such pair.
    """

    pairs: int
    accuracy: Estimate
    calibration_error: float
    shorter: float | None
    longer: float | None
    pairs_shorter: int
    pairs_longer: int
    bins: tuple[Bin, ...]

    def metrics(self) -> dict[str, float]:
        """For a manifest."""
        found = {
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "calibration_error": self.calibration_error,
            "accuracy_chosen_shorter": self.shorter,
            "accuracy_chosen_longer": self.longer,
            "pairs": self.pairs,
            "pairs_chosen_shorter": self.pairs_shorter,
            "pairs_chosen_longer": self.pairs_longer,
        }
        return {name: float(value) for name, value in found.items() if value is not None}


def judge(
    margins: Sequence[float],
    chosen: Sequence[int],
    rejected: Sequence[int],
    groups: Sequence[Hashable] | None = None,
) -> Judged:
    """`margins`: the chosen answer's score less the rejected one's, one a pair; `chosen`, `rejected`: tokens of the answers;
    `groups`: what pairs hang together by, as their prompts. There is one pair at least.
    """
    held = np.asarray(margins, np.float64)
    right = (held > 0) + (held == 0) / 2
    lengths = np.asarray(chosen) - np.asarray(rejected)
    confidence = 1 / (1 + np.exp(-np.abs(held)))
    bins = _bins(confidence, right)
    return Judged(
        pairs=len(held),
        accuracy=estimate(right, groups=groups),
        calibration_error=sum(one.pairs * abs(one.confidence - one.accuracy) for one in bins) / len(held),
        shorter=_mean(right[lengths < 0]),
        longer=_mean(right[lengths > 0]),
        pairs_shorter=int((lengths < 0).sum()),
        pairs_longer=int((lengths > 0).sum()),
        bins=bins,
    )


def draw_calibration(judged: Judged, file: Path) -> None:
    """As PNG: accuracy against confidence, a dot a bin, its area by its pairs; on the line a model knows how sure it may be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.6), dpi=150)
    axes = figure.add_axes((0.14, 0.13, 0.82, 0.82))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=8)
    axes.grid(True, axis="y", color=_RULE, linewidth=0.6)
    axes.plot([0.5, 1], [0.5, 1], color=_MUTED, linewidth=0.8, linestyle="--")
    areas = [20 + 380 * one.pairs / judged.pairs for one in judged.bins]
    axes.scatter(
        [one.confidence for one in judged.bins],
        [one.accuracy for one in judged.bins],
        areas,
        color=_DOTS,
        alpha=0.7,
        linewidths=0,
    )
    for one in judged.bins:
        axes.annotate(
            str(one.pairs), (one.confidence, one.accuracy), fontsize=6, ha="center", va="center", color="white"
        )
    axes.set(xlim=(0.48, 1.03), ylim=(-0.05, 1.08))
    axes.set_xlabel("confidence, sigmoid of the margin", color=_MUTED, fontsize=8)
    axes.set_ylabel("accuracy on held-out pairs", color=_MUTED, fontsize=8)
    axes.text(0.5, 1.03, f"expected calibration error {judged.calibration_error:.3f}", color=_MUTED, fontsize=8)
    figure.savefig(file, metadata={"Software": None})


def _bins(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[Bin, ...]:
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return tuple(
        Bin(
            confidence=float(confidence[which == at].mean()),
            accuracy=float(right[which == at].mean()),
            pairs=int((which == at).sum()),
        )
        for at in sorted(set(which.tolist()))
    )


def _mean(right: NDArray[np.float64]) -> float | None:
    return float(right.mean()) if right.size else None
