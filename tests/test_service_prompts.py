"""Prompts as versions: what a file may hold, that a version never changes, which one answers, and the way back."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import IMPELLER, Service, WireEngine, hit, run_graft

from ingest import db
from ingest.catalog import Collection, now
from ingest.errors import ConflictError, InvalidError, NotFoundError
from ingest.schemas import Chunking, Hit
from service.prompt import CURRENT, build, built_in_versions
from service.prompt_store import PromptStore
from service.records import Turn
from service.template import Template

SUPPORT = """
passages = 2

[en]
system = "You are the help desk. Answer from the notes, or write: {{ refusal }}"
user = '''
{% for note in passages %}{{ note.n }}: {{ note.text }}
{% endfor %}{{ question }}'''

[[en.examples]]
user = "1: The bell is red.\\n\\nWhich colour?"
assistant = "Red [1]."

[zh]
user = "{% for note in passages %}{{ note.best }}{% endfor %}{{ question }}"
"""
OTHER = SUPPORT.replace("help desk", "front desk")
NOTE = hit("The bell is red. It rings at noon.", heading="Rooms > Bell")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    engine = db.connect(f"sqlite:///{tmp_path / 'graft.db'}")
    db.migrate(engine)
    yield PromptStore(engine)
    engine.dispose()


@pytest.fixture
def collection() -> Collection:
    return Collection(
        name="desk", embedder="e", chunking=Chunking(), fingerprint="f" * 64, prompt="auto", created_at=now()
    )


# a file


def test_a_file_is_messages_by_the_questions_language() -> None:
    template = Template.of(SUPPORT)
    turns = [Turn(role="user", content="Hello"), Turn(role="assistant", content="Good day.")]
    assert template.messages("Which colour is the bell?", turns, [NOTE]) == [
        {
            "role": "system",
            "content": "You are the help desk. Answer from the notes, or write: The documents say nothing about this.",
        },
        {"role": "user", "content": "1: The bell is red.\n\nWhich colour?"},
        {"role": "assistant", "content": "Red [1]."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "1: The bell is red. It rings at noon.\nWhich colour is the bell?"},
    ]
    assert template.messages("铃是什么颜色？", [], [hit("铃是红色的。中午响。")]) == [
        {"role": "user", "content": "铃是红色的。铃是什么颜色？"}
    ]


def test_text_is_never_read_as_a_template() -> None:
    hostile = hit("{{ question }} {% for x in y %} {{ refusal }}")
    assert (
        "{{ question }} {% for x in y %} {{ refusal }}"
        in Template.of(SUPPORT).messages("{{ x }}?", [], [hostile])[-1]["content"]
    )
    assert Template.of(SUPPORT).messages("{{ x }}?", [], [hostile])[-1]["content"].endswith("{{ x }}?")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{{ question }}'''", "{{ question }} {{ colour }}'''"), "'colour'"),
        (("{{ note.text }}", "{{ note.text }}{{ note.colour }}"), "'colour'"),
        (("{{ note.text }}", "{{ note.text }}{{ note.__class__ }}"), "'__class__'"),
        (("{{ note.text }}", "{{ question.text }}"), "'text'"),
        (("{{ question }}'''", "'''"), "en.user: it does not show {{ question }}"),
        (("{{ note.text }}", "{{ note.path }}"), "neither the text nor the best sentence"),
        (("{% endfor %}{{ question }}'''", "{{ question }}'''"), "line"),
        (("{{ refusal }}", "{{ refusal | replace }}"), "replace"),
        (("{{ refusal }}", "{{ refusal.upper() }}"), "Call"),
        (("{{ refusal }}", "{{ refusal * 1000000 }}"), "Mul"),
        (("{{ refusal }}", "{% include 'brief-1.toml' %}"), "Include"),
        (("for note in passages", "for note in question"), "a loop goes over `passages`"),
        (("passages = 2", "passages = 99"), "passages"),
        (("passages = 2", "passages = 2\ncolour = 'red'"), "colour"),
        (("passages = 2", "passages ="), "TOML"),
        (("[zh]\nuser", "[de]\nuser"), "de"),
        (("[zh]\nuser = \"{%", "[zh]\nsystem = \"{%"), "zh.user"),
        (("help desk", "help desk " * 2000), "too long"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(change: tuple[str, str], said: str) -> None:
    assert change[0] in SUPPORT
    with pytest.raises(InvalidError) as refused:
        Template.of(SUPPORT.replace(*change))
    assert said in str(refused.value)


def test_a_part_for_each_language_or_one_for_all() -> None:
    english = SUPPORT[: SUPPORT.index("[zh]")]
    with pytest.raises(InvalidError, match="`all`"):
        Template.of(english)
    everyone = Template.of(english.replace("[en]", "[all]").replace("[[en.", "[[all."))
    assert everyone.messages("铃是什么颜色？", [], [NOTE])[0]["content"].startswith("You are the help desk.")


@pytest.mark.parametrize("version", built_in_versions())
def test_the_products_own_files_fit(version: str, store: PromptStore) -> None:
    assert store.versions(version)[0].source
    assert store.template(version).messages("Why?", [], [])


# versions


def test_a_new_version_leaves_the_old_ones_as_they_are(store: PromptStore) -> None:
    first, new = store.add("support", SUPPORT, "ann")
    assert (first.version, first.built_in, first.principal, new) == ("support-1", False, "ann", True)
    second, _ = store.add("support", OTHER, "ben")
    assert second.version == "support-2"
    again, new = store.add("support", f"# the same with a remark\n{SUPPORT}", "ben")
    assert (again, new) == (first, False)
    assert [one.source for one in store.versions("support")] == [SUPPORT, OTHER]
    assert [one.version for one in store.versions("support-2")] == ["support-2"]
    assert store.resolved("support") == "support-2"


def test_two_at_once_make_two_versions_or_one(store: PromptStore) -> None:
    made: list[str] = []
    together = threading.Barrier(6)

    def add(n: int) -> None:
        together.wait()
        made.append(store.add("desk", SUPPORT.replace("help desk", f"desk {n % 3}"), "ann")[0].version)

    threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(made) == ["desk-1", "desk-1", "desk-2", "desk-2", "desk-3", "desk-3"]
    assert len(store.versions("desk")) == 3


@pytest.mark.parametrize("name", ["Support", "support-2", "2nd", "auto", "brief", "cited", "x" * 41, "a b", ""])
def test_names_that_do_not_fit(store: PromptStore, name: str) -> None:
    with pytest.raises(InvalidError):
        store.add(name, SUPPORT, "ann")


def test_an_added_version_is_built_as_the_products_own(store: PromptStore) -> None:
    store.add("support", SUPPORT, "ann")
    built = build("support-1", "Which colour?", [], [NOTE], store.template)
    assert built == build("support-1", "Which colour?", [], [NOTE.model_copy()], PromptStore(store.engine).template)
    assert build("brief-1", "Which colour?", [], [NOTE], store.template) == build(
        "brief-1", "Which colour?", [], [NOTE]
    )
    with pytest.raises(NotFoundError, match="support-1"):
        store.template("support")
    with pytest.raises(NotFoundError, match="brief-1"):
        build("nobody-1", "Which colour?", [], [NOTE])


# pointers


def test_moves_and_the_way_back(store: PromptStore, collection: Collection) -> None:
    assert store.pointer(collection) == "auto"
    for version in ("support-1", "support-2", "support-2", "auto"):
        store.use(collection, version, "ann")
    for before in ("support-2", "support-1", "auto"):
        assert store.roll_back(collection, "ben").to_version == before == store.pointer(collection)
    with pytest.raises(ConflictError, match="'desk'"):
        store.roll_back(collection, "ben")
    store.use(collection, "support-2", "ann")
    assert store.roll_back(collection, "ann").to_version == "auto"
    kinds = [move.kind for move in store.moves("desk")]
    assert kinds == ["use", "use", "use", "rollback", "rollback", "rollback", "use", "rollback"]
    assert [move.from_version for move in store.moves("desk")][1:] == [move.to_version for move in store.moves("desk")][
        :-1
    ]


def test_moves_of_two_processes_follow_each_other(store: PromptStore, collection: Collection) -> None:
    stores = [PromptStore(store.engine) for _ in range(4)]
    together = threading.Barrier(4)

    def use(n: int) -> None:
        together.wait()
        for turn in range(3):
            stores[n].use(collection, f"own{n}-{turn + 1}", f"user {n}")

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    moves = store.moves("desk")
    assert len(moves) == 12
    assert ["auto", *(move.to_version for move in moves)] == [
        *(move.from_version for move in moves),
        moves[-1].to_version,
    ]


# over HTTP


@pytest.fixture
def desk(service: Service) -> Iterator[str]:
    """A name of its own for each test's prompts; `default` answers as before afterwards."""
    number = len(service.http.get("/prompts").json())
    yield f"desk{number}x"
    service.http.put("/collections/default", json={"prompt": "auto"})


