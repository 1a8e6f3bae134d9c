"""Folders of the benchmark's own making: real papers as PDF, DOCX, HTML and Markdown, and texts of drawn words.

PDF and DOCX need reportlab and python-docx, of the development environment (`make dev`).
"""

import html
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.corpus import Abstract
from ingest.settings import CHECKOUT

SENTENCE_WORDS, PARAGRAPH_SENTENCES = 14, 6
Block = tuple[int, str]  # level of a heading (0: a paragraph) and its text


def can_write() -> bool:
    return bool(find_spec("reportlab") and find_spec("docx"))


def write(target: Path, papers: Sequence[str], abstracts: Sequence[Abstract], per_file: int = 10) -> list[Path]:
    """Each paper, and `per_file` abstracts, become a file; the four formats take turns."""
    documents = [("paper", _of_paper(text)) for text in papers]
    for start in range(0, len(abstracts), per_file):
        group = abstracts[start : start + per_file]
        documents.append(("abstracts", [block for one in group for block in ((2, one.title), (0, one.text))]))
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for n, (kind, blocks) in enumerate(documents):
        suffix, write_one = FORMATS[n % len(FORMATS)]
        written.append(target / f"{kind}-{n:04}{suffix}")
        write_one(written[-1], blocks)
    return written


def drawn_blocks(paragraphs: int, seed: int, heading_every: int = 8) -> list[Block]:
    """Paragraphs of about 84 words, each as often as in the examples of the product; no two documents are alike."""
    texts = drawn_paragraphs(paragraphs, seed)
    blocks: list[Block] = []
    for n, text in enumerate(texts):
        if n % heading_every == 0:
            blocks.append((2, " ".join(text.split()[:5]).rstrip(".")))
        blocks.append((0, text))
    return blocks


def drawn_paragraphs(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    words = generator.choice(_words(), (count, PARAGRAPH_SENTENCES, SENTENCE_WORDS))
    return [" ".join(" ".join(sentence).capitalize() + "." for sentence in paragraph) for paragraph in words]


def write_pdf(file: Path, blocks: Iterable[Block]) -> None:
    """A4 pages in one column, with what Latin-1 has of the text."""
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import Paragraph, SimpleDocTemplate, Spacer

    styles = getSampleStyleSheet()
    flow = []
    for level, text in blocks:
        style = styles[f"Heading{level}" if level else "BodyText"]
        flow += [Paragraph(html.escape(text.encode("latin-1", "ignore").decode("latin-1")), style), Spacer(1, 4)]
    SimpleDocTemplate(str(file), invariant=1).build(flow)


def write_docx(file: Path, blocks: Iterable[Block]) -> None:
    from docx import Document

    document = Document()
    for level, text in blocks:
        if level:
            document.add_heading(text, level)
        else:
            document.add_paragraph(text)
    document.save(str(file))


def write_html(file: Path, blocks: Iterable[Block]) -> None:
    body = "\n".join(
        f"<h{level}>{html.escape(text)}</h{level}>" if level else f"<p>{html.escape(text)}</p>"
        for level, text in blocks
    )
    head = '<meta charset="utf-8"><title>A document</title>'
    file.write_text(f"<!doctype html>\n<html><head>{head}</head>\n<body>\n{body}\n</body></html>\n", encoding="utf-8")


def write_markdown(file: Path, blocks: Iterable[Block]) -> None:
    lines = [f"{'#' * level} {text}" if level else text for level, text in blocks]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


FORMATS: tuple[tuple[str, Callable[[Path, Iterable[Block]], None]], ...] = (
    (".pdf", write_pdf),
    (".docx", write_docx),
    (".html", write_html),
    (".md", write_markdown),
)


def _of_paper(text: str) -> list[Block]:
    title, *paragraphs = [part for part in text.split("\n\n") if part.strip()]
    return [(1, title), *((0, " ".join(paragraph.split())) for paragraph in paragraphs)]


def _words() -> list[str]:
    texts = [file.read_text(encoding="utf-8") for file in sorted((CHECKOUT / "examples/manuals").glob("*.md"))]
    return [word for text in texts for word in text.split() if word.isalpha()]
