"""`graft align`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.cli_options import JsonOption, ingest_settings, service_settings
from service.show import err, escape, out, write_json

if TYPE_CHECKING:
    from finetune.align_figures import Aligned, Figure


def align(
    pairs: Annotated[Path, typer.Argument(help="Answers that people compared: hh-rlhf's files, or rows for dpo.")],
    helpful: Annotated[
        Path, typer.Option(metavar="ROWS", help="Questions with answers: what has to be kept. Never trained on.")
    ],
    to_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Gets the trainings and the report.")],
    by: Annotated[Literal["dpo", "ppo"], typer.Option(help="ppo: a reward model, then PPO against it.")] = "dpo",
    mix: Annotated[
        Path | None, typer.Option(metavar="ROWS", help="Rows that are imitated too, so that helpfulness is kept.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STEP.KEY=VALUE", help="Of sft, reward, dpo, ppo or judge; without STEP, of all."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="The model to start from; left out, the one that is served.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the pairs that measures.")] = 0.2,
    most_pairs: Annotated[int, typer.Option("--pairs", min=1, help="Held-out pairs to compare, at most.")] = 400,
    prompts: Annotated[int, typer.Option(min=1, help="Of their prompts, answered at most.")] = 100,
    questions: Annotated[int, typer.Option(min=1, help="Helpful rows to answer, at most.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 96,
    margin: Annotated[float, typer.Option(min=0, help="Of token F1, that may be lost.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of how the pairs are parted, and what is drawn of them.")] = 17,
    to: JsonOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop all that the folder holds of an alignment.")] = False,
) -> None:
    """Aligns a model with what people prefer, and measures it before and after. Given again, it goes on where it was ended."""
    from eval.cli_retrieval import check_writable
    from finetune.align import align as run
    from finetune.align_folder import PAGE
    from finetune.align_plan import Alignment
    from finetune.cli_options import finetune_settings
    from finetune.hooks import Hooks
    from finetune.show_training import shown

    check_writable(to)
    ingest = ingest_settings()
    wanted = Alignment(
        pairs=pairs,
        helpful=helpful,
        mix=mix,
        by=by,
        base=base or service_settings(None).model,
        settings=tuple(settings or ()),
        held_out=held_out,
        most_pairs=most_pairs,
        most_prompts=prompts,
        most_helpful=questions,
        tokens=tokens,
        margin=margin,
        seed=seed,
    )
    with shown() as show:
        found = run(
            wanted,
            out=to_folder,
            settings=finetune_settings(),
            models=ingest.models,
            home=ingest.home,
            hooks=Hooks(progress=show),
            tell=lambda line: err.print(line, markup=False),
            restart=restart,
        )
    if to:
        write_json(found, to)
    if to != "-":
        _print(found, to_folder, to_folder / PAGE)


def _print(found: "Aligned", folder: Path, page: Path) -> None:
    for step in found.steps:
        for note in step.notes:
            out.print(f"{step.name}: {note}", markup=False)
    for one in found.figures:
        out.print(_line(one), markup=False)
    said = {
        "kept": "kept",
        "lost": "lost",
        "unclear": "not shown to be kept: ask more questions, or ones that it can answer",
    }[found.helpfulness]
    out.print(f"helpfulness is {said} (margin {found.margin:g}); the judge prefers the chosen answer in "
              f"{found.judge_accuracy.value:.3f} of the held-out pairs", markup=False)  # fmt: skip
    out.print(f"  page: {escape(str(page))}", soft_wrap=True)
    out.print(f"  next: graft check {escape(str(folder / found.adapter))}", soft_wrap=True)


def _line(one: "Figure") -> str:
    now, change = one.of["after"], one.change
    return (
        f"{one.title}: {one.of['before'].value:.3f} → {one.of['sft'].value:.3f} → {now.value:.3f} "
        f"({change.difference:+.3f} [{change.low:+.3f}, {change.high:+.3f}], {change.cases} cases)"
    )
