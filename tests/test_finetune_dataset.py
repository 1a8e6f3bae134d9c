"""Rows from questions over documents: what the model will be shown, token for token; nothing of what measures is in them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_fixtures import Service, WireEngine, hit

from eval.answer_metrics import contains, markers, plain
from eval.cases import read_dataset
from eval.collection import Placed, placed
from eval.schemas import Case, DataSet, Document
from finetune import cli_raft
from finetune.dataset import Mix, raft_rows
from finetune.frozen import card_of, described, freeze, without_leaks
from finetune.preferences import preference_rows
from finetune.rows import read_rows
from finetune.schemas import Message, Provenance, SftRow
from finetune.split import split_dataset
from finetune.tokens import token_counter
from ingest.errors import ConflictError, InvalidError
from service.cite import cite
from service.client import Client
from service.prompt import built_in
from service.refusal import REFUSAL, is_refusal
from service.schemas import CollectionSettings, QueryRequest

pytestmark = pytest.mark.slow
PARTS = ("pump", "valve", "filter", "motor", "boiler", "crane", "lathe", "press", "mixer", "dryer", "saw", "drill")
METALS = ("bronze", "titanium", "nickel", "copper", "zinc", "cobalt", "brass", "steel", "tin", "lead", "silver", "iron")


def plant() -> DataSet:
    """Twelve documents of three facts, and a question about each; one more has no answer."""
    documents, cases = [], []
    for number, (part, metal) in enumerate(zip(PARTS, METALS, strict=True)):
        facts = {
            f"Which metal is the housing of the {part} made of?": (
                metal,
                f"The housing of the {part} is made of {metal}.",
            ),
            f"How many hours does the {part} run?": (f"{41 + number}", f"The {part} runs {41 + number} hours."),
            f"Is the {part} painted?": (
                "yes" if number % 2 else "no",
                f"The {part} is {'painted' if number % 2 else 'bare'}.",
            ),
        }
        text = "\n\n".join(fact for _, fact in facts.values())
        documents.append(Document(id=part, title=f"The {part}", text=text))
        cases += [
            Case(id=f"{part}-{at}", question=question, relevant={part: 1}, answers=(answer,))
            for at, (question, (answer, _)) in enumerate(facts.items())
        ]
    cases.append(Case(id="none", question="Who painted the ceiling of the chapel?", answerable=False))
    return DataSet(name="plant", documents=tuple(documents), cases=tuple(cases))


@pytest.fixture(scope="module")
def client(started: Service) -> Iterator[Client]:
    with Client(started.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def place(client: Client) -> Iterator[Placed]:
    with placed(client, plant()) as found:
        yield found


@pytest.fixture(scope="module")
def rows(client: Client, place: Placed, models: Path) -> tuple[SftRow, ...]:
    counter = token_counter("smollm2-135m-instruct", models)
    made = raft_rows(client, plant(), place, built_in("tuned-1"), Mix(refusals=0.4, seed=5), counter)
    assert not made.left_out
    return made.rows


def test_an_answer_cites_the_passages_that_hold_it_wherever_they_stand(rows: tuple[SftRow, ...]) -> None:
    answers = [row for row in rows if row.source.kind == "answer"]
    assert len(answers) == 36
    ranks = set()
    for row in answers:
        said, asked = row.completion[0].content, row.prompt[-1].content
        (rank,) = markers(said)
        passages = asked.split("\n\n[")
        ranks.add(rank)
        if plain(said) not in {"Yes", "No"}:
            assert contains(passages[rank - 1], [plain(said)])
        assert row.source.question is not None
        assert asked.endswith(f"Question: {row.source.question}")
    assert ranks == {1, 2, 3}


def test_no_row_shows_a_document_that_is_held_out(client: Client, place: Placed, models: Path) -> None:
    """Where all lie in one collection, the retriever finds those too."""
    counter = token_counter("smollm2-135m-instruct", models)
    asked = plant().model_copy(update={"cases": plant().cases[:3]})  # about the pump
    parts = client, asked, place, built_in("tuned-1"), Mix(refusals=0.5, seed=5), counter

    def shown(held_out: frozenset[str]) -> set[str]:
        rows = raft_rows(*parts, held_out=held_out).rows
        texts = " ".join(row.prompt[-1].content for row in rows)
        return {part for part in PARTS if f"The {part}:" in texts or f"of the {part} " in texts}

    others = shown(frozenset()) - {"pump"}
    assert others
    assert shown(frozenset(others)) & others == set()


def test_a_prompt_without_passages_gives_no_rows(client: Client, place: Placed, models: Path) -> None:
    counter = token_counter("smollm2-135m-instruct", models)
    with pytest.raises(InvalidError, match="shows no passages"):
        raft_rows(client, plant(), place, built_in("plain-1"), Mix(prompt="plain-1"), counter)


def test_a_refusal_has_no_passage_that_holds_the_answer(rows: tuple[SftRow, ...]) -> None:
    refusals = [row for row in rows if row.source.kind == "refusal"]
    assert {row.completion[0].content for row in refusals} == {REFUSAL}
    assert 0.25 < len(refusals) / len(rows) < 0.55
    answers = {case.id: case.answers for case in plant().cases}
    for row in refusals:
        held = answers[str(row.source.id)]
        if held and held[0] not in {"yes", "no"}:
            assert not contains(row.prompt[-1].content.rpartition("Question: ")[0], held)


def test_a_prompt_is_what_serving_sends_for_the_same_passages(
    client: Client, place: Placed, rows: tuple[SftRow, ...], wire: WireEngine
) -> None:
    """The same question, asked of the service with this prompt: the passages are the retriever's, in its own order."""
    client.put_collection(place.view.name, CollectionSettings(prompt="tuned-1"))
    case = plant().cases[0]
    client.query(QueryRequest(question=case.question, collection=place.view.name))
    sent = wire.last().body["messages"]
    row = next(one for one in rows if one.source.id == case.id and one.source.kind == "answer")
    learned = [one.model_dump() for one in row.prompt]
    assert sent[0] == learned[0]
    assert len(sent) == len(learned) == 2
    passages, trained = (
        {re.sub(r"^\[\d\] ", "", one) for one in messages[1]["content"].split("\n\n")} for messages in (sent, learned)
    )
    assert len(passages & trained) >= 2  # the gold one and the question at least


