"""Training rows: each format that is read, each reason why a row is not, and what is held out."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.schemas import Document
from finetune.recipe import read_recipe, with_settings
from finetune.rows import line_of, read_rows, split_rows, write_rows
from finetune.rows_lines import rows_of
from finetune.rows_questions import hit
from finetune.schemas import KtoRow, Message, Method, PreferenceRow, Provenance, Row, SftRow
from finetune.train import read_data
from ingest.errors import InvalidError
from service.prompt import CURRENT, build
from service.refusal import REFUSAL

ASKED = {"role": "user", "content": "What is it?"}
SAID = {"role": "assistant", "content": "A pump."}
OTHER = {"role": "assistant", "content": "A valve."}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str = "What is it?") -> Message:
    return Message(role="user", content=text)


def said(text: str = "A pump.") -> Message:
    return Message(role="assistant", content=text)


def system(text: str = "Be brief.") -> Message:
    return Message(role="system", content=text)


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Each as a line: a text as it is, anything else as JSON."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_one(folder: Path, row: Any, method: Method) -> Row:
    (found,) = read_rows(write(folder / "rows.jsonl", [row]), method).rows
    return found


def refusal_of(path: Path, method: Method = "sft") -> str:
    with pytest.raises(InvalidError) as error:
        read_rows(path, method)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [SYSTEM, ASKED, SAID]}, SftRow(prompt=(system(), user(), said()))),
        ({"prompt": [ASKED], "completion": [SAID]}, SftRow(prompt=(user(),), completion=(said(),))),
        ({"prompt": "What is it? ", "completion": " A pump."}, SftRow(prompt=(user(),), completion=(said(),))),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}, SAID], "score": 3},
            SftRow(prompt=(user(), said())),
        ),
        (
            {"instruction": "What", "input": "is it?", "output": "A pump."},
            SftRow(prompt=(user("What\nis it?"),), completion=(said(),)),
        ),
        (
            {"instruction": "What is it?", "output": "A pump.", "system": "Be brief.", "history": [["Hello", "Yes?"]]},
            SftRow(prompt=(system(), user("Hello"), said("Yes?"), user(), said())),
        ),
        (
            {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A pump."}]},
            SftRow(prompt=(user(),), completion=(said(),)),
        ),
    ],
)  # fmt: skip
def test_rows_of_answers(tmp_path: Path, row: Any, wanted: SftRow) -> None:
    assert read_one(tmp_path, row, "sft") == wanted


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        {"prompt": "What is it?", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        {"prompt": "What is it?", "chosen": "A pump.", "rejected": "A valve."},
        {"chosen": "\n\nHuman: What is it?\n\nAssistant: A pump.", "rejected": "\n\nHuman: What is it?\n\nAssistant: A valve."},
        {"prompt": "\n\nHuman: What is it?\n\nAssistant:", "chosen": " A pump.", "rejected": " A valve."},
        {"instruction": "What is it?", "input": "", "chosen": "A pump.", "rejected": "A valve."},
        {
            "conversations": [{"from": "human", "value": "What is it?"}],
            "chosen": {"from": "gpt", "value": "A pump."},
            "rejected": {"from": "gpt", "value": "A valve."},
        },
    ],
)  # fmt: skip
def test_rows_of_preferences(tmp_path: Path, row: Any) -> None:
    wanted = PreferenceRow(prompt=(user(),), chosen=(said(),), rejected=(said("A valve."),))
    assert read_one(tmp_path, row, "dpo") == wanted


def test_a_prompt_that_only_the_beginnings_tell(tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    found = read_one(tmp_path, row, "dpo")
    assert isinstance(found, PreferenceRow)
    assert [one[-1].content for one in (found.prompt, found.chosen, found.rejected)] == [
        "The sky is",
        "blue.",
        "black.",
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "completion": [SAID], "label": False},
        {"prompt": "What is it?", "completion": "A pump.", "label": False},
        {"messages": [ASKED, SAID], "label": False},
        {"instruction": "What is it?", "output": "A pump.", "kto_tag": False},
    ],
)
def test_rows_with_a_label(tmp_path: Path, row: Any) -> None:
    assert read_one(tmp_path, row, "kto") == KtoRow(prompt=(user(),), completion=(said(),), label=False)


def test_where_a_row_comes_from(tmp_path: Path) -> None:
    ours = {"id": "q1", "documents": ["a.md"], "acl": ["staff"], "kind": "answer", "question": "What?"}
    found = read_one(tmp_path, {"messages": [ASKED, SAID], "source": ours}, "sft")
    assert found.source == Provenance(id="q1", documents=("a.md",), acl=("staff",), kind="answer", question="What?")
    assert read_one(tmp_path, {"messages": [ASKED, SAID], "source": "wiki"}, "sft").source == Provenance()
    path = write(tmp_path / "rows.jsonl", [{"messages": [ASKED, SAID], "source": {"document": "a.md"}}])
    assert "source: document: Extra inputs" in refusal_of(path)  # an acl that is spelt wrongly must not be lost


BAD: list[tuple[Any, str]] = [
    ("not json", "not JSON"),
    ("[1]", "it is a list, not an object"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "hello"}, "messages is a string, not a list"),
    ({"messages": [ASKED]}, "ends with a message of the user"),
    ({"messages": [SAID, ASKED]}, "messages[0]: roles in wrong order, a message of the assistant is the first"),
    ({"messages": [ASKED, ASKED, SAID]}, "messages[1]: roles in wrong order, a message of the user follows one of the user"),
    ({"messages": [ASKED, SYSTEM, SAID]}, "messages[1]: roles in wrong order, a message of the system"),
    ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "messages[1]: the answer is empty"),
    ({"messages": [{"role": "user", "content": ""}, SAID]}, "messages[0]: the message of the user is empty"),
    ({"messages": [ASKED, {"role": "assistant", "content": 7}]}, "messages[1]: its text is a number, not a string"),
    ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "messages[1]: its text is null"),
    ({"messages": [ASKED, {"role": "bot", "content": "x"}]}, 'role "bot" is none of system, user, assistant, tool'),
    ({"messages": [ASKED, {"content": "x"}]}, "messages[1] has no role"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls a tool"),
    ({"messages": [ASKED, SAID], "tools": [{}]}, "it offers tools"),
    ({"messages": [ASKED, SAID], "images": ["a.png"]}, "it has images"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]}, "a part of type 'image'"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', "half a character"),
    ({"prompt": [ASKED, SAID], "completion": [SAID]}, "nothing asks for an answer"),
    ({"prompt": "What is it?", "completion": ""}, "completion[0]: the answer is empty"),
    ({"prompt": [ASKED], "completion": [ASKED]}, "completion[0] is the user's, and an answer is the assistant's"),
    ({"completion": "x"}, "it has no prompt"),
    ({"text": "only text"}, "plain text has no answer to learn"),
    ({"colour": "red"}, "its keys are 'colour'"),
]  # fmt: skip
BAD_PREFERENCES: list[tuple[Any, str]] = [
    ({"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}, "chosen and rejected are the same"),
    ({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, "chosen and rejected are the same"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": [ASKED], "chosen": [SAID]}, "it has no rejected"),
    ({"prompt": [ASKED], "chosen": [SAID], "rejected": []}, "rejected is empty"),
    ({"prompt": [ASKED], "chosen": "A pump.", "rejected": [OTHER]}, "chosen is a string and rejected a list"),
    ({"chosen": "abc", "rejected": "xyz"}, "no beginning in common"),
    ({"prompt": [ASKED], "chosen": [SAID, ASKED, SAID], "rejected": [OTHER]}, "chosen has 3 messages"),
]
BAD_LABELS: list[tuple[Any, str]] = [
    ({"prompt": [ASKED], "completion": [SAID], "label": "yes"}, "label is a string, not true or false"),
    ({"prompt": [ASKED], "completion": [SAID], "label": 1}, "label is a number"),
]


@pytest.mark.parametrize(("method", "bad"), [("sft", BAD), ("dpo", BAD_PREFERENCES), ("kto", BAD_LABELS)])
def test_every_bad_row_is_named_with_its_reason(tmp_path: Path, method: Method, bad: list[tuple[Any, str]]) -> None:
    for row, wanted in bad:
        message = refusal_of(write(tmp_path / "rows.jsonl", [json.dumps({"messages": [ASKED, SAID]}), "", row]), method)
        assert "rows.jsonl:3: " in message, row
        assert wanted in message, message


def test_all_bad_rows_are_named_in_one_go(tmp_path: Path) -> None:
    good = {"messages": [ASKED, SAID]}
    rows = [*[good] * 24, *['{"messages": []}', "not json"] * 15, good, *["{"] * 3, good, "{"]
    message = refusal_of(write(tmp_path / "bad.jsonl", rows))
    assert "34 rows do not fit" in message
    assert "bad.jsonl:25: messages is empty" in message
    assert "bad.jsonl:26: not JSON" in message
    assert "and 14 more: bad.jsonl lines 45-54, 56-58, 60" in message  # those without a reason
    assert "--fitting" in message


def test_rows_of_another_method_say_which(tmp_path: Path) -> None:
    pairs = [{"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}] * 2
    message = refusal_of(write(tmp_path / "pairs.jsonl", pairs))
    assert "holds rows for dpo, not for sft" in message
    mixed = write(tmp_path / "mixed.jsonl", [{"messages": [ASKED, SAID]}, *pairs])
    message = refusal_of(mixed)
    assert "mixed.jsonl:2: it is a row for dpo, not for sft" in message
    assert "mixed.jsonl:3" in message


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:20])
    (tmp_path / "number.json").write_text("7")
    for name, wanted in (
        ("latin.jsonl", "utf-8"),
        ("empty.jsonl", "holds no row"),
        ("rows.csv", "of a kind that is not read"),
        ("cut.jsonl.gz", "cannot be read"),
        ("number.json", "of no known layout"),
        ("missing.jsonl", "there is no file"),
        (".", "is a folder"),
    ):
        message = refusal_of(tmp_path / name)
        assert wanted in message, message
        assert str(tmp_path) in message


def test_written_rows_are_read_again_with_the_same_digest(tmp_path: Path) -> None:
    source = Provenance(documents=("a.md",), acl=())
    kinds: list[tuple[Method, tuple[Row, ...]]] = [
        ("sft", (SftRow(prompt=(user("«\u2028»\n"), said())), SftRow(prompt=(user(),), completion=(said(),), source=source))),
        ("dpo", (PreferenceRow(prompt=(user(),), chosen=(said(),), rejected=(said("no"),), source=source),)),
        ("kto", (KtoRow(prompt=(user(),), completion=(said(),), label=True),)),
    ]  # fmt: skip
    for method, rows in kinds:
        path = tmp_path / f"{method}.jsonl"
        digest = write_rows(rows, path)
        found = read_rows(path, method)
        assert (found.rows, found.digest, found.name) == (rows, digest, method)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert write_rows(rows, tmp_path / f"{method}.jsonl.gz") == digest
        assert read_rows(tmp_path / f"{method}.jsonl.gz", method).digest == digest
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(
        f"{method}.jsonl{end}" for method, _ in kinds for end in ("", ".gz")
    )
    with pytest.raises(OSError, match="directory"):
        write_rows(kinds[0][1], tmp_path / "nowhere" / "rows.jsonl")


def test_a_card_says_what_a_file_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    digest = write_rows([SftRow(prompt=(user(), said()))], path)
    card = tmp_path / "rows.jsonl.card.json"
    card.write_text(json.dumps({"digest": digest, "prompt_version": "tuned-1", "name": "pumps"}))
    found = read_rows(path, "sft")
    assert (found.name, found.prompt_version) == ("pumps", "tuned-1")
    write_rows([SftRow(prompt=(user(), said("Another.")))], path)
    message = refusal_of(path)
    assert digest[:12] in message
    assert "remove the card" in message
    card.write_text("{}")
    assert "names no digest" in refusal_of(path)


SQUAD = {
    "data": [
        {
            "title": "Pumps",
            "paragraphs": [
                {
                    "context": "The Heron H75 has an impeller of bronze.",
                    "qas": [
                        {"id": "1", "question": "What is the impeller made of?", "answers": [{"text": "bronze."}]},
                        {"id": "2", "question": "Who built it?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}  # fmt: skip


def test_questions_become_the_prompts_of_serving(tmp_path: Path) -> None:
    path = tmp_path / "pumps.json"
    path.write_text(json.dumps(SQUAD))
    found = read_rows(path, "sft")
    assert found.prompt_version == CURRENT["cited"]
    answered, refused = found.rows
    passage = hit(Document(id="Pumps/0", title="", text="The Heron H75 has an impeller of bronze."))
    wanted = build(CURRENT["cited"], "What is the impeller made of?", [], [passage])
    assert [one.model_dump() for one in answered.prompt] == wanted
    assert isinstance(answered, SftRow)
    assert answered.completion == (said("bronze [1]"),)
    assert answered.source == Provenance(
        id="1", documents=("Pumps/0",), kind="answer", question="What is the impeller made of?"
    )
    assert isinstance(refused, SftRow)
    assert refused.completion == (said(REFUSAL),)
    assert "bronze" in refused.prompt[-1].content
    brief = read_rows(path, "sft", "brief-2")
    assert isinstance(brief.rows[0], SftRow)
    assert (brief.prompt_version, brief.rows[0].completion) == ("brief-2", (said("bronze"),))
    assert "not for dpo" in refusal_of(path, "dpo")


def test_questions_to_decide(tmp_path: Path) -> None:
    path = tmp_path / "decide.json"
    asked = {
        "QUESTION": "Does it help?",
        "CONTEXTS": ["It helped 9 of 10."],
        "final_decision": "yes",
        "LONG_ANSWER": "It does.",
    }
    path.write_text(json.dumps({"123": asked}))
    (row,) = read_rows(path, "sft").rows
    assert isinstance(row, SftRow)
    assert row.completion == (said("Yes [1]"),)


ENTRY_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


@pytest.fixture
def info(tmp_path: Path) -> Path:
    """A LLaMA-Factory folder: a data set of each layout, and those that cannot be read."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A pump."}]
    files: dict[str, Any] = {
        "alpaca.json": [{"q": f"Part {at}?", "ctx": "", "a": f"GR-{at}"} for at in range(5)],
        "share.json": [{"conversations": [{"from": "system", "value": "Be brief."}, *turns, *turns]}],
        "pairs.json": [{"conversations": turns[:1], "chosen": turns[1], "rejected": {"from": "gpt", "value": "A valve."}}],
        "labels.json": [{"messages": [ASKED, SAID], "label": False}],
        "calls.json": [{"conversations": [turns[0], {"from": "function_call", "value": "{}"}], "tools": "[]"}],
        "tools.json": [{"conversations": turns, "tools": "[{}]"}],
        "pictures.json": [{"messages": [ASKED, SAID], "images": ["a.png"]}],
        "wrong.json": [{"conversations": [turns[1], turns[0]]}, {"conversations": [*turns, {"from": "bot", "value": "x"}]}, 7],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows))
    with_tools = {"messages": "conversations", "tools": "tools"}
    entries: dict[str, Any] = {
        "alpaca": {"file_name": "alpaca.json", "columns": {"prompt": "q", "query": "ctx", "response": "a"}},
        "share": {"file_name": "share.json", "formatting": "sharegpt"},
        "pairs": {
            "file_name": "pairs.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "labels": {
            "file_name": "labels.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": ENTRY_TAGS,
        },
        "calls": {"file_name": "calls.json", "formatting": "sharegpt", "columns": with_tools},
        "tools": {"file_name": "tools.json", "formatting": "sharegpt", "columns": with_tools},
        "pictures": {
            "file_name": "pictures.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": ENTRY_TAGS,
        },
        "wrong": {"file_name": "wrong.json", "formatting": "sharegpt"},
        "drawn": {"file_name": "alpaca.json", "num_samples": 2, "columns": {"prompt": "q", "response": "a"}},
        "hub": {"hf_hub_url": "somebody/rows"},
        "script": {"script_url": "rows"},
        "gone": {"file_name": "gone.json"},
        "above": {"file_name": "../rows.json"},
        "away": {"file_name": "/etc/hostname"},
        "link": {"file_name": "link.json"},
        "typo": {"file_name": "alpaca.json", "columns": {"promt": "q"}},
    }  # fmt: skip
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(entries))
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    return path


