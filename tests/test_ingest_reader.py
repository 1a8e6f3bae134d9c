"""Documents of LlamaIndex readers, run as a job runs them: readers of its core, and some of ours that behave badly."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ingest.errors import DocumentError, ForbiddenError, InvalidError, UnavailableError
from ingest.pipeline import Cancelled
from ingest.reader import ReaderSpec, allowed, args_of, is_spooled, load, spool, uri_of
from ingest.sync import Walk, is_below

FOLDER = "llama_index.core.readers:SimpleDirectoryReader"
JSON = "llama_index.core.readers.json:JSONReader"
STRINGS = "llama_index.core.readers:StringIterableReader"

READERS = '''
import os, subprocess, sys, time, uuid
from datetime import date
from pathlib import Path
from llama_index.core.readers.base import BasePydanticReader, BaseReader
from llama_index.core.schema import Document

class Wiki(BasePydanticReader):
    """Pages of a wiki, as a connector gives them."""
    is_remote: bool = True
    space: str

    def lazy_load_data(self, count: int = 3, revision: int = 1):
        for number in range(count):
            yield Document(id_=f"{self.space}/{number}", text=f"# Page {number}\\n\\nrevision {revision} of {number}",
                           metadata={"title": f"Page {number}", "url": f"https://wiki/{number}", "on": date(2024, 1, 2),
                                     "score": float("nan"), "tags": {"b", "a"}})

class Pdf(BaseReader):
    """One Document a page, with random ids, as file readers give them."""
    def load_data(self, file: Path, labels: list):
        assert isinstance(file, Path)
        return [Document(text=f"page {label}", metadata={"file_path": f"{file}.{part}", "page_label": label})
                for part, all_labels in enumerate(labels) for label in all_labels]

class Sections(BaseReader):
    """Several documents of one URL, with random ids; one without text."""
    def load_data(self, texts):
        return [Document(text=text, metadata={"url": "https://wiki/a"}) for text in texts]

class Stable(BaseReader):
    """Random-looking ids that are the pages' own."""
    def load_data(self):
        page = "59833787-2cf9-4fdf-8782-e53db20768a5"
        return [Document(id_=page, text="x", metadata={"page_id": page, "url": "https://notion/x"})]

class Raises(BaseReader):
    def __init__(self, api_token):
        self.api_token = api_token
    def lazy_load_data(self):
        yield Document(text="one")
        print("half way")
        raise RuntimeError(f"401: the wiki does not know {self.api_token}")

class Hangs(BaseReader):
    def load_data(self, pids):
        child = subprocess.Popen(["sleep", "60"])
        Path(pids).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)

class Dies(BaseReader):
    def load_data(self):
        os.kill(os.getpid(), 9)

class Noisy(BaseReader):
    def load_data(self):
        for _ in range(20_000):
            print("x" * 100)
        return [Document(id_="a", text="text")]

class NotDocuments(BaseReader):
    def load_data(self):
        return ["text"]

class NeedsMore(BaseReader):
    def __init__(self):
        import a_package_that_is_not_there
    def load_data(self):
        return []

class NoReader:
    def load_data(self):
        raise AssertionError
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/my_readers.py").write_text(READERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))


def run(into: Path, name: str, seconds: float = 60, most: int = 100_000, **args: Any) -> Walk:
    name = name if ":" in name else f"my_readers:{name}"
    return spool(ReaderSpec(name=name, args=args), into, lambda: False, seconds, most)


# what may run, with what


@pytest.mark.parametrize(
    "names", [["llama_index.readers.web:PageReader"], ["x:Y", "llama_index.readers.*"], ["llama_index.readers.web.*"]]
)
def test_a_reader_that_is_listed_may_run(names: list[str]) -> None:
    allowed("llama_index.readers.web:PageReader", names)


@pytest.mark.parametrize(
    "names", [[], ["llama_index.readers.web:Other"], ["llama_index.readers.webs.*"], ["llama_index.readers"], ["web.*"]]
)
def test_any_other_is_forbidden_and_the_setting_is_named(names: list[str]) -> None:
    with pytest.raises(ForbiddenError, match="SERVICE_INGEST_READERS"):
        allowed("llama_index.readers.web:PageReader", names)


@pytest.mark.parametrize("name", ["os", "os:system()", "a b:C", ":C", "a.b:", "../x:C", "a:B:C"])
def test_what_is_no_name_of_a_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        ReaderSpec(name=name)


def test_arguments_of_the_command_line_are_json_where_they_can_be() -> None:
    pairs = ["a=text", "b=7", "c=[1, 2]", "d=true", 'e="7"', "f=a=b", "g=", "h=007", "i=NaN", 'j={"k": null}']
    assert args_of(pairs) == {
        "a": "text", "b": 7, "c": [1, 2], "d": True, "e": "7", "f": "a=b", "g": "", "h": "007", "i": "NaN", "j": {"k": None},
    }  # fmt: skip
    for wrong in ("a", "=x", "a b=c"):
        with pytest.raises(InvalidError, match="key=value"):
            args_of([wrong])


