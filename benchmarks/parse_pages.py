"""Pages a second of our parsing beside pypdf and markitdown, on the same PDFs, and the share of expected text found.

The three take turns, file by file, each in a process that has its libraries loaded. No OCR, which the others lack; counted
are the PDFs that all three read. The expected texts came with the samples: they are markitdown's own, of its tests.
"""

import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import minilm, mixed
from benchmarks.report import Options, Row, median, say, shown, skipped
from deploy.environment import SetupError
from ingest.errors import DocumentError
from ingest.parse import ParseOptions, parse

OURS, OTHERS = "graft", ("pypdf", "markitdown")
TOOLS = (OURS, *OTHERS)
PDFS, PARAGRAPHS = 4, 150  # generated ones, of about 25 pages
RUN = 5  # words


class Read(NamedTuple):
    seconds: float
    text: str
    pages: int


Reads = dict[Path, dict[str, list[Read]]]  # by file and tool, one a round; none where the tool found no text


def run(options: Options) -> list[Row]:
    name = "pages parsed"
    samples = options.folder("doc_samples")
    if samples is None:
        return [skipped(name, "it needs --data with doc_samples/")]
    if not mixed.can_write():
        return [skipped(name, "it needs reportlab and python-docx: make dev")]
    if options.quick and not minilm.is_ready():
        return [skipped(name, "its environment is not made yet, which takes minutes: run it once without --quick")]
    try:
        python = minilm.environment()
    except SetupError as error:
        return [skipped(name, str(error).splitlines()[0])]
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        made = []
        for n in range(1 if options.quick else PDFS):
            made.append(Path(folder) / f"generated-{n}.pdf")
            mixed.write_pdf(made[-1], mixed.drawn_blocks(20 if options.quick else PARAGRAPHS, n))
        found = sorted(samples.rglob("*.pdf"))
        rounds = 1 if options.quick else 3
        with _others(python) as others:
            return [
                *_speed("samples", read_all(found[: 5 if options.quick else None], others, rounds)),
                *_speed("generated", read_all(made, others, rounds)),
                *_recall(samples, others),
            ]


class Others:
    """The process in which the others run."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def read(self, tool: str, file: Path) -> Read | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([tool, str(file)]), file=self.process.stdin, flush=True)
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return Read(**said) if said.get("text", "").strip() else None


@contextmanager
def _others(python: Path) -> Iterator[Others]:
    command = [python, minilm.HERE / "parse_others.py"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        yield Others(process)


def read_all(files: Sequence[Path], others: Others, rounds: int) -> Reads:
    """The first round is to warm up, and is not counted."""
    found: Reads = {file: {tool: [] for tool in TOOLS} for file in files}
    for n in range(rounds + 1):
        for file in files:
            for tool in TOOLS:
                read = _ours(file) if tool == OURS else others.read(tool, file)
                if read and n:
                    found[file][tool].append(read)
        say(f"{len(files)} PDFs, round {n} of {rounds}")
    return found


def _ours(file: Path) -> Read | None:
    data = file.read_bytes()
    start = time.perf_counter()
    try:
        parsed = parse(data, file.name, ParseOptions(max_chars=20_000_000, ocr=False))
    except DocumentError:
        return None
    return Read(time.perf_counter() - start, parsed.text, len(parsed.pages))


def _speed(which: str, reads: Reads) -> list[Row]:
    both = {file: by_tool for file, by_tool in reads.items() if all(by_tool.values())}
    pages = sum(by_tool["pypdf"][0].pages for by_tool in both.values())
    seconds = {
        tool: sum(median([read.seconds for read in by_tool[tool]]) for by_tool in both.values()) for tool in TOOLS
    }
    failed = ", ".join(f"{tool} {sum(not by_tool[tool] for by_tool in reads.values())}" for tool in TOOLS)
    note = f"{len(both)} of {len(reads)} PDFs, {pages} pages; not read, or no text found: {failed}"
    rows = [shown(f"{which}: pages parsed, {tool}", pages / seconds[tool], "pages/s") for tool in TOOLS]
    rows[0] = rows[0]._replace(note=note)
    return [
        *rows,
        *(shown(f"{which}: ours / {tool}, pages/s", seconds[tool] / seconds[OURS], "times") for tool in OTHERS),
    ]


def _recall(samples: Path, others: Others) -> list[Row]:
    """Of all expected texts together: runs of words, for which their order counts, and words."""
    expected = {file.stem: words(file.read_text(encoding="utf-8")) for file in samples.rglob("expected_outputs/*.md")}
    pdfs = [file for file in sorted(samples.rglob("*.pdf")) if expected.get(file.stem)]
    texts = {tool: [_ours(pdf) if tool == OURS else others.read(tool, pdf) for pdf in pdfs] for tool in TOOLS}
    rows = []
    for length, what in ((RUN, f"runs of {RUN} words"), (1, "words")):
        for tool in TOOLS:
            pairs = [
                (grams(expected[pdf.stem], length), grams(words(read.text if read else ""), length))
                for pdf, read in zip(pdfs, texts[tool], strict=True)
            ]
            found = [(wanted & got).total() for wanted, got in pairs]
            total = [wanted.total() for wanted, _ in pairs]
            each = [f"{pdf.stem} {one / all_:.2f}" for pdf, one, all_ in zip(pdfs, found, total, strict=True)]
            rows.append(shown(f"expected text found, {what}, {tool}", sum(found) / sum(total), "", ", ".join(each)))
    return rows


def words(text: str) -> list[str]:
    """In lower case; a word that a hyphen parts at the end of a line is one."""
    return re.findall(r"\w+", re.sub(r"(?<=\w)-[ \t]*\n[ \t]*(?=\w)", "", text.lower()))


def grams(of: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(of[at : at + length]) for at in range(len(of) - length + 1))
