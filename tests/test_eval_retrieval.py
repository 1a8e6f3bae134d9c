"""`graft eval retrieval` against a real service: what is measured, and that nothing of it stays behind."""

import json
import math
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import GRAFT, HERON, IMPELLER, Service, environment, run_graft, until, write

from eval.cases import read_dataset
from eval.collection import document_name, parse_settings, placed
from eval.compare import read_run
from eval.retrieval import run_retrieval
from eval.retrieval_metrics import MEASURES, is_judged, means, percentiles, scores
from eval.schemas import Case, DataSet, Document, RetrievalRun, RunFacts
from ingest.catalog import now
from ingest.errors import InvalidError, NotFoundError
from service.client import Client
from service.schemas_jobs import Job

TEXTS = {
    "a/b": ("Submersible pumps", "The impeller of the Heron is made of white iron."),
    "tab\tand\nline": ("", "Grease the bearings of the Kestrel every 2,000 running hours."),
    "泵 #1": ("年休假", "工作满一年的员工，每年享有7天年休假。"),
    "../up": ("Expenses", "Claims are handed in within 45 days after the journey."),
    "nothing": ("", " "),
}
QUESTIONS = {
    "q1": ("What is the impeller of the Heron made of?", {"a/b": 2, "tab\tand\nline": 1}),
    "q2": ("How often are bearings greased?", {"tab\tand\nline": 1}),
    "q3": ("每年有几天年休假？", {"泵 #1": 1}),
    "q4": ("Within how many days are claims handed in?", {"../up": 1}),
    "q5": ("Who won the cup?", {}),
}
DATA = DataSet(
    name="small",
    documents=tuple(Document(id=key, title=title, text=text) for key, (title, text) in TEXTS.items()),
    cases=tuple(
        Case(id=key, question=question, relevant=relevant, slices={"language": "zh" if key == "q3" else "en"})
        for key, (question, relevant) in QUESTIONS.items()
    ),
)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A data set of SQuAD's layout, of three paragraphs."""
    return squad(tmp_path / "asked.json", 3)


def squad(path: Path, paragraphs: int) -> Path:
    names = [*["Heron", "Kestrel", "Osprey", "Plover"], *map(str, range(paragraphs))][:paragraphs]
    articles = [
        {
            "title": f"Pump {name}",
            "paragraphs": [
                {
                    "context": f"The pump {name} weighs {at + 100} kilograms and stands in the hall. " * 3,
                    "qas": [{"id": str(at), "question": f"What does the pump {name} weigh?", "answers": []}],
                }
            ],
        }
        for at, name in enumerate(names)
    ]
    path.write_text(json.dumps({"data": articles}))
    return path


def made(service: Service) -> list[str]:
    """Collections that an evaluation made."""
    return [one["name"] for one in service.http.get("/collections").json() if one["name"].startswith("eval-")]


