"""Markdown with its front matter, reStructuredText, source code and other text: kept as decoded."""

import datetime
import re
from itertools import pairwise
from typing import Any

import yaml
from markdown_it import MarkdownIt

from ingest.parse_decode import decode
from ingest.parse_types import MARKDOWN, RST
from ingest.schemas import Heading, ParsedText

MATTER_CHARS = 65_536  # of front matter; longer is text
_BLOCKS = MarkdownIt("commonmark").disable(["inline", "text_join"])  # a line of 10 MB has no headings in it
_INLINE = MarkdownIt("commonmark")
_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_UNDERLINE = re.compile(r"""([!-/:-@[-`{-~])\1*[ \t]*""")


def read_text(data: bytes, mime: str) -> ParsedText:
    """Raises DocumentError for bytes that are no text."""
    text = decode(data)
    if mime == MARKDOWN:
        return read_markdown(text)
    return ParsedText(text=text, mime=mime, headings=rst_headings(text) if mime == RST else ())


def read_markdown(text: str) -> ParsedText:
    """Front matter goes into metadata and acl, and out of the text."""
    body, metadata, acl = front_matter(text)
    return ParsedText(text=body, mime=MARKDOWN, headings=markdown_headings(body), metadata=metadata, acl=acl)


def markdown_headings(text: str) -> tuple[Heading, ...]:
    """ATX and setext headings outside code, by CommonMark's rules."""
    line_starts = [0, *(match.end() for match in re.finditer(r"\n|\r\n?", text))]
    tokens = _BLOCKS.parse(text)
    found = []
    for opened, inline in pairwise(tokens):
        if opened.type == "heading_open" and opened.map:
            spans = _INLINE.parseInline(inline.content)[0].children or []
            title = "".join(span.content for span in spans).strip()
            found.append(Heading(level=int(opened.tag[1]), start=line_starts[opened.map[0]], title=title))
    return tuple(found)


def rst_headings(text: str) -> tuple[Heading, ...]:
    """Titles underlined, or over- and underlined; styles are levels in the order that they come in (docutils' rule)."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    styles: list[tuple[str, bool]] = []
    found = []
    for at, (title, under) in enumerate(pairwise(line.rstrip() for line in lines)):
        if not title or not _is_rule(under) or _is_rule(title) or len(under) < len(title):
            continue
        over = at > 0 and lines[at - 1].rstrip() == under
        if not over and (title[0].isspace() or (at > 0 and lines[at - 1].strip())):
            continue  # an underline under the last line of a paragraph or a table
        style = (under[0], over)
        if style not in styles:
            styles.append(style)
        level = min(styles.index(style) + 1, 6)
        found.append(Heading(level=level, start=starts[at - over], title=title.strip()))
    return tuple(found)


def _is_rule(line: str) -> bool:
    return len(line) > 1 and _UNDERLINE.fullmatch(line) is not None


def front_matter(text: str) -> tuple[str, dict[str, Any], tuple[str, ...] | None]:
    """-> the text without it, its keys (a mapping under `metadata` merged in), and its `acl`.

    What is no YAML mapping stays in the text.
    """
    match = _MATTER.match(text)
    matter = _mapping(match[1]) if match and len(match[1]) <= MATTER_CHARS else None
    if match is None or matter is None:
        return text, {}, None
    acl = matter.pop("acl", None)
    nested = matter.pop("metadata", None)
    metadata = json_able({**matter, **nested} if isinstance(nested, dict) else matter)
    if nested is not None and not isinstance(nested, dict):
        metadata["metadata"] = json_able(nested)
    return text[match.end() :].lstrip("\r\n"), metadata, _groups(acl)


def _groups(acl: Any) -> tuple[str, ...] | None:
    if acl is None:
        return None
    return tuple(str(group) for group in acl) if isinstance(acl, (list, tuple, set)) else (str(acl),)


def _mapping(source: str) -> dict[Any, Any] | None:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(source)):
            return None  # a few lines of references can stand for gigabytes
        loaded = yaml.safe_load(source)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def json_able(value: Any) -> Any:
    """Dates become ISO 8601, what JSON lacks becomes text."""
    match value:
        case dict():
            return {str(key): json_able(one) for key, one in value.items()}
        case list() | tuple() | set():
            return [json_able(one) for one in value]
        case datetime.date():  # datetime is one too
            return value.isoformat()
        case float() if value != value or value in {float("inf"), float("-inf")}:
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
