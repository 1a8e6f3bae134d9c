"""The catalog: collections that contradict their documents, who sees which document, texts kept as long as they are used."""

from pathlib import Path

import pytest
from sqlalchemy import func, select

from ingest.catalog import Catalog, Collection, Document, now, texts
from ingest.db import connect, migrate
from ingest.errors import ConflictError, NotFoundError
from ingest.schemas import Chunking, Labels, ParsedText, document_id


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    engine = connect(f"sqlite:///{tmp_path}/graft.db")
    migrate(engine)
    return Catalog(engine)


def collection(fingerprint: str, tokens: int = 224) -> Collection:
    return Collection(
        name="notes",
        embedder="e",
        chunking=Chunking(tokens=tokens),
        fingerprint=fingerprint,
        prompt="auto",
        created_at=now(),
    )


def document(path: str, text: ParsedText | None = None, acl: tuple[str, ...] = ()) -> Document:
    return Document(
        id=document_id("notes", path, 0), collection="notes", uri=f"file:///{path}", first_uri=f"file:///{path}", path=path,
        size=1, stamp=1, content_hash="c", text_hash=text.content_address() if text else None, state="done", chunks=2,
        acl=acl, indexed_at=now(),
    )  # fmt: skip


def test_a_collection_comes_back_as_it_was_put(catalog: Catalog) -> None:
    put = collection("a")
    catalog.put_collection(put)
    assert catalog.collection("notes") == put
    assert catalog.collections() == [put]


def test_a_filled_collection_refuses_another_embedder_or_chunking(catalog: Catalog) -> None:
    catalog.put_collection(collection("a"))
    catalog.put_collection(collection("b", tokens=100))  # it is still empty
    catalog.finish([(document("a.md"), None)])
    with pytest.raises(ConflictError, match="'notes' holds documents under another embedder or chunking"):
        catalog.put_collection(collection("c"))
    assert catalog.collection("notes").chunking.tokens == 100
    catalog.put_collection(collection("b", tokens=100).model_copy(update={"threshold": 0.4}))
    assert catalog.collection("notes").threshold == 0.4


def test_a_document_comes_back_as_it_was_recorded(catalog: Catalog) -> None:
    put = document("a.md", acl=("red", "blue"))
    catalog.put([put])
    assert catalog.document(put.id) == put


def test_a_member_of_a_group_sees_open_documents_and_the_groups_own(catalog: Catalog) -> None:
    catalog.put([document("a.md"), document("b.md", acl=("red",)), document("c.md", acl=("blue",)), document("d.md")])

    def seen(groups: set[str] | None, limit: int | None = None, offset: int = 0) -> list[str]:
        found = catalog.documents("notes", None if groups is None else frozenset(groups), limit, offset)
        return [one.path for one in found]

    assert seen(None) == ["a.md", "b.md", "c.md", "d.md"]
    assert seen({"red"}) == ["a.md", "b.md", "d.md"]
    assert seen(set()) == ["a.md", "d.md"]
    assert seen({"red"}, limit=2, offset=1) == ["b.md", "d.md"]
    assert seen(None, limit=2, offset=1) == ["b.md", "c.md"]
    assert seen(None, offset=3) == ["d.md"]


def test_a_text_that_two_documents_share_goes_with_the_last_of_them(catalog: Catalog) -> None:
    text = ParsedText(text="The same words.", mime="text/plain")
    first, second = document("a.md", text), document("b.md", text)
    catalog.finish([(first, text), (second, text)])
    catalog.forget([first.id])
    assert catalog.text(second.id) == text
    with pytest.raises(NotFoundError, match=first.id):
        catalog.text(first.id)
    other = ParsedText(text="Other words.", mime="text/plain")
    catalog.finish([(document("b.md", other), other)])
    assert catalog.text(second.id) == other
    catalog.finish([(document("c.md", text), None)])
    with pytest.raises(NotFoundError):
        catalog.text(document("c.md").id)  # the shared text went when nothing pointed to it


def test_stamps_are_those_below_a_folder_not_of_its_namesakes(catalog: Catalog) -> None:
    catalog.put([document(path) for path in ("docs/a.md", "docs/deep/b.md", "docs-old/c.md", "docs")])
    assert set(catalog.stamps("notes", ["file:///docs"])) == {
        "file:///docs/a.md",
        "file:///docs/deep/b.md",
        "file:///docs",
    }


def test_documents_are_counted_by_state_with_their_chunks(catalog: Catalog) -> None:
    catalog.put(
        [document("a.md"), document("b.md"), document("c.md").model_copy(update={"state": "failed", "chunks": 0})]
    )
    assert catalog.count("notes") == {"done": 2, "failed": 1, "chunks": 4}


def test_an_archive_holds_its_members_and_no_namesake(catalog: Catalog) -> None:
    catalog.put(
        [document(path) for path in ("a.zip", "a.zip!/b.md", "a.zip!/in.zip/c.md", "a.zipped", "a.zip%21/d.md")]
    )
    found = catalog.stamps("notes", ["file:///a.zip"])
    assert set(found) == {"file:///a.zip", "file:///a.zip!/b.md", "file:///a.zip!/in.zip/c.md"}


def test_a_removed_document_keeps_no_text_and_is_not_brought_back_by_a_job_at_work(catalog: Catalog) -> None:
    text = ParsedText(text="The password is hunter2.", mime="text/plain")
    written = document("a.md", text)
    catalog.finish([(written, text)])
    catalog.remove([written.id])
    assert catalog.is_removed(written.id)
    assert catalog.finish([(written, text)]) == [written.id]
    assert catalog.documents("notes") == []
    assert [one.id for one in catalog.documents("notes", state="removed")] == [written.id]
    with catalog.engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(texts)).scalar_one() == 0


def test_the_most_particular_access_list_holds() -> None:
    plain = document("a.md").relabelled(given_acl=("staff",))
    assert plain.acl == ("staff",)
    own = plain.relabelled(own_acl=("board",))
    assert own.acl == ("board",)
    beside = own.relabelled(sidecar=Labels(acl=("hr", "audit")))
    assert beside.acl == ("audit", "hr")
    assert beside.relabelled(sidecar=Labels(acl=())).acl == ()
    assert beside.relabelled(sidecar=None).acl == ("board",)
    labelled = plain.relabelled(
        properties={"title": "x", "year": 1}, metadata={"year": 2, "site": "n"}, sidecar=Labels(metadata={"site": "s"})
    )
    assert labelled.labels() == {"title": "x", "year": 2, "site": "s"}


def test_documents_are_listed_by_folder(catalog: Catalog) -> None:
    catalog.put([document(path) for path in ("docs/a.md", "docs/deep/b.md", "docs-old/c.md", "do_s/d.md")])
    assert [one.path for one in catalog.documents("notes", path="docs")] == ["docs/a.md", "docs/deep/b.md"]
    assert [one.path for one in catalog.documents("notes", path="do_s/")] == ["do_s/d.md"]
