"""Documents behind URLs: a real S3 server (moto) and a real web server on loopback, and what may be read of them."""

import gzip
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from ingest.errors import DocumentError, ForbiddenError, InvalidError, SettingsError, UnavailableError
from ingest.remote import allowed, is_remote, prefixes_of, read, shown, uri_of, walk
from ingest.sync import is_below

MB = 2**20
SECRET = "wJalrXUtnFEMI-a-secret"


# what may be read


@pytest.mark.parametrize("place", ["s3://b/k", "gs://b", "az://c/x", "HTTPS://h/", "memory://x", "zip://a::s3://b/k"])
def test_a_url_is_remote(place: str) -> None:
    assert is_remote(place)


@pytest.mark.parametrize("place", ["/srv/docs", "docs/a.txt", "file:///etc/passwd", "FILE:///x", "C:\\x", ""])
def test_a_path_is_not_remote(place: str) -> None:
    assert not is_remote(place)


@pytest.mark.parametrize(
    "url",
    [
        "https://docs.example.org",
        "https://docs.example.org/guide/a.html?page=2#part",
        "HTTPS://Docs.Example.ORG:443/x",
        "https://docs.example.org./x",
        "https://intern.example.org/wiki/a%20b",
        "https://intern.example.org/%77iki/x",
        "s3://team-docs/handbook",
        "s3a://team-docs/handbook/a b.pdf",
        "s3://team-docs/handbook/100%.txt",
        "abfss://docs@account.dfs.core.windows.net/x",
    ],
)
def test_what_lies_at_or_below_a_prefix_is_allowed(url: str) -> None:
    allowed(url, PREFIXES)


PREFIXES = prefixes_of(
    "s3://team-docs/handbook/, https://docs.example.org\nhttps://intern.example.org:443/wiki/ http://[::1]:8080 "
    "abfs://docs@account.dfs.core.windows.net"
)


@pytest.mark.parametrize(
    "url",
    [
        "https://docs.example.org.evil.net/",
        "https://docs.example.org@evil.net/",
        "https://user:pass@docs.example.org/",
        "https://evil.net/https://docs.example.org/",
        "https://evil.net\\@docs.example.org/",
        "https://docs.example.org:8443/",
        "http://docs.example.org/",
        "https://intern.example.org/",
        "https://intern.example.org/wikis/a",
        "https://intern.example.org/wiki/../admin",
        "https://intern.example.org/wiki/%2e%2e/admin",
        "https://intern.example.org/wiki/..%2fadmin",
        "https://intern.example.org/wiki/..%5cadmin",
        "https://intern.example.org/wiki/%252e%252e/admin",
        "https://intern.example.org/wiki%2fa",
        "https://docs.example.org/a\r\nHost: evil.net",
        "https:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost:8000/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "s3://team-docs",
        "s3://team-docs/handbook2/a.pdf",
        "s3://team-docs/handbook/../secret",
        "s3://team-docs.evil/handbook/a",
        "gs://team-docs/handbook/a.pdf",
        "abfss://docs@other.dfs.core.windows.net/x",
        "file:///etc/passwd",
        "local:///etc/passwd",
        "memory://x",
        "simplecache::file:///etc/passwd",
        "https::s3://team-docs/handbook/a",
        "zip://passwd::s3://team-docs/handbook/a.zip",
        "/etc/passwd",
        "",
    ],
)
def test_anything_else_is_forbidden_and_the_setting_is_named(url: str) -> None:
    with pytest.raises(ForbiddenError) as caught:
        allowed(url, PREFIXES)
    assert "pass@" not in str(caught.value)
    if "none of those" in str(caught.value):
        assert "SERVICE_INGEST_URLS" in str(caught.value)
    with pytest.raises(DocumentError):
        read(url, PREFIXES, MB)
    with pytest.raises(ForbiddenError):
        walk(url, PREFIXES)