def named(info: Path, names: str) -> Path:
    return Path(f"{info}#{names}")


def test_data_sets_of_llamafactory(info: Path) -> None:
    found = read_rows(named(info, "alpaca"), "sft")
    assert found.rows[4] == SftRow(prompt=(user("Part 4?"),), completion=(said("GR-4"),))
    assert (found.name, found.places[4]) == ("alpaca", "alpaca.json row 5")
    assert read_rows(named(info, "share"), "sft").rows == (SftRow(prompt=(system(), user(), said(), user(), said())),)
    assert read_rows(named(info, "pairs"), "dpo").rows == (
        PreferenceRow(prompt=(user(),), chosen=(said(),), rejected=(said("A valve."),)),
    )
    assert read_rows(named(info, "labels"), "kto").rows == (
        KtoRow(prompt=(user(),), completion=(said(),), label=False),
    )
    several = read_rows(named(info, "alpaca[:2], share"), "sft")
    assert [row.prompt[-1].content for row in several.rows] == ["Part 0?", "Part 1?", "A pump."]
    drawn = read_rows(named(info, "drawn"), "sft")
    assert len(drawn.rows) == 2
    assert drawn == read_rows(named(info, "drawn"), "sft")


def test_what_is_not_read_of_llamafactory(info: Path) -> None:
    for name, wanted in (
        ("calls", "conversations[1] calls a tool"),
        ("tools", "it offers tools"),
        ("pictures", "it has images"),
        ("wrong", "wrong.json row 1: conversations[0]: roles in wrong order"),
        ("wrong", """wrong.json row 2: conversations[2]: from "bot" is none of 'human', 'gpt'"""),
        ("wrong", "wrong.json row 3: it is a number, not an object"),
        ("hub", "'hub' is at hf_hub_url 'somebody/rows', and nothing is fetched"),
        ("script", "script_url"),
        ("gone", "its file 'gone.json' is not in"),
        ("above", "lies outside"),
        ("away", "lies outside"),
        ("link", "lies outside"),
        ("typo", "columns.promt"),
        ("nobody", "there is no data set 'nobody'; those with a file are alpaca, share"),
        ("hub,gone", "'gone'"),
        ("pairs", "holds rows for dpo, not for sft"),
    ):
        assert wanted in refusal_of(named(info, name)), name
    assert "add #NAME; those with a file are alpaca" in refusal_of(info)
    assert f"name an entry: {info}#NAME" in refusal_of(info.parent)


