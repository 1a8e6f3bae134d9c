"""`graft ingest --watch FOLDER` as a user runs it: a folder's changes arrive in the index by themselves, until Ctrl-C."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import GRAFT, HERON, KESTREL, Service, environment, running, until, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SOON = 60.0  # seconds: a change costs two or three; how many more depends on what else the machine does


@dataclass(frozen=True)
class Watched:
    """A folder that is followed by a process of its own, and the service that it tells."""

    folder: Path
    service: Service
    process: subprocess.Popen[bytes]
    output: Path

    def documents(self) -> dict[str, dict[str, Any]]:
        """By path below the folder."""
        reply = self.service.http.get("/documents")
        reply.raise_for_status()
        return {one["path"].removeprefix("docs/"): one for one in reply.json()}

    def found(self, word: str) -> set[str]:
        """Paths below the folder of the passages that hold `word`."""
        reply = self.service.http.post("/retrieve", json={"question": word, "top_k": 20})
        reply.raise_for_status()
        return {hit["path"].removeprefix("docs/") for hit in reply.json()["hits"] if word in hit["text"]}

    def wait_for(self, word: str, paths: set[str]) -> None:
        until(lambda: self._follows() and self.found(word) == paths, SOON)

    def wait_for_acl(self, path: str, acl: list[str]) -> None:
        until(lambda: self._follows() and self.documents()[path]["acl"] == acl, SOON)

    def _follows(self) -> bool:
        assert self.process.poll() is None, f"the watch ended:\n{self.output.read_text()}"
        return True


@contextmanager
def watching(service: Service, folder: Path, output: Path, **settings: str) -> Iterator[Watched]:
    process = start_watch(service.home, folder, output, **settings)
    try:
        yield Watched(folder, service, process, output)
    finally:
        process.kill()
        process.wait()


def start_watch(home: Path, folder: Path, output: Path, **settings: str) -> subprocess.Popen[bytes]:
    """In a session of its own, with Ctrl-C as a terminal's: what runs these tests may ignore it."""
    with output.open("wb") as log:
        return subprocess.Popen(
            [str(GRAFT), "ingest", "--watch", str(folder)],
            cwd=folder.parent,
            env=environment(home, **settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def interrupted(process: subprocess.Popen[bytes]) -> int:
    """-> its exit status."""
    process.send_signal(signal.SIGINT)
    return process.wait(30)


def says(output: Path, text: str) -> bool:
    return text in " ".join(output.read_text().split())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    root = tmp_path_factory.mktemp("watched")
    folder = write(root / "docs", {"heron.md": HERON, "old.md": "# Mooring\n\nThe mooring line is blue.\n"})
    write(folder, {"gone.md": "A zyzzyva is a weevil.\n", "secret.md": "Salaries are in the kumquat file.\n"})
    home = tmp_path_factory.mktemp("homes") / "watched"
    with (
        running(home, root, "--no-engine") as service,
        watching(service, folder, root / "watch.output") as watched,
    ):
        until(lambda: says(watched.output, "watching"), SOON)
        yield watched


def test_the_folder_is_taken_in_first(watched: Watched) -> None:
    watched.wait_for("impeller", {"heron.md"})
    assert says(watched.output, "4 done")


def test_an_edit_is_followed(watched: Watched) -> None:
    write(watched.folder, {"heron.md": HERON.replace("3.2 litres", "3.7 litres")})
    watched.wait_for("3.7 litres", {"heron.md"})
    assert watched.found("3.2 litres") == set()


def test_new_files_are_followed(watched: Watched) -> None:
    write(watched.folder, {"kestrel.md": KESTREL, "deep/er/note.txt": "A quarterly note."})
    watched.wait_for("quarterly", {"deep/er/note.txt"})
    watched.wait_for("coupling", {"kestrel.md"})


def test_a_move_is_followed_and_keeps_the_document(watched: Watched) -> None:
    before = watched.documents()["old.md"]
    (watched.folder / "archive").mkdir()
    (watched.folder / "old.md").rename(watched.folder / "archive/new.md")
    watched.wait_for("mooring", {"archive/new.md"})
    assert watched.documents()["archive/new.md"]["id"] == before["id"]
    assert "old.md" not in watched.documents()


def test_a_renamed_folder_is_followed(watched: Watched) -> None:
    write(watched.folder, {"one/a.md": "A walrus.", "one/two/b.md": "Another walrus."})
    watched.wait_for("walrus", {"one/a.md", "one/two/b.md"})
    before = watched.documents()
    (watched.folder / "one").rename(watched.folder / "renamed")
    watched.wait_for("walrus", {"renamed/a.md", "renamed/two/b.md"})
    assert watched.documents()["renamed/two/b.md"]["id"] == before["one/two/b.md"]["id"]


def test_a_deletion_is_followed(watched: Watched) -> None:
    watched.wait_for("zyzzyva", {"gone.md"})
    (watched.folder / "gone.md").unlink()
    watched.wait_for("zyzzyva", set())
    assert "gone.md" not in watched.documents()


def test_a_sidecar_is_followed_until_it_is_gone(watched: Watched) -> None:
    sidecar = write(watched.folder, {"secret.md.graft.json": '{"acl": ["board"]}'}) / "secret.md.graft.json"
    watched.wait_for_acl("secret.md", ["board"])
    write(watched.folder, {"secret.md.graft.json": '{"acl": ["staff"]}'})
    watched.wait_for_acl("secret.md", ["staff"])
    sidecar.unlink()
    watched.wait_for_acl("secret.md", [])
    assert "secret.md.graft.json" not in watched.documents()


def test_a_file_that_cannot_be_read_is_told(watched: Watched) -> None:
    write(watched.folder, {"torn.pdf": b"%PDF-1.4 torn"})
    until(lambda: says(watched.output, "failed docs/torn.pdf"), SOON)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_it_lives_through_a_restart_of_the_service_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    """And what changed after its first job, before it watched, arrives too."""
    folder = write(tmp_path / "docs", {"heron.md": HERON})
    home, port, output = tmp_path / "home", free_port(), tmp_path / "watch.output"
    with running(home, tmp_path, "--no-engine", SERVICE_PORT=port) as service:
        process = start_watch(home, folder, output)
        watched = Watched(folder, service, process, output)
        watched.wait_for("impeller", {"heron.md"})
        write(folder, {"early.md": "A kumquat before it was watched."})
        watched.wait_for("kumquat", {"early.md"})
        until(lambda: says(output, "watching"), SOON)
    write(folder, {"kestrel.md": KESTREL})  # while no service runs
    until(lambda: says(output, "tried again"), SOON)
    assert process.poll() is None
    with running(home, tmp_path, "--no-engine", SERVICE_PORT=port) as service:
        watched = Watched(folder, service, process, output)
        watched.wait_for("coupling", {"kestrel.md"})
        write(folder, {"late.md": "A walrus after the restart."})
        watched.wait_for("walrus", {"late.md"})
        assert interrupted(process) in {0, 130}
        assert "Traceback" not in output.read_text()
        assert service.http.get("/health/live").status_code == 200


def test_with_nothing_running_it_brings_its_own_service_and_ends_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", {"heron.md": HERON})
    home, output = tmp_path / "home", tmp_path / "watch.output"
    process = start_watch(home, folder, output)
    try:
        until(lambda: says(output, "watching"), SOON)
        write(folder, {"kestrel.md": KESTREL, "torn.pdf": b"%PDF-1.4 torn"})
        until(lambda: says(output, "failed docs/torn.pdf"), SOON)
        assert interrupted(process) in {0, 130}
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in output.read_text()
    assert not (home / "owner.json").exists()
