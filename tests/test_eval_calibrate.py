"""A threshold: chosen as its rule says, tested on other folds, and applied where the service refuses by it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from service_fixtures import Service, WireEngine, run_graft, write

from eval.calibrate import Calibration, Rule, area, calibrate, choose
from eval.cases import read_dataset
from eval.collection import placed
from ingest.errors import InvalidError
from service.client import Client
from service.look_up import best_score
from service.schemas import CollectionSettings, QueryRequest, SearchRequest

pytestmark = pytest.mark.slow

KEPT = (
    "violin", "telescope", "tortoise", "cannon", "loom", "sextant", "canoe", "harp", "microscope", "sundial", "anvil", "globe",
    "kimono", "tapestry", "mammoth", "meteorite", "lantern", "typewriter", "bicycle", "saddle", "compass", "accordion",
)  # fmt: skip
ELSEWHERE = (
    "rocket", "submarine", "piano", "zebra", "umbrella", "tractor", "helicopter", "diamond", "penguin", "refrigerator",
    "chessboard", "parachute", "volcano", "skateboard", "hammock", "toaster", "giraffe", "trampoline", "camera", "bulldozer",
    "windmill", "snowplough",
)  # fmt: skip


def asked(thing: str) -> str:
    return f"In which room is the {thing} shown?"


def lines(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def museum(started: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """-> questions of the collection `museum`, half of which its documents answer; one is Chinese."""
    folder = started.root / "museum"
    write(
        folder,
        {f"{thing}.txt": f"The {thing} is shown in room {n}." for n, thing in enumerate(KEPT, 1)}
        | {"zh.txt": "小提琴在第一展室展出。"},
    )
    started.ingest(folder, collection="museum")
    rows: list[dict[str, object]] = [{"question": asked(one), "relevant": [f"museum/{one}.txt"]} for one in KEPT]
    rows += [{"question": asked(one), "answerable": False} for one in ELSEWHERE]
    rows.append({"question": "小提琴在哪个展室？", "relevant": ["museum/zh.txt"]})
    yield lines(tmp_path_factory.mktemp("questions") / "museum.jsonl", rows)
    with Client(started.url) as client:
        client.delete_collection("museum")


def test_each_rule_does_what_it_says() -> None:
    answerable, unanswerable = np.array([0.9, 0.8, 0.7, 0.6, 0.4]), np.array([0.65, 0.5, 0.3, 0.2, 0.1])
    assert choose(answerable, unanswerable, Rule()) == pytest.approx(
        0.55
    )  # between .5 and .6: 4 of 5 right on each side
    assert choose(answerable, unanswerable, Rule("false_refusals", 0.0)) == pytest.approx(0.35)
    assert choose(answerable, unanswerable, Rule("false_refusals", 0.2)) == pytest.approx(0.55)
    assert choose(answerable, unanswerable, Rule("precision", 1.0)) == pytest.approx(0.675)
    assert choose(answerable, unanswerable, Rule("precision", 0.8)) == pytest.approx(0.55)
    assert choose(answerable, unanswerable, Rule("precision", 0.5)) < 0.1  # all are answered


def test_the_area_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    answerable, unanswerable = random.integers(3, 12, 80) / 10, random.integers(0, 9, 50) / 10  # with ties
    expected = roc_auc_score([1] * 80 + [0] * 50, np.concatenate([answerable, unanswerable]))
    assert area(answerable, unanswerable) == pytest.approx(expected)


def test_the_threshold_is_applied_and_the_service_refuses_by_it(
    museum: Path, service: Service, wire: WireEngine, tmp_path: Path
) -> None:
    arguments = ("eval", "calibrate", "museum", "--queries", str(museum), "--apply", "--json", str(tmp_path / "c.json"))
    done = run_graft(service.home, *arguments, cwd=service.root)
    assert done.returncode == 0, done.stderr
    found = Calibration.model_validate_json((tmp_path / "c.json").read_text())
    assert (found.answerable, found.unanswerable, found.left_out, found.nothing_found) == (22, 22, 1, 0)
    assert not found.made
    assert "1 questions left out: the embedder does not read them" in done.stderr
    assert found.auc.value > 0.9
    assert found.held_out.balanced_accuracy.value > 0.8
    assert found.threshold is not None
    wire.say("In room 1.")
    refused = {True: 0, False: 0}
    with Client(service.url) as client:
        assert client.collection("museum").threshold == pytest.approx(found.threshold)
        for kind, things in ((True, KEPT), (False, ELSEWHERE)):
            for thing in things[:6]:
                hits = client.retrieve(SearchRequest(question=asked(thing), collection="museum")).hits
                answer = client.query(QueryRequest(question=asked(thing), collection="museum"))
                score = best_score(hits, reranked=False)
                assert score is not None
                assert (answer.finish_reason == "refused") == (score < found.threshold), thing
                refused[kind] += answer.finish_reason == "refused"
    assert refused[False] >= 4
    assert refused[True] <= 2


def test_labels_without_meaning_give_no_threshold(museum: Path, service: Service, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": asked(thing), "answerable": place % 2 == 0} for place, thing in enumerate((*KEPT, *ELSEWHERE))
    ]
    file = lines(tmp_path / "mixed.jsonl", rows)
    with Client(service.url) as client:
        client.put_collection("museum", CollectionSettings(threshold=0.123))
    done = run_graft(service.home, "eval", "calibrate", "museum", "--queries", str(file), "--apply", cwd=service.root)
    assert done.returncode == 1
    assert "no threshold is set on 'museum'" in done.stderr
    with Client(service.url) as client:
        assert client.collection("museum").threshold == 0.123


def test_without_unanswerable_questions_each_stands_for_one_without_its_documents(
    museum: Path, service: Service, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"question": asked(one), "relevant": [f"museum/{one}.txt"]} for one in KEPT]
    data = read_dataset(lines(tmp_path / "answerable.jsonl", rows))
    with Client(service.url) as client, placed(client, data, collection="museum") as place:
        found = calibrate(client, place, data.cases)
    assert found.made
    assert found.answerable == found.unanswerable == 22
    assert found.auc.value > 0.9
    bare = read_dataset(lines(tmp_path / "bare.jsonl", [{"question": asked(one)} for one in KEPT]))
    with Client(service.url) as client, placed(client, bare, collection="museum") as place:
        with pytest.raises(InvalidError, match="mark some"):
            calibrate(client, place, bare.cases)
        few = read_dataset(museum, limit=30)
        with pytest.raises(InvalidError, match="at least 20 of each"):
            calibrate(client, place, few.cases)