def test_passages_are_left_out_to_stay_within_the_tokens(client: Client, place: Placed, models: Path) -> None:
    counter = token_counter("smollm2-135m-instruct", models)
    made = raft_rows(client, plant(), place, built_in("tuned-1"), Mix(tokens=110, fewer=0, seed=5), counter)
    assert made.rows
    for row in made.rows:
        assert counter(row.prompt) <= 110
        for rank in markers(row.completion[0].content):
            assert f"[{rank}]" in row.prompt[-1].content


def test_the_citation_of_a_row_is_one_that_serving_accepts(rows: tuple[SftRow, ...], client: Client) -> None:
    row = next(one for one in rows if one.source.kind == "answer" and plain(one.completion[0].content) in METALS)
    passages = [
        hit(text.partition("] ")[2], n)
        for n, text in enumerate(row.prompt[-1].content.rpartition("\n\nQuestion: ")[0].split("\n\n["), 1)
    ]
    cited = cite(row.completion[0].content, passages)
    assert [one.supported for one in cited.sentences] == [True]
    assert cited.citations[0].by == "model"


def test_no_document_is_on_both_sides_of_a_split() -> None:
    learn, held = split_dataset(plant(), 0.25, seed=3)
    assert {one.id for one in learn.cases} | {one.id for one in held.cases} == {one.id for one in plant().cases}
    used = [{document for case in side.cases for document in case.relevant} for side in (learn, held)]
    assert used[0].isdisjoint(used[1])
    assert {one.id for one in learn.documents}.isdisjoint({one.id for one in held.documents})
    assert 0.15 < len(held.cases) / len(plant().cases) < 0.35
    assert split_dataset(plant(), 0.25, seed=3) == (learn, held)


def test_questions_of_one_article_stay_together() -> None:
    cases = tuple(
        Case(id=str(n), question="What?", relevant={str(n): 1}, slices={"document": f"article {n % 3}"})
        for n in range(12)
    )
    learn, held = split_dataset(DataSet(name="d", documents=(), cases=cases), 0.34, seed=1)
    articles = [{one.slices["document"] for one in side.cases} for side in (learn, held)]
    assert articles[0].isdisjoint(articles[1])
    with pytest.raises(InvalidError, match="all about the same documents"):
        split_dataset(DataSet(name="d", documents=(), cases=cases[:1]), 0.34, seed=1)


def test_a_split_is_a_data_set_that_evaluation_reads(tmp_path: Path) -> None:
    _, held = split_dataset(plant(), 0.25, seed=3)
    (tmp_path / "held-out.json").write_text(held.model_dump_json())
    read = read_dataset(tmp_path / "held-out.json")
    assert read.documents == held.documents
    assert [one.id for one in read.cases] == [one.id for one in held.cases]


def test_nothing_that_is_held_out_enters_by_question_or_by_text() -> None:
    text = "The long report says that seventeen engineers walked around the reactor for a whole week in the rain and found it."
    held = DataSet(
        name="held",
        documents=(Document(id="d", title="", text=text),),
        cases=(Case(id="1", question="Who walked around the reactor?", relevant={"d": 1}),),
    )
    rows = [
        row("Who  walked around the REACTOR", "[1] Nothing.", "nobody"),
        row("What was found?", f"[1] As {text.lower()}", "it"),
        row("What was found?", "[1] Seventeen engineers walked.", "it"),
        row(
            "What was found?",
            "[1] Nothing.",
            "found that seventeen engineers walked around the reactor for a whole week in the rain",
        ),
    ]
    kept, left_out = without_leaks(rows, [held])
    assert kept == [rows[2]]
    assert left_out == {"its question is held out": 1, "it shows text of a held-out document": 2}


