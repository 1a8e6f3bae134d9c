"""The strategy `code`: source files are cut along the syntax tree (the idea of cAST, Zhang et al., 2025).

Neighbouring nodes are packed up to the limit; a node that is over it gives way to its children. A class or function that is
over it is packed by itself, and each of its parts but the first has the signatures around it as context.
"""

import importlib
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from tree_sitter import Language, Node, Parser

from ingest.chunk_piece import Budget, Piece, pack, sentence_spans, trimmed
from ingest.chunk_text import by_sentence
from ingest.schemas import ParsedText

GRAMMARS = {  # language -> module, function
    "bash": ("tree_sitter_bash", "language"),
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "csharp": ("tree_sitter_c_sharp", "language"),
    "go": ("tree_sitter_go", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "php": ("tree_sitter_php", "language_php"),
    "python": ("tree_sitter_python", "language"),
    "ruby": ("tree_sitter_ruby", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}
DEPTH = 64  # nodes deeper than this are cut as text: a chain of ten thousand additions is ten thousand nodes deep
DENSE = 20  # code points a token: a node with more is taken to be over the limit without counting
SIGNATURE = 120  # characters of one in a context
WRAPPERS = {"decorated_definition", "export_statement", "template_declaration"}


def by_code(parsed: ParsedText, budget: Budget) -> Iterator[Piece]:
    """The language is the one in `parsed.mime`, "text/x-python"; other files are cut by sentence."""
    name = parsed.mime.removeprefix("text/x-")
    if name not in GRAMMARS or name == parsed.mime:
        yield from by_sentence(parsed, budget)
        return
    data = parsed.text.encode("utf-8", "surrogatepass")
    source = _Source(parsed.text, None if parsed.text.isascii() else _places(data), budget)
    yield from _scope(source, Parser(_language(name)).parse(data).root_node, 0, len(parsed.text), (), 0)


class _Source(NamedTuple):
    text: str
    places: "np.ndarray[tuple[int], np.dtype[np.int32]] | None"  # by byte, its code point; None: they are the same
    budget: Budget

    def end(self, node: Node) -> int:
        return node.end_byte if self.places is None else int(self.places[node.end_byte])


class _Tile(NamedTuple):
    """A stretch that follows the one before it. `definition`: a class or function that is over the limit."""

    start: int
    end: int
    definition: Node | None = None


@cache
def _language(name: str) -> Language:
    module, function = GRAMMARS[name]
    return Language(getattr(importlib.import_module(module), function)())


def _places(data: bytes) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    leading = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    return np.concatenate([[0], np.cumsum(leading)]).astype(np.int32)


def _scope(source: _Source, node: Node, start: int, end: int, path: tuple[str, ...], depth: int) -> Iterator[Piece]:
    """What is in one definition, or in the whole file. `path`: the signatures around it."""
    signature = _signature(node)
    outer = _context(source, path)
    path = (*path, signature) if signature else path
    inner = _context(source, path)
    cuts = [start]
    for tile in _tiles(source, node, start, end, inner, depth):
        if tile.definition is None:
            cuts.append(tile.end)
            continue
        yield from _packed(source, cuts, start, outer, inner)
        yield from _scope(source, tile.definition, tile.start, tile.end, path, depth + 1)
        cuts = [tile.end]
    yield from _packed(source, cuts, start, outer, inner)


def _packed(source: _Source, cuts: list[int], first: int, outer: str | None, inner: str | None) -> Iterator[Piece]:
    """The part that begins at `first` holds the signature itself, so it has the outer context alone."""
    spans = list(pack(source.text, cuts, source.budget.room(inner), source.budget))
    if len(spans) > 1 and not any(map(str.isalnum, source.text[slice(*spans[-1])])):  # closing brackets alone
        start, at = spans[-2]
        last = max(cut for cut in cuts if cut < at)
        if last > start:
            spans[-2:] = [(start, last), (last, spans[-1][1])]
    for start, end in spans:
        yield Piece(start, end, outer if start == first else inner, floor=start)


def _tiles(source: _Source, node: Node, start: int, end: int, context: str | None, depth: int) -> Iterator[_Tile]:
    """text[start:end], which is `node` and what stands between it and the one before, without a gap."""
    children = node.children if depth < DEPTH else []
    if not children:
        yield from _plain_tiles(source, start, end, context)
    definition = _definition(node)
    for place, child in enumerate(children):
        stop = end if place == len(children) - 1 else source.end(child)
        if stop <= start:
            continue
        if _is_small(source, start, stop, context):
            yield _Tile(start, stop)
        elif _definition(child) is not None and child != definition:
            yield _Tile(start, stop, child)
        else:
            yield from _tiles(source, child, start, stop, context, depth + 1)
        start = stop


def _plain_tiles(source: _Source, start: int, end: int, context: str | None) -> Iterator[_Tile]:
    """A long string or comment."""
    begin, stop = trimmed(source.text, start, end)
    if begin < stop:
        for part in sentence_spans(source.text, begin, stop, source.budget.room(context), source.budget):
            yield _Tile(start, part[1])
            start = part[1]
    if start < end:
        yield _Tile(start, end)


def _is_small(source: _Source, start: int, end: int, context: str | None) -> bool:
    room = source.budget.room(context)
    return end - start <= DENSE * room and source.budget.count(source.text[start:end]) <= room


def _definition(node: Node) -> Node | None:
    """The class or function that a node is, or wraps in decorators and the like."""
    if node.type in WRAPPERS:
        inner = node.child_by_field_name("definition") or node.child_by_field_name("declaration")
        inner = inner or (node.named_children[-1] if node.named_children else None)
        return _definition(inner) if inner is not None else None
    if node.child_by_field_name("body") is None or "for_" in node.type or node.type.endswith("statement"):
        return None
    named = node.type in {"function_definition", "impl_item"} or node.child_by_field_name("name") is not None
    return node if named else None


def _signature(node: Node) -> str | None:
    """What stands before the body, on one line."""
    definition = _definition(node)
    body = definition.child_by_field_name("body") if definition is not None else None
    if definition is None or body is None or node.text is None:
        return None
    head = (definition.text or b"")[: body.start_byte - definition.start_byte].decode("utf-8", "replace")
    return textwrap.shorten(head, SIGNATURE, placeholder=" …").rstrip(" {:") or None


def _context(source: _Source, path: tuple[str, ...]) -> str | None:
    return source.budget.trim("\n".join(path)) if path else None
