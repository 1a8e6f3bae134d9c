"""Fusion weights: cross-fitting keeps its promise, and on a real collection what is tuned here is how the service then ranks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from service_fixtures import Service, run_graft, write

from eval.cases import read_dataset
from eval.collection import placed
from eval.resample import compared, estimate
from eval.weights import Fusion, Weights, cross_fit, fetch, order, pick, tune
from ingest.errors import InvalidError
from ingest.schemas import Retrieval
from service.client import Client
from service.schemas import CollectionSettings, SearchRequest

pytestmark = pytest.mark.slow

COUNT = 54
SYLLABLES = ("zor", "vex", "mul", "tra", "kin", "po")


def word(number: int) -> str:
    return f"{SYLLABLES[number % 6]}{SYLLABLES[number // 6 % 6]}{('ta', 'lo')[number // 36]}n"


def note(number: int) -> str:
    before = " They are cleaned, oiled and checked, then wrapped in paper and signed for by whoever is there."
    after = " Please sign the book, and tell the foreman of what is missing or worn."
    about = "The spare parts of the works are listed in this note, which the crew reads each day."
    return f"{about}{before * (3 + number % 3)} The {word(number)} is on a shelf.{after * (3 + number % 4)}"


@pytest.fixture(scope="module")
def coded(started: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """-> questions of the collection `coded`: of documents that differ in a word alone, which BM25 tells apart and the
    embedder hardly does; the present setting is the embedder alone.
    """
    folder = started.root / "coded"
    write(folder, {f"{n}.txt": note(n) for n in range(COUNT)})
    with Client(started.url) as client:
        client.put_collection("coded", CollectionSettings(retrieval=Retrieval(dense_weight=1)))
        started.ingest(folder, collection="coded")
        file = tmp_path_factory.mktemp("questions") / "coded.jsonl"
        rows = [{"question": f"Where is the {word(n)}?", "relevant": [f"coded/{n}.txt"]} for n in range(COUNT)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield file
        client.delete_collection("coded")


def test_a_fold_is_never_scored_by_a_setting_that_it_helped_to_choose() -> None:
    random = np.random.default_rng(0)
    table = random.random((40, 30))  # 40 settings of pure chance
    held_out, chosen = cross_fit(table, 5, seed=1)
    assert table.mean(1).max() > table.mean() + 0.08  # tuned on all, chance looks like a gain
    assert abs(held_out.mean() - table.mean()) < 0.08  # cross-fitted it does not
    assert len(chosen) == 5
    again, _ = cross_fit(table, 5, seed=1)
    assert (again == held_out).all()


def test_cross_fitting_finds_a_setting_that_is_better_everywhere() -> None:
    table = np.full((3, 50), 0.4)
    table[2] = 0.6
    held_out, chosen = cross_fit(table, 5, seed=0)
    assert chosen == [2] * 5
    assert (held_out == 0.6).all()


def test_a_setting_that_leads_by_less_than_its_noise_is_not_picked() -> None:
    random = np.random.default_rng(5)
    present = random.random(100)
    level = present + random.normal(0, 0.2, 100)
    table = np.stack([present, level - level.mean() + present.mean() + 0.01, present + 0.02])
    assert pick(table[:2]) == 0  # .01 ahead, give or take .02
    assert pick(table) == 2  # .02 ahead, on every question


def test_a_difference_that_is_chance_is_told_from_one_that_is_not() -> None:
    random = np.random.default_rng(3)
    before = random.random(200)
    ids = [str(n) for n in range(200)]
    noise = compared("m", ids, before, before + random.normal(0, 0.3, 200))
    gain = compared("m", ids, before, before + random.normal(0.1, 0.3, 200))
    assert noise.p > 0.05
    assert noise.low < 0 < noise.high
    assert gain.p < 0.01
    assert gain.low > 0
    assert len(gain.won) + len(gain.lost) == 200
    same = compared("m", ids, before, before)
    assert (same.difference, same.p) == (0, 1)


def test_cases_that_hang_together_are_drawn_together() -> None:
    scores = np.repeat(np.random.default_rng(1).random(10), 20)
    groups = [place // 20 for place in range(200)]
    alone, whole = estimate(scores), estimate(scores, groups=groups)
    assert alone.value == whole.value
    assert whole.high - whole.low > 3 * (alone.high - alone.low)


def test_too_few_questions_are_refused(coded: Path, started: Service) -> None:
    with Client(started.url) as client:
        data = read_dataset(coded, limit=12)
        with (
            placed(client, data, collection="coded") as place,
            pytest.raises(InvalidError, match=r"12 questions .* too few"),
        ):
            tune(client, place, data.cases, data.name)


def test_the_order_fused_here_is_the_services_own(coded: Path, started: Service) -> None:
    settings = [Fusion(dense_weight=0.3), Fusion(dense_weight=1), Fusion(fusion="rrf", dense_weight=0.6, rrf_k=10)]
    data = read_dataset(coded, limit=5)
    with Client(started.url) as client, placed(client, data, collection="coded") as place:
        for case in data.cases:
            fetched = fetch(client, place, place.view.retrieval, case.question)
            for setting in settings:
                retrieval = Retrieval(**setting.model_dump())
                request = SearchRequest(question=case.question, collection="coded", retrieval=retrieval, top_k=100)
                ids = [hit.chunk_id for hit in client.retrieve(request).hits]
                assert ids == order(fetched, setting)[: len(ids)], setting


def test_a_collection_that_is_searched_wrongly_gets_better_weights_and_a_tuned_one_is_kept(
    coded: Path, started: Service, tmp_path: Path
) -> None:
    arguments = ("eval", "weights", "coded", "--queries", str(coded), "--apply", "--json", str(tmp_path / "w.json"))
    done = run_graft(started.home, *arguments, cwd=started.root)
    assert done.returncode == 0, done.stderr
    found = Weights.model_validate_json((tmp_path / "w.json").read_text())
    assert found.verdict == "change"
    assert found.agreement == 1
    assert found.against["the present setting"].p < 0.05
    assert found.cross_fitted.low > found.present.score
    assert found.best.fusion.dense_weight < 0.8
    assert f"set: {found.best.fusion}" in done.stdout
    with Client(started.url) as client:
        assert client.collection("coded").retrieval.dense_weight == found.best.fusion.dense_weight
        data = read_dataset(coded)
        with placed(client, data, collection="coded") as place:
            again = tune(client, place, data.cases, data.name)
        assert again.verdict == "keep"
        assert again.present.fusion == found.best.fusion


def test_apply_needs_a_collection_that_stays(coded: Path, started: Service) -> None:
    done = run_graft(started.home, "eval", "weights", str(coded), "--apply", cwd=started.root)
    assert done.returncode == 1
    assert "--apply needs a collection" in done.stderr