def test_without_the_setting_no_url_is_read() -> None:
    with pytest.raises(ForbiddenError, match=r"\(none\); SERVICE_INGEST_URLS"):
        walk("http://127.0.0.1:1/", prefixes_of(" "))


@pytest.mark.parametrize("prefix", ["s3://", "file:///", "memory://", "docs.example.org", "https://a:b@example.org"])
def test_a_prefix_that_cannot_be_one_is_refused_at_once(prefix: str) -> None:
    with pytest.raises(SettingsError, match="SERVICE_INGEST_URLS"):
        prefixes_of(prefix)


def test_a_signed_link_shows_no_secret_and_is_the_same_document_when_signed_anew() -> None:
    first = "https://docs.example.org/a%20b.pdf?id=7&X-Amz-Date=1&X-Amz-Signature=abc"
    again = "https://docs.example.org/a%20b.pdf?id=7&X-Amz-Date=2&X-Amz-Signature=def"
    assert shown(first) == "https://docs.example.org/a b.pdf"
    assert uri_of(first) == uri_of(again) != uri_of("https://docs.example.org/a%20b.pdf?id=8")
    assert "abc" not in uri_of(first)
    azure = "https://x.blob.core.windows.net/c/a.pdf?sv=2024&se=2026&sp=r&sig="
    assert uri_of(azure + "abc") == uri_of("https://x.blob.core.windows.net/c/a.pdf?sv=2025&se=2027&sp=r&sig=def")


def test_no_web_file_lies_below_another_but_objects_lie_below_their_folder() -> None:
    urls = ["https://h/", "https://h/guide", "https://h/guide/a", "https://h/guide?id=1", "https://h/guide?id=2"]
    uris = [uri_of(url) for url in urls]
    assert [[is_below(one, other) for one in uris].count(True) for other in uris] == [1] * 5
    assert is_below(uri_of("s3://b/folder/a"), uri_of("s3://b/folder/"))
    assert is_below(uri_of("s3://b/folder/a"), uri_of("s3://b"))
    assert not is_below(uri_of("s3://b/folder2/a"), uri_of("s3://b/folder"))


# an object store


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server that the environment names, with a bucket `team-docs` of its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    S3FileSystem.clear_instance_cache()  # of a test with another environment
    client = boto3.client("s3")
    client.create_bucket(Bucket="team-docs")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="team-docs"):
        keys = [{"Key": one["Key"]} for one in page.get("Contents", [])]
        if keys:
            client.delete_objects(Bucket="team-docs", Delete={"Objects": keys})
    client.delete_bucket(Bucket="team-docs")
    S3FileSystem.clear_instance_cache()


HANDBOOK = ["s3://team-docs/handbook"]


def put(s3: Any, key: str, body: bytes = b"text") -> None:
    s3.put_object(Bucket="team-docs", Key=key, Body=body)


def test_all_objects_below_a_prefix_are_found_and_read(s3: Any) -> None:
    keys = ["a b.pdf", "ä/100%.txt", "deep/er/c.md", "x::y#1.txt", "empty.txt"]
    for key in keys:
        put(s3, f"handbook/{key}", b"" if key == "empty.txt" else key.encode())
    put(s3, "handbook/", b"")  # how consoles write a folder
    put(s3, "handbook2/other.txt")
    found = walk("s3://team-docs/handbook/", HANDBOOK)
    assert [file.path for file in found.files] == sorted(f"s3://team-docs/handbook/{key}" for key in keys)
    assert found.failures == found.skips == found.unseen == []
    by_path = {file.path.removeprefix("s3://team-docs/handbook/"): file for file in found.files}
    for key in keys:
        expected = b"" if key == "empty.txt" else key.encode()
        assert read(by_path[key].place, HANDBOOK, MB) == expected
        assert by_path[key].size == len(expected)
    assert by_path["a b.pdf"].uri == "s3://team-docs/handbook/a%20b.pdf"
    assert by_path["x::y#1.txt"].uri == "s3://team-docs/handbook/x%3A%3Ay%231.txt"


