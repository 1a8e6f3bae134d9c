"""Documents behind a URL: the objects of a store (through fsspec), and single files of a web server (httpx).

Nothing is read that lies below none of the allowed prefixes (SERVICE_INGEST_URLS); redirects are checked like any other
URL. Keys of object stores are taken as they are written, web addresses percent-decoded. Credentials are the drivers' own
business (their environment variables): none is taken from a URL, and none is shown.
"""

import hashlib
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from mimetypes import MimeTypes
from pathlib import PurePosixPath
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, quote, unquote

import httpx
from pydantic import ValidationError

from ingest.errors import DocumentError, ForbiddenError, GraftError, InvalidError, SettingsError, UnavailableError
from ingest.schemas import Failure, Labels, Skip
from ingest.sync import SIDECAR, File, Walk

SETTING = "SERVICE_INGEST_URLS"
WEB = frozenset({"http", "https"})
SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
HERE = frozenset([  # what fsspec knows and this machine itself answers
    "file", "local", "memory", "dir", "zip", "tar", "libarchive", "reference", "cached", "blockcache", "filecache",
    "simplecache", "data", "git", "dvc", "generic", "async_wrapper", "asyncwrapper", "asynclocal", "dask", "jlab",
    "jupyter", "pyscript",
])  # fmt: skip
REDIRECTS = 5
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # between two pieces of an answer
SIDECAR_BYTES = 2**20
SIDECARS_AT_ONCE = 128
# What a store's listing calls the version of an object, the surest first.
VERSIONS = ("ETag", "md5Hash", "crc32c", "etag", "generation", "last_modified", "LastModified", "updated", "mtime")
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://")
_SIGNATURE = re.compile(
    r"(?i)x-(amz|goog|oss|ms)-.*|(aws|oss|google)access(key)?id|key-pair-id|policy|signature|expires|sig"
    r"|(access_|auth_?)?token|api_?key|code|password|secret"
)
_SHARED_ACCESS = re.compile(r"(?i)s[a-z]{1,5}")  # Azure's: se, sp, sv, skoid, ...; a signature only beside `sig`
_SECRET = re.compile(r"^(AWS|AZURE|GOOGLE|FSSPEC)_.*(SECRET|KEY|TOKEN|PASSWORD|CONNECTION_STRING)")
_TYPES = MimeTypes()  # without the files of the operating system, which differ
_MORE_SUFFIXES = {"text/markdown": ".md", "text/x-markdown": ".md", "application/xhtml+xml": ".html"}
_UNTYPED = frozenset({"", "text/plain", "application/octet-stream", "binary/octet-stream"})


class Location(NamedTuple):
    """A URL in parts that can be compared; `segments` of its path, web addresses percent-decoded."""

    scheme: str
    host: str  # or the bucket
    segments: tuple[str, ...]

    def covers(self, other: "Location") -> bool:
        ours = self.segments[:-1] if self.segments[-1:] == ("",) else self.segments
        return self[:2] == other[:2] and other.segments[: len(ours)] == ours


def is_remote(place: str) -> bool:
    """Whether it is a URL, of whatever scheme but file."""
    return bool(_URL.match(place)) and not place.lower().startswith("file://")


def prefixes_of(setting: str) -> tuple[str, ...]:
    """SERVICE_INGEST_URLS: prefixes separated by white space or commas. Raises SettingsError for one that is none."""
    prefixes = tuple(part for part in re.split(r"[\s,]+", setting) if part)
    for prefix in prefixes:
        _prefix(prefix)
    return prefixes


def allowed(url: str, prefixes: Sequence[str]) -> None:
    """Raises ForbiddenError unless `url` lies at or below one of `prefixes`."""
    try:
        location = _located(url)
    except ValueError as error:
        raise ForbiddenError(f"url {shown(url)!r} is not read: {error}") from error
    if not any(_prefix(prefix).covers(location) for prefix in prefixes):
        listed = ", ".join(prefixes) or "none"
        raise ForbiddenError(
            f"url {shown(url)!r} lies below none of those that may be read ({listed}); {SETTING} lists them"
        )


