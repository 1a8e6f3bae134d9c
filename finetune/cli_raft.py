"""`graft dataset split | raft | preferences`: from questions over documents to frozen rows."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from eval.cases import read_dataset
from eval.cli_retrieval import check_writable, ended_by_signal
from eval.collection import placed
from eval.schemas import DataSet
from finetune.frozen import Card, described, freeze, refuse_existing, sha256_of, without_leaks
from finetune.schemas import FAULTS, SftRow
from ingest.errors import InvalidError
from service.cli_options import JsonOption, connected, ingest_settings, service_settings
from service.show import err, escape, out, write_json
from service.template import Template

SeedOption = Annotated[int, typer.Option(help="Of what goes with chance.")]
OutOption = Annotated[Path, typer.Option("--out", help="The file of the rows; its card is written beside it.")]


def split(
    questions: Annotated[Path, typer.Argument(help="A data set, as `graft eval answers` reads them.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Gets learn.json and held-out.json.")],
    share: Annotated[float, typer.Option(min=0.01, max=0.99, help="Of the questions, held out.")] = 0.25,
    seed: SeedOption = 17,
) -> None:
    """Splits a data set into questions to learn from and questions that measure, with no document on both sides."""
    from finetune.split import split_dataset

    sides = split_dataset(read_dataset(questions), share, seed)
    out_folder.mkdir(parents=True, exist_ok=True)
    files = [out_folder / f"{name}.json" for name in ("learn", "held-out")]
    if there := [file for file in files if file.exists()]:
        raise InvalidError(f"{str(there[0])!r} is there already: choose another folder")
    for side, file in zip(sides, files, strict=True):
        file.write_text(side.model_dump_json(indent=1) + "\n")
        out.print(f"{file}: {len(side.cases)} questions, {len(side.documents)} documents", markup=False)


def raft(
    questions: Annotated[list[Path], typer.Argument(help="Data sets to learn from.")],
    to: OutOption,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Data sets that measure: nothing of them enters. May be repeated.")
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="That the questions are about, where they bring no documents."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="The version that the tuned model will be asked with.")] = "tuned-1",
    refusals: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of rows whose passages lack the answer.")
    ] = 0.2,
    words: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 40,
    tokens: Annotated[int, typer.Option(min=64, help="Of a prompt, at most.")] = 512,
    base: Annotated[
        str | None, typer.Option(help="The model whose tokens are counted; default the served one.")
    ] = None,
    seed: SeedOption = 17,
    to_json: JsonOption = None,
) -> None:
    """Makes rows by retrieving for each question: gold passages among others, answers that cite, and refusals."""
    from finetune.dataset import Mix, raft_rows
    from finetune.tokens import token_counter

    refuse_existing(to)
    check_writable(to_json)
    mix = Mix(prompt=prompt, refusals=refusals, words=words, tokens=tokens, seed=seed)
    kept_out = [read_dataset(path) for path in held_out or ()]
    learned = [(path, read_dataset(path)) for path in questions]
    counter = token_counter(base or service_settings(None).model, ingest_settings().models)
    rows, left_out = list[SftRow](), Counter[str]()
    paths = frozenset(path for one in kept_out if not one.documents for case in one.cases for path in case.relevant)
    with ended_by_signal(), connected() as client, Progress(console=err, transient=True) as bar:
        version = client.prompt(prompt)[-1]
        template = Template.of(version.source)
        for _, dataset in learned:
            tell = _teller(bar, dataset)
            with placed(client, dataset, collection=None if dataset.documents else collection) as place:
                made = raft_rows(client, dataset, place, template, mix, counter, tell, paths)
            rows += made.rows
            left_out.update(made.left_out)
    clean, leaked = without_leaks(rows, kept_out)
    if not clean:
        why = "; ".join(f"{count}: {reason}" for reason, count in sorted((left_out + Counter(leaked)).items()))
        raise InvalidError(f"no question gave a row ({why or 'there is none'})")
    card = freeze(
        clean,
        to,
        method="sft",
        prompt_version=version.version,
        made_by={"command": "raft", **mix.model_dump()},
        sources=[{"name": dataset.name, "sha256": sha256_of(path)} for path, dataset in learned if path.is_file()],
        left_out={**left_out, **leaked},
        held_out=described(kept_out),
    )
    tell_card(card, to, to_json)


def preferences(
    rows_file: Annotated[Path, typer.Argument(help="Rows of `graft dataset raft`.")],
    to: OutOption,
    every: Annotated[
        bool,
        typer.Option("--every", help="A pair for each fault that fits, as a reward model wants them; not one a row."),
    ] = False,
    fault: Annotated[
        list[str] | None, typer.Option(help="Only pairs with this one rejected; may be given several times.")
    ] = None,
    seed: SeedOption = 17,
    to_json: JsonOption = None,
) -> None:
    """Makes preference rows of answers' rows: right and cited, against wrong, uncited or without support."""
    from finetune.preferences import preference_rows
    from finetune.rows import read_rows

    refuse_existing(to)
    rows = read_rows(rows_file, "sft")
    asked = [row for row in rows.rows if isinstance(row, SftRow)]
    if unknown := sorted(set(fault or ()) - set(FAULTS)):
        raise InvalidError(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    faults = tuple(one for one in FAULTS if not fault or one in fault)
    made = preference_rows(asked, seed, every, faults)
    paired = {row.prompt for row in made}
    lost = sum(row.prompt not in paired for row in asked)
    if not made:
        raise InvalidError(f"{str(rows_file)!r} has no row with numbered passages and an answer to make such a pair of")
    card = freeze(
        made,
        to,
        method="dpo",
        prompt_version=rows.prompt_version,
        made_by={"command": "preferences", "seed": seed, "every": every, "faults": faults},
        sources=[{"name": rows.name or rows_file.name, "sha256": rows.digest}],
        left_out={"no fault could be made of it": lost} if lost else None,
    )
    tell_card(card, to, to_json)


def _teller(bar: Progress, dataset: DataSet) -> Callable[[int, int], None]:
    task = bar.add_task(escape(dataset.name), total=len(dataset.cases))
    return lambda done, of: bar.update(task, completed=done, total=of)


def tell_card(card: Card, path: Path, to_json: str | None) -> None:
    """What was made."""
    if to_json:
        write_json(card, to_json)
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(card.kinds.items()))
    out.print(f"{path}: {card.rows} rows ({kinds}), {card.digest[:12]}", markup=False)
    for reason, count in sorted(card.left_out.items()):
        out.print(f"  left out {count}: {reason}", markup=False)
