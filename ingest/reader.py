"""Documents of any LlamaIndex reader (`MODULE:CLASS`): run in a child of its own, spooled as one file each, then read.

Knows nothing of collections or folders; what it spools is taken in like the files of a folder. To run a reader is to run
its code with the rights of the service, so only those that SERVICE_INGEST_READERS lists are.
"""

import hashlib
import importlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import IO, Annotated, Any, NamedTuple
from urllib.parse import quote

from pydantic import Field

from ingest.errors import DocumentError, ForbiddenError, InvalidError, UnavailableError
from ingest.schemas import Frozen, Heading, PageSpan, ParsedText, Skip
from ingest.sync import File, Walk

SETTING = "SERVICE_INGEST_READERS"
SUFFIX = ".reader.json"
MANIFEST = "manifest.json"  # written last
REFUSED = 3  # exit status: the last line of stderr is what the user did wrong
IDENTITIES = ("file_path", "url", "source", "file_name")  # metadata that tell a document from others
NAMES = ("file_path", "file_name", "title", "url")  # metadata that users know it by
MARKDOWN_SUFFIXES = frozenset({".md", ".markdown", ".mdx"})
LONGEST_ID = 512  # characters
OUTPUT_BYTES = 8192  # kept of the end
_SECRET = re.compile(r"(?i)key|token|secret|pass|cred|auth")  # in an argument's name


class ReaderSpec(Frozen):
    """`args` go to the constructor, or to the method that loads."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]  # module.path:Class
    args: dict[str, Any] = {}


class Order(Frozen):
    """What the child is told."""

    spec: ReaderSpec
    into: str
    max_documents: int
    max_bytes: int


def args_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` of the command line; a value that is JSON is what it says (numbers, lists, ...), else it is text."""
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidError(f"--arg {pair!r} is not of the form key=value")
        try:
            args[key] = json.loads(value, parse_constant=lambda constant: str(constant))
        except ValueError:
            args[key] = value
    return args


def allowed(name: str, names: Sequence[str]) -> None:
    """`names`: of readers, or `module.*` for all in a module and below it. Raises ForbiddenError."""
    module = name.partition(":")[0] + "."
    if not any(name == one or (one.endswith(".*") and module.startswith(one[:-1])) for one in names):
        listed = ", ".join(names) or "none"
        raise ForbiddenError(f"reader {name!r} is not among those that may run ({listed}); {SETTING} lists them")


def uri_of(spec: ReaderSpec) -> str:
    """The URIs of its documents are this, "#", and their ids. Other arguments are another source, but for secrets, which
    change while the source stays.
    """
    told = {key: value for key, value in spec.args.items() if not _SECRET.search(key)}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    return f"reader:{spec.name}?{digest}" if told else f"reader:{spec.name}"


def is_spooled(place: str) -> bool:
    return re.fullmatch(r"\d{8}" + re.escape(SUFFIX), PurePath(place).name) is not None


def spool(
    spec: ReaderSpec,
    into: Path,
    cancelled: Callable[[], bool],
    seconds: float,
    max_documents: int = 100_000,
    max_mb: int = 10_240,
) -> Walk:
    """Runs the reader and writes its documents into the folder `into`, whose earlier ones go. Blocks; the child is niced.

    `cancelled` is asked ten times a second. Raises Cancelled; InvalidError (no such reader or argument, it failed, it gave
    more than `max_documents` or `max_mb`); UnavailableError (it took over `seconds`).
    """
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in [*into.glob("*" + SUFFIX), *into.glob(MANIFEST)]:
        old.unlink()
    order = Order(spec=spec, into=str(into.absolute()), max_documents=max_documents, max_bytes=max_mb * 2**20)
    status, said = _run(order, cancelled, seconds)
    if status != 0 or not (into / MANIFEST).is_file():
        raise InvalidError(_failure(spec, status, said))
    manifest = json.loads((into / MANIFEST).read_bytes())
    files = [File(uri, str(into.absolute() / name), *rest) for uri, name, *rest in manifest["files"]]
    return Walk(files, [Skip(path=path, reason="the reader gave no text for it") for path in manifest["empty"]], [], [])