def question(text: str, *documents: str) -> SftRow:
    return SftRow(prompt=(user(text), said()), source=Provenance(documents=documents))


def test_what_shares_a_document_stays_together() -> None:
    rows = [question(f"q{at}", f"d{at // 10}") for at in range(100)]
    rows.append(question("bridge", "d0", "d1"))
    train, held_out = split_rows(rows_of(rows, [f"rows.jsonl:{at}" for at in range(101)], "pumps", "cited-2"), 0.2, 3)
    assert len(held_out.rows) == 20
    assert not _documents(train.rows) & _documents(held_out.rows)
    sides = [_documents(side.rows) for side in (train, held_out)]
    assert any({"d0", "d1"} <= side for side in sides)
    assert (train.name, held_out.prompt_version) == ("pumps", "cited-2")
    assert all(rows[int(place.split(":")[1])] == row for row, place in zip(train.rows, train.places, strict=True))
    again = split_rows(rows_of(rows), 0.2, 3)
    assert (again[0].digest, again[1].digest) == (train.digest, held_out.digest)
    assert split_rows(rows_of(rows), 0.2, 4)[1].digest != held_out.digest


def test_one_document_leaves_nothing_to_hold_out() -> None:
    train, held_out = split_rows(rows_of([question(f"q{at}", "d") for at in range(9)]), 0.3, 1)
    assert (len(train.rows), len(held_out.rows)) == (9, 0)