@pytest.mark.slow
def test_over_a_thousand_objects_are_listed(s3: Any) -> None:
    for number in range(1001):  # a listing's page has a thousand
        put(s3, f"handbook/{number:04}.txt", b"x")
    assert len(walk("s3://team-docs/handbook", HANDBOOK).files) == 1001


def test_the_stamp_changes_with_the_content_and_only_with_it(s3: Any) -> None:
    put(s3, "handbook/a.txt", b"one")
    [first] = walk("s3://team-docs/handbook", HANDBOOK).files
    put(s3, "handbook/a.txt", b"one")
    assert walk("s3://team-docs/handbook", HANDBOOK).files == [first]
    assert walk("s3://team-docs/handbook/a.txt", HANDBOOK).files == [first]  # named by itself
    put(s3, "handbook/a.txt", b"two")
    [other] = walk("s3://team-docs/handbook", HANDBOOK).files
    assert (other.uri, other.size) == (first.uri, first.size)
    assert other.stamp != first.stamp
    assert 0 <= other.stamp < 2**63


def test_an_object_of_the_name_of_a_folder_is_found_beside_it(s3: Any) -> None:
    put(s3, "handbook")
    put(s3, "handbook/a.txt")
    assert len(walk("s3://team-docs/handbook", HANDBOOK).files) == 2


def test_hidden_names_are_left_out(s3: Any) -> None:
    for key in ("a.txt", ".env", ".git/config", "x/.y/z.txt"):
        put(s3, f"handbook/{key}")
    found = walk("s3://team-docs/handbook", HANDBOOK)
    assert [file.path for file in found.files] == ["s3://team-docs/handbook/a.txt"]
    assert [skip.path for skip in found.skips] == ["s3://team-docs/handbook/.env"]


def test_a_sidecar_labels_its_object_and_one_that_cannot_be_understood_keeps_it_out(s3: Any) -> None:
    for key in ("a.txt", "b.txt"):
        put(s3, f"handbook/{key}")
    put(s3, "handbook/a.txt.graft.json", b'{"acl": ["staff", "board"], "metadata": {"year": 2024}}')
    put(s3, "handbook/b.txt.graft.json", b'{"acl": "staff"}')
    put(s3, "handbook/c.txt.graft.json", b"{}")
    found = walk("s3://team-docs/handbook", HANDBOOK)
    [file] = found.files
    assert file.sidecar is not None
    assert file.sidecar.acl == ("board", "staff")
    assert file.sidecar.metadata == {"year": 2024}
    assert found.unseen == ["s3://team-docs/handbook/b.txt"]
    assert "b.txt.graft.json" in found.failures[0].reason
    assert [skip.path for skip in found.skips] == ["s3://team-docs/handbook/c.txt.graft.json"]
    assert walk("s3://team-docs/handbook/a.txt", HANDBOOK).files == [file]  # its sidecar counts there, too


def test_a_prefix_without_objects_is_empty_and_a_missing_bucket_is_an_error(s3: Any) -> None:
    assert walk("s3://team-docs/handbook/none", HANDBOOK).files == []
    with pytest.raises(InvalidError, match="no such bucket"):
        walk("s3://no-such-bucket/x", ["s3://no-such-bucket"])


def test_an_object_over_the_limit_or_gone_is_not_read(s3: Any) -> None:
    put(s3, "handbook/big.txt", b"x" * 1001)
    with pytest.raises(DocumentError, match=r"1,001 bytes or more, over INGEST_MAX_FILE_MB"):
        read("s3://team-docs/handbook/big.txt", HANDBOOK, 1000)
    assert len(read("s3://team-docs/handbook/big.txt", HANDBOOK, 1001)) == 1001
    with pytest.raises(DocumentError, match="gone"):
        read("s3://team-docs/handbook/never.txt", HANDBOOK, 1000)


