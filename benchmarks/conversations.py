"""Fifty follow-up questions over `examples/`: as they are, rewritten, and in the form that stands alone.

The rules of `service.rewrite` were made while half of the conversations was looked at; both halves are shown. Where an engine
is installed the bundled model rewrites too (`SERVICE_REWRITE=engine`), which shows why `auto` leaves that to the rules.
"""

import shutil
from pathlib import Path

from benchmarks.report import Options, Row, at_least, say, shown, skipped
from benchmarks.service_process import serving, with_engine
from eval.conversations import Conversation, Form, conversations, measure, of_slice, write_distractors
from eval.schemas import RetrievalRun
from ingest.errors import GraftError
from ingest.settings import CHECKOUT
from service.client import Client
from service.schemas_jobs import IngestRequest

BAR = 0.9  # of the standalone form's recall@10
LANGUAGES = ("en", "zh")
NAMES: dict[Form, str] = {
    "standalone": "standalone form",
    "as_is": "as it is",
    "rules": "by rules",
    "served": "by the bundled model",
}


def run(options: Options) -> list[Row]:
    asked = conversations()
    asked = (*asked[:3], *asked[-3:]) if options.quick else asked
    root = options.scratch / "conversations"
    shutil.copytree(CHECKOUT / "examples", root / "examples", dirs_exist_ok=True)
    write_distractors(root / "distractors")
    with serving(root / "home", [root]) as service, Client(service.url) as client:
        _ingest(client, root, "examples", "distractors")
        runs = measure(client, "default", asked, ("standalone", "as_is", "rules"))
    rows = [_row(form, runs, language) for language in LANGUAGES for form in ("standalone", "as_is", "rules")]
    return [*rows, *_by_the_model(root, asked, runs)]


def _ingest(client: Client, root: Path, *folders: str) -> None:
    for folder in folders:
        job = client.wait(client.ingest(IngestRequest(path=str(root / folder))).job_id)
        if job.state != "succeeded":
            raise RuntimeError(f"{folder} could not be ingested: {job.error}")


def _by_the_model(root: Path, asked: tuple[Conversation, ...], runs: dict[Form, RetrievalRun]) -> list[Row]:
    if not (CHECKOUT / ".venv-vllm").is_dir():
        return [skipped("follow-ups, by the bundled model", "no engine is installed (make engine)")]
    settings = {"SERVICE_REWRITE": "engine", "SERVICE_REWRITE_SECONDS": "60", "SERVICE_INGEST_ROOTS": str(root)}
    with with_engine(root / "engine-home", **settings) as url, Client(url) as client:
        try:
            _ingest(client, root, "distractors")  # examples/ is there
            runs |= measure(
                client, "default", asked, ("served",), lambda _, one: say(f"{one.case.id}: {one.case.question}")
            )
        except GraftError as error:
            return [skipped("follow-ups, by the bundled model", str(error))]
    return [_row("served", runs, language) for language in LANGUAGES]


def _row(form: Form, runs: dict[Form, RetrievalRun], language: str) -> Row:
    found, alone = (of_slice(runs[one], language=language) for one in (form, "standalone"))
    halves = ", ".join(
        f"{split} {found_of['recall@10']:.2f}"
        for split in ("tune", "check")
        if (found_of := of_slice(runs[form], language=language, split=split))
    )
    rest = ", ".join(f"{name} {found[name]:.3f}" for name in ("recall@1", "recall@3", "ndcg@10"))
    name, figure = f"follow-ups, {language}, recall@10: {NAMES[form]}", round(found["recall@10"], 3)
    if form == "rules":
        return at_least(name, figure, "", round(BAR * alone["recall@10"], 3), f"{rest}; by half: {halves}")
    return shown(name, figure, "", f"{rest}; by half: {halves}")