def load(place: str, max_chars: int | None = None) -> ParsedText:
    """A spooled document: its parts joined, with pages where every part has a `page_label`. Raises DocumentError."""
    try:
        parts = [json.loads(line) for line in Path(place).read_bytes().splitlines()]
        texts = [str(part["text"]) for part in parts]
        metadata = [dict(part["metadata"]) for part in parts]
    except OSError as error:
        raise DocumentError("read", error.strerror or type(error).__name__) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DocumentError("parse", "it is no document that a reader has given") from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise DocumentError("parse", "no text was found in it")
    if max_chars is not None and len(text) > max_chars:
        raise DocumentError(
            "parse", f"its text has {len(text):,} characters, over INGEST_MAX_TEXT_CHARS ({max_chars:,})"
        )
    pages = _pages(texts, [one.get("page_label") for one in metadata])
    common = {key: value for key, value in metadata[0].items() if all(one.get(key) == value for one in metadata)}
    mime, headings = _structure(text, str(parts[0].get("mime")), common)
    return ParsedText(text=text, mime=mime, pages=pages, headings=headings, metadata=common)


def _pages(texts: Sequence[str], labels: Sequence[Any]) -> tuple[PageSpan, ...]:
    if any(label is None for label in labels):
        return ()
    numbers = [int(str(label)) for label in labels if re.fullmatch(r"[1-9]\d{0,8}", str(label))]
    if len(numbers) < len(labels):  # roman numerals, "A-3"
        numbers = list(range(1, len(labels) + 1))
    spans, at = [], 0
    for number, text in zip(numbers, texts, strict=True):
        if text.strip():
            spans.append(PageSpan(number=number, start=at, end=at + len(text)))
        at += len(text) + 2
    return tuple(spans)


def _structure(text: str, mime: str, metadata: Mapping[str, Any]) -> tuple[str, tuple[Heading, ...]]:
    """-> (type, headings). "#" begins a heading in Markdown, and in text of which nothing says that it is something else."""
    from ingest.parse import markdown_headings

    named = str(metadata.get("file_name") or metadata.get("file_path") or "")
    suffix = PurePath(named).suffix.lower()
    is_markdown = mime == "text/markdown" or suffix in MARKDOWN_SUFFIXES
    if not is_markdown and (suffix or not re.search(r"^ {0,3}#{1,6} ", text, re.MULTILINE)):
        return "text/plain", ()
    headings = markdown_headings(text)
    return ("text/markdown" if is_markdown or headings else "text/plain"), headings


def _run(order: Order, cancelled: Callable[[], bool], seconds: float) -> tuple[int, str]:
    """-> (exit status of the child, the end of what it wrote to stdout and stderr)."""
    from ingest.pipeline import Cancelled

    child = subprocess.Popen(
        [sys.executable, "-c", "from ingest.reader import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said = bytearray()
    listener = threading.Thread(target=_keep_end, args=[child.stdout, said], daemon=True)
    listener.start()
    until = time.monotonic() + seconds
    try:
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.write(order.model_dump_json().encode())
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.1)
                break
            if cancelled():
                raise Cancelled
            if time.monotonic() > until:
                name = order.spec.name
                raise UnavailableError(f"reader {name!r} took over {seconds:g} s; narrow what it reads, or try again")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it started goes with it
        status = child.wait()
        listener.join(timeout=5)
    return status, said.decode("utf-8", "replace")


def _keep_end(output: IO[bytes], said: bytearray) -> None:
    with output:
        while piece := os.read(output.fileno(), 65_536):
            said += piece
            del said[:-OUTPUT_BYTES]


def _failure(spec: ReaderSpec, status: int, said: str) -> str:
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    if status == REFUSED and lines:
        return lines[-1]
    reason = " | ".join(lines[-3:])[-600:] or "it said nothing"
    for key, value in spec.args.items():
        if isinstance(value, str) and len(value) > 3 and _SECRET.search(key):
            reason = reason.replace(value, "…")
    ending = f"was killed by signal {-status}" if status < 0 else "failed"
    return f"reader {spec.name!r} {ending}: {reason}"


# in the child


def main() -> None:
    """Reads an Order from stdin. Exits with 0 once the manifest is written."""
    from ingest.worker import die_with_parent

    die_with_parent()
    os.nice(19)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory runs out, this process goes, not the service
    order = Order.model_validate_json(sys.stdin.buffer.read())
    try:
        _load_all(order)
    except InvalidError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)


