"""Whatever is done to a folder, and wherever jobs end: its index is the one that is built of the same folder from nothing.

What is kept on purpose is part of the comparison: a file that cannot be read any more keeps its earlier version, and one
whose sidecar cannot be understood keeps version and labels.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from broken_files import archive
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from sqlalchemy import select
from test_ingest_pipeline import Home, Stored

from ingest.catalog import texts
from ingest.pipeline import Cancelled, IngestJob, Options
from ingest.schemas import Report
from ingest.settings import IngestSettings
from ingest.sync import SIDECAR, Folder, Labelling
from ingest.writer import Target

EXAMPLES = 3  # a job with something to read takes three seconds, most of them for its processes to start
Members = dict[str, bytes]
Tree = dict[str, bytes | Members]  # what is on the disk, sidecars included: content by path; an archive's members
Edit = tuple[str, int, str, Any]  # what is done, to which of the files that there are, a path, a value

FILES = ("a.md", "b.txt", "d/c.md", "d/e/f.md", "a.md/in.txt", "z.zip/m.md")
ARCHIVES = ("z.zip", "d/y.zip")
MEMBERS = ("m.md", "n.txt", "in/o.md")
FOLDERS = ("d", "d/e", "a.md", "z.zip", "g")
UNREADABLE = {b"": "failed", b" \n": "failed", b"%PDF-1.4 torn": "failed", b"ID3\x04\x00": "skipped"}
BAD_SIDECARS = (b"", b"{", b'{"acl": "staff"}', b'{"group": ["staff"]}')
GOOD_SIDECARS = (b'{"acl": ["board", "audit"]}', b'{"acl": []}', b'{"metadata": {"owner": "Ada", "site": "east"}}')


class Labels(NamedTuple):
    """What a job sets; each job of these tests sets both."""

    acl: tuple[str, ...]
    site: str


class Kept(NamedTuple):
    """What should be known of a document. `data`: of its version that answers; None when there is none."""

    data: bytes | None
    state: str
    labels: Labels
    sidecar: bytes | None


def text_of(parts: Sequence[int], front: bool) -> bytes:
    """A chunk a part; the same part twice is the same text twice."""
    head = "---\ntitle: Weights\nacl: [scales]\n---\n" if front else ""
    return (head + "\n\n".join(f"## Part {n}\n\nPart {n} weighs {n * 37} kg.\n" for n in parts)).encode()


START: Tree = {
    "a.md": text_of([1, 2, 3, 4], front=False),
    "b.txt": text_of([5], front=False),
    "d/c.md": text_of([6, 6, 7], front=True),
    "d/e/f.md": text_of([1, 2, 3, 4], front=False),
    "d/e/f.md.graft.json": GOOD_SIDECARS[0],
    "z.zip": {"m.md": text_of([8, 9], front=False), "in/o.md": text_of([10], front=True)},
    "d/y.zip": {"m.md": text_of([11, 12], front=False)},
}

readable = st.builds(text_of, st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans())
contents = st.one_of(readable, readable, readable, st.sampled_from(sorted(UNREADABLE)))
members = st.dictionaries(st.sampled_from(MEMBERS), contents, max_size=3)
which = st.integers(0, 20)
edits: st.SearchStrategy[Edit] = st.one_of(
    st.tuples(st.just("write"), which, st.sampled_from(FILES), contents),
    st.tuples(st.just("edit"), which, st.none(), contents),
    st.tuples(st.just("pack"), which, st.sampled_from(ARCHIVES), members),
    st.tuples(st.just("repack"), which, st.sampled_from(MEMBERS), st.none() | contents),
    st.tuples(st.just("tear"), which, st.sampled_from(ARCHIVES), st.sampled_from([b"", b"PK\x03\x04 torn"])),
    st.tuples(st.just("move"), which, st.sampled_from(FILES + ARCHIVES), st.booleans()),
    st.tuples(st.just("copy"), which, st.sampled_from(FILES + ARCHIVES), st.booleans()),
    st.tuples(st.just("rename"), which, st.sampled_from(FOLDERS), st.sampled_from(FOLDERS)),
    st.tuples(st.just("delete"), which, st.none(), st.booleans()),
    st.tuples(st.just("touch"), which, st.none(), st.none()),
    st.tuples(st.just("label"), which, st.none(), st.none() | st.sampled_from(GOOD_SIDECARS + BAD_SIDECARS)),
)
labels = st.builds(Labels, st.sampled_from([(), ("staff",), ("audit", "board")]), st.sampled_from(["north", "south"]))
rounds = st.tuples(st.lists(edits, min_size=3, max_size=8), labels, st.integers(0, 60))
lives = st.tuples(st.permutations(["full", "only", "cancelled", "killed"]), st.lists(rounds, min_size=5, max_size=5))


# the folder


def edited(tree: Tree, edit: Edit) -> Tree:
    """-> the tree after it; the same when it makes no sense there."""
    what, number, path, value = edit
    files = sorted(one for one in tree if not one.endswith(SIDECAR))
    chosen = files[number % len(files)] if files else ""
    packed = [one for one in files if isinstance(tree[one], dict)]
    match what:
        case "write" | "pack" | "tear":
            return put(tree, path, value)
        case "edit" if chosen and not chosen.endswith(".zip"):
            return put(tree, chosen, value)
        case "repack" if packed:
            chosen = packed[number % len(packed)]
            inside = dict(tree[chosen])  # type: ignore[call-overload]
            inside.pop(path, None)
            return put(tree, chosen, inside if value is None else {**inside, path: value})
        case "move" | "copy" if chosen and chosen != path and chosen.endswith(".zip") == path.endswith(".zip"):
            moved = {path + end: tree[chosen + end] for end in ("", SIDECAR) if chosen + end in tree}
            rest = (
                tree
                if what == "copy"
                else {one: node for one, node in tree.items() if one not in {chosen, chosen + SIDECAR}}
            )
            for one, node in list(moved.items())[: 1 + value]:
                rest = put(rest, one, node)
            return rest
        case "rename" if not (path + "/").startswith(value + "/") and not (value + "/").startswith(path + "/"):
            below = {one: node for one, node in tree.items() if one.startswith(path + "/")}
            rest = {one: node for one, node in tree.items() if one not in below}
            for one, node in below.items():
                rest = put(rest, value + one[len(path) :], node)
            return rest
        case "delete" if chosen:
            return {one: node for one, node in tree.items() if one not in {chosen, (chosen + SIDECAR) * value}}
        case "label" if chosen and value is None:
            return {one: node for one, node in tree.items() if one != chosen + SIDECAR}
        case "label" if chosen:
            return {**tree, chosen + SIDECAR: value}
    return dict(tree)


def put(tree: Tree, path: str, node: bytes | Members) -> Tree:
    """What is in its way, a folder where a file shall be or the other way round, is gone."""
    clear = {
        one: held for one, held in tree.items() if not one.startswith(path + "/") and not path.startswith(one + "/")
    }
    return {**clear, path: node}


def lay_out(folder: Path, tree: Tree, before: Tree) -> set[str]:
    """Makes `folder`, where `before` lies, hold `tree`. -> the paths that changed."""
    changed = {path for path in tree.keys() | before.keys() if tree.get(path) != before.get(path)}
    for path in sorted(changed & before.keys()):
        (folder / path).unlink()
        for parent in (folder / path).parents:
            if parent != folder and not any(parent.iterdir()):
                parent.rmdir()
            else:
                break
    for path in sorted(changed & tree.keys()):
        node = tree[path]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(node if isinstance(node, bytes) else archive(node))
    return changed


# what should be known of it


def is_bad(sidecar: bytes | Members | None) -> bool:
    return sidecar in BAD_SIDECARS


def troubled(tree: Tree) -> set[str]:
    """Where something is that cannot be read: there the version before counts."""
    inside = {
        f"{path}!/{name}": data for path, node in tree.items() if isinstance(node, dict) for name, data in node.items()
    }
    files = {path: node for path, node in tree.items() if isinstance(node, bytes)}
    unread = {path for path, data in {**inside, **files}.items() if data in UNREADABLE or path.endswith(".zip")}
    return unread | {path for path in tree if path.endswith(SIDECAR) and is_bad(tree[path])}


def settled(kept: Mapping[str, Kept], tree: Tree, given: Labels) -> dict[str, Kept]:
    """What should be known after a job over all of `tree`, by path; of an archive's members by ARCHIVE!/NAME."""
    known: dict[str, Kept] = {}
    for path, node in tree.items():
        if path.endswith(SIDECAR):
            continue
        sidecar = tree.get(path + SIDECAR)
        held = {key: one for key, one in kept.items() if is_of(key, path)}
        label = {"labels": given, "sidecar": sidecar}
        if is_bad(sidecar):
            known |= held
        elif isinstance(node, dict):
            known[path] = Kept(None, "done", **label)  # type: ignore[arg-type]
            for name, data in node.items():
                known[f"{path}!/{name}"] = version(held.get(f"{path}!/{name}"), data, **label)
        elif path.endswith(".zip"):
            known |= {key: one._replace(**label) for key, one in held.items()}
            known[path] = Kept(None, "failed", **label)  # type: ignore[arg-type]
        else:
            known[path] = version(held.get(path), node, **label)
    return known


