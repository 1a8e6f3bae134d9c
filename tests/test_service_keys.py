"""Keys and groups: who may do what, what a group never sees, and what a service without keys refuses."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from service_fixtures import IMPELLER, Service, WireEngine, running, write

from ingest.errors import ForbiddenError, NotFoundError, SettingsError
from ingest.schemas import Chunking
from service.client import Client
from service.principals import Keys, Principal
from service.schemas import QueryRequest, SearchRequest
from service.schemas_jobs import IngestRequest, ReindexRequest
from service.settings import ServiceSettings
from service.up import check_address

GROUPS = {"key-a": ["a"], "key-b": ["b"], "key-none": [], "key-admin": ["admin"]}
SECRETS = {
    "a/pay.md": "# Pay\n\nThe director is paid 93,000 crowns. The bonus of the plumbers is paid in June by Ingrid Sallow.",
    "b/audit.md": "# Audit\n\nThe audit found that the valve records of June are missing. The plumbers lost the keys.",
    "all/canteen.md": "# Canteen\n\nThe canteen is open for two hours at noon. The plumbers pay in crowns.",
}


def keys_file(folder: Path) -> Path:
    known = [
        {"id": key, "sha256": hashlib.sha256(key.encode()).hexdigest(), "groups": groups}
        for key, groups in GROUPS.items()
    ]
    path = folder / "keys.json"
    path.write_text(json.dumps(known))
    return path


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, wire_engine: WireEngine) -> Iterator[Service]:
    """SECRETS, those below a/ for group a, those below b/ for group b. `http` has the admin's key."""
    folder = tmp_path_factory.mktemp("keyed")
    root = write(folder / "root", SECRETS)
    settings = {"SERVICE_LLM_URL": wire_engine.url, "SERVICE_API_KEYS_FILE": str(keys_file(folder))}
    with running(folder / "home", root, "--no-engine", key="key-admin", **settings) as service:
        assert service.ingest(root)["report"]["files"]["done"] == 3
        for group in ("a", "b"):  # read already: only who may see it changes
            assert service.ingest(root / group, acl=[group])["state"] == "succeeded"
        yield service


@pytest.fixture
def client(keyed: Service, wire: WireEngine) -> Iterator[Callable[[str], Client]]:
    opened: list[Client] = []

    def of(key: str) -> Client:
        opened.append(Client(keyed.url, key))
        return opened[-1]

    yield of
    for one in opened:
        one.__exit__()