def test_the_same_question_is_not_on_both_sides() -> None:
    rows = [SftRow(prompt=(user(f"What  is {at % 5}?"), said(f"{at}"))) for at in range(50)]
    train, held_out = split_rows(rows_of(rows), 0.2, 1)
    assert len(held_out.rows) == 10
    assert not {row.prompt[0] for row in train.rows} & {row.prompt[0] for row in held_out.rows}
    asked = [
        SftRow(prompt=(user(f"passage {at}"), said()), source=Provenance(question=f"Q{at % 5}")) for at in range(50)
    ]
    train, held_out = split_rows(rows_of(asked), 0.2, 1)
    assert not {row.source.question for row in train.rows} & {row.source.question for row in held_out.rows}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 6), max_size=3)), min_size=1, max_size=20),
    st.floats(0, 0.99),
    st.integers(0, 5),
)
def test_no_document_is_on_both_sides(asked: list[tuple[int, list[int]]], share: float, seed: int) -> None:
    rows = rows_of([question(f"q{text}", *(f"d{one}" for one in documents)) for text, documents in asked])
    train, held_out = split_rows(rows, share, seed)
    assert train.rows
    assert not _documents(train.rows) & _documents(held_out.rows)
    assert not {row.prompt for row in train.rows} & {row.prompt for row in held_out.rows}
    assert sorted(map(line_of, (*train.rows, *held_out.rows))) == sorted(map(line_of, rows.rows))


def _documents(rows: Sequence[Row]) -> set[str]:
    return {one for row in rows for one in row.source.documents}


def test_fewer_rows_are_drawn_from_all_of_the_file_by_the_seed(tmp_path: Path) -> None:
    """A file goes by subject: its first rows are of one."""
    rows = [SftRow(prompt=(user(f"Part {n}?"),), completion=(said(),)) for n in range(100)]
    write_rows(rows, tmp_path / "rows.jsonl")
    asked = ["max_rows=20", "held_out=0", "seed=3"]
    recipe = read_recipe("sft-lora", [f'data="{tmp_path}/rows.jsonl"', *asked])
    drawn = read_data(recipe)
    numbers = [int(place.rpartition(":")[2]) for place in drawn.learn.places]
    assert len(drawn.learn.rows) == 20
    assert numbers == sorted(numbers)
    assert max(numbers) > 60
    assert read_data(recipe) == drawn
    assert read_data(with_settings(recipe, ["seed=4"])) != drawn
