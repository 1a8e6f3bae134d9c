"""Data sets as their authors give them -> cases and documents; what does not fit is refused by file and line, all at once."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import write

from eval.cases import read_dataset
from eval.schemas import Case
from ingest.errors import InvalidError
from service.records import Turn

CORPUS = [
    {"_id": "a/1 ü", "title": "Pumps", "text": "They move water."},
    {"_id": "b", "title": "", "text": "Valves close."},
]
QUERIES = [
    {"_id": "q1", "text": "What moves water?"},
    {"_id": "q2", "text": "What closes?"},
    {"_id": "q3", "text": "Why?"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\ta/1 ü\t2\nq1\tb\t0\nq2\tb\t1\n"


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def beir(folder: Path, **files: str) -> Path:
    return write(
        folder, {"corpus.jsonl": jsonl(*CORPUS), "queries.jsonl": jsonl(*QUERIES), "qrels/test.tsv": QRELS} | files
    )


def asked(*questions: dict[str, Any], context: str = "The pump is red.", title: str = "Red_pumps", **more: Any) -> Any:
    """A file of SQuAD's layout with one paragraph."""
    return {"data": [{"title": title, "paragraphs": [{"context": context, "qas": list(questions), **more}]}]}


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidError) as refused:
        read_dataset(path, **options)
    return str(refused.value)


def test_beir_folder(tmp_path: Path) -> None:
    found = read_dataset(beir(tmp_path / "pumps"))
    assert found.name == "pumps/test"
    assert [(one.id, one.title, one.text) for one in found.documents] == [
        ("a/1 ü", "Pumps", "They move water."),
        ("b", "", "Valves close."),
    ]
    # q3 is not judged in this split, so it is no case of it
    assert [(one.id, one.question, one.relevant) for one in found.cases] == [
        ("q1", "What moves water?", {"a/1 ü": 2, "b": 0}),
        ("q2", "What closes?", {"b": 1}),
    ]
    assert {one.slices["language"] for one in found.cases} == {"en"}


def test_beir_gzipped_and_without_a_header_is_the_same(tmp_path: Path) -> None:
    plain = beir(tmp_path / "plain" / "pumps")
    packed = tmp_path / "packed" / "pumps"
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        content = (plain / file).read_text(encoding="utf-8")
        if file.endswith(".tsv"):
            content = content.partition("\n")[2]
        write(packed, {f"{file}.gz": gzip.compress(content.encode())})
    assert read_dataset(packed) == read_dataset(plain)


def test_beir_split_is_chosen_when_there_are_several(tmp_path: Path) -> None:
    folder = beir(tmp_path / "pumps", **{"qrels/train.tsv": "q3\tb\t1\n"})
    assert "test, train; choose one with --split" in refusal(folder)
    assert "'dev' is none of them" in refusal(folder, split="dev")
    assert [one.id for one in read_dataset(folder, split="train").cases] == ["q3"]


def test_beir_rows_that_do_not_fit_are_told_together(tmp_path: Path) -> None:
    folder = beir(
        tmp_path / "pumps",
        **{
            "corpus.jsonl": jsonl(*CORPUS, CORPUS[1]) + "{broken\n",
            "queries.jsonl": jsonl(*QUERIES, {"_id": "q4", "text": " "}, {"text": "no id"}),
            "qrels/test.tsv": QRELS + "q1\tb\n\nq9\tb\t1\nq1\tnowhere\t1\nq2\tb\tx\nq2\tb\t2\n",
        },
    )
    said = refusal(folder)
    for reason in (
        "9 rows do not fit",
        "corpus.jsonl:3: id 'b' is that of an earlier line",
        "corpus.jsonl:4: Invalid JSON",
        "queries.jsonl:4: text: Value error, is empty",
        "queries.jsonl:5: _id: Field required",
        "test.tsv:5: 2 columns",
        "test.tsv:7: query 'q9' is not among the queries",
        "test.tsv:8: document 'nowhere' is not in the corpus",
        "test.tsv:9: grade 'x' is no whole number",
        "test.tsv:10: grade 2 contradicts an earlier line's 1",
    ):
        assert reason in said