def test_a_chinese_text_that_is_held_out_is_found_in_a_row() -> None:
    """Whatever punctuation and line ends are; a name that both texts have is no leak."""
    name = "中华人民共和国国家市场监督管理总局"
    said = "每台泵在运行两千小时之后都要更换轴承,并且在更换之前把轴里的旧油全部放掉。"
    held = DataSet(
        name="held",
        documents=(Document(id="d", title="保养", text=f"{name}规定:{said}"),),
        cases=(Case(id="1", question="多久更换轴承?", relevant={"d": 1}),),
    )
    rows = [
        row("规定是什么?", f"[1] 操作员说,{said.replace(',', ' ')}", "更换"),
        row("谁规定?", f"[1] {name}没有这样说。", "没有"),
        row("多久更换 轴承?", "[1] 没有。", "没有"),
    ]
    kept, left_out = without_leaks(rows, [held])
    assert kept == [rows[1]]
    assert left_out == {"its question is held out": 1, "it shows text of a held-out document": 1}


def test_a_frozen_data_set_has_a_card_and_never_changes(tmp_path: Path, rows: tuple[SftRow, ...]) -> None:
    path = tmp_path / "plant.jsonl"
    card = freeze(
        rows, path, method="sft", prompt_version="tuned-1", made_by={"command": "raft"}, held_out=described([plant()])
    )
    assert json.loads(card_of(path).read_text())["digest"] == card.digest
    read = read_rows(path, "sft")
    assert (read.rows, read.digest, read.prompt_version) == (rows, card.digest, "tuned-1")
    assert card.held_out["plant"]["questions"] == 37
    with pytest.raises(ConflictError, match="never changes"):
        freeze(rows, path, method="sft", prompt_version="tuned-1", made_by={})
    path.write_text(path.read_text().replace("bronze", "gold"))
    with pytest.raises(InvalidError, match="card"):
        read_rows(path, "sft")


def test_the_groups_of_a_data_set_are_those_that_may_see_every_row(tmp_path: Path) -> None:
    limited = [
        row("A?", "[1] a", "a", acl=("engineers", "managers")),
        row("B?", "[1] b", "b"),
        row("C?", "[1] c", "c", acl=("managers",)),
    ]
    card = freeze(limited, tmp_path / "r.jsonl", method="sft", prompt_version=None, made_by={})
    assert card.acl == ("managers",)


def test_pairs_prefer_what_is_right_and_cited(rows: tuple[SftRow, ...]) -> None:
    pairs = preference_rows(rows, seed=2)
    kinds = {one.source.kind for one in pairs}
    assert kinds >= {"wrong", "uncited", "miscited", "refused", "unsupported"}
    for pair in pairs:
        chosen, rejected = pair.chosen[0].content, pair.rejected[0].content
        assert chosen != rejected
        if pair.source.kind == "unsupported":
            assert is_refusal(chosen)
            assert markers(rejected)
        if pair.source.kind == "uncited":
            assert plain(chosen) == rejected
        if pair.source.kind == "miscited":
            assert plain(chosen) == plain(rejected)
            assert markers(chosen) != markers(rejected)
    assert preference_rows(rows, seed=2) == pairs
    some = preference_rows(rows, seed=2, faults=("wrong", "unsupported"))
    assert {one.source.kind for one in some} == {"wrong", "unsupported"}


def test_a_yes_or_no_without_support_is_what_a_refusal_is_preferred_to() -> None:
    asked = row("Does it pump?", "[1] The Heron lifts water.", REFUSAL)
    (pair,) = preference_rows([asked], seed=2)
    assert pair.rejected[0].content in {"Yes [1]", "No [1]"}


def test_the_commands_lead_from_questions_to_rows_and_pairs(
    started: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_URL", started.url)
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    questions, parts, rows, pairs = (tmp_path / name for name in ("plant.json", "parts", "rows.jsonl", "pairs.jsonl"))
    questions.write_text(plant().model_dump_json())
    cli_raft.split(questions, parts)
    cli_raft.raft([parts / "learn.json"], rows, held_out=[parts / "held-out.json"])
    cli_raft.preferences(rows, pairs)
    said = capsys.readouterr().out
    assert f"{rows}: " in said
    held = {case.question for case in read_dataset(parts / "held-out.json").cases}
    learned = read_rows(rows, "sft")
    assert learned.prompt_version == "tuned-1"
    assert {row.source.question for row in learned.rows}.isdisjoint(held)
    assert len(read_rows(pairs, "dpo").rows) > 20
    card = json.loads(card_of(rows).read_text())
    assert card["held_out"]["plant/held-out"]["questions"] == len(held)
    assert card["sources"][0]["name"] == "plant/learn"
    with pytest.raises(ConflictError, match="choose another name"):
        cli_raft.raft([parts / "learn.json"], rows)
    with pytest.raises(InvalidError, match="there already"):
        cli_raft.split(questions, parts)


def row(question: str, passages: str, answer: str, acl: tuple[str, ...] | None = None) -> SftRow:
    return SftRow(
        prompt=(Message(role="user", content=f"{passages}\n\nQuestion: {question}"),),
        completion=(Message(role="assistant", content=answer),),
        source=Provenance(question=question, acl=acl),
    )