def _load_all(order: Order) -> None:
    reader_class = _find(order.spec.name)
    method, given, asked = _assign(order.spec, reader_class)
    reader = reader_class(**_fitting(reader_class, given, order.spec.name))
    load_method = getattr(reader, method)
    spooled = _Spool(order)
    for document in load_method(**_fitting(load_method, asked, order.spec.name)):
        spooled.add(document)
    spooled.finish()


def _find(name: str) -> type[Any]:
    """Raises InvalidError."""
    from llama_index.core.readers.base import BaseReader

    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the reader needs
        package = "-".join(module_name.replace("_", "-").split(".")[:3])
        cure = (
            f"run: .venv/bin/pip install {package}" if package.startswith("llama-index-readers-") else "check its name"
        )
        raise InvalidError(f"reader {name!r}: there is no module {error.name!r} in .venv; {cure}") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, BaseReader):
        return found
    others = sorted(key for key, one in vars(module).items() if isinstance(one, type) and issubclass(one, BaseReader))
    raise InvalidError(
        f"reader {name!r}: {module_name} has no reader {class_name!r}; it has {', '.join(others) or 'none'}"
    )


class _Takes(NamedTuple):
    names: frozenset[str]
    others: bool  # it has **kwargs


def _takes(function: Callable[..., Any]) -> _Takes:
    parameters = inspect.signature(function).parameters.values()
    named = {one.name for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}} - {"self"}
    return _Takes(frozenset(named), any(one.kind is one.VAR_KEYWORD for one in parameters))