def is_of(key: str, path: str) -> bool:
    """Whether a document is the file at `path`, or in it."""
    return key == path or key.startswith(path + "!/")


def version(held: Kept | None, data: bytes, **label: Any) -> Kept:
    if data not in UNREADABLE:
        return Kept(data, "done", **label)
    return Kept(held.data if held else None, UNREADABLE[data], **label)


# jobs


def job(home: Home, given: Labels, only: Sequence[str] = (), **others: Any) -> IngestJob:
    folder = Folder(home.folder, home.folder.parent, tuple(home.folder / path for path in only))
    return IngestJob(
        home.catalog, Target(home.index, home.collection.index, 384, "e" * 64), home.settings, home.collection, folder,
        Options(Labelling(given.acl, {"site": given.site}), allow_empty=True), runtime="onnxruntime", **others,
    )  # fmt: skip


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ingest.settings import IngestSettings
from test_ingest_pipeline import Home
home = Home(IngestSettings(), Path(sys.argv[2]))
acl, site = json.loads(sys.argv[3])
tell = lambda progress: print(progress.model_dump_json(), flush=True)
home.job(acl, {"site": site}, allow_empty=True, report_progress=tell).run()
home.index.close()
"""


def killed(home: Home, given: Labels, moment: int) -> None:
    """A job in a process of its own, killed after so many chunks, or before; the index is ours again afterwards."""
    home.index.close()
    own = {"GRAFT_HOME": str(home.settings.home), "GRAFT_MODELS": str(home.settings.models), "INGEST_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(home.folder), json.dumps(given)],
        env={**os.environ, **own}, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["chunks"] >= moment // 4:
            break
    time.sleep(random.Random(moment).uniform(0, 0.05) if moment % 2 else 0)
    event("killed at work" if process.poll() is None else "ended before its kill")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    home.index = type(home.index)(home.settings.home / "index")


def cancelled(home: Home, given: Labels, moment: int) -> bool:
    """A job that is cancelled when it has asked so many times whether it is. -> whether it ended before."""
    asked = iter(range(moment))
    try:
        job(home, given, cancelled=lambda: next(asked, None) is None).run()
    except Cancelled:
        event("cancelled")
        return False
    return True


# the comparison


def by_content(points: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without the ids, which tell a moved document from a new one."""
    return {json.dumps({**one.payload, "document_id": None}, sort_keys=True): one for one in points.values()}