def uri_of(url: str) -> str:
    """The URL as documents are known by it. No URI of a web file lies below another's, as objects' do: it ends in "?",
    and a digest of the query without what signs it, so that a link signed anew names the same document.

    Raises InvalidError.
    """
    try:
        location = _located(url)
    except ValueError as error:
        raise InvalidError(f"url {shown(url)!r} is not read: {error}") from error
    path = "/".join(quote(segment, safe="") for segment in location.segments)
    if location.scheme not in WEB:
        return f"{location.scheme}://{location.host}/{path}".rstrip("/")
    return f"{location.scheme}://{location.host}/{path}?{_query_digest(httpx.URL(url).query.decode())}"


def shown(url: str) -> str:
    """For users: without userinfo, query and fragment, which may hold secrets."""
    try:
        location = _located(url)
        return f"{location.scheme}://{location.host}/{'/'.join(location.segments)}".rstrip("/")
    except ValueError:
        return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url)[0])[:300]


def walk(url: str, prefixes: Sequence[str], seconds: float = READ_SECONDS) -> Walk:
    """All objects at or below `url`, or the one web file. Hidden names are skipped; `NAME.graft.json` is a sidecar.

    A prefix without objects gives no files, as does a web file that is gone (with a failure that says so). Raises
    ForbiddenError, SettingsError (no driver), InvalidError (no such bucket, denied), UnavailableError (no answer).
    """
    allowed(url, prefixes)
    try:
        if _located(url).scheme in WEB:
            return _walk_web(url, prefixes, seconds)
        return _walk_store(_located(url))
    except (GraftError, MemoryError):
        raise
    except Exception as error:  # each driver has its own tree
        _raise_failed(url, error, seconds)


def read(
    place: str,
    prefixes: Sequence[str],
    max_bytes: int,
    limit: str = "INGEST_MAX_FILE_MB",
    seconds: float = READ_SECONDS,
) -> bytes:
    """The bytes behind a `File.place` of a walk; `limit`: the setting of `max_bytes`. Raises DocumentError."""
    try:
        allowed(place, prefixes)
        location = _located(place)
        if location.scheme in WEB:
            return _read_web(place, prefixes, max_bytes, seconds)
        return _read_object(location, max_bytes)
    except (DocumentError, MemoryError):
        raise
    except _TooLargeError as error:
        reason = f"it has {error.size:,} bytes or more, over {limit} ({max_bytes / 2**20:.4g} MiB)"
        raise DocumentError("read", reason) from None
    except GraftError as error:
        raise DocumentError("read", str(error)) from error
    except FileNotFoundError as error:
        raise DocumentError("read", "it is gone since the store was listed") from error
    except Exception as error:  # each driver has its own tree
        raise DocumentError("read", _said(error, seconds)) from error


# what a URL is


def _located(url: str) -> Location:
    """Raises ValueError with the reason why it is not read."""
    if not _URL.match(url):
        raise ValueError("it is no URL, as s3://bucket/folder is")
    scheme, rest = url.split("://", 1)
    scheme = SAME.get(scheme.lower(), scheme.lower())
    if "::" in scheme:
        raise ValueError("chains of URLs are not followed")
    if scheme in HERE:
        raise ValueError(f"{scheme} leads to this machine, not to a store")
    if scheme in WEB:
        try:
            parsed = httpx.URL(f"{scheme}://{rest}")  # it knows default ports of schemes in lower case
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"it is no URL: {error}") from error
        if parsed.userinfo:
            raise ValueError("user names and passwords are not taken from a URL")
        host = parsed.raw_host.decode().lower().rstrip(".")
        port = "" if parsed.port is None else f":{parsed.port}"
        host = f"[{host}]{port}" if ":" in host else host + port
        path = parsed.raw_path.split(b"?")[0].decode()
        segments = tuple(unquote(segment) for segment in path.removeprefix("/").split("/"))
    else:
        host, _, key = rest.partition("/")
        if "@" in host and (scheme != "az" or ":" in host):
            raise ValueError("user names and passwords are not taken from a URL")
        segments = tuple(key.split("/")) if key else ()
        if "::" in host:  # fsspec would take it for a chain
            raise ValueError("chains of URLs are not followed")
    if not host:
        raise ValueError("it names no host or bucket")
    _check(host, segments)
    return Location(scheme, host, segments)


