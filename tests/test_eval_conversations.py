"""The fifty conversations: they fit the documents, and a rewritten follow-up finds what its standalone form does."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixtures import CHECKOUT, running

from eval.conversations import (
    FORMS,
    Form,
    conversations,
    means,
    measure,
    of_slice,
    write_distractors,
)
from eval.schemas import RetrievalRun
from ingest.parse import ParseOptions, parse
from service.client import Client
from service.schemas_jobs import IngestRequest

EXAMPLES = CHECKOUT / "examples"


def bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_fifty_of_every_kind_in_two_halves() -> None:
    asked = conversations()
    assert len({one.id for one in asked}) == 50
    assert Counter(one.language for one in asked) == {"en": 30, "zh": 20}
    assert Counter((one.language, one.split) for one in asked) == {
        ("en", "tune"): 15, ("en", "check"): 15, ("zh", "tune"): 10, ("zh", "check"): 10,
    }  # fmt: skip
    assert sum(one.kind == "shift" for one in asked) >= 8
    for one in asked:
        assert [turn.role for turn in one.turns] == ["user", "assistant"]
        assert (one.question == one.standalone) is (one.kind == "shift"), one.id


def test_each_passage_stands_in_one_document_and_in_no_distractor(tmp_path: Path) -> None:
    options = ParseOptions(max_chars=10**6)
    files = [path for path in EXAMPLES.rglob("*") if path.is_file()]
    read = {str(path.relative_to(EXAMPLES)): bare(parse(path.read_bytes(), path.name, options).text) for path in files}
    write_distractors(tmp_path)
    others = [bare(path.read_text()) for path in tmp_path.iterdir()]
    for one in conversations():
        assert [path for path, text in read.items() if bare(one.passage) in text] == [one.path], one.id
        assert not any(bare(one.passage) in text for text in others), one.id


def test_distractors_are_always_the_same(tmp_path: Path) -> None:
    write_distractors(tmp_path / "a")
    write_distractors(tmp_path / "b")
    written = {path.name: path.read_text() for path in (tmp_path / "a").iterdir()}
    assert written == {path.name: path.read_text() for path in (tmp_path / "b").iterdir()}
    assert len(written) == 32
    assert not any("{" in text for text in written.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Form, RetrievalRun]]:
    root = tmp_path_factory.mktemp("conversations")
    write_distractors(root / "distractors")
    with (
        running(root / "home", CHECKOUT, "--no-engine", "--root", str(root)) as service,
        Client(service.url) as client,
    ):
        for folder in (EXAMPLES, root / "distractors"):
            assert client.wait(client.ingest(IngestRequest(path=str(folder))).job_id).state == "succeeded"
        yield measure(client, "default", conversations())


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_rewritten_finds_nine_tenths_of_what_the_standalone_form_finds(
    runs: dict[Form, RetrievalRun], language: str
) -> None:
    alone, rules, as_is = (of_slice(runs[form], language=language) for form in ("standalone", "rules", "as_is"))
    assert alone["recall@10"] >= 0.9  # else the set shows nothing
    assert rules["recall@10"] >= 0.9 * alone["recall@10"]
    assert rules["ndcg@10"] > as_is["ndcg@10"]


@pytest.mark.slow
def test_question_of_a_new_subject_is_searched_for_as_it_is(runs: dict[Form, RetrievalRun]) -> None:
    shifts = [one for one in runs["rules"].cases if one.case.slices["kind"] == "shift"]
    standalone = {one.id: one.standalone for one in conversations()}
    assert all(one.case.question == standalone[one.case.id] for one in shifts)
    assert means(shifts) == of_slice(runs["standalone"], kind="shift")


@pytest.mark.slow
def test_a_run_has_every_case_with_its_scores(runs: dict[Form, RetrievalRun]) -> None:
    assert tuple(runs) == FORMS
    for run in runs.values():
        assert len(run.cases) == 50
        assert set(run.metrics) == {"recall@1", "recall@3", "recall@10", "ndcg@10"}
        for case in run.cases:
            assert case.metrics["recall@1"] <= case.metrics["recall@3"] <= case.metrics["recall@10"]
            assert (case.metrics["ndcg@10"] == 1) is (case.metrics["recall@1"] == 1)
