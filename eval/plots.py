"""Figures as inline SVG: their colours are the page's (CSS variables), so they follow its theme, and their text is text.

Drawn with matplotlib's own objects, without pyplot: no display, no global state, the same bytes for the same numbers.
"""

import io
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in these, which no library draws by itself, and replaced by the page's variables.
_COLOURS = {"#0000a1": "accent", "#0000a2": "muted", "#0000a3": "rule", "#0000a4": "before"}
_ACCENT, _MUTED, _RULE, _BEFORE = _COLOURS
_SIZE = (3.5, 1.9)  # inches, at 72 points
_AXES = (0.1, 0.13, 0.88, 0.82)  # left, bottom, width, height; the same for all, so that they align
LONGEST = 23  # characters of a name beside a bar
_RANKS = ((1, 1), (2, 2), (3, 3), (4, 10), (11, 30), (31, 100))


class Plot(NamedTuple):
    svg: str
    said: str  # the same in words


def score_histogram(scores: Sequence[float], before: Sequence[float] = ()) -> Plot:
    """Ten bins over 0 to 1, or over the scores' own range; the run before as an outline."""
    held = [*scores, *before]
    low, high = (0.0, 1.0) if min(held) >= 0 and max(held) <= 1 else (min(held), max(held))
    edges = np.linspace(low, high if high > low else low + 1, 11)
    counts, _ = np.histogram(scores, bins=edges)
    figure, axes = _axes()
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.94, align="edge", color=_ACCENT, linewidth=0, clip_on=False)
    if before:
        outline, _ = np.histogram(before, bins=edges)
        axes.stairs(outline, edges, color=_BEFORE, linewidth=1.4, clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    return _plot(figure, _bins_said(counts, edges, "{:.3g}"))


def latency_histogram(milliseconds: Sequence[float]) -> Plot:
    """Twenty bins up to the 99th percentile; what was slower is told."""
    from matplotlib.ticker import MaxNLocator

    end = float(np.percentile(milliseconds, 99))
    edges = np.linspace(0, _round_up(end if end > 0 else 1.0), 21)
    counts, _ = np.histogram(milliseconds, bins=edges)
    figure, axes = _axes()
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.94, align="edge", color=_ACCENT, linewidth=0, clip_on=False)
    axes.set_xlim(0, edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    slower = sum(value > edges[-1] for value in milliseconds)
    beyond = f"; {slower} slower than that, up to {max(milliseconds):,.0f} ms" if slower else ""
    return _plot(figure, f"0 to {edges[-1]:,.0f} ms{beyond}")


def rank_histogram(ranks: Sequence[int | None]) -> Plot:
    """`ranks`: of the first relevant document of each case; None where none was found."""
    counted: Counter[str] = Counter(_rank_bin(rank) for rank in ranks)
    deepest = max((rank or 0 for rank in ranks), default=0)
    names = [_bin_name(low, high) for low, high in _RANKS if low <= max(deepest, 10)]
    names += [name for name in ("> 100",) if counted[name]] + ["none"]
    figure, axes = _axes()
    colours = [_MUTED if name == "none" else _ACCENT for name in names]
    bars = axes.bar(names, [counted[name] for name in names], width=0.86, color=colours, linewidth=0, clip_on=False)
    axes.bar_label(bars, labels=[str(counted[name] or "") for name in names], fontsize=8, color=_MUTED, padding=2)
    axes.set_position((0.01, 0.13, 0.98, 0.82))
    axes.set_yticks([])
    axes.grid(False)
    axes.tick_params(labelsize=7.5)
    axes.margins(x=0.01, y=0.14)
    return _plot(figure, ", ".join(f"{name}: {counted[name]}" for name in names))


def history(values: Sequence[tuple[int, float]], best: Sequence[tuple[int, float]], failed: Sequence[int] = ()) -> Plot:
    """`values` and the `best` so far, by number; `failed` have no value, and are marked below. What lies beyond `limits` is
    drawn at their edge.
    """
    figure, axes = _curve_axes()
    ends = limits([value for _, value in values], best[-1][1])
    axes.plot(*_dots(_cut(values, ends)), color=_BEFORE, linewidth=4, solid_capstyle="round", clip_on=False)
    axes.step(*_both(_cut(best, ends)), where="post", color=_ACCENT, linewidth=1.6, clip_on=False)
    if failed:
        below = _dots([(number, 0.0) for number in failed])
        where = axes.get_xaxis_transform()
        axes.plot(*below, color=_MUTED, linewidth=4, solid_capstyle="round", transform=where, clip_on=False)
    steps = [one for before, one in zip([(0, math.nan), *best], best, strict=False) if one[1] != before[1]]
    return _plot(figure, ", ".join(f"{number}: {value:.4g}" for number, value in steps))


def bars(shares: Sequence[tuple[str, float]]) -> Plot:
    """Shares from 0 to 1, the largest first, by name."""
    figure, axes = _axes()
    shown = list(reversed(shares))
    drawn = axes.barh(
        range(len(shown)), [share for _, share in shown], height=0.7, color=_ACCENT, linewidth=0, clip_on=False
    )
    axes.bar_label(drawn, labels=[f"{share:.2f}" for _, share in shown], fontsize=8, color=_MUTED, padding=3)
    axes.set_position((0.42, 0.13, 0.5, 0.82))
    axes.set_yticks(range(len(shown)), [_ending(name) for name, _ in shown])
    axes.grid(False)
    axes.set_xlim(0, 1)
    return _plot(figure, ", ".join(f"{name}: {share:.2f}" for name, share in shares))


def curves(lines: Sequence[tuple[Sequence[tuple[int, float]], bool]], *kept: float) -> Plot:
    """Each line's points, and whether it is marked as one that was ended. What lies beyond `limits`, which are wide enough for
    what is `kept`, is drawn at their edge.
    """
    figure, axes = _curve_axes()
    values = [value for points, _ in lines for _, value in points]
    ends = limits(values, *kept)
    for whole, ended in lines:
        points, colour = _cut(whole, ends), _MUTED if ended else _ACCENT
        axes.plot(*_both(points), color=colour, linewidth=0.9, linestyle=":" if ended else "-", clip_on=False)
        axes.plot(*_dots(points), color=colour, linewidth=3, solid_capstyle="round", clip_on=False)
    return _plot(figure, f"{len(lines)} trials, {sum(ended for _, ended in lines)} ended early")


def limits(values: Sequence[float], *kept: float) -> tuple[float, float]:
    """-> the range of what is `kept`, and of most values: some that lie far beyond would flatten all others."""
    quarter, three = np.percentile(values, (25, 75))
    reach = 1.5 * (three - quarter)
    low, high = max(min(values), quarter - reach), min(max(values), three + reach)
    return float(min(low, *kept, high)), float(max(high, *kept, low))


def _ending(name: str) -> str:
    """The end of a long name tells more."""
    return name if len(name) <= LONGEST else f"…{name[-LONGEST + 1 :]}"


def _cut(points: Sequence[tuple[int, float]], ends: tuple[float, float]) -> list[tuple[int, float]]:
    return [(at, min(max(value, ends[0]), ends[1])) for at, value in points]


def _dots(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """-> a line without length at each point, whose round ends are a dot: markers would be definitions, which go."""
    across = [part for at, _ in points for part in (float(at), float(at), math.nan)]
    return across, [part for _, value in points for part in (value, value, math.nan)]


def _both(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [at for at, _ in points], [value for _, value in points]


def _curve_axes() -> tuple["Figure", "Axes"]:
    """With whole numbers below, and room for values at the left."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    axes.set_position((0.16, 0.13, 0.82, 0.82))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure, axes


def _axes() -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes(_AXES)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(length=0, labelcolor=_MUTED, labelsize=8, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
    axes.yaxis.grid(True, color=_RULE, linewidth=0.6, clip_on=False)
    axes.set_axisbelow(True)
    return figure, axes


def _plot(figure: "Figure", said: str) -> Plot:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Plot(_inline(text.getvalue()), said)


def _inline(drawn: str) -> str:
    """-> the SVG without what a page does not need: prolog, metadata, namespaces, definitions, ids, fonts."""
    root = ET.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "defs"):
                parent.remove(child)
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        one.attrib.pop("id", None)
        if "style" in one.attrib:
            one.set("style", _themed(one.attrib["style"]))
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true", "focusable": "false"}
    return ET.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    for colour, name in _COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return re.sub(r"font-family:[^;]*; ", "", style)


def _bins_said(counts: Sequence[int] | np.ndarray, edges: np.ndarray, form: str) -> str:
    named = zip(edges[:-1], edges[1:], counts, strict=True)
    return ", ".join(f"{form.format(low)} to {form.format(high)}: {count}" for low, high, count in named if count)


def _rank_bin(rank: int | None) -> str:
    if rank is None:
        return "none"
    return next((_bin_name(low, high) for low, high in _RANKS if low <= rank <= high), "> 100")


def _bin_name(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _round_up(value: float) -> float:
    """-> the next 1, 2, 2.5 or 5 times a power of ten, or a tenth step of it."""
    step = 10.0 ** math.floor(math.log10(value)) / 2
    return math.ceil(value / step) * step