def evaluate(service: Service, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_graft(service.home, "eval", "retrieval", *arguments, cwd=cwd)


# metrics, by their definitions


def test_ndcg_gains_are_the_grades() -> None:
    (got,) = scores([{"a": 3, "b": 1, "c": 0}], [["c", "b", "x", "a"]])
    best = 3 / math.log2(2) + 1 / math.log2(3)
    assert got["ndcg@10"] == pytest.approx((1 / math.log2(3) + 3 / math.log2(5)) / best)
    assert got["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert got["mrr"] == pytest.approx(1 / 2)
    assert (got["precision@1"], got["precision@5"], got["precision@10"]) == (
        0.0,
        pytest.approx(2 / 5),
        pytest.approx(2 / 10),
    )
    assert (got["recall@1"], got["recall@5"]) == (0.0, 1.0)


def test_what_was_not_found_counts_against_recall_map_and_ndcg() -> None:
    ranked = [f"x{at}" for at in range(10)]
    ranked[1] = "a"
    (got,) = scores([{"a": 1, "b": 1, "far": 1}], [[*ranked, "far"]])
    assert got["ndcg@10"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert got["map"] == pytest.approx((1 / 2 + 2 / 11) / 3)  # over all ranks
    assert (got["recall@10"], got["recall@20"], got["recall@100"]) == tuple(map(pytest.approx, (1 / 3, 2 / 3, 2 / 3)))
    assert got["precision@10"] == pytest.approx(1 / 10)


def test_a_case_with_nothing_found_scores_0_and_counts() -> None:
    each = scores([{"a": 1}, {"a": 1}], [["a"], []])
    assert each[1] == dict.fromkeys(MEASURES, 0.0)
    assert means(each)["ndcg@10"] == 0.5


def test_the_order_is_taken_as_served() -> None:
    """trec_eval breaks ties by id, which would score another ranking than the one that users get."""
    for ranked, rank in ((["b", "a", "c"], 2), (["c", "b", "a"], 3)):
        (got,) = scores([{"a": 1}], [ranked])
        assert got["mrr"] == pytest.approx(1 / rank)


def test_ids_may_hold_anything() -> None:
    odd = ["a b", "a\tb", "a\0b", "a\0c", "\n", "", "泵"]
    for at, wanted in enumerate(odd):
        (got,) = scores([{wanted: 1}], [odd])
        assert got["mrr"] == pytest.approx(1 / (at + 1))


def test_judged_means_that_there_is_something_to_find() -> None:
    assert [is_judged(one) for one in ({}, {"a": 0}, {"a": 0, "b": 1})] == [False, False, True]


def test_percentiles_are_over_those_that_have_the_time() -> None:
    each = [{"client": float(at)} for at in range(1, 102)]
    each[0]["rerank"] = 7.0
    assert percentiles(each) == {"client": {"p50": 51.0, "p99": 100.0}, "rerank": {"p50": 7.0, "p99": 7.0}}


# settings of a run


def test_settings_are_those_of_a_collection() -> None:
    tried = parse_settings(
        [
            "dense_weight=.5",
            "retrieval.rerank=true",
            "chunking.tokens=128",
            "chunking.strategy=heading",
            "embedder=e5=x",
        ]
    )
    assert tried.retrieval == {"dense_weight": ".5", "rerank": True}
    assert tried.chunking == {"tokens": 128, "strategy": "heading"}
    assert tried.embedder == "e5=x"


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("dense_weight", "is not KEY=VALUE"),
        ("denseweight=.5", "dense_weight, "),
        ("chunking.size=3", "chunking.tokens"),
        ("tokens=128", "chunking.tokens"),
        ("dense_weight=2", "dense_weight: Input should be less than or equal to 1"),
        ("rerank=perhaps", "rerank: Input should be a valid boolean"),
        ("chunking.strategy=size", "strategy: Input should be"),
    ],
)
def test_settings_that_are_none_are_refused(pair: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said.replace(".", r"\.")):
        parse_settings([pair])


# runs


def test_run_ranks_the_data_sets_own_documents(service: Service, client: Client) -> None:
    with placed(client, DATA) as place:
        run = run_retrieval(client, DATA, place, configuration={"seed": 3}, threads=3)
        assert service.http.get(f"/collections/{place.view.name}").json()["documents"] == 4  # one says nothing
    assert [one.case.id for one in run.cases] == ["q1", "q2", "q3", "q4"]
    for one in run.cases:
        best = max(one.case.relevant, key=lambda key: one.case.relevant[key])
        assert one.ranked[0].document == best
        assert one.ranked[0].text.strip().endswith(TEXTS[best][1])
        assert {hit.document for hit in one.ranked} <= TEXTS.keys()
        assert one.metrics["mrr"] == 1.0
    assert run.counts == {"cases": 4, "left_out": 1, "documents": 4, "documents_left_out": 0}
    assert run.metrics["recall@1"] == pytest.approx((1 / 2 + 3) / 4)
    assert run.latency_ms["client"]["p50"] >= run.latency_ms["search"]["p50"] > 0
    assert run.facts.machine
    assert {"embedder", "chunking", "retrieval", "seed", "threads"} <= run.configuration.keys()
    assert made(service) == []


@pytest.mark.slow
def test_title_is_searched_with_the_text(client: Client) -> None:
    documents = (Document(id="1", title="Zeppelin\nmooring", text="It is 30 m high."), DATA.documents[0])
    cases = (Case(id="1", question="zeppelin mooring", relevant={"1": 1}),)
    data = DataSet(name="titles", documents=documents, cases=cases)
    with placed(client, data) as place:
        run = run_retrieval(client, data, place)
    assert run.cases[0].ranked[0].document == "1"
    assert "Zeppelin mooring" in run.cases[0].ranked[0].text


def test_names_stand_for_the_whole_document() -> None:
    one = Document(id="1", title="t", text="x")
    others = [one.model_copy(update={field: "2"}) for field in ("id", "title", "text")]
    assert len({document_name(each) for each in (one, *others)}) == 4


@pytest.mark.slow
def test_command_writes_a_run_and_removes_its_collection(service: Service, asked: Path, tmp_path: Path) -> None:
    done = evaluate(service, str(asked), "--json", "run.json", "--set", "dense_weight=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "asked: 3 questions over 3 documents" in done.stdout
    assert "ndcg@10" in done.stdout
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["metrics"]["ndcg@10"] == 1.0
    assert written["metrics"]["recall@100"] == 1.0
    assert written["configuration"]["retrieval"]["dense_weight"] == 0
    assert written["configuration"]["set"] == ["dense_weight=0"]
    assert [one["case"]["id"] for one in written["cases"]] == ["0", "1", "2"]
    assert isinstance(read_run(tmp_path / "run.json"), RetrievalRun)
    assert made(service) == []


@pytest.mark.slow
def test_kept_collection_is_asked_as_it_is(service: Service, asked: Path, tmp_path: Path) -> None:
    first = evaluate(service, str(asked), "--keep", "--json", "first.json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (name,) = made(service)
    try:
        assert name in first.stdout
        jobs = service.http.get("/jobs", params={"collection": name}).json()
        again = evaluate(
            service, str(asked), "-c", name, "--against", "first.json", "--json", "again.json", cwd=tmp_path
        )
        assert again.returncode == 0, again.stderr
        assert "+0.000 to +0.000" in again.stdout
        assert service.http.get("/jobs", params={"collection": name}).json() == jobs
        runs = [json.loads((tmp_path / file).read_text()) for file in ("first.json", "again.json")]
        assert runs[0]["metrics"] == runs[1]["metrics"]
        other = evaluate(service, str(squad(tmp_path / "other.json", 4)), "-c", name, cwd=tmp_path)
        assert other.returncode == 1
        assert "1 of its 4 documents are not there" in other.stderr
        split = evaluate(service, str(asked), "-c", name, "--set", "chunking.tokens=64", cwd=tmp_path)
        assert split.returncode == 1
        assert "without --collection" in split.stderr
        assert made(service) == [name]
    finally:
        service.http.delete(f"/collections/{name}")


def test_settings_are_tried_on_a_collection_without_changing_it(client: Client) -> None:
    held = client.collection("default")
    data = DataSet(
        name="x", documents=(), cases=(Case(id="1", question=IMPELLER, relevant={"docs/pumps/heron.md": 1}),)
    )
    with placed(client, data, collection="default", tried=parse_settings(["dense_weight=0"])) as place:
        run = run_retrieval(client, data, place)
    assert run.configuration["retrieval"]["dense_weight"] == 0
    assert run.cases[0].ranked[0].document == "docs/pumps/heron.md"
    assert client.collection("default") == held


@pytest.mark.slow
def test_questions_about_a_collection_that_is_there(service: Service, tmp_path: Path) -> None:
    rows = [{"question": IMPELLER, "relevant": ["docs/pumps/heron.md"]}, {"question": "Who won?"}]
    write(tmp_path, {"asked.jsonl": "\n".join(map(json.dumps, rows))})
    done = evaluate(service, "asked.jsonl", "--collection", "default", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    assert run["cases"][0]["ranked"][0]["document"] == "docs/pumps/heron.md"
    assert run["cases"][0]["ranked"][0]["text"] in HERON
    assert run["counts"]["left_out"] == 1
    assert "default" in {one["name"] for one in service.http.get("/collections").json()}


@pytest.mark.slow
def test_bad_input_is_refused_before_anything_is_made(service: Service, asked: Path, tmp_path: Path) -> None:
    rows = [{"question": IMPELLER, "relevant": ["pumps/gone.md"]}, {"question": "a?", "relevant": {"b.md": 1}}]
    write(
        tmp_path,
        {"asked.jsonl": "\n".join(map(json.dumps, rows)), "none.jsonl": '{"question": "Who?"}', "run.json": "{}"},
    )
    facts = RunFacts(name="x", dataset="elsewhere", created_at=now(), configuration={})
    write(tmp_path, {"other.json": RetrievalRun(facts=facts, metrics={}, cases=()).model_dump_json()})
    for arguments, said in (
        (["asked.jsonl", "-c", "default"], ["line 1: 'pumps/gone.md'", "line 2: 'b.md'", "graft documents list"]),
        (["asked.jsonl", "-c", "nowhere"], ["nowhere"]),
        (["asked.jsonl"], ["--collection"]),
        (["none.jsonl", "-c", "default"], ["no question of 'none' has a relevant document"]),
        ([str(asked), "--set", "weight=1"], ["dense_weight"]),
        ([str(asked), "--set", "embedder=nowhere"], ["nowhere"]),
        ([str(asked), "--json", "no/folder.json"], ["no/folder.json"]),
        ([str(asked), "--against", "run.json"], ["run.json", "--json"]),
        ([str(asked), "--against", "other.json"], ["'elsewhere'", "'asked'"]),
        (["gone.json"], ["gone.json"]),
    ):
        done = evaluate(service, *arguments, cwd=tmp_path)
        assert done.returncode == 1, done
        for one in said:
            assert one in done.stderr
        assert "Traceback" not in done.stderr
    assert made(service) == []


@pytest.mark.slow
def test_collection_goes_when_the_run_fails(service: Service, client: Client) -> None:
    with pytest.raises(ZeroDivisionError), placed(client, DATA):
        _ = 1 / len(made(service)[1:])
    assert made(service) == []


def test_collection_goes_when_its_ingest_is_broken_off(service: Service, client: Client) -> None:
    """Also when it was to be kept: half of it is of no use. The job is still running."""

    def break_off(done: int, total: int) -> None:
        assert made(service)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), placed(client, DATA, keep=True, on_progress=break_off):
        pytest.fail("was entered")
    assert made(service) == []


def test_upload_that_is_broken_off_leaves_no_collection(
    service: Service, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service does what it was asked, whether or not anybody waits for the reply, and would make the collection anew."""
    files = [write(tmp_path, {"a.md": "The Heron lifts water."}) / "a.md"]
    sent, main = ThreadPoolExecutor(1), threading.get_ident()
    upload = client.upload

    def late(_: Sequence[Path], collection: str) -> Job:
        reply = sent.submit(lambda: (time.sleep(0.5), upload(files, collection))[1])
        signal.pthread_kill(main, signal.SIGINT)
        return reply.result()

    monkeypatch.setattr(client, "upload", late)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt), placed(client, DATA):
            pytest.fail("was entered")
    finally:
        signal.signal(signal.SIGINT, handler)
    sent.shutdown()
    assert made(service) == []


@pytest.mark.slow
def test_collection_stays_when_it_is_kept_and_the_run_fails(service: Service, client: Client) -> None:
    with pytest.raises(ZeroDivisionError), placed(client, DATA, keep=True) as place:
        _ = 1 / 0
    assert made(service) == [place.view.name]
    client.delete_collection(place.view.name)


def test_collection_that_is_gone_meanwhile_is_no_error(client: Client) -> None:
    with placed(client, DATA) as place:
        client.delete_collection(place.view.name)
    with pytest.raises(NotFoundError):
        client.collection(place.view.name)


def is_filling(service: Service) -> bool:
    there = made(service)
    return bool(there) and service.http.get("/jobs").json()[0]["collection"] in there


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_command_and_removes_its_collection(service: Service, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [str(GRAFT), "eval", "retrieval", str(squad(tmp_path / "big.json", 5000)), "--keep"],
        cwd=tmp_path,
        env=environment(service.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    until(lambda: is_filling(service), 60)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in {0, -number}, said
    assert "Traceback" not in said
    assert made(service) == []


@pytest.mark.slow
def test_without_a_service_one_is_started_for_the_command(tmp_path: Path, asked: Path) -> None:
    home = tmp_path / "home"
    done = run_graft(home, "eval", "retrieval", str(asked), "--limit", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "asked: 2 questions over 3 documents" in done.stdout
    listed = run_graft(home, "collections", "--json", "-", cwd=tmp_path)
    assert [one["name"] for one in json.loads(listed.stdout)] == ["default"]
    assert not any((home / "uploads").glob("*"))


@pytest.mark.slow
def test_read_dataset_feeds_the_run(asked: Path, client: Client) -> None:
    data = read_dataset(asked)
    with placed(client, data, tried=parse_settings(["chunking.tokens=32"])) as place:
        assert place.view.chunking.tokens == 32
        assert place.view.chunks > 3
        run = run_retrieval(client, data, place)
    assert len({hit.document for hit in run.cases[0].ranked}) == len(run.cases[0].ranked) == 3  # by document
