"""Archives over the life of a folder: each file in one is a document, and follows what happens to it."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from broken_files import archive, encrypted_zip
from test_ingest_archive import tar
from test_ingest_pipeline import PUMP, Home, Moment, Watch, pdf, run, write

from ingest.settings import IngestSettings

pytestmark = pytest.mark.slow

FIGURES = {"f.md": b"# Figures\n\nThe tank holds 1234 litres.\n"}
INNER = {"g.md": b"# Mooring\n\nThe mooring line is blue.\n"}
STATION = {"e.md": b"# Station\n\nA kumquat grows at the station.\n"}
PASSWORD = "open sesame"
LABELS = '{"acl": ["staff"], "metadata": {"site": "north"}}'


class Life(NamedTuple):
    moments: dict[str, Moment]
    started: dict[str, int]  # processes, by moment


def files(moment: Moment) -> dict[str, int]:
    return dict(moment.report.files.model_dump(exclude_defaults=True))


def failures(moment: Moment) -> dict[str, str]:
    return {failure.path.removeprefix("docs/"): failure.reason for failure in moment.report.failures}


def vectors(moment: Moment, path: str) -> dict[str, bytes]:
    """-> by chunk id."""
    return {key: moment.points[key].dense.tobytes() for key in moment.chunks(path)}


@pytest.fixture(scope="module")
def life(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Jobs one after the other over one folder that changes between them."""
    root = tmp_path_factory.mktemp("archives")
    folder = root / "docs"
    settings = IngestSettings(home=root / "home", models=models, embedder_runtime="onnxruntime", threads=2)
    station = tar(STATION, "gz")
    write(
        folder,
        {
            "manual.zip": archive({"pump.md": PUMP.encode(), "sub/c.txt": b"The casing is painted twice."}),
            "station.tar.gz": station,
            "station.tar.gz.graft.json": LABELS,
            "nested.zip": archive({**FIGURES, "inner.zip": archive(INNER)}),
            "gone.zip": archive({"words.md": b"# Words\n\nA zyzzyva is a weevil.\n"}),
            "report.zip": archive({"good.md": b"A good file.", "locked.pdf": pdf("The quarterly report.", PASSWORD)}),
            "folder.zip/mast.md": "# Mast\n\nA yardarm is on the mast.\n",
            "other.zip/keel.md": "# Keel\n\nA garboard is beside the keel.\n",
        },
    )
    home = Home(settings, folder)
    life = Life({}, {})

    def go(name: str) -> None:
        watch = Watch()
        life.moments[name] = run(home, report_progress=watch)
        life.started[name] = len(watch.started)
        assert watch.left_over() == []
        assert not list(settings.scratch.glob("*"))

    go("first")
    write(folder, {"report.zip": archive({"good.md": b"A good file."})})
    go("mended")
    go("again")

    write(
        folder,
        {
            "manual.zip": archive(
                {"pump.md": PUMP.replace("3.2", "3.4").encode(), "sub/c.txt": b"The casing is painted twice."}
            ),
            "station.tar.gz": station[:-30],
            "report.zip": archive({"good.md": b"A good file.", "locked.pdf": pdf("The quarterly report.", PASSWORD)}),
            "safe.zip": archive({"note.md": b"A note.", "inner.zip": encrypted_zip({"key.md": b"hunter2"}, PASSWORD)}),
        },
    )
    (folder / "moved").mkdir()
    (folder / "nested.zip").rename(folder / "moved/renamed.zip")
    (folder / "gone.zip").unlink()
    for name in ("folder.zip", "other.zip"):
        shutil.rmtree(folder / name)
    write(folder, {"folder.zip": b"PK\x03\x04 torn", "other.zip": archive(INNER), "other.zip.graft.json": "{"})
    go("changed")
    for name in ("folder.zip", "other.zip", "other.zip.graft.json"):
        (folder / name).unlink()

    write(folder, {"station.tar.gz": station, "moved/renamed.zip.graft.json": LABELS.replace("staff", "board")})
    write(folder, {"labelled.zip": archive({"pay.md": b"Salaries.", "pay.md.graft.json": LABELS.encode()})})
    home.settings = settings.model_copy(update={"passwords": IngestSettings(passwords=PASSWORD).passwords})
    go("unlocked")

    home.settings = settings.model_copy(update={"archive_depth": 0})
    write(folder, {"beside.md": "A file beside the archives.", "new.zip": archive(INNER)})
    go("closed")
    home.index.close()
    return life