def _check(host: str, segments: Sequence[str]) -> None:
    """Nothing that one reader of a URL takes for a step upwards, and another for a name."""
    for segment in (host, *segments):
        plain = segment
        for _ in range(3):  # encoded over again
            plain = unquote(plain)
        if any(part in {".", ".."} for part in re.split(r"[/\\]", plain)):
            raise ValueError("its path holds '.' or '..'")
        if re.search(r"[\x00-\x1f\x7f]", plain):
            raise ValueError("it holds control characters")


def _prefix(prefix: str) -> Location:
    try:
        return _located(prefix)
    except ValueError as error:
        raise SettingsError(
            f"{SETTING}: {shown(prefix)!r} cannot be allowed: {error}; write it as s3://bucket/folder"
        ) from error


def _query_digest(query: str) -> str:
    pairs = parse_qsl(query, keep_blank_values=True)
    azure = any(name.lower() == "sig" for name, _ in pairs)
    kept = [
        (name, value)
        for name, value in pairs
        if not _SIGNATURE.fullmatch(name) and not (azure and _SHARED_ACCESS.fullmatch(name))
    ]
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16] if kept else ""


def _stamp(*parts: object) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


# object stores


def _store(location: Location) -> tuple[Any, str]:
    """-> (the file system, its name of the bucket). Raises SettingsError, InvalidError."""
    import fsspec

    scheme = "abfs" if location.scheme == "az" else location.scheme
    try:
        system, root = fsspec.core.url_to_fs(f"{scheme}://{location.host}", use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(location.scheme)
        cure = f"run: .venv/bin/pip install 'graft[{extra}]'" if extra else "install it in .venv"
        raise SettingsError(f"the driver for {location.scheme}:// is not installed ({error}); {cure}") from error
    except ValueError as error:
        raise InvalidError(f"{location.scheme}:// cannot be read: {_said(error)}") from error
    return system, str(root).rstrip("/")


def _walk_store(location: Location) -> Walk:
    system, root = _store(location)
    key = "/".join(location.segments).rstrip("/")
    target = f"{root}/{key}" if key else root
    entries: dict[str, dict[str, Any]] = system.find(target, detail=True)
    if key:  # what is listed lies below; an object can have the name itself, and a sidecar beside it
        for name in (target, target + SIDECAR):
            with suppress(FileNotFoundError):
                entries.setdefault(name, system.info(name))
    entries = {name: one for name, one in entries.items() if one["type"] == "file" and not name.endswith("/")}
    if not entries and location.scheme != "s3" and not system.exists(root):  # S3 has said so by now
        raise FileNotFoundError(root)
    found = Walk([], [], [], [])
    names = [name for name in sorted(entries) if _is_seen(name, target, root, location, found)]
    sidecars = {name.removesuffix(SIDECAR): name for name in names if name.endswith(SIDECAR)}
    labels = _labels(system, [entries[name] for base, name in sidecars.items() if base in entries])
    for name in names:
        if name.endswith(SIDECAR):
            if name.removesuffix(SIDECAR) not in entries:
                path = _object_url(location, name, root)
                found.skips.append(Skip(path=path, reason="a sidecar of a file that is not there"))
        else:
            _add(found, _object_url(location, name, root), entries[name], labels.get(name + SIDECAR))
    return found


def _is_seen(name: str, target: str, root: str, location: Location, found: Walk) -> bool:
    """Names that start with a dot are left out, and so is what lies in folders of such names."""
    below = name[len(target) + 1 :].split("/") if name.startswith(target + "/") else [""]
    if below[-1].startswith(".") and not any(part.startswith(".") for part in below[:-1]):
        path = _object_url(location, name, root)
        found.skips.append(Skip(path=path, reason="hidden: its name starts with a dot"))
    return not any(part.startswith(".") for part in below)


def _object_url(location: Location, name: str, root: str) -> str:
    return f"{location.scheme}://{location.host}/{name[len(root) + 1 :]}"


def _add(found: Walk, url: str, entry: dict[str, Any], labels: Labels | str | None) -> None:
    """A file whose sidecar cannot be understood is not taken in: it might be shown to those who may not see it."""
    try:
        uri = uri_of(url)
    except InvalidError as error:
        found.failures.append(Failure(path=url, stage="read", reason=str(error)))
        return
    if isinstance(labels, str):
        found.failures.append(Failure(path=url, stage="read", reason=labels))
        found.unseen.append(uri)
        return
    version = next((entry[key] for key in VERSIONS if entry.get(key)), None) or sorted(entry.items(), key=str)
    size = int(entry.get("size") or 0)
    found.files.append(File(uri, url, url, size, _stamp(version, size), labels))


def _labels(system: Any, sidecars: Sequence[dict[str, Any]]) -> dict[str, Labels | str]:
    """-> by the sidecar's name, what it says, or the reason why that cannot be told."""
    labels: dict[str, Labels | str] = {
        one["name"]: f"its sidecar has over {SIDECAR_BYTES:,} bytes" for one in sidecars if one["size"] > SIDECAR_BYTES
    }
    names = [one["name"] for one in sidecars if one["size"] <= SIDECAR_BYTES]
    for start in range(0, len(names), SIDECARS_AT_ONCE):
        contents = system.cat(names[start : start + SIDECARS_AT_ONCE], on_error="return")
        labels.update({name: _label(name, content) for name, content in contents.items()})
    return labels


def _label(name: str, content: bytes | Exception) -> Labels | str:
    sidecar = f"its sidecar {PurePosixPath(name).name!r}"
    if isinstance(content, Exception):
        return f"{sidecar} cannot be read: {_said(content)}"
    try:
        labels = Labels.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        return f'{sidecar} does not fit: {where}: {first["msg"]}; write {{"acl": ["group"], "metadata": {{}}}}'
    return labels if labels.acl is None else labels.model_copy(update={"acl": tuple(sorted(labels.acl))})


def _read_object(location: Location, max_bytes: int) -> bytes:
    system, root = _store(location)
    with system.open(f"{root}/{'/'.join(location.segments)}", "rb", cache_type="none") as file:
        size = getattr(file, "size", None)
        if size is not None and size > max_bytes:
            raise _TooLargeError(size)
        data: bytes = file.read(max_bytes + 1 if size is None else size)
    if len(data) > max_bytes:
        raise _TooLargeError(len(data))
    return data


# web servers


def _walk_web(url: str, prefixes: Sequence[str], seconds: float) -> Walk:
    status = 0
    with _client(seconds) as client:
        for method, headers in (("HEAD", {}), ("GET", {"range": "bytes=0-0"})):  # some servers know no HEAD
            with _response(client, method, url, prefixes, headers) as response:
                if response.is_success:
                    return Walk([_web_file(url, response)], [], [], [])
                status, reason = response.status_code, f"the server says {_status(response)}"
    if status in {404, 410}:
        return Walk([], [], [Failure(path=shown(url), stage="read", reason=reason)], [])
    if status in {408, 429} or status >= 500:
        raise UnavailableError(f"{shown(url)!r} cannot be read now: {reason}; try again later")
    raise InvalidError(f"{shown(url)!r} cannot be read: {reason}; it must be open to this service without a login")


def _web_file(url: str, response: httpx.Response) -> File:
    """Its place ends in a fragment, which no server sees, where the name alone would tell the parser a wrong type."""
    headers = response.headers
    whole = re.search(r"/(\d+)$", headers.get("content-range", "")) or re.match(
        r"(\d+)$", headers.get("content-length", "")
    )
    size = 0 if whole is None or "content-encoding" in headers else int(whole[1])
    versions = [headers.get("etag"), headers.get("last-modified")]
    stamp = _stamp(*versions, size) if any(versions) else time.time_ns()  # nothing tells a change: it is read each time
    named = PurePosixPath(_located(url).segments[-1]).suffix.lower()
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    suffix = named
    if kind not in _UNTYPED and _TYPES.guess_type("x" + named)[0] != kind:
        suffix = _MORE_SUFFIXES.get(kind) or _TYPES.guess_extension(kind) or named
    place = str(httpx.URL(url).copy_with(fragment=None))
    if PurePosixPath(place).suffix != suffix:
        place = f"{place}#file{suffix}"
    return File(uri_of(url), place, shown(url), size, stamp)


def _read_web(place: str, prefixes: Sequence[str], max_bytes: int, seconds: float) -> bytes:
    with _client(seconds) as client, _response(client, "GET", place, prefixes) as response:
        if not response.is_success:
            raise DocumentError("read", f"the server says {_status(response)}")
        return _body(response, max_bytes)


def _client(seconds: float) -> httpx.Client:
    # What is not compressed cannot swell; a server that compresses all the same is unpacked within the limit.
    headers = {"user-agent": "graft", "accept": "*/*", "accept-encoding": "identity"}
    timeout = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
    return httpx.Client(headers=headers, timeout=timeout, follow_redirects=False)


@contextmanager
def _response(
    client: httpx.Client, method: str, url: str, prefixes: Sequence[str], headers: dict[str, str] | None = None
) -> Iterator[httpx.Response]:
    """The answer behind at most REDIRECTS redirects, its body unread. Raises ForbiddenError, InvalidError, httpx' errors."""
    target = httpx.URL(url).copy_with(fragment=None)
    for _ in range(REDIRECTS + 1):
        with client.stream(method, target, headers=headers) as response:
            if not response.has_redirect_location:
                yield response
                return
            target = target.join(response.headers["location"]).copy_with(fragment=None)
        try:
            allowed(str(target), prefixes)
        except ForbiddenError as error:
            raise ForbiddenError(f"{shown(url)!r} redirects, and {error}") from error
        if target.scheme not in WEB:
            raise ForbiddenError(f"{shown(url)!r} redirects to {target.scheme}://; only http and https are followed")
    raise InvalidError(f"{shown(url)!r} redirects over {REDIRECTS} times")


def _body(response: httpx.Response, max_bytes: int) -> bytes:
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in {"", "identity", "gzip", "x-gzip", "deflate"}:
        raise DocumentError("read", f"the server packs it as {packing!r}, which it was not asked to")
    declared = response.headers.get("content-length", "")
    if packing in {"", "identity"} and declared.isdigit() and int(declared) > max_bytes:
        raise _TooLargeError(int(declared))
    unpack = None if packing in {"", "identity"} else zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    parts, size = [], 0
    for raw in response.iter_raw(2**16):
        piece = unpack.decompress(raw, max_bytes + 1 - size) if unpack else raw
        size += len(piece)
        if size > max_bytes:
            raise _TooLargeError(size)
        parts.append(piece)
    if unpack and (not unpack.eof or unpack.unused_data):
        raise DocumentError("read", f"its {packing} packing does not end where the answer does")
    return b"".join(parts)


# what went wrong


class _TooLargeError(Exception):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _raise_failed(url: str, error: Exception, seconds: float) -> NoReturn:
    """Raises InvalidError for what would fail again, UnavailableError else."""
    if isinstance(error, FileNotFoundError):
        raise InvalidError(f"{shown(url)!r} cannot be read: there is no such bucket") from error
    refused = isinstance(error, PermissionError | ValueError | httpx.InvalidURL | httpx.UnsupportedProtocol)
    # botocore's, google-auth's and azure-core's; none of them need be installed
    refused |= bool(re.search(r"Credentials|Authentication|Validation|Config", type(error).__name__))
    if refused:
        raise InvalidError(
            f"{shown(url)!r} cannot be read: {_said(error, seconds)}; check the name and the service's credentials"
        ) from error
    raise UnavailableError(f"{shown(url)!r} cannot be read now: {_said(error, seconds)}") from error


def _said(error: Exception, seconds: float = READ_SECONDS) -> str:
    """One line, without what a URL in it or the environment keeps secret."""
    if isinstance(error, httpx.TimeoutException):
        return f"the server did not go on for {seconds:g} s"
    said = " ".join(str(error).split()) or type(error).__name__
    said = re.sub(r"//[^/\s@]+@", "//", re.sub(r"\?[^\s\"']+", "?…", said))
    for name, value in os.environ.items():
        if len(value) > 3 and _SECRET.match(name):
            said = said.replace(value, "…")
    return said[:300]


def _status(response: httpx.Response) -> str:
    return f"{response.status_code} {response.reason_phrase}".strip()
