"""A library's Markdown -> text that can be read and quoted.

Kept: headings, lists, quotes, tables, fenced code. Gone: escapes, emphasis, links' and images' addresses.
"""

from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from ingest.schemas import Heading

# The libraries write fences and # headings only, and no HTML: what looks like another block is text.
_MARKDOWN = (
    MarkdownIt("commonmark", {"maxNesting": 200})
    .enable("table")
    .disable(["reference", "code", "lheading", "html_block", "html_inline"])
)
_MARKDOWN.validateLink = lambda url: True  # type: ignore[method-assign]  # of any scheme: its address is dropped


class Line(NamedTuple):
    text: str
    level: int = 0  # of a heading
    title: str = ""


def readable(markdown: str) -> tuple[str, tuple[Heading, ...]]:
    """-> text and its headings, at the code point where their line starts."""
    lines = _blocks(SyntaxTreeNode(_MARKDOWN.parse(markdown)).children)
    headings, at = [], 0
    for line in lines:
        if line.level:
            headings.append(Heading(level=line.level, start=at, title=line.title))
        at += len(line.text) + 1
    return "\n".join(line.text for line in lines), tuple(headings)


def markdown_table(rows: list[list[str]]) -> str:
    """The first row is the header; short rows are filled up."""
    width = max(map(len, rows), default=0)
    if not width:
        return ""
    written = ["| " + " | ".join(map(_cell, [*row, *[""] * (width - len(row))])) + " |" for row in rows]
    return "\n".join([written[0], "|" + " --- |" * width, *written[1:]])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _blocks(nodes: list[SyntaxTreeNode], tight: bool = False) -> list[Line]:
    lines: list[Line] = []
    for node in nodes:
        block = _block(node)
        if block and lines and not tight:
            lines.append(Line(""))
        lines.extend(block)
    return lines


def _block(node: SyntaxTreeNode) -> list[Line]:
    match node.type:
        case "heading":
            title, level = " ".join(_inline(node).replace("\u200b", "").split()), int(node.tag[1])
            return [Line(f"{'#' * level} {title}", level, title)] if title else []
        case "paragraph":
            text = _inline(node).strip()
            return [Line(line.rstrip()) for line in text.split("\n")] if text else []
        case "bullet_list" | "ordered_list":
            return _list(node)
        case "blockquote":
            return [line._replace(text=f"> {line.text}".rstrip()) for line in _blocks(node.children)]
        case "fence":
            mark = node.markup
            return [Line(line) for line in [f"{mark}{node.info}", *node.content.rstrip("\n").split("\n"), mark]]
        case "table":
            rows = [[_inline(cell) for cell in row.children] for part in node.children for row in part.children]
            return [Line(line) for line in markdown_table(rows).split("\n")] if any(map(any, rows)) else []
        case "hr":
            return []
        case _:
            return [Line(line) for line in node.content.split("\n")]


def _list(node: SyntaxTreeNode) -> list[Line]:
    first = int(node.attrs.get("start", 1))
    lines = []
    for at, item in enumerate(node.children):
        mark = f"{first + at}{item.markup} " if node.type == "ordered_list" else "- "
        inside = _blocks(item.children, tight=True)
        if inside:
            lines.append(inside[0]._replace(text=mark + inside[0].text))
            lines.extend(line._replace(text=" " * len(mark) + line.text) for line in inside[1:])
    return lines


def _inline(node: SyntaxTreeNode) -> str:
    if node.type in {"softbreak", "hardbreak"}:
        return "\n"
    if node.type == "image" or not node.children:  # an image's content is its description
        return "" if node.type in {"inline", "link", "em", "strong"} else node.content
    return "".join(map(_inline, node.children))
