"""How a report's values become HTML: everything that is put in is escaped, and cleaned of what no page may hold."""

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report_cases import CUT, shorten
from eval.report_figures import LOWER_IS_BETTER, label
from eval.schemas import Difference
from ingest.errors import InvalidError
from ingest.files import write_whole

# Control characters but tab and newline, half surrogate pairs and what is no character: no encoder or parser takes them.
_NOT_IN_A_PAGE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_BLANK_LINES = re.compile(r"(?:[ \t]*\n){3,}")


@lru_cache(maxsize=1)
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "label": lambda metric: shorten(label(metric), CUT["name"]),
        "name": lambda text: shorten(str(text), CUT["name"]),
        "score": score,
        "signed": signed,
        "ms": milliseconds,
        "p": p_value,
        "percent": percent,
        "verdict": verdict,
        "duration": duration,
        "opening": lambda text: text[:1].upper() + text[1:],
        "svg": Markup,
    }
    return made


def write_page(page: str, path: Path) -> None:
    """Writes it, or leaves what was there. Raises InvalidError where the path cannot be written to."""
    try:
        write_whole(path, page.encode("utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        raise InvalidError(
            f"the report cannot be written to {str(path)!r}: {getattr(error, 'strerror', None) or error}; "
            "name a file in a folder that you may write to"
        ) from error


def clean(value: Any) -> Any:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _BLANK_LINES.sub("\n\n", _NOT_IN_A_PAGE.sub("\ufffd", value.replace("\r\n", "\n")))


def score(value: float) -> str:
    """Three decimals for what lies between -1 and 1, as nearly every score does."""
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.1f}"


def signed(value: float) -> str:
    return score(value) if score(abs(value)) == "0.000" else f"{'+' if value > 0 else '−'}{score(abs(value))}"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def percent(value: float) -> str:
    """-> of a bar's width, within it."""
    return f"{100 * min(1.0, max(0.0, value)):.2f}%" if math.isfinite(value) else "0%"


def verdict(difference: Difference) -> str:
    """-> better or worse where the interval leaves out 0, else unclear."""
    if difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if (difference.difference > 0) != (difference.metric in LOWER_IS_BETTER) else "worse"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