# documents


def ids(found: Walk) -> list[str]:
    return [file.uri.partition("#")[2] for file in found.files]


def test_two_spaces_of_one_connector_are_two_sources_whatever_the_key_to_them() -> None:
    hr, team = (uri_of(ReaderSpec(name="my_readers:Wiki", args={"space": space})) for space in ("hr", "team"))
    rotated = uri_of(ReaderSpec(name="my_readers:Wiki", args={"space": "hr", "api_token": "new"}))
    assert not is_below(f"{hr}#1", team)
    assert rotated == hr


def test_documents_of_a_connector_become_files_with_their_ids_as_uris(tmp_path: Path) -> None:
    found = run(tmp_path / "spool", "Wiki", space="team docs", count=2)
    spec = ReaderSpec(name="my_readers:Wiki", args={"space": "team docs", "count": 2})
    assert [file.uri for file in found.files] == [f"{uri_of(spec)}#team%20docs%2F0", f"{uri_of(spec)}#team%20docs%2F1"]
    assert all(is_below(file.uri, uri_of(spec)) for file in found.files)
    assert [file.path for file in found.files] == ["Page 0", "Page 1"]
    assert all(is_spooled(file.place) and Path(file.place).stat().st_size == file.size for file in found.files)
    parsed = load(found.files[1].place)
    assert parsed.text == "# Page 1\n\nrevision 1 of 1"
    assert parsed.mime == "text/markdown"
    assert [heading.title for heading in parsed.headings] == ["Page 1"]
    assert parsed.metadata == {
        "title": "Page 1", "url": "https://wiki/1", "on": "2024-01-02", "score": None, "tags": ["a", "b"],
    }  # fmt: skip


@pytest.mark.slow
def test_what_did_not_change_keeps_its_uri_and_stamp(tmp_path: Path) -> None:
    first = run(tmp_path / "1", "Wiki", space="a")
    again = run(tmp_path / "2", "Wiki", space="a")
    other = run(tmp_path / "2", "Wiki", space="a", revision=2, count=2)  # what lay there goes
    seen = [[(file.uri, file.stamp) for file in found.files] for found in (first, again, other)]
    assert seen[0] == seen[1]
    assert ids(other) == ids(first)[:2]
    assert not {stamp for _, stamp in seen[2]} & {stamp for _, stamp in seen[0]}
    assert all(0 <= stamp < 2**63 for _, stamp in seen[0])
    assert len(list((tmp_path / "2").glob("*.reader.json"))) == 2


def test_a_folder_read_by_llama_index(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("# One\n\ntext")
    (tmp_path / "docs/b.py").write_text("# a comment\nx = 1")
    found = run(tmp_path / "spool", FOLDER, input_dir=str(tmp_path / "docs"), required_exts=[".md", ".py"])
    assert [file.path for file in found.files] == [str(tmp_path / "docs/a.md"), str(tmp_path / "docs/b.py")]
    assert ids(found) == [  # not its random ids
        str(tmp_path / name).replace("/", "%2F") for name in ("docs/a.md", "docs/b.py")
    ]
    markdown, code = (load(file.place) for file in found.files)
    assert (markdown.text, markdown.mime, markdown.headings[0].title) == ("# One\n\ntext", "text/markdown", "One")
    assert (code.mime, code.headings) == ("text/plain", ())
    assert code.metadata["file_name"] == "b.py"


@pytest.mark.slow
def test_a_json_file_read_by_llama_index(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "q": "why?"}\n{"id": 2, "q": "how?"}\n')
    args = {"input_file": str(tmp_path / "a.jsonl"), "is_jsonl": True, "extra_info": {"source": "faq"}}
    found = run(tmp_path / "spool", JSON, **args)  # of the constructor and of load_data
    assert ids(found) == ["faq", "faq%232"]
    assert '"q": "how?"' in load(found.files[1].place).text
    assert [(file.uri, file.stamp) for file in run(tmp_path / "spool", JSON, **args).files] == [
        (file.uri, file.stamp) for file in found.files
    ]


@pytest.mark.slow
def test_pages_of_one_file_are_one_document_with_pages(tmp_path: Path) -> None:
    found = run(tmp_path / "spool", "Pdf", file="/data/report", labels=[["1", "2", "3"], ["i", "ii", "1"]])
    assert ids(found) == ["%2Fdata%2Freport.0", "%2Fdata%2Freport.1"]
    assert [file.path for file in found.files] == ["/data/report.0", "/data/report.1"]
    arabic, roman = (load(file.place) for file in found.files)
    assert [(page.number, arabic.text[page.start : page.end]) for page in arabic.pages] == [
        (1, "page 1"), (2, "page 2"), (3, "page 3"),
    ]  # fmt: skip
    assert arabic.metadata == {"file_path": "/data/report.0"}  # what all pages say
    assert [page.number for page in roman.pages] == [1, 2, 3]  # counted


@pytest.mark.slow
def test_random_ids_are_replaced_by_ones_that_the_next_run_gives_again(tmp_path: Path) -> None:
    sections = run(tmp_path / "spool", "Sections", texts=["one", "two", " "])
    assert ids(sections) == ["https%3A%2F%2Fwiki%2Fa", "https%3A%2F%2Fwiki%2Fa%232"]
    assert [file.path for file in sections.files] == ["https://wiki/a", "https://wiki/a (2)"]
    assert [skip.reason for skip in sections.skips] == ["the reader gave no text for it"]
    texts = ["the same", "another", "the same"]  # nothing but the text is known of these
    first, again = (run(tmp_path / "spool", STRINGS, texts=order) for order in (texts, texts[::-1]))
    assert len(set(ids(first))) == 3
    assert set(ids(first)) == set(ids(again))
    [own] = run(tmp_path / "spool", "Stable").files
    assert own.uri == "reader:my_readers:Stable#59833787-2cf9-4fdf-8782-e53db20768a5"


@pytest.mark.slow
def test_three_thousand_documents(tmp_path: Path) -> None:
    found = run(tmp_path / "spool", "Wiki", space="a", count=3_000)
    assert (
        len(found.files)
        == len({file.path for file in found.files})
        == len({file.place for file in found.files})
        == 3_000
    )
    assert load(found.files[-1].place).text.endswith("of 2999")
    with pytest.raises(InvalidError, match="more than 2,999 documents"):
        run(tmp_path / "spool", "Wiki", most=2_999, space="a", count=3_000)


# what goes wrong


@pytest.mark.slow
def test_an_argument_that_a_reader_does_not_take_or_lacks_is_named_with_those_it_takes(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"takes no argument 'spaec'; it takes .*count.*revision.*space"):
        run(tmp_path / "spool", "Wiki", spaec="a")
    with pytest.raises(InvalidError, match="missing a required argument: 'space'"):
        run(tmp_path / "spool", "Wiki")
    with pytest.raises(InvalidError, match="missing a required argument: 'input_file'"):
        run(tmp_path / "spool", JSON)


@pytest.mark.slow
def test_a_reader_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"pip install llama-index-readers-confluence"):
        run(tmp_path / "spool", "llama_index.readers.confluence:ConfluenceReader")
    with pytest.raises(InvalidError, match=r"has no reader 'NoReader'; it has .*Wiki"):
        run(tmp_path / "spool", "NoReader")
    with pytest.raises(InvalidError, match="a_package_that_is_not_there"):
        run(tmp_path / "spool", "NeedsMore")