def _assign(spec: ReaderSpec, reader_class: type[Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """-> (name of the method that loads, arguments of the constructor, of the method). Raises InvalidError."""
    from llama_index.core.readers.base import BaseReader

    methods = {
        name: _takes(getattr(reader_class, name))
        for name in ("lazy_load_data", "load_data")
        if getattr(reader_class, name) is not getattr(BaseReader, name)
    }
    if not methods:
        raise InvalidError(f"reader {spec.name!r} has neither load_data nor lazy_load_data of its own")
    constructor = _takes(reader_class)
    rest = {key for key in spec.args if key not in constructor.names}
    fitting = [name for name, takes in methods.items() if rest <= takes.names]
    fitting += [name for name, takes in methods.items() if takes.others]
    if not fitting and constructor.others:
        fitting = list(methods)
        rest = rest & methods[fitting[0]].names
    if not fitting:
        known = constructor.names.union(*(takes.names for takes in methods.values()))
        unknown = ", ".join(map(repr, sorted(rest - known) or sorted(rest)))
        raise InvalidError(
            f"reader {spec.name!r} takes no argument {unknown}; it takes {', '.join(sorted(known)) or 'none'}"
        )
    given = {key: value for key, value in spec.args.items() if key not in rest}
    return fitting[0], given, {key: spec.args[key] for key in spec.args if key in rest}


def _fitting(function: Callable[..., Any], args: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`args`, with paths where paths are wanted. Raises InvalidError when one that is needed is missing."""
    signature = inspect.signature(function)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise InvalidError(f"reader {name!r}: {error}; give it as --arg NAME=VALUE") from error
    fitted = dict(args)
    for key, value in args.items():
        wanted = signature.parameters.get(key)
        annotation = "" if wanted is None else str(wanted.annotation)
        if isinstance(value, str) and "Path" in annotation and "str" not in annotation:
            fitted[key] = Path(value)
    return fitted


class _Entry:
    """A document while its parts come in."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name  # of its file
        self.path = path
        self.size = 0
        self.hash = hashlib.sha256()
        self.has_text = False


class _Spool:
    """Writes each document into a file, a line of JSON for each of its parts, and last of all the manifest."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.into = Path(order.into)
        self.entries: dict[str, _Entry] = {}
        self.times = Counter[str]()  # that a made-up id came
        self.paths: set[str] = set()
        self.documents = self.bytes = 0

    def add(self, document: Any) -> None:
        if not hasattr(document, "id_") or not hasattr(document, "metadata"):
            raise InvalidError(f"reader {self.order.spec.name!r} gave a {type(document).__name__}, not a Document")
        text = _clean(document.text if hasattr(document, "text") else document.get_content())
        metadata: dict[str, Any] = _plain(dict(document.metadata or {}))
        identity = self._identity(str(document.id_), text, metadata)
        mime = getattr(document, "mimetype", None) or ""
        line = json.dumps({"id": identity, "text": text, "mime": mime, "metadata": metadata}, sort_keys=True).encode()
        entry = self.entries.get(identity)
        if entry is None:
            entry = _Entry(f"{len(self.entries) + 1:08}{SUFFIX}", self._path(identity, metadata))
            self.entries[identity] = entry
        self._count(len(line))
        with open(self.into / entry.name, "ab") as file:
            file.write(line + b"\n")
        entry.size += len(line) + 1
        entry.hash.update(line + b"\n")
        entry.has_text |= bool(text.strip())

    def finish(self) -> None:
        uri = uri_of(self.order.spec)
        files = [
            (f"{uri}#{quote(identity, safe='')}", one.name, one.path, one.size, _stamp(one.hash.digest()))
            for identity, one in self.entries.items()
            if one.has_text
        ]
        empty = [one.path for one in self.entries.values() if not one.has_text]
        partial = self.into / (MANIFEST + ".partial")
        partial.write_text(json.dumps({"files": files, "empty": empty}))
        partial.replace(self.into / MANIFEST)

    def _identity(self, given: str, text: str, metadata: Mapping[str, Any]) -> str:
        """The document's own id; where that is a random one, which the next run would not give again, one of what is known.

        Pages of one file are one document; other documents of one file are numbered.
        """
        if not _is_random(given) or given in map(str, metadata.values()):
            return given if len(given) <= LONGEST_ID else _digest(given)
        known = next((str(metadata[key]) for key in IDENTITIES if metadata.get(key)), "")
        known = known if 0 < len(known) <= LONGEST_ID else _digest(known or text)
        if metadata.get("page_label") and not known.startswith("sha256:"):
            return known
        self.times[known] += 1
        return known if self.times[known] == 1 else f"{known}#{self.times[known]}"

    def _path(self, identity: str, metadata: Mapping[str, Any]) -> str:
        shown = next((str(metadata[key]) for key in NAMES if metadata.get(key)), identity)
        shown = " ".join(shown.split())[:1000] or identity
        path, number = shown, 1
        while path in self.paths:
            number += 1
            path = f"{shown} ({number})"
        self.paths.add(path)
        return path

    def _count(self, size: int) -> None:
        self.documents += 1
        self.bytes += size
        name, most = self.order.spec.name, self.order.max_documents
        if self.documents > most:
            raise InvalidError(f"reader {name!r} gave more than {most:,} documents; narrow it by its arguments")
        if self.bytes > self.order.max_bytes:
            raise InvalidError(
                f"reader {name!r} gave more than {self.order.max_bytes // 2**20:,} MiB; narrow it by its arguments"
            )


def _is_random(identity: str) -> bool:
    try:
        return uuid.UUID(identity).version == 4
    except ValueError:
        return False


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _stamp(digest: bytes) -> int:
    """63 bits."""
    return int.from_bytes(digest[:8]) >> 1


def _clean(text: str) -> str:
    """Without what no database takes: NUL, halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {_clean(str(key)): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(one) for one in value), key=str)  # their order differs from run to run
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else _clean(str(value))