def paths_of(client: Client, question: str = "plumbers", **fields: object) -> set[str]:
    request = SearchRequest.model_validate({"question": question, "top_k": 50, **fields})
    return {hit.path for hit in client.retrieve(request).hits}


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic key-a", "key-a", "Bearer key-a key-b"])
def test_without_a_known_key_nothing_is_told(keyed: Service, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    with httpx.Client(base_url=keyed.url, headers=headers, trust_env=False) as http:
        for method, path in (
            ("POST", "/query"), ("POST", "/retrieve"), ("POST", "/ingest"), ("GET", "/collections"),
            ("GET", "/documents"), ("GET", "/jobs/x"), ("GET", "/interactions/x"), ("POST", "/feedback"), ("GET", "/metrics"),
        ):  # fmt: skip
            reply = http.request(method, path, json={"question": "x", "path": "x"} if method == "POST" else None)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.get("/health/live").status_code == 200


def test_ingest_and_collections_need_an_admin(keyed: Service, client: Callable[[str], Client]) -> None:
    for key in ("key-a", "key-none"):
        with pytest.raises(ForbiddenError, match="admin"):
            client(key).ingest(IngestRequest(path=str(keyed.root)))
        with pytest.raises(ForbiddenError, match="admin"):
            client(key).delete_collection("default")
        headers = {"authorization": f"Bearer {key}"}
        assert keyed.http.put("/collections/x", json={}, headers=headers).status_code == 403
        assert keyed.http.get("/jobs/x", headers=headers).status_code == 403


def test_each_sees_what_is_for_all_and_for_its_groups(client: Callable[[str], Client]) -> None:
    everybody = {"all/canteen.md"}
    assert paths_of(client("key-a")) == everybody | {"a/pay.md"}
    assert paths_of(client("key-b")) == everybody | {"b/audit.md"}
    assert paths_of(client("key-none")) == everybody
    for key in ("key-a", "key-b", "key-none"):
        assert {one.path for one in client(key).documents()} == paths_of(client(key))


def test_document_of_another_group_does_not_exist(keyed: Service, client: Callable[[str], Client]) -> None:
    [secret] = [one for one in client("key-a").documents() if one.path == "a/pay.md"]
    assert "93,000" in client("key-a").document_text(secret.id)
    for key in ("key-b", "key-none"):
        for path in (f"/documents/{secret.id}", f"/documents/{secret.id}/text"):
            reply = keyed.http.get(path, headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == 404
            assert "93,000" not in reply.text


def test_random_questions_of_group_b_never_show_a_chunk_of_group_a(
    keyed: Service, client: Callable[[str], Client]
) -> None:
    chance = random.Random(7)
    words = re.findall(r"\w+", " ".join(SECRETS.values()))
    [secret] = [one.id for one in client("key-a").documents() if one.path == "a/pay.md"]
    of_b, of_a = client("key-b"), client("key-a")
    filters: list[dict[str, object]] = [{}, {}, {"path": "a"}, {"path": ["a", "b"]}, {"document_id": secret}]
    seen_by_a = 0
    for _ in range(40):
        question = " ".join(chance.choices(words, k=chance.randint(1, 6)))
        fields = {"filters": chance.choice(filters), "group_by": chance.choice([None, "document"])}
        assert "a/pay.md" not in paths_of(of_b, question, **fields), (question, fields)
        seen_by_a += "a/pay.md" in paths_of(of_a, question, **fields)
    assert seen_by_a > 12  # the questions do find it, for those who may see it


def test_an_index_that_is_not_live_is_for_admins_and_shows_what_they_may_see_now(
    keyed: Service, client: Callable[[str], Client]
) -> None:
    admin = client("key-admin")
    folder = write(keyed.root / "plans", {"plan.md": "# Plan\n\nThe plumbers get a new van."})
    assert keyed.ingest(folder, collection="plans")["state"] == "succeeded"
    job = admin.wait(admin.reindex("plans", ReindexRequest(chunking=Chunking(tokens=64), flip=False)).job_id)
    assert job.state == "succeeded", job
    (ready,) = [one.fingerprint[:8] for one in admin.indexes("plans") if one.state == "ready"]
    assert paths_of(admin, collection="plans", index=ready) == {"plans/plan.md"}
    assert keyed.ingest(folder, collection="plans", acl=["b"])["state"] == "succeeded"  # told to the live index alone
    assert paths_of(admin, collection="plans", index=ready) == set()
    with pytest.raises(ForbiddenError, match="admin"):
        paths_of(client("key-b"), collection="plans", index=ready)
    admin.delete_collection("plans")
    shutil.rmtree(folder)


def test_answers_of_group_b_are_made_without_group_a(wire: WireEngine, client: Callable[[str], Client]) -> None:
    wire.say("The director is paid 93,000 crowns.")
    asked = QueryRequest(question="How much is the director paid?")
    answer = client("key-b").query(asked)
    assert "director" not in str(wire.last().body["messages"][-1]).replace(asked.question, "")
    assert answer.citations == ()
    held = client("key-b").interaction(answer.interaction_id)
    assert "a/pay.md" not in {hit["path"] for hit in held["hits"]}
    assert client("key-a").query(asked).citations[0].path == "a/pay.md"


def test_interaction_and_its_feedback_are_its_own_principals_alone(
    keyed: Service, client: Callable[[str], Client]
) -> None:
    identity = client("key-a").query(QueryRequest(question=IMPELLER)).interaction_id
    assert client("key-a").interaction(identity)["principal"] == "key-a"
    for key in ("key-b", "key-admin"):
        headers = {"authorization": f"Bearer {key}"}
        assert keyed.http.get(f"/interactions/{identity}", headers=headers).status_code == 404
        body = {"interaction_id": identity, "rating": "down"}
        assert keyed.http.post("/feedback", json=body, headers=headers).status_code == 404
    assert client("key-a").interaction(identity)["feedback"] == []


def test_with_keys_other_hosts_may_ask(keyed: Service) -> None:
    headers = {"host": "graft.example", "origin": "http://app.example"}
    assert keyed.http.get("/collections", headers=headers).status_code == 200


@pytest.mark.slow
def test_an_uploaded_file_is_for_its_groups_alone_and_by_admins_alone(
    keyed: Service, client: Callable[[str], Client]
) -> None:
    form = {"collection": "uploads", "acl": json.dumps(["a"])}
    files = [("files", ("policies/pay.md", SECRETS["a/pay.md"]))]
    reply = keyed.http.post("/documents", data=form, files=files)
    assert reply.status_code == 202, reply.text
    assert keyed.wait(reply.json()["job_id"])["state"] == "succeeded"
    (document,) = client("key-admin").documents("uploads")
    assert (document.path, document.acl) == ("policies/pay.md", ("a",))
    assert paths_of(client("key-a"), collection="uploads") == {"policies/pay.md"}
    assert paths_of(client("key-b"), collection="uploads") == set()
    with pytest.raises(NotFoundError):
        client("key-b").document(document.id)
    for key in ("key-a", "key-b"):
        with pytest.raises(ForbiddenError):
            client(key).delete_document(document.id)
        headers = {"authorization": f"Bearer {key}"}
        assert keyed.http.post("/documents", data=form, files=files, headers=headers).status_code == 403


@pytest.mark.slow
def test_a_sidecar_narrows_a_document_of_an_open_folder(keyed: Service, client: Callable[[str], Client]) -> None:
    folder = keyed.root / "sidecars"
    write(folder, {"pay.md": SECRETS["a/pay.md"], "open.md": "The plumbers eat at noon."})
    write(folder, {"pay.md.graft.json": '{"acl": ["a"], "metadata": {"site": "north"}}'})
    keyed.ingest(folder, collection="sidecars")
    assert paths_of(client("key-a"), collection="sidecars") == {"sidecars/pay.md", "sidecars/open.md"}
    assert paths_of(client("key-b"), collection="sidecars") == {"sidecars/open.md"}
    assert paths_of(client("key-a"), collection="sidecars", filters={"metadata.site": "north"}) == {"sidecars/pay.md"}
    (folder / "pay.md.graft.json").write_text('{"acl": ["b"]}')
    job = keyed.ingest(folder, collection="sidecars")
    assert job["report"]["chunks"]["added"] == 0
    assert paths_of(client("key-a"), collection="sidecars") == {"sidecars/open.md"}
    assert paths_of(client("key-b"), collection="sidecars") == {"sidecars/pay.md", "sidecars/open.md"}
    write(folder, {"new.md": "The plumbers sleep.", "new.md.graft.json": '{"acl": "a"}'})
    job = keyed.ingest(folder, collection="sidecars")
    assert "sidecar" in job["report"]["failures"][0]["reason"]
    assert "sidecars/new.md" not in paths_of(client("key-admin"), collection="sidecars")


# without keys


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.1.5", "["])
def test_without_keys_a_host_beyond_loopback_is_refused(service: Service, host: str) -> None:
    reply = service.http.post("/retrieve", json={"question": "x"}, headers={"host": host})
    assert reply.status_code == 403
    assert "SERVICE_API_KEYS_FILE" in reply.json()["detail"]


@pytest.mark.parametrize("origin", ["http://evil.example", "https://localhost.evil.example", "null", "file://"])
def test_without_keys_an_origin_beyond_loopback_is_refused(service: Service, origin: str) -> None:
    assert service.http.get("/collections", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize(
    "headers", [{"host": "localhost:8000"}, {"host": "[::1]:8000"}, {"origin": "http://127.0.0.1:3000"}]
)
def test_without_keys_this_machine_may_ask(service: Service, headers: dict[str, str]) -> None:
    assert service.http.get("/collections", headers=headers).status_code == 200


def test_without_keys_no_address_beyond_loopback(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "graft.example"):
        with pytest.raises(SettingsError, match="SERVICE_API_KEYS_FILE"):
            check_address(ServiceSettings(host=host))
        check_address(ServiceSettings(host=host, api_keys_file=keys_file(tmp_path)))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(ServiceSettings(host=host))


# the keys file

DIGEST = hashlib.sha256(b"key").hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "{}",
        '[{"id": "a"}]',
        '[{"id": "a", "sha256": "key"}]',
        f'[{{"id": "a", "sha256": "{DIGEST}", "role": "x"}}]',
        f'[{{"id": "a", "sha256": "{DIGEST}"}}, {{"id": "a", "sha256": "{DIGEST[::-1]}"}}]',
        b"\xff\xfe",
    ],
)
def test_broken_keys_file_is_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=re.escape(str(file))):
        Keys(file)


def test_missing_keys_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Keys(tmp_path / "keys.json")


def test_known_key(tmp_path: Path) -> None:
    keys = Keys(keys_file(tmp_path))
    assert keys.principal("Bearer key-a") == Principal(id="key-a", groups=frozenset({"a"}))
    assert keys.principal("bearer  key-a ") is not None
    assert keys.principal("Bearer key-A") is None
