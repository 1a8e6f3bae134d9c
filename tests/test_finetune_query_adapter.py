"""finetune.query_adapter and what leads to it: rows, split, mining, the map that is learned; and the file that serves it."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.schemas import Case
from finetune.hard_negatives import evenly, mine
from finetune.passages import Passages, searched
from finetune.query_adapter import Side, learn, loss_of, pool_of
from finetune.retrieval_recipe import Mining, Moving, read_retrieval_recipe, retrieval_recipes
from finetune.retrieval_rows import read_asked, split_asked
from ingest.embed import Embedder, Vectors, unit
from ingest.errors import InvalidError, NotFoundError
from ingest.query_adapter import QueryAdapter, check_fits, load_query_adapter, write_query_adapter
from ingest.settings import IngestSettings

SIZE, COUNT = 16, 120


def rotated(seed: int = 0) -> tuple[Vectors, Vectors, Vectors]:
    """-> passages, the questions that they answer, turned by a rotation, and that rotation."""
    random = np.random.default_rng(seed)
    passages = unit(random.standard_normal((COUNT, SIZE)).astype(np.float32))
    rotation = np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0].astype(np.float32)
    noise = 0.02 * random.standard_normal((COUNT, SIZE)).astype(np.float32)
    return passages, unit(passages @ rotation + noise), rotation


def cases(count: int = COUNT) -> list[Case]:
    return [Case(id=f"q{at}", question=f"zq{at}", relevant={f"d{at}": 1}) for at in range(count)]


def shelf(count: int = COUNT) -> Passages:
    return Passages(tuple(f"text{at}" for at in range(count)), tuple(f"d{at}" for at in range(count)))


def test_a_made_rotation_is_learned_from_some_questions_and_holds_for_others() -> None:
    passages, questions, _ = rotated()
    right = [[at] for at in range(COUNT)]
    how = Moving(penalties=(0.01, 0.001, 0.0001), steps=60)
    made = learn(Side(questions[:70], right[:70]), Side(questions[70:90], right[70:90]), passages, how)
    assert made.penalty is not None
    adapter = QueryAdapter(made.matrix, "x", "f")
    held_out = slice(90, None)
    with searched(shelf(), passages) as search:
        before = np.mean(search.scores(cases()[held_out], questions[held_out]))
        after = np.mean(search.scores(cases()[held_out], adapter.apply(questions[held_out])))
    assert before < 0.3
    assert after > 0.9
    assert np.allclose(np.linalg.norm(adapter.apply(questions), axis=1), 1, atol=1e-5)
    losses = [one["loss"] for one in made.log if "loss" in one and one["penalty"] == made.penalty]
    assert losses[-1] < losses[0]


def test_questions_that_nothing_can_be_learned_for_leave_the_identity() -> None:
    passages, _, _ = rotated()
    wrong = [[(at + 1 + at % 7) % COUNT] for at in range(60)]  # no map fits these and those that say when to stop
    right = [[at] for at in range(60, 90)]
    made = learn(Side(passages[:60], wrong), Side(passages[60:90], right), passages, Moving(penalties=(0.01, 0.0001)))
    assert made.penalty is None
    assert np.array_equal(made.matrix, np.eye(SIZE))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_no_map_ranks_better_none_is_learned_though_one_would_lower_the_loss(seed: int) -> None:
    """All vectors share a direction, as an embedder's do: cosines differ little, and a low scale leaves much loss to gain."""
    random, count = np.random.default_rng(seed), 400
    passages = random.standard_normal((count, 48)) / 48**0.5
    shared = random.standard_normal(48)
    passages += 1.5 * shared / np.linalg.norm(shared)
    questions = unit((passages + 0.2 * random.standard_normal(passages.shape)).astype(np.float32))
    passages = unit(passages.astype(np.float32))
    right = [[at] for at in range(count)]
    learned, stop = (Side(questions[part], right[part]) for part in (slice(130), slice(130, 200)))

    def found(how: Moving) -> float:
        adapter = QueryAdapter(learn(learned, stop, passages, how).matrix, "x", "f")
        with searched(shelf(count), passages) as search:
            return float(np.mean(search.scores(cases(count)[200:], adapter.apply(questions[200:]))))

    untouched = found(Moving(penalties=(1e9,)))
    assert found(Moving()) > untouched - 0.002
    assert found(Moving(scale=20)) < untouched - 0.01  # which is what the found scale is for


def test_the_gradient_is_that_of_the_loss() -> None:
    passages, questions, _ = rotated()
    what = Side(questions[:9], [[at, (at + 5) % COUNT] for at in range(9)])
    random = np.random.default_rng(1)
    matrix = np.eye(SIZE, dtype=np.float32) + 0.1 * random.standard_normal((SIZE, SIZE)).astype(np.float32)
    gradient = loss_of(matrix, what, passages, 5.0)[1]
    for row, column in ((0, 0), (3, 7), (11, 2)):
        nudge = np.zeros_like(matrix)
        nudge[row, column] = 1e-2
        slope = (
            loss_of(matrix + nudge, what, passages, 5.0)[0] - loss_of(matrix - nudge, what, passages, 5.0)[0]
        ) / 2e-2
        assert gradient[row, column] == pytest.approx(slope, abs=2e-3)


def test_a_pool_that_is_too_small_for_all_keeps_the_relevant_and_the_nearest() -> None:
    passages, questions, _ = rotated()
    pool = pool_of(passages[:5], passages, [[7], [9]], 20)
    assert len(pool) == 20
    assert {7, 9, 0, 1, 2, 3, 4} <= set(pool)
    assert pool_of(questions, passages, [[7]], COUNT) == list(range(COUNT))