def test_the_files_of_an_archive_are_documents(life: Life) -> None:
    first = life.moments["first"]
    members = {path for path, document in first.documents.items() if document.chunks and "!/" in document.uri}
    assert members == {
        "manual.zip/pump.md", "manual.zip/sub/c.txt", "station.tar.gz/e.md", "nested.zip/f.md",
        "nested.zip/inner.zip/g.md", "gone.zip/words.md", "report.zip/good.md",
    }  # fmt: skip
    assert first.found["zyzzyva"] == {"gone.zip/words.md"}
    assert first.found["mooring"] == {"nested.zip/inner.zip/g.md"}
    payload = next(one for one in first.payloads("manual.zip/pump.md") if "bearings" in one["text"])
    assert payload["folders"] == ["docs/manual.zip/pump.md", "docs/manual.zip", "docs"]
    assert payload["heading"] == "Pump manual > Bearings"
    assert PUMP[payload["start"] : payload["end"]] == payload["text"]


def test_every_file_and_archive_is_counted_once(life: Life) -> None:
    """Five archives, seven members and two files are done, one member fails."""
    assert files(life.moments["first"]) == {"done": 14, "failed": 1}
    assert life.moments["first"].kept_texts == 9


def test_a_second_run_opens_no_archive(life: Life) -> None:
    again = life.moments["again"]
    assert files(again) == {"unchanged": 14}
    assert life.started["again"] == 0
    assert again.points.keys() == life.moments["mended"].points.keys()
    assert again.documents == life.moments["mended"].documents


def test_a_file_that_is_gone_from_its_archive_leaves(life: Life) -> None:
    assert "report.zip/locked.pdf" in life.moments["first"].documents
    assert "report.zip/locked.pdf" not in life.moments["mended"].documents
    assert life.moments["mended"].report.chunks.added == 0


def test_an_edit_in_an_archive_embeds_its_own_chunk_alone(life: Life) -> None:
    before, after = (vectors(life.moments[name], "manual.zip/pump.md") for name in ("again", "changed"))
    assert len(before) == len(after) == 4
    assert len(before.items() & after.items()) == 3
    assert life.moments["changed"].report.chunks.added == 2  # and the new note
    assert not any("3.2 litres" in text for text in life.moments["changed"].chunks("manual.zip/pump.md").values())


def test_a_moved_archive_moves_its_files(life: Life) -> None:
    before, after = life.moments["again"], life.moments["changed"]
    assert after.report.files.moved == 2
    assert not any(path.startswith("nested.zip") for path in after.documents)
    for name in ("f.md", "inner.zip/g.md"):
        old, new = f"nested.zip/{name}", f"moved/renamed.zip/{name}"
        assert after.documents[new].id == before.documents[old].id
        assert vectors(after, new) == vectors(before, old)
        assert all(payload["path"] == f"docs/{new}" for payload in after.payloads(new))
    assert after.found["mooring"] == {"moved/renamed.zip/inner.zip/g.md"}


def test_a_deleted_archive_leaves_no_trace(life: Life) -> None:
    changed = life.moments["changed"]
    assert not any(path.startswith("gone.zip") for path in changed.documents)
    assert changed.found["zyzzyva"] == set()
    assert not any("zyzzyva" in point.payload["text"] for point in changed.points.values())
    assert changed.kept_texts == len({document.text_hash for document in changed.documents.values()} - {None})


