"""The real documents: SciFact's abstracts with their questions and judgements, and the papers of COVID-QA.

Read from `--data`, never copied into the project. Cuts and embeds them by the product's own code; vectors are kept in the
scratch folder, under the embedder's fingerprint and runtime, since a full set takes minutes.
"""

import csv
import gzip
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.report import say
from ingest.chunk import split
from ingest.embed import Embedder, TokenCounter, Vectors
from ingest.parse import markdown_headings
from ingest.schemas import Chunk, Chunking, ParsedText, document_id
from ingest.settings import CHECKOUT

ENGLISH_EXAMPLES = ("faq.html", "manuals/*", "policies/*", "reports/*")


class Abstract(NamedTuple):
    id: str
    title: str
    text: str


class Questions(NamedTuple):
    """`judged`: by question, the ids of the abstracts that answer it."""

    texts: dict[str, str]
    judged: dict[str, frozenset[str]]


def abstracts(folder: Path, count: int | None = None) -> list[Abstract]:
    """The first `count` of SciFact."""
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Abstract(row["_id"], row["title"], row["text"]) for row in rows[:count]]


def questions(folder: Path) -> Questions:
    """The training part of SciFact; each of its judgements is 1."""
    judged: dict[str, set[str]] = {}
    with (folder / "qrels" / "train.tsv").open(newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            judged.setdefault(row["query-id"], set()).add(row["corpus-id"])
    with (folder / "queries.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = {row["_id"]: row["text"] for row in rows if row["_id"] in judged}
    return Questions(texts, {key: frozenset(judged[key]) for key in texts})


def papers(folder: Path, count: int | None = None) -> list[str]:
    """The first `count` papers of COVID-QA, long ones."""
    (file,) = folder.glob("*.json")
    documents = json.loads(file.read_text(encoding="utf-8"))["data"]
    return [paragraph["context"] for document in documents for paragraph in document["paragraphs"]][:count]


def write_abstracts(target: Path, chosen: Sequence[Abstract], per_file: int = 10) -> None:
    """`per_file` abstracts a file: in turn Markdown with headings, and plain text."""
    target.mkdir(parents=True, exist_ok=True)
    for n, start in enumerate(range(0, len(chosen), per_file)):
        group = chosen[start : start + per_file]
        if n % 2:
            (target / f"abstracts-{n:04}.txt").write_text("\n\n".join(f"{one.title}\n\n{one.text}" for one in group))
        else:
            (target / f"abstracts-{n:04}.md").write_text("\n\n".join(f"## {one.title}\n\n{one.text}" for one in group))


def write_papers(target: Path, chosen: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for n, text in enumerate(chosen):
        (target / f"paper-{n:03}.txt").write_text(text)


def copy_examples(target: Path) -> None:
    """The English ones that come with the product: Markdown, PDF, DOCX, HTML, CSV."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ENGLISH_EXAMPLES:
        for file in sorted((CHECKOUT / "examples").glob(pattern)):
            shutil.copy(file, target / file.name)


def chunks(chosen: Sequence[Abstract], counter: TokenCounter, chunking: Chunking) -> list[tuple[str, Chunk]]:
    """-> (abstract's id, chunk), each abstract cut as a Markdown document with its title as heading."""
    found = []
    for one in chosen:
        text = f"# {one.title}\n\n{one.text}"
        parsed = ParsedText(text=text, mime="text/markdown", headings=markdown_headings(text))
        identity = document_id("bench", one.id, 0)
        found += [(one.id, chunk) for chunk in split(identity, parsed, chunking, counter)]
    return found


def vectors(texts: Sequence[str], embedder: Embedder, scratch: Path, queries: bool = False) -> Vectors:
    """From the scratch folder when these texts were embedded before."""
    said = "\0".join([embedder.fingerprint, embedder.runtime, str(queries), *texts])
    kept = scratch / f"vectors-{hashlib.sha256(said.encode()).hexdigest()[:16]}.npy"
    if kept.exists():
        return np.asarray(np.load(kept), dtype=np.float32)
    if queries:
        made = np.stack([embedder.embed_query(text) for text in texts])
    else:
        say(f"embedding {len(texts):,} chunks with {Path(embedder.name).name} on {embedder.runtime}")
        made = np.concatenate([embedder.embed(texts[at : at + 192]) for at in range(0, len(texts), 192)])
    unfinished = kept.with_suffix(".unfinished.npy")
    np.save(unfinished, made)
    unfinished.replace(kept)
    return made