def test_hard_negatives_are_never_relevant_nor_the_same_text_nor_clearly_nearer() -> None:
    texts = [
        "oil of the pump",
        "oil of the pump",
        "oil of the fan",
        "oil in the lake",
        "soup at noon",
        "oil pump parts",
    ]
    passages = Passages(tuple(texts), ("right", "copy", "near", "far", "other", "right"))
    vectors = unit(np.array([[1, 0.3, 0], [1, 0.3, 0], [1, 0.4, 0], [0.6, 1, 0], [0, 0, 1], [1, 0.5, 0]], np.float32))
    question = unit(np.array([[1, 0.45, 0]], np.float32))
    asked = [Case(id="q", question="oil pump", relevant={"right": 1, "gone": 1})]
    with searched(passages, vectors) as search:
        (one,) = mine(asked, question, vectors, search, Mining(negatives=5, depth=10, most_above=0.0))
        (bare,) = mine(asked, question, vectors, search, Mining(negatives=1), {"q": ("other",)})
    assert one.positive == 5  # the nearest of the relevant document's passages
    assert not {0, 1, 5} & set(one.negatives)  # its own, and what says the same
    assert {2, 3} <= set(one.negatives)
    assert bare.negatives == (4,)  # what the rows name goes first
    with searched(passages, vectors) as search:
        closer = Case(id="q", question="oil pump", relevant={"far": 1})
        (guarded,) = mine([closer], question, vectors, search, Mining(negatives=5, depth=10, most_above=0.05))
    assert not {0, 1, 2, 5} & set(guarded.negatives)  # clearly nearer than what is judged: it may be relevant too
    full = evenly([guarded, one], 3, 0)
    assert all(not set(row.negatives) & row.right for row in full)


def test_questions_are_split_by_document() -> None:
    asked = [Case(id=f"q{at}", question=f"What is {at}?", relevant={f"d{at // 3}": 1}) for at in range(60)]
    sides = split_asked(asked, 0.25, 0.1, seed=3)
    assert sum(map(len, sides)) == 60
    assert abs(len(sides.held_out) - 15) <= 3
    documents = [{document for case in side for document in case.relevant} for side in sides]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    assert sides == split_asked(asked, 0.25, 0.1, seed=3)
    with pytest.raises(InvalidError, match="cannot be split, for they are all about the same documents"):
        split_asked([case.model_copy(update={"relevant": {"d": 1}}) for case in asked], 0.25, 0.1, seed=3)


def test_pairs_are_read_and_bad_ones_refused_by_line(tmp_path: Path) -> None:
    lines = [{"anchor": f"What is {at}?", "positive": f"It is {at}.", "negative": "Soup."} for at in range(9)]
    lines.append({"question": "Both?", "positives": ["One.", "Two."]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    asked = read_asked(file)
    assert asked.is_pairs
    assert len(asked.dataset.cases) == 10
    assert len(asked.dataset.cases[-1].relevant) == 2
    texts = {one.id: one.text for one in asked.dataset.documents}
    assert {texts[one] for one in asked.negatives["line 1"]} == {"Soup."}
    bad = [{"question": "", "positive": "x"}, {"question": "No passage?", "positives": []},
           {"question": "Both?", "positive": "Soup.", "negative": "soup. "}]  # fmt: skip
    with file.open("a") as out:
        out.write("".join(f"{json.dumps(line)}\n" for line in bad))
    with pytest.raises(InvalidError) as refused:
        read_asked(file)
    assert "3 rows do" in str(refused.value)
    for number in (11, 12, 13):
        assert f"pairs.jsonl:{number}: " in str(refused.value)
    few = tmp_path / "few.jsonl"
    few.write_text(f"{json.dumps(lines[0])}\n")
    with pytest.raises(InvalidError, match="holds 1 questions"):
        read_asked(few)


def test_recipes_are_read_with_settings_and_what_does_not_fit_is_named() -> None:
    assert retrieval_recipes() == ("embedder", "query-adapter", "reranker")
    assert read_retrieval_recipe("query-adapter", ("steps=5", "held_out=0.3")).adapter.steps == 5
    assert read_retrieval_recipe("embedder", ("mining.negatives=7",)).mining.negatives == 7
    with pytest.raises(InvalidError, match=r"recipe 'reranker' does not fit: mining\.negatives"):
        read_retrieval_recipe("reranker", ("negatives=-1",))


def test_an_adapter_of_another_embedder_is_refused_by_name(embedder: Embedder, settings: IngestSettings) -> None:
    folder = settings.home / "query-adapters/sci"
    with pytest.raises(NotFoundError, match="there is no query adapter 'sci'"):
        load_query_adapter("sci", settings)
    folder.mkdir(parents=True)
    matrix = np.eye(embedder.dimension, dtype=np.float32)
    write_query_adapter(folder, QueryAdapter(matrix, "other-embedder", "0" * 64))
    adapter = load_query_adapter("sci", settings)
    with pytest.raises(InvalidError, match="'sci' is for vectors of 'other-embedder'"):
        check_fits("sci", adapter, embedder)
    with pytest.raises(NotFoundError, match="no query adapter"):
        load_query_adapter("../query-adapters/sci", settings)
    (folder / "query_adapter.safetensors").write_bytes(b"not one")
    with pytest.raises(InvalidError, match="is not what `graft tune query-adapter` writes"):
        load_query_adapter("sci", settings)