def test_an_archive_that_breaks_is_told_and_keeps_its_files(life: Life) -> None:
    before, changed = life.moments["again"], life.moments["changed"]
    assert failures(changed).keys() == {
        "station.tar.gz", "report.zip/locked.pdf", "safe.zip", "safe.zip/inner.zip", "folder.zip", "other.zip",
    }  # fmt: skip
    assert "truncated" in failures(changed)["station.tar.gz"]
    assert changed.found["kumquat"] == {"station.tar.gz/e.md"}
    assert vectors(changed, "station.tar.gz/e.md") == vectors(before, "station.tar.gz/e.md")
    assert changed.documents["station.tar.gz"].state == "failed"
    mended = life.moments["unlocked"]
    assert mended.documents["station.tar.gz"].state == "done"
    assert vectors(mended, "station.tar.gz/e.md") == vectors(before, "station.tar.gz/e.md")


def test_a_folder_whose_place_a_file_took_that_cannot_be_read_is_gone(life: Life) -> None:
    first, changed = life.moments["first"], life.moments["changed"]
    for path, word in (("folder.zip/mast.md", "yardarm"), ("other.zip/keel.md", "garboard")):
        assert path in first.documents
        assert path not in changed.documents
        assert not any(word in point.payload["text"] for point in changed.points.values())


def test_a_file_that_failed_is_tried_again_though_its_archive_is_as_it_was(life: Life) -> None:
    assert "encrypted" in failures(life.moments["changed"])["report.zip/locked.pdf"]
    unlocked = life.moments["unlocked"]
    assert "report.zip/locked.pdf" not in failures(unlocked)
    assert unlocked.found["quarterly"] == {"report.zip/locked.pdf"}


def test_an_archive_in_an_archive_that_could_not_be_opened_is_tried_again(life: Life) -> None:
    assert "INGEST_PASSWORDS" in failures(life.moments["changed"])["safe.zip/inner.zip"]
    assert life.moments["unlocked"].found["hunter2"] == {"safe.zip/inner.zip/key.md"}
    assert failures(life.moments["unlocked"]) == {}


def test_a_sidecar_of_an_archive_labels_its_files(life: Life) -> None:
    first, unlocked = life.moments["first"], life.moments["unlocked"]
    assert labels(first, "station.tar.gz/e.md") == ({("staff",)}, {"north"})
    assert labels(first, "nested.zip/inner.zip/g.md") == ({()}, {None})
    assert labels(unlocked, "moved/renamed.zip/inner.zip/g.md") == ({("board",)}, {"north"})
    assert unlocked.documents["moved/renamed.zip/f.md"].acl == ("board",)
    before, after = (vectors(one, "moved/renamed.zip/f.md") for one in (life.moments["changed"], unlocked))
    assert before == after  # labelled, not embedded


def test_a_sidecar_in_an_archive_labels_its_file_and_is_no_document(life: Life) -> None:
    unlocked = life.moments["unlocked"]
    assert "labelled.zip/pay.md.graft.json" not in unlocked.documents
    assert labels(unlocked, "labelled.zip/pay.md") == ({("staff",)}, {"north"})


def labels(moment: Moment, path: str) -> tuple[set[tuple[str, ...]], set[str | None]]:
    """-> the access lists and the sites of its chunks."""
    payloads = moment.payloads(path)
    return {tuple(one["acl"]) for one in payloads}, {one["metadata"].get("site") for one in payloads}


def test_with_a_depth_of_zero_what_was_in_archives_leaves(life: Life) -> None:
    closed = life.moments["closed"]
    assert {point.payload["path"] for point in closed.points.values()} == {"docs/beside.md"}
    assert closed.kept_texts == 1
    assert not [path for path in closed.documents if ".zip/" in path or ".gz/" in path]


def test_with_a_depth_of_zero_archives_are_told_by_the_settings_name(life: Life) -> None:
    """Those that were open before, and one that is new."""
    skips = {skip.path.removeprefix("docs/"): skip.reason for skip in life.moments["closed"].report.skips}
    paths = {"manual.zip", "station.tar.gz", "moved/renamed.zip", "report.zip", "safe.zip", "labelled.zip", "new.zip"}
    assert skips.keys() == paths
    assert all("INGEST_ARCHIVE_DEPTH" in reason for reason in skips.values())
    assert not any(path.startswith(tuple(paths)) for path in life.moments["closed"].documents)