def kept_texts(home: Home) -> set[str]:
    with home.catalog.engine.connect() as connection:
        return set(connection.execute(select(texts.c.hash)).scalars())


def built_from_nothing(kept: Mapping[str, Kept], settings: IngestSettings, folder: Path) -> Home:
    """Another home, of the versions that should answer: a job for each set of labels."""
    tree: Tree = {}
    for key, one in kept.items():
        path, _, name = key.partition("!/")
        if one.data is None:
            continue
        tree[path] = {**tree.get(path, {}), name: one.data} if name else one.data  # type: ignore[dict-item]
        if one.sidecar is not None:
            tree[path + SIDECAR] = one.sidecar
    folder.mkdir(parents=True)
    lay_out(folder, tree, {})
    home = Home(settings, folder)
    home.index.create(home.collection.index, 384)  # there may be nothing to write
    for shared in sorted({one.labels for one in kept.values() if one.data is not None}):
        only = [key.partition("!/")[0] for key, one in kept.items() if one.labels == shared and one.data is not None]
        job(home, shared, only).run()
    return home


def same_as_built(home: Home, kept: Mapping[str, Kept], fresh: Home) -> None:
    rows = [(one.path.removeprefix("docs/"), one.state) for one in home.catalog.documents("default")]
    assert Counter(rows) == Counter((key.replace("!/", "/"), one.state) for key, one in kept.items())

    found, expected = home.points(), fresh.points()
    ours, theirs = by_content(found), by_content(expected)
    assert ours.keys() == theirs.keys()
    assert len(found) == len(ours)
    for key, one in ours.items():
        assert float(np.dot(one.dense, theirs[key].dense)) >= 0.99

    for path, built in fresh.documents().items():
        if built.text_hash is not None:
            document = home.documents()[path]
            for column in ("text_hash", "chunks", "pages", "languages", "acl", "mime", "own_acl", "sidecar"):
                assert getattr(document, column) == getattr(built, column), (path, column)
            assert document.labels() == built.labels()
            assert document.chunks == sum(one.payload["document_id"] == document.id for one in found.values())
    assert kept_texts(home) == kept_texts(fresh)