def test_squad_paragraph_is_a_document_once(tmp_path: Path) -> None:
    content = asked(
        {"id": "1", "question": "Which colour?", "answers": [{"text": "red"}, {"text": "red"}, {"text": "Red."}]}
    )
    content["data"] += asked({"id": "2", "question": "Is it red?", "answers": []}, title="Other")["data"]
    found = read_dataset(saved(tmp_path / "dev.json", content))
    assert [(one.id, one.title, one.text) for one in found.documents] == [("Red_pumps/0", "", "The pump is red.")]
    first, second = found.cases
    assert (first.relevant, first.answers) == ({"Red_pumps/0": 1}, ("red", "Red."))
    assert first.slices == {"document": "Red pumps", "language": "en"}
    assert (second.relevant, second.answers, second.answerable) == ({"Red_pumps/0": 1}, (), True)


def test_squad_2_question_that_is_impossible_is_not_answerable(tmp_path: Path) -> None:
    question = {
        "id": "1",
        "question": "How heavy?",
        "answers": [],
        "is_impossible": True,
        "plausible_answers": [{"text": "red"}],
    }
    (case,) = read_dataset(saved(tmp_path / "dev.json", asked(question))).cases
    assert (case.answerable, case.relevant, case.answers) == (False, {}, ())


def test_dialects_of_squad_keep_their_own_ids(tmp_path: Path) -> None:
    drcd = asked(
        {"id": "7-1-1", "question": "哪一種？", "answers": [{"id": "1", "text": "紅"}]}, context="泵是紅的。", id="7-1"
    )
    found = read_dataset(saved(tmp_path / "drcd.json", drcd))
    assert (found.documents[0].id, found.cases[0].slices["language"]) == ("7-1", "zh")
    covid = asked({"id": 262, "question": "Which?", "answers": [{"text": "red", "answer_start": 12}]}, document_id=630)
    del covid["data"][0]["title"]
    found = read_dataset(saved(tmp_path / "covid.json", covid))
    assert (found.documents[0].id, found.cases[0].id, found.cases[0].relevant) == ("630", "262", {"630": 1})


def test_squad_places_that_do_not_fit_are_told_together(tmp_path: Path) -> None:
    content = asked({"id": "1", "question": ""}, {"id": "2", "answers": []}, context=" ")
    said = refusal(saved(tmp_path / "dev.json", content))
    assert "3 rows do not fit" in said
    assert "data[0].paragraphs[0].context: Value error, is empty" in said
    assert "data[0].paragraphs[0].qas[0].question: Value error, is empty" in said
    assert "data[0].paragraphs[0].qas[1].question: Field required" in said
    twice = asked({"id": "1", "question": "a?"}, {"id": "1", "question": "b?"})
    assert "id '1' is that of two questions" in refusal(saved(tmp_path / "twice.json", twice))


def test_pubmedqa(tmp_path: Path) -> None:
    row = {
        "QUESTION": "Does it help?",
        "CONTEXTS": ["Some were asked.", "It helped."],
        "LABELS": ["METHODS", "RESULTS"],
        "LONG_ANSWER": "It does.",
        "YEAR": "2007",
        "final_decision": "yes",
    }
    found = read_dataset(saved(tmp_path / "ori_pqal.json", {"12377809": row}))
    (case,), (document,) = found.cases, found.documents
    assert (document.id, document.text) == ("12377809", "METHODS: Some were asked.\n\nRESULTS: It helped.")
    assert "Does it help?" not in document.title + document.text  # the question would find itself
    assert (case.kind, case.answers, case.long_answer, case.slices["type"]) == (
        "yes_no_maybe",
        ("yes",),
        "It does.",
        "yes",
    )
    said = refusal(saved(tmp_path / "bad.json", {"1": row | {"final_decision": "perhaps"}}))
    assert "1 row does not fit" in said
    assert "1.final_decision: Input should be 'yes', 'no' or 'maybe'" in said


def test_beerqa_question_needs_all_of_its_paragraphs(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "src": "hotpotqa", "question": "Which?", "answers": ["a"], "context": [["T", "one"], ["U", "two"]]},
        {"id": "2", "src": "squad", "question": "What?", "answers": ["b"], "context": [["T", "another"]]},
        {"id": "3", "src": "squad", "question": "Who?", "answers": ["c"], "context": [["T", "one"]]},
    ]
    found = read_dataset(saved(tmp_path / "beer.json", {"version": "1", "data": rows}))
    assert {one.id: (one.title, one.text) for one in found.documents} == {
        "T": ("T", "one"), "U": ("U", "two"), "T#2": ("T", "another"),
    }  # fmt: skip
    assert [one.relevant for one in found.cases] == [{"T": 1, "U": 1}, {"T#2": 1}, {"T": 1}]
    assert [one.slices["type"] for one in found.cases] == ["hotpotqa", "squad", "squad"]