@pytest.mark.slow
def test_a_reader_that_fails_says_why_without_its_secrets_and_leaves_no_documents(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="401: the wiki does not know") as caught:
        run(tmp_path / "spool", "Raises", api_token="tell-no-one")
    assert "tell-no-one" not in str(caught.value)
    with pytest.raises(InvalidError, match="killed by signal 9"):
        run(tmp_path / "spool", "Dies")
    with pytest.raises(InvalidError, match="gave a str, not a Document"):
        run(tmp_path / "spool", "NotDocuments")


@pytest.mark.slow
def test_a_reader_may_talk_as_much_as_it_likes(tmp_path: Path) -> None:
    assert len(run(tmp_path / "spool", "Noisy").files) == 1


@pytest.mark.slow
def test_a_reader_that_hangs_ends_with_its_time_or_a_cancel_and_so_does_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(UnavailableError, match="took over 6 s"):
        run(tmp_path / "spool", "Hangs", seconds=6, pids=str(pids))
    if pids.exists():  # a busy machine may not have come so far
        assert_gone(pids)
        pids.unlink()
    stop = threading.Event()
    asked_at: list[float] = []

    def cancel() -> None:
        while not pids.exists():
            time.sleep(0.02)
        asked_at.append(time.monotonic())
        stop.set()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(Cancelled):
        spool(ReaderSpec(name="my_readers:Hangs", args={"pids": str(pids)}), tmp_path / "spool", stop.is_set, 60)
    assert time.monotonic() - asked_at[0] < 1
    assert_gone(pids)


def assert_gone(pids: Path) -> None:
    for pid in pids.read_text().split():
        status = Path(f"/proc/{pid}/stat")
        for _ in range(20):  # an orphan is a zombie until init asks for it
            if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            os.kill(int(pid), 9)
            pytest.fail(f"process {pid} still runs")


def test_a_spooled_file_is_told_from_others_and_a_wrong_one_is_no_document(tmp_path: Path) -> None:
    assert not is_spooled("/docs/notes.reader.json")
    wrong = tmp_path / "00000001.reader.json"
    assert is_spooled(str(wrong))
    with pytest.raises(DocumentError):
        load(str(wrong))
    for content in ("", "{", "[]", '{"text": "x"}', '{"text": " ", "metadata": {}}'):
        wrong.write_text(content)
        with pytest.raises(DocumentError):
            load(str(wrong))
    wrong.write_text('{"text": "long enough", "metadata": {}}')
    with pytest.raises(DocumentError, match="over INGEST_MAX_TEXT_CHARS"):
        load(str(wrong), max_chars=5)