def accounted(report: Report) -> None:
    """Every path is told once, and counted where it is told."""
    told = [one.path for one in (*report.failures, *report.skips)]
    assert len(told) == len(set(told)) == report.files.failed + report.files.skipped


class Life:
    """A folder, and what should be known of it. `uncertain`: a job was cut off since the last whole one."""

    def __init__(self, home: Home, kept: dict[str, Kept]) -> None:
        self.home, self.kept = home, kept
        self.tree = dict(START)
        self.uncertain = False

    def edit(self, edits: Sequence[Edit]) -> set[str]:
        """-> the paths that changed. After a job that was cut off nothing new goes bad: nobody could say what is kept."""
        tree, touched = dict(self.tree), set()
        for edit in edits:
            new = edited(tree, edit)
            if self.uncertain and troubled(new) - troubled(tree):
                continue
            tree = new
            touched |= {sorted(tree)[edit[1] % len(tree)]} if edit[0] == "touch" and tree else set()
        changed = lay_out(self.home.folder, tree, self.tree)
        for path in touched & tree.keys():
            os.utime(self.home.folder / path)
        self.tree = tree
        return changed | touched

    def sync(self, how: str, given: Labels, moment: int, changed: set[str]) -> None:
        if how == "killed":
            killed(self.home, given, moment)
            self.uncertain = True
        elif how == "cancelled" and not cancelled(self.home, given, moment):
            self.uncertain = True
        elif how == "only" and changed:
            self.follow(given, changed, moment)
        elif how == "full":
            accounted(job(self.home, given).run())
        if how == "full" or (how == "cancelled" and not self.uncertain):
            self.kept, self.uncertain = settled(self.kept, self.tree, given), False

    def follow(self, given: Labels, changed: set[str], moment: int) -> None:
        """What `--watch` does: only what changed, sometimes with the folder above it."""
        only = sorted(changed)
        if moment % 3 == 0 and "/" in only[0]:
            only.append(only[0].rpartition("/")[0])
        accounted(job(self.home, given, only).run())
        seen = {path.removesuffix(SIDECAR) for path in only}
        within = settled(self.kept, self.tree, given)
        for key in self.kept.keys() | within.keys():
            path = key.partition("!/")[0]
            if not any(path == one or path.startswith(one + "/") for one in seen):
                continue
            if key in within:
                self.kept[key] = within[key]
            else:
                del self.kept[key]


@pytest.fixture(scope="module")
def started(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder and its home, as every example begins: to be copied to ../life, where its files are known to be."""
    root = tmp_path_factory.mktemp("property") / "life"
    (root / "docs").mkdir(parents=True)
    lay_out(root / "docs", START, {})
    home = Home(
        IngestSettings(home=root / "home", models=models, embedder_runtime="onnxruntime", threads=2), root / "docs"
    )
    job(home, Labels((), "north")).run()
    home.index.close()
    home.catalog.engine.dispose()
    return root.rename(root.with_name("start"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_index_is_the_one_built_from_nothing(started: Path, models: Path) -> None:
    fixed = settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # to make an example smaller would take an hour
        print_blob=True,
    )

    @fixed
    @given(lives)
    def live(life: tuple[Sequence[str], Sequence[tuple[Sequence[Edit], Labels, int]]]) -> None:
        compared(life, started, models)

    live()


def compared(
    life: tuple[Sequence[str], Sequence[tuple[Sequence[Edit], Labels, int]]], started: Path, models: Path
) -> None:
    root = started.with_name("life")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(started, root)
    own = IngestSettings(home=root / "home", models=models, embedder_runtime="onnxruntime", threads=2)
    home = Home(own, root / "docs")
    lived = Life(home, settled({}, START, Labels((), "north")))
    how, changes = life
    try:
        for end, (edits, given, moment) in zip([*how, "full"], changes, strict=True):
            changed = lived.edit(edits)
            note(f"{end} {given} {moment}: {sorted(changed)}")
            lived.sync(end, given, moment, changed)
        again = job(home, given).run()
        assert (again.files.moved, again.files.deleted, again.chunks.added) == (0, 0, 0)
        assert again.files.done == 0 or troubled(lived.tree)  # an archive is opened again for a file that failed
        fresh = built_from_nothing(lived.kept, own.model_copy(update={"home": root / "fresh"}), root / "built" / "docs")
        same_as_built(home, lived.kept, fresh)
        fresh.index.close()
    finally:
        home.index.close()