def test_a_store_that_refuses_or_cannot_be_reached_is_an_error_without_secrets(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9") as caught:
        walk("s3://team-docs/handbook", HANDBOOK)
    assert SECRET not in str(caught.value)
    assert "list-type" not in str(caught.value)  # queries can be signed
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(InvalidError, match=r"credentials.*check"):
        walk("s3://team-docs/handbook", HANDBOOK)


@pytest.mark.parametrize(("scheme", "extra", "driver"), [("gs", "gcs", "gcsfs"), ("az", "azure", "adlfs")])
def test_a_missing_driver_is_named_with_the_command_that_installs_it(scheme: str, extra: str, driver: str) -> None:
    code = f"""
import sys
sys.modules[{driver!r}] = None
from ingest.remote import walk
walk("{scheme}://team-docs/x", ["{scheme}://team-docs"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"SettingsError: the driver for {scheme}:// is not installed" in done.stderr
    assert f".venv/bin/pip install 'graft[{extra}]'" in done.stderr


# a web server


class _Pages(BaseHTTPRequestHandler):
    """Each path answers in a way of its own; `requests` holds those that came."""

    requests: list[str] = []
    forbidden = ""  # where the redirect that must not be followed goes to

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.path in {"/no-head.txt", "/gone.txt"}:
            self._answer(405 if self.path == "/no-head.txt" else 404)
        else:
            self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        name = self.path.split("?")[0].removeprefix("/")
        getattr(self, "get_" + name.split(".")[0].replace("-", "_"), self.get_page)()

    def get_page(self) -> None:
        self._answer(200, b"<h1>Guide</h1>", {"Content-Type": "text/html; charset=utf-8", "ETag": '"v1"'})

    def get_plain(self) -> None:
        self._answer(200, b"# plain", {"Content-Type": "text/plain"})

    def get_no_head(self) -> None:
        assert self.headers["range"] in {"bytes=0-0", None}
        if self.headers["range"]:
            self._answer(206, b"t", {"Content-Range": "bytes 0-0/4", "Last-Modified": "yesterday"})
        else:
            self._answer(200, b"text")

    def get_gone(self) -> None:
        self._answer(404)

    def get_login(self) -> None:
        self._answer(403)

    def get_broken(self) -> None:
        self._answer(503)

    def get_here(self) -> None:
        self._answer(302, headers={"Location": "/plain.txt"})

    def get_away(self) -> None:
        self._answer(302, headers={"Location": self.forbidden})

    def get_file(self) -> None:
        self._answer(302, headers={"Location": "file:///etc/passwd"})

    def get_round(self) -> None:
        self._answer(302, headers={"Location": "/round"})

    def get_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 65536)

    def get_short(self) -> None:
        self._answer(200, b"ten bytes.", {"Content-Length": "100"})
        self.close_connection = True

    def get_bomb(self) -> None:
        self._answer(200, gzip.compress(bytes(50 * MB)), {"Content-Encoding": "gzip"})

    def get_packed(self) -> None:
        self._answer(200, gzip.compress(b"unpacked"), {"Content-Encoding": "gzip"})

    def get_cut(self) -> None:
        self._answer(200, gzip.compress(b"unpacked" * 100)[:-12], {"Content-Encoding": "gzip"})

    def get_odd(self) -> None:
        self._answer(200, b"?", {"Content-Encoding": "br"})

    def get_slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x")
        self.wfile.flush()
        time.sleep(1.5)

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client hung up, as it should


def serve(handler: type[BaseHTTPRequestHandler]) -> tuple[_Quiet, str]:
    server = _Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    class Elsewhere(_Pages):
        requests: list[str] = []

    inner, _Pages.forbidden = serve(Elsewhere)
    server, url = serve(_Pages)
    yield url
    assert Elsewhere.requests == []  # no redirect ever got there
    for one in (server, inner):
        one.shutdown()
        one.server_close()


def test_a_web_file_is_found_with_its_size_and_read(web: str) -> None:
    [file] = walk(f"{web}/plain.txt", [web]).files
    assert (file.path, file.size) == (f"{web}/plain.txt", 7)
    assert read(file.place, [web], MB) == b"# plain"
    [file] = walk(f"{web}/no-head.txt", [web]).files
    assert file.size == 4
    assert read(file.place, [web], MB) == b"text"


def test_the_place_of_a_web_file_tells_the_parser_the_type_that_the_server_says(web: str) -> None:
    [page] = walk(f"{web}/page?id=1", [web]).files
    assert page.place.endswith(".html")
    assert page.path == f"{web}/page"
    assert read(page.place, [web], MB) == b"<h1>Guide</h1>"
    assert _Pages.requests[-1] == "GET /page?id=1"
    assert walk(f"{web}/plain.md?x=1", [web]).files[0].place.endswith(".md")  # text/plain says nothing


def test_an_unchanged_web_file_keeps_its_stamp_and_one_without_a_version_is_read_each_time(web: str) -> None:
    assert walk(f"{web}/page", [web]) == walk(f"{web}/page", [web])
    assert walk(f"{web}/plain.txt", [web]) != walk(f"{web}/plain.txt", [web])


def test_a_web_file_that_is_gone_is_named_and_one_that_is_refused_is_an_error(web: str) -> None:
    found = walk(f"{web}/gone.txt", [web])
    assert found.files == []
    assert (found.failures[0].path, found.failures[0].reason) == (f"{web}/gone.txt", "the server says 404 Not Found")
    with pytest.raises(InvalidError, match="403 Forbidden"):
        walk(f"{web}/login", [web])
    with pytest.raises(UnavailableError, match="503"):
        walk(f"{web}/broken", [web])
    with pytest.raises(DocumentError, match="503"):
        read(f"{web}/broken", [web], MB)
    with pytest.raises(UnavailableError, match="refused"):
        walk("http://127.0.0.1:9/x?token=tell-no-one", ["http://127.0.0.1:9"])


def test_a_redirect_is_followed_where_it_may_go_and_nowhere_else(web: str) -> None:
    assert read(f"{web}/here", [web], MB) == b"# plain"
    assert walk(f"{web}/here", [web]).files[0].size == 7
    for name, reason in (("away", "SERVICE_INGEST_URLS"), ("file", "is not read")):
        with pytest.raises(ForbiddenError, match=rf"redirects, and.*{reason}"):
            walk(f"{web}/{name}", [web])
        with pytest.raises(DocumentError, match=rf"redirects, and.*{reason}"):
            read(f"{web}/{name}", [web], MB)
    with pytest.raises(DocumentError, match="over 5 times"):
        read(f"{web}/round", [web], MB)


def test_never_more_is_read_than_the_limit(web: str) -> None:
    for name in ("endless", "bomb"):
        with pytest.raises(DocumentError, match="over INGEST_MAX_FILE_MB"):
            read(f"{web}/{name}", [web], MB)
    with pytest.raises(DocumentError, match="over INGEST_MAX_FILE_MB"):
        read(f"{web}/plain.txt", [web], 6)
    assert read(f"{web}/packed", [web], 8) == b"unpacked"


def test_an_answer_that_stops_early_is_not_taken_for_the_file(web: str) -> None:
    for name, reason in (("short", "10 bytes, expected 100"), ("cut", "packing does not end"), ("odd", "'br'")):
        with pytest.raises(DocumentError, match=reason):
            read(f"{web}/{name}", [web], MB)
    with pytest.raises(DocumentError, match=r"did not go on for 0\.3 s"):
        read(f"{web}/slow", [web], MB, seconds=0.3)


@pytest.mark.slow
def test_reading_fits_into_the_memory_of_a_parser(s3: Any, web: str) -> None:
    put(s3, "handbook/big.bin", bytes(20 * MB))
    code = f"""
from ingest.worker import _enter_parser
_enter_parser(256 * 2**20)
from ingest.remote import read
assert len(read("s3://team-docs/handbook/big.bin", {HANDBOOK!r}, 30 * 2**20)) == 20 * 2**20
assert read("{web}/plain.txt", ["{web}"], 2**20) == b"# plain"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
