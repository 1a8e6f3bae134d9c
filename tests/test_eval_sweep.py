"""A sweep on a real service: indexes are made once and gone at the end, and what it chose is what a collection takes."""

import json
from pathlib import Path

import pytest
from service_fixtures import Service, run_graft
from test_eval_weights import note, word

from eval.cases import read_dataset
from eval.space import parse_space
from eval.study import Trial
from eval.sweep import Plan, Sweep, sweep
from service.client import Client
from service.schemas import CollectionSettings

pytestmark = pytest.mark.slow
COUNT = 30


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in BEIR layout."""
    folder = tmp_path_factory.mktemp("notes")
    (folder / "qrels").mkdir()
    corpus = [{"_id": f"d{n}", "title": "", "text": note(n)} for n in range(COUNT)]
    queries = [{"_id": f"q{n}", "text": f"Where is the {word(n)}?"} for n in range(COUNT)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(COUNT))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_grid_over_chunking_and_weights(notes: Path, service: Service, tmp_path: Path) -> None:
    space = parse_space(["tokens=32,200", "weight=0,1", "overlap=0,500"])
    plan = Plan(space, trials=20, sampler="grid", name="grid", storage=tmp_path)
    told: list[Trial] = []
    with Client(service.url) as client:
        before = {one.name for one in client.collections()}
        found = sweep(client, read_dataset(notes), plan, on_trial=told.append)
        assert {one.name for one in client.collections()} == before
        assert (len(told), found.searched + found.held_out_questions) == (8, COUNT)
        refused = [one for one in told if one.value is None]
        assert {one.setting["chunking.overlap"] for one in refused} == {500}
        assert "overlap" in refused[0].error
        assert found.collections == 3  # the default's, and one for each size
        scores = {str(one.setting): one.value for one in told if one.value is not None}
        assert found.study.best is not None
        assert found.study.best.value == max(scores.values())
        assert {one.metric for one in found.held_out} >= {"ndcg@10", "recall@100"}
        assert all(one.cases == found.held_out_questions for one in found.held_out)
        view = client.put_collection("chosen", CollectionSettings.model_validate(found.settings))
        client.delete_collection("chosen")
        assert view.retrieval.dense_weight == found.chosen["retrieval.dense_weight"]
        assert view.chunking.tokens == found.chosen["chunking.tokens"]
        told.clear()
        again = sweep(client, read_dataset(notes), plan, on_trial=told.append)
        assert not told  # all of it was tried
        assert again.chosen == found.chosen


def test_the_command_searches_a_collection_as_it_is(notes: Path, service: Service, tmp_path: Path) -> None:
    (service.root / "swept").mkdir()
    rows = []
    for n in range(COUNT):
        (service.root / "swept" / f"{n}.txt").write_text(note(n))
        rows.append({"question": f"Where is the {word(n)}?", "relevant": [f"swept/{n}.txt"]})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    service.ingest(service.root / "swept", collection="swept")
    files = ("--json", str(tmp_path / "sweep.json"), "--write", str(tmp_path / "best.json"))
    space = ("--space", "dense_weight=0..1.0:.25", "--trials", "4", "--studies", str(tmp_path))
    done = run_graft(
        service.home, "eval", "sweep", str(tmp_path / "q.jsonl"), "-c", "swept", *space, *files, cwd=service.root
    )
    assert done.returncode == 0, done.stderr
    found = Sweep.model_validate_json((tmp_path / "sweep.json").read_text())
    assert len(found.study.trials) == 4
    assert "settings (tpe)" in done.stdout
    best = CollectionSettings.model_validate_json((tmp_path / "best.json").read_text())
    assert best.retrieval is not None
    assert best.retrieval.dense_weight == found.chosen["retrieval.dense_weight"]
    with Client(service.url) as client:
        client.put_collection("swept", best)
        client.delete_collection("swept")