def put(service: Service, name: str, source: str, status: int = 201) -> Any:
    reply = service.http.put(f"/prompts/{name}", json={"template": source})
    assert reply.status_code == status, reply.text
    return reply.json()


def rebuilt(service: Service, answer: dict[str, Any], template: Template) -> list[Any]:
    held = service.interaction(answer["interaction_id"])
    hits = [Hit.model_validate(one) for one in held["hits"]][: held["passages"]]
    return list(template.messages(held["question"], [], hits))


def test_a_version_is_added_used_recorded_and_left_again(service: Service, wire: WireEngine, desk: str) -> None:
    assert put(service, desk, SUPPORT)["version"] == f"{desk}-1"
    assert put(service, desk, SUPPORT, 200)["version"] == f"{desk}-1"
    used = service.http.put("/collections/default", json={"prompt": desk})
    assert used.json()["prompt"] == f"{desk}-1"  # the newest of that moment
    put(service, desk, OTHER)
    answer = service.answer()
    assert service.interaction(answer["interaction_id"])["prompt_version"] == f"{desk}-1"
    assert wire.last().body["messages"] == rebuilt(service, answer, Template.of(SUPPORT))
    assert len(service.interaction(answer["interaction_id"])["hits"]) > 2  # of which the prompt takes two
    service.http.put("/collections/default", json={"prompt": f"{desk}-2"})
    assert wire_said(service, wire).startswith("You are the front desk.")
    back = service.http.post("/collections/default/prompt/rollback").json()
    assert (back["from_version"], back["to_version"], back["kind"]) == (f"{desk}-2", f"{desk}-1", "rollback")
    assert wire_said(service, wire).startswith("You are the help desk.")
    assert service.http.put("/collections/default", json={"prompt": "auto"}).json()["prompt"] == "auto"
    answer = service.answer()
    assert service.interaction(answer["interaction_id"])["prompt_version"] == CURRENT["cited"]
    moves = service.http.get("/collections/default/prompt/moves").json()
    assert [move["to_version"] for move in moves[-4:]] == [f"{desk}-1", f"{desk}-2", f"{desk}-1", "auto"]
    assert [one["version"] for one in service.http.get(f"/prompts/{desk}").json()] == [f"{desk}-1", f"{desk}-2"]
    assert {f"{desk}-2", *built_in_versions()} <= {one["version"] for one in service.http.get("/prompts").json()}