def test_questions_for_a_collection(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(
        "\ufeff"
        + jsonl(
            {
                "question": "Wie viel?",
                "relevant": ["a.md", "b.md"],
                "answers": ["3"],
                "language": "de",
                "type": "number",
            }
        )
        + "\n"
        + jsonl(
            {
                "id": "x",
                "question": "And then?",
                "relevant": {"c.md": 3},
                "turns": [{"role": "user", "content": "First?"}],
                "answerable": False,
            }
        ),
        encoding="utf-8",
    )
    found = read_dataset(file)
    assert (found.name, found.documents, found.lines) == ("asked", (), {"line 1": 1, "x": 3})
    first, second = found.cases
    assert (first.relevant, first.answers) == ({"a.md": 1, "b.md": 1}, ("3",))
    assert first.slices == {"language": "de", "type": "number"}
    assert second.turns == (Turn(role="user", content="First?"),)
    assert (second.relevant, second.answerable) == ({"c.md": 3}, False)


def test_questions_that_do_not_fit_are_told_by_line(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    rows = [{"question": "a?", "relevent": []}, {"relevant": []}, {"question": "b?", "relevant": {"a": -1}}]
    file.write_text(jsonl(*rows, {"id": "x", "question": "c?"}, {"id": "x", "question": "d?"}) + "[]\n")
    said = refusal(file)
    for reason in (
        "5 rows do not fit",
        "asked.jsonl:1: relevent: Extra inputs",
        "asked.jsonl:2: question: Field required",
        "asked.jsonl:3: relevant",
        "asked.jsonl:5: id 'x' is that of an earlier line",
        "asked.jsonl:6: Input should be an object",
    ):
        assert reason in said


def test_many_reasons_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text("{}\n" * 50)
    said = refusal(file)
    assert "50 rows do not fit" in said
    assert said.endswith("and 30 more")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.json", '{"rows": []}'),
        ("set.json", "[]"),
        ("set.csv", "a,b"),
        ("folder/corpus.jsonl", ""),
        ("set.json", "3"),
    ],
)
def test_what_is_of_no_layout_is_told_the_layouts(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, {name: content})
    said = refusal(tmp_path / name.partition("/")[0])
    assert "of no known layout" in said
    for layout in ("BEIR", "SQuAD", "PubMedQA", "BeerQA", "JSONL"):
        assert layout in said


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"bad.json": "{", "latin.jsonl": '{"question": "\xe4?"}'.encode("latin-1"), "cut.jsonl.gz": b"\x1f\x8b\x08"},
    )
    for name in ("bad.json", "latin.jsonl", "cut.jsonl.gz", "missing.json"):
        assert name in refusal(tmp_path / name)


def test_empty_set_and_splits_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("\n")
    assert "holds no question" in refusal(tmp_path / "asked.jsonl")
    (tmp_path / "asked.jsonl").write_text(jsonl({"question": "a?"}))
    assert "has no splits" in refusal(tmp_path / "asked.jsonl", split="test")
    assert "--limit 0" in refusal(tmp_path / "asked.jsonl", limit=0)


def test_limit_draws_by_the_seed_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(jsonl(*({"id": str(at), "question": f"Number {at}?"} for at in range(100))))

    def drawn(**options: int) -> list[int]:
        return [int(one.id) for one in read_dataset(file, **options).cases]

    some = drawn(limit=10, seed=3)
    assert len(some) == 10
    assert some == sorted(some) == drawn(limit=10, seed=3)
    assert some != drawn(limit=10, seed=4)
    assert drawn(limit=1000) == drawn() == list(range(100))


def test_a_short_question_is_of_the_language_of_the_others(tmp_path: Path) -> None:
    """As "Ubuntu?" and "Gustav Adolf?", which are taken for neighbours of English; Chinese is no neighbour."""
    file = tmp_path / "asked.jsonl"
    english = [{"question": f"What is the weight of pump number {at}?"} for at in range(97)]
    odd = [{"question": "Que es la vida?"}, {"question": "泵有多重？"}, {"question": "And now?", "language": "fr"}]
    file.write_text(jsonl(*english, *odd), encoding="utf-8")
    cases: tuple[Case, ...] = read_dataset(file).cases
    assert [one.slices["language"] for one in cases] == ["en"] * 98 + ["zh", "fr"]
