"""A row on the terminal, and the keys that decide on it. Texts of rows are shown as they are: no markup, nothing that a terminal
would act on.
"""

import os
import sys
from collections.abc import Callable

from rich.text import Text

from finetune.review import (
    HELP,
    WORDS,
    Decision,
    Terminal,
    edited_by,
    keys_of,
    typed_answer,
    with_answer,
)
from finetune.row_report import visible
from finetune.schemas import KtoRow, Message, PreferenceRow, PromptRow, Row
from service.show import out

HEAD, TAIL = 1000, 500  # characters of a long message that are shown at first
_COLOURS = {"system": "dim", "user": "cyan", "assistant": "green", "tool": "magenta"}


def show_row(row: Row, place: str, above: str, whole: bool = False) -> None:
    """`above`: what the line over the row says of it, beside its place; `whole`: uncut."""
    out.print()
    out.print(Text(visible(" · ".join(filter(None, (above, place, row.source.kind))))[:300], "bold"))
    if row.source.documents:
        _line("documents: " + ", ".join(row.source.documents[:10]), "dim")
    asked, ends = row.prompt, list[tuple[str, tuple[Message, ...]]]()
    if isinstance(row, PreferenceRow):
        ends = [("chosen", row.chosen), ("rejected", row.rejected)]
    elif isinstance(row, KtoRow):
        ends = [("wanted" if row.label else "unwanted", row.completion)]
    elif not isinstance(row, PromptRow) and row.completion:
        ends = [("answer", row.completion)]
    for one in asked:
        _message(one.role, one, whole)
    for name, messages in ends:
        for one in messages:
            _message(name, one, whole)


def terminal() -> Terminal:
    """Single keys of a terminal, else what comes through a pipe."""
    tty = sys.stdin.isatty()
    piped = keys_of(sys.stdin)
    key: Callable[[], str] = _pressed if tty else lambda: next(piped, "")

    def show(row: Row, place: str, number: int, total: int, decision: Decision | None, whole: bool) -> None:
        done = f"{number} of {total}" + (f", {WORDS[decision.verdict]} before" if decision else "")
        show_row(row, place, done, whole)
        _line(HELP, "dim")

    def edit(row: Row) -> Row | None:
        command = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if tty and command:
            return edited_by(command, row)
        text = typed_answer(sys.stdin, _line, not tty)
        return with_answer(row, text) if text else None

    return Terminal(show, key, edit, _line)


def _pressed() -> str:
    """One key. Ctrl-C and Ctrl-D end the review."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    held = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)  # a key that was pressed before counts
        sign = sys.stdin.read(1)
    except KeyboardInterrupt:
        return "q"
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, held)
    return "q" if sign in ("\x03", "\x04") else sign


def _message(name: str, one: Message, whole: bool) -> None:
    shown, text = Text(f"{name}: ", f"bold {_COLOURS[one.role]}"), one.content
    if whole or len(text) <= HEAD + TAIL:
        shown.append(visible(text))
    else:
        shown.append(visible(text[:HEAD]))
        shown.append(f" ... {len(text) - HEAD - TAIL} characters ... ", "dim")
        shown.append(visible(text[-TAIL:]))
    out.print(shown)


def _line(text: str, style: str = "") -> None:
    out.print(Text(visible(text), style))