def wire_said(service: Service, wire: WireEngine) -> str:
    service.answer(IMPELLER)
    return str(wire.last().body["messages"][0]["content"])


def test_unknown_prompts_are_refused_with_those_that_there_are(service: Service) -> None:
    for name in ("nobody", "cited-99"):
        reply = service.http.put("/collections/default", json={"prompt": name})
        assert reply.status_code == 422
        assert "cited-1" in reply.json()["detail"]
        assert "auto" in reply.json()["detail"]
    assert service.http.get("/collections/default").json()["prompt"] == "auto"
    assert service.http.put("/collections/fresh", json={"prompt": "nobody"}).status_code == 422
    assert service.http.get("/collections/fresh").status_code == 404
    assert service.http.get("/prompts/nobody").status_code == 404
    assert service.http.put("/prompts/cited", json={"template": SUPPORT}).status_code == 422
    bad = service.http.put("/prompts/desk", json={"template": SUPPORT.replace("{{ refusal }}", "{{ colour }}")})
    assert (bad.status_code, "'colour'" in bad.json()["detail"]) == (422, True)


def test_a_collection_may_be_made_with_its_prompt_and_gone_it_is_forgotten(service: Service) -> None:
    made = service.http.put("/collections/shelf", json={"prompt": "cited-1"}).json()
    assert made["prompt"] == "cited-1"
    kept = service.http.put("/collections/shelf", json={"threshold": 0.2}).json()
    assert kept["prompt"] == "cited-1"
    service.http.delete("/collections/shelf")
    assert service.http.put("/collections/shelf", json={}).json()["prompt"] == "auto"
    service.http.delete("/collections/shelf")


@pytest.mark.slow
def test_the_command_adds_shows_uses_and_goes_back(service: Service, desk: str, tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text(SUPPORT)

    def graft(*arguments: str) -> str:
        ran = run_graft(service.home, "prompts", *arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert graft("add", desk, str(file)).strip() == f"{desk}-1"
    assert f"{desk}-1" in graft("use", desk)
    listed = graft("list")
    assert "cited-1" in listed
    assert f"{desk}-1" in listed
    assert "{{ note.text }}" in graft("show", desk)
    assert f"{desk}-1 -> auto" in graft("rollback")
    (tmp_path / "bad.toml").write_text("passages = 1")
    ran = run_graft(service.home, "prompts", "add", desk, "bad.toml", cwd=tmp_path)
    assert (ran.returncode, "part `all`" in ran.stderr) == (1, True)
