"""The `graft` command: with a service, without one, and what it says when something is wrong."""

import hashlib
import json
from pathlib import Path

import pytest
from service_fixtures import HERON, IMPELLER, IMPELLER_ANSWER, KESTREL, Service, run_graft, running, write


def own_settings(service: Service) -> dict[str, str]:
    """Leads to the running service, wherever the home is."""
    return {"GRAFT_URL": service.url}


def test_with_a_service_everything_goes_there(service: Service, tmp_path: Path) -> None:
    found = run_graft(
        tmp_path, "retrieve", IMPELLER, "--top-k", "1", "--json", "-", cwd=tmp_path, **own_settings(service)
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["hits"][0]["path"] == "docs/pumps/heron.md"
    file = tmp_path / "answer.json"
    asked = run_graft(service.home, "query", IMPELLER, "--json", str(file), cwd=tmp_path)  # by the home's owner
    assert (asked.returncode, asked.stdout) == (0, "")
    assert json.loads(file.read_text())["answer"] == "".join(IMPELLER_ANSWER)


def test_query_shows_the_answer_and_its_sources(service: Service, tmp_path: Path) -> None:
    shown = run_graft(service.home, "query", IMPELLER, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("".join(IMPELLER_ANSWER))
    assert "[1] docs/pumps/heron.md" in shown.stdout


@pytest.mark.slow
def test_errors_are_one_line(service: Service, tmp_path: Path) -> None:
    for arguments, status, said in (
        (["retrieve", "x", "--collection", "nowhere"], 1, "nowhere"),
        (["query", " "], 2, "question"),
        (["retrieve", "x", "--top-k", "0"], 2, "--top-k"),
        (["ingest", str(tmp_path)], 1, "--root"),
        (["fly"], 2, "fly"),
    ):
        done = run_graft(service.home, *arguments, cwd=tmp_path)
        assert done.returncode == status, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_nothing_answers_at_the_url(tmp_path: Path) -> None:
    done = run_graft(tmp_path, "collections", cwd=tmp_path, GRAFT_URL="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "graft up" in done.stderr
    assert "Traceback" not in done.stderr


def test_query_without_an_engine_names_graft_up(tmp_path: Path) -> None:
    done = run_graft(tmp_path / "home", "query", IMPELLER, cwd=tmp_path)
    assert done.returncode == 1
    assert "graft up" in done.stderr
    assert "SERVICE_LLM_URL" in done.stderr
    assert not (tmp_path / "home").exists()  # nothing was started


@pytest.mark.parametrize(
    ("setting", "value"),
    [("SERVICE_PORT", "99999"), ("INGEST_THREADS", "none")],
)
def test_setting_that_does_not_fit_is_named(tmp_path: Path, setting: str, value: str) -> None:
    done = run_graft(tmp_path / "home", "retrieve", "x", cwd=tmp_path, **{setting: value})
    assert done.returncode == 1
    assert setting.partition("_")[2].lower() in done.stderr.lower()
    assert "docs/settings.md" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_up_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    for arguments, settings, said in (
        (["--ingest", "missing"], {}, "missing"),
        ([], {"SERVICE_HOST": "0.0.0.0"}, "SERVICE_API_KEYS_FILE"),
        ([], {"SERVICE_API_KEYS_FILE": str(tmp_path / "none.json")}, "none.json"),
    ):
        done = run_graft(tmp_path / "home", "up", "--no-engine", *arguments, cwd=tmp_path, **settings)
        assert done.returncode == 1, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_second_up_says_who_owns_the_home_and_a_taken_port_names_its_setting(service: Service, tmp_path: Path) -> None:
    second = run_graft(service.home, "up", "--no-engine", cwd=tmp_path)
    assert second.returncode == 1
    for said in (str(service.home), str(service.process.pid), service.url, "GRAFT_HOME"):
        assert said in second.stderr
    port = service.url.rpartition(":")[2]
    taken = run_graft(tmp_path / "other", "up", "--no-engine", cwd=tmp_path, SERVICE_PORT=port)
    assert taken.returncode == 1
    assert "SERVICE_PORT" in taken.stderr
    assert port in taken.stderr
    assert service.http.get("/health/live").status_code == 200  # neither harmed it


@pytest.mark.slow
def test_with_nothing_running_commands_start_the_service_themselves(tmp_path: Path) -> None:
    home = tmp_path / "home"
    docs = write(tmp_path / "docs", {"a.md": HERON, "b.md": KESTREL, "broken.pdf": b"%PDF-1.4 nothing"})
    ingested = run_graft(home, "ingest", str(docs), "--json", "-", cwd=tmp_path)
    assert ingested.returncode == 0, ingested.stderr
    report = json.loads(ingested.stdout)
    assert (report["files"]["done"], report["files"]["failed"]) == (2, 1)
    found = run_graft(home, "retrieve", IMPELLER, "--json", "-", cwd=tmp_path)
    assert json.loads(found.stdout)["hits"][0]["path"].endswith("docs/a.md")
    listed = run_graft(home, "collections", "--json", "-", cwd=tmp_path)
    assert [(one["name"], one["documents"]) for one in json.loads(listed.stdout)] == [("default", 2)]
    again = run_graft(home, "ingest", str(docs), cwd=tmp_path)
    assert "2 unchanged" in again.stdout
    assert "broken.pdf" in again.stdout
    assert not (home / "owner.json").exists()


@pytest.mark.slow
def test_doctor_says_what_is_missing_and_the_remedy(tmp_path: Path) -> None:
    done = run_graft(tmp_path / "home", "doctor", "--json", "-", cwd=tmp_path, GRAFT_VLLM_VENV=str(tmp_path / "none"))
    findings = {one["name"]: one for one in json.loads(done.stdout)}
    assert (findings["engine"]["state"], findings["engine"]["remedy"]) == ("missing", "make engine")
    assert done.returncode == 1
    assert "bge-small-en-v1.5" in str(findings)


@pytest.mark.slow
def test_key_of_the_environment_is_sent(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"id": "me", "sha256": hashlib.sha256(b"secret").hexdigest(), "groups": ["admin"]}]))
    with running(tmp_path / "home", tmp_path, "--no-engine", key="secret", SERVICE_API_KEYS_FILE=str(keys)) as service:
        refused = run_graft(service.home, "collections", cwd=tmp_path)
        assert refused.returncode == 1
        assert "Bearer" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert run_graft(service.home, "collections", cwd=tmp_path, GRAFT_API_KEY="secret").returncode == 0
