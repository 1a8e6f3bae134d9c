"""The training curve of a run: what its log says, as JSONL, and loss and held-out loss against steps, as PNG.

Where answers are rewarded it is the reward and the held-out one, since their loss says nothing of how far a run is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

# Black and two colours that stay apart for any eye, and in grey.
_LOSS, _HELD_OUT, _MUTED, _RULE = "#8a8f98", "#1f5fbf", "#5b6068", "#e3e5e8"
_SIZE = (6.4, 3.6)  # inches, at 150 points
_AXES = (0.09, 0.12, 0.89, 0.84)  # left, bottom, width, height


def write_curve(points: Sequence[Mapping[str, float]], out: Path) -> int | None:
    """Writes `curve.jsonl` and `curve.png` into `out`. `points`: the trainer's log, each with `step`, and `loss` or
    `eval_loss`, or `reward` or `eval_reward`, among others. Returns the best step; None where none was measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({key: _finite(value) for key, value in point.items()}) for point in points]
    (out / "curve.jsonl").write_text("".join(f"{line}\n" for line in lines))
    best, name = best_step(points), _name(points)
    held_out = _series(points, f"eval_{name}") or _series(points, f"held_out_{name}")
    _draw(name, _series(points, name), held_out, best, out / "curve.png")
    return best


def best_step(points: Sequence[Mapping[str, float]]) -> int | None:
    """The first of those with the lowest held-out loss, or the highest held-out reward."""
    name = _name(points)
    held_out, sign = _series(points, f"eval_{name}"), -1 if name == "reward" else 1
    return int(min(held_out, key=lambda at: (sign * held_out[at], at))) if held_out else None


def _name(points: Sequence[Mapping[str, float]]) -> str:
    return "reward" if any("reward" in point or "eval_reward" in point for point in points) else "loss"


def _series(points: Sequence[Mapping[str, float]], name: str) -> dict[float, float]:
    """-> by step; where a step is there twice, as after a resume, the later one counts."""
    held = {point["step"]: point[name] for point in points if "step" in point and name in point}
    return {step: value for step, value in sorted(held.items()) if math.isfinite(value)}


def _finite(value: float) -> float | None:
    """JSON has no words for infinity and what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(
    name: str, learned: Mapping[float, float], held_out: Mapping[float, float], best: int | None, file: Path
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, dpi=150)
    axes = figure.add_axes(_AXES)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=8)
    axes.grid(True, axis="y", color=_RULE, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("step", color=_MUTED, fontsize=8)
    axes.plot(list(learned), list(learned.values()), color=_LOSS, linewidth=1.1, marker=_marker(learned), label=name)
    if held_out:
        values = list(held_out.values())
        axes.plot(list(held_out), values, color=_HELD_OUT, linewidth=1.6, marker=".", label=f"held-out {name}")
    if best is not None:
        said = f"best: {held_out[best]:.3f} at step {best}"
        axes.plot([best], [held_out[best]], "o", color=_HELD_OUT, markersize=7, label=said)
    if learned or held_out:
        axes.legend(frameon=False, fontsize=8, labelcolor=_MUTED)
    figure.savefig(file, metadata={"Software": None})


def _marker(series: Mapping[float, float]) -> str:
    """A single point has no line to be seen by."""
    return "." if len(series) < 3 else ""
