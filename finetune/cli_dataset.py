"""`graft dataset`: rows as they are, and a person's decisions on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli_options import JsonOption

if TYPE_CHECKING:
    from finetune.schemas import Method, Rows

app = typer.Typer(no_args_is_help=True, help="Makes, inspects and reviews training rows.")
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A .jsonl or .json file (also .gz), or DATASET_INFO.json#NAME.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(metavar="sft|dpo|kto|reward|grpo|ppo", help="What the rows are for; default: what most of them fit."),
]


@app.command()
def inspect(
    file: FileArgument,
    method: MethodOption = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out rows, that must share nothing.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer that a row may have.")] = 1024,
    model: Annotated[str | None, typer.Option(help="Whose tokens are counted; default: the bundled one.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    fitting: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the rows that fit, in TRL's formats.")
    ] = None,
    to: JsonOption = None,
) -> None:
    """Shows what rows are like: lengths, duplicates, contradictions, what is shared with held-out rows; and some of them."""
    from finetune.row_report import report, show
    from finetune.rows import read_all, read_rows, refuse_all, write_rows
    from service.show import write_json

    wanted = _method(method)
    read = read_all(file, wanted)
    if fitting is None or not read.rows.rows:
        refuse_all(file, read.refused)
    if fitting is not None:
        _check_out(fitting, file)
        write_rows(read.rows.rows, fitting)
        _say(f"{fitting}: {len(read.rows.rows)} rows that fit; {len(read.refused)} do not")
    held_out = read_rows(eval_data, _kind(read.rows)) if eval_data else None
    tokenizer, template = _tokenizer(model)
    found = report(read.rows, held_out, tokenizer, max_length, template)
    if to:
        write_json(found, to)
    if to != "-":
        show(found)
        _show_samples(read.rows, samples)


@app.command()
def review(
    file: FileArgument,
    method: MethodOption = None,
    apply: Annotated[
        Path | None,
        typer.Option("--apply", metavar="OUT", help="Ask nothing; write the rows accepted and edited so far."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Ask for rows that are decided, too.")] = False,
) -> None:
    """Accept, edit or reject rows one after the other; the decisions are kept in FILE.review.jsonl."""
    from finetune import review as reviewing
    from finetune.review_terminal import terminal
    from finetune.rows import read_all, write_rows

    read = read_all(file, _method(method))
    path = reviewing.decisions_path(file)
    if read.refused:
        _say(
            f"{len(read.refused)} rows do not fit and are left out; `graft dataset inspect {file}` names them", "yellow"
        )
    if apply:
        _check_out(apply, file)
        kept = reviewing.reviewed(read.rows, reviewing.read_decisions(path))
        write_rows(kept.rows, apply)
        _say(f"{apply}: {len(kept.rows)} rows ({reviewing.summary(kept.counts)})")
        return
    decisions = reviewing.review(read.rows, path, terminal(), again)
    _say(f"{reviewing.summary(reviewing.reviewed(read.rows, decisions).counts)}; kept in {path}")


def _method(name: str | None) -> "Method | None":
    """Raises InvalidError."""
    from finetune.schemas import ROW_OF
    from ingest.errors import InvalidError

    found = next((one for one in ROW_OF if one == name), None)
    if name is not None and found is None:
        raise InvalidError(f"--method {name!r} is none of {', '.join(ROW_OF)}")
    return found


def _kind(rows: "Rows") -> "Method":
    from finetune.rows import FITS

    return FITS[type(rows.rows[0])] if rows.rows else "sft"


def _check_out(out: Path, file: Path) -> None:
    """Raises InvalidError."""
    from ingest.errors import InvalidError

    if out.absolute() == file.absolute():
        raise InvalidError(f"{str(out)!r} is the file that is read: name another one")
    if out.with_name(f"{out.name}.card.json").exists():
        raise InvalidError(f"{str(out)!r} is a data set with a card, and never changes: name another file")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise InvalidError(f"{str(out)!r} cannot be written: name a file in a folder that is there")


def _tokenizer(model: str | None) -> tuple[Any, str | None]:
    """-> tokenizer and chat template; none where the bundled model is not there. Raises SettingsError."""
    from finetune.base_folder import find_base
    from ingest.errors import SettingsError
    from ingest.model_files import read_tokenizer
    from service.base_model import chat_template
    from service.cli_options import ingest_settings

    try:
        folder = find_base(model, ingest_settings().models)
    except SettingsError:
        if model is not None:
            raise
        _say("the bundled model is not here, so no tokens are counted: `make models` fetches it", "yellow")
        return None, None
    return read_tokenizer(folder), chat_template(folder)


def _show_samples(rows: "Rows", count: int) -> None:
    from finetune.review_terminal import show_row

    total = len(rows.rows)
    for number in range(min(count, total)):
        at = number * total // min(count, total)
        show_row(rows.rows[at], rows.places[at], "")


def _say(line: str, style: str = "") -> None:
    from rich.text import Text

    from finetune.row_report import visible
    from service.show import err

    err.print(Text(visible(line), style))
