"""`graft score`, and `graft dataset citation-pairs`: what a reward model says, and pairs that the citation check makes."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingest.errors import InvalidError
from service.cli_options import JsonOption, ingest_settings
from service.show import err, write_json

if TYPE_CHECKING:
    from finetune.reward_model import RewardModel
    from finetune.reward_report import Judged
    from finetune.schemas import PreferenceRow, Rows


def score(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A reward model that `graft tune reward` wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows of prompt and completion, or of preferences.")],
    to_file: Annotated[
        Path | None, typer.Option("--out", metavar="OUT.jsonl", help="Left out: standard output.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR|NAME", help="The model it was trained on; left out, as it was named then."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="Of the base.")] = "float32",
    to: JsonOption = None,
) -> None:
    """Scores answers, one line each: place and score, of a preference those of both answers and the margin."""
    from finetune.base_folder import find_base
    from finetune.reward_model import load_reward_model
    from finetune.rows import read_all, refuse_all
    from finetune.runs import read_manifest
    from finetune.train import require_stack

    if dtype not in {"float32", "bfloat16"}:
        raise InvalidError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    require_stack()
    named = read_manifest(folder).recipe.get("model", {}).get("base")
    read = read_all(file)
    refuse_all(file, read.refused)
    model = load_reward_model(folder, find_base(base or named, ingest_settings().models), dtype)
    lines, judged = _scored(model, read.rows)
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    if to_file:
        to_file.write_text(text, encoding="utf-8")
    elif to != "-":
        sys.stdout.write(text)
    if judged is None:
        return
    if to:
        write_json(judged, to)
    found = judged.accuracy
    err.print(
        f"{judged.pairs} pairs: the chosen answer has the higher score in {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]; "
        f"calibration error {judged.calibration_error:.3f}; where it is the shorter one {_share(judged.shorter)} of "
        f"{judged.pairs_shorter}, the longer one {_share(judged.longer)} of {judged.pairs_longer}",
        highlight=False,
    )


def citation_pairs(
    answers: Annotated[
        Path, typer.Argument(metavar="FILE", help="Rows of prompt and completion, several answers to a prompt.")
    ],
    to: Annotated[Path, typer.Option("--out", help="The file of the rows; its card is written beside it.")],
    seed: Annotated[int, typer.Option(help="Of what goes with chance.")] = 17,
    to_json: JsonOption = None,
) -> None:
    """Makes preference rows of answers to the same prompts: what the service's citation check supports, against what not."""
    from finetune import citation_pairs as pairs
    from finetune.cli_raft import tell_card
    from finetune.frozen import freeze, refuse_existing
    from finetune.row_report import places_of
    from finetune.rows import read_rows
    from finetune.schemas import SftRow

    refuse_existing(to)
    rows = read_rows(answers, "sft")
    made = pairs.citation_pairs([row for row in rows.rows if isinstance(row, SftRow)], places_of(rows), seed)
    if not made:
        raise InvalidError(
            f"{str(answers)!r} has no prompt with both a supported and an unsupported answer: give several answers to each, as "
            "sampled at a temperature"
        )
    card = freeze(
        made,
        to,
        method="dpo",
        prompt_version=rows.prompt_version,
        made_by={"command": "citation-pairs", "seed": seed},
        sources=[{"name": rows.name or answers.name, "sha256": rows.digest}],
    )
    tell_card(card, to, to_json)


def _scored(model: "RewardModel", rows: "Rows") -> tuple[list[dict[str, Any]], "Judged | None"]:
    """-> a line for each row; how far they agree, where the rows are preferences. Raises InvalidError for other rows."""
    from finetune.row_report import places_of
    from finetune.schemas import PreferenceRow, SftRow

    places, kind = places_of(rows), type(rows.rows[0])
    if kind is PreferenceRow:
        return _compared(model, [row for row in rows.rows if isinstance(row, PreferenceRow)], places)
    conversations = []
    for row, place in zip(rows.rows, places, strict=True):
        if not isinstance(row, SftRow) or not row.completion:
            raise InvalidError(
                f"{place}: what is scored is a row with prompt and completion, or with chosen and rejected"
            )
        conversations.append((row.prompt, row.completion[-1].content))
    scores = model.score(conversations)
    return [{"place": place, "score": round(one, 4)} for place, one in zip(places, scores, strict=True)], None


def _compared(
    model: "RewardModel", rows: "list[PreferenceRow]", places: tuple[str, ...]
) -> tuple[list[dict[str, Any]], "Judged"]:
    from finetune.reward_model import conversation_ids
    from finetune.reward_report import judge
    from finetune.rows_split import prompt_text

    chosen = [conversation_ids(model.chat, row.prompt, row.chosen[-1].content) for row in rows]
    rejected = [conversation_ids(model.chat, row.prompt, row.rejected[-1].content) for row in rows]
    scores = model.score_tokens([*chosen, *rejected])
    high, low = scores[: len(rows)], scores[len(rows) :]
    margins = [one - other for one, other in zip(high, low, strict=True)]
    lines = [
        {"place": place, "chosen": round(one, 4), "rejected": round(other, 4), "margin": round(one - other, 4)}
        for place, one, other in zip(places, high, low, strict=True)
    ]
    return lines, judge(margins, list(map(len, chosen)), list(map(len, rejected)), [prompt_text(row) for row in rows])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
