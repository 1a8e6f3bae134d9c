"""Health, figures and the API's own description."""

import re

from prometheus_client.parser import text_string_to_metric_families
from service_fixtures import Service


def test_live(service: Service) -> None:
    assert service.http.get("/health/live").json() == {"state": "ok"}


def test_ready_names_each_dependency(service: Service) -> None:
    reply = service.http.get("/health/ready")
    assert reply.status_code == 200
    body = reply.json()
    assert body["ready"] is True
    assert {name: one["state"] for name, one in body["dependencies"].items()} == dict.fromkeys(
        ("database", "index", "jobs", "engine", "adapters"), "ok"
    )
    assert re.match(r"\d+ chunks", body["dependencies"]["index"]["detail"])


def figures(service: Service) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = service.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(reply.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_metrics_count_answers_tokens_citations_and_requests(service: Service) -> None:
    before = figures(service)
    answer = service.answer(source="eval")
    after = figures(service)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("graft_answers_total", source="eval", adapter="", finish_reason="stop") == 1
    assert grown("graft_tokens_total", kind="prompt_tokens", adapter="") == answer["usage"]["prompt_tokens"]
    assert grown("graft_citations_total", by="match") == len(answer["citations"]) == 1
    assert grown("graft_answer_stage_seconds_count", stage="first_token") == 1
    assert grown("graft_http_requests_total", method="POST", route="/query", status="200") == 1
    assert after[("graft_engine_up", ())] == 1


def test_metrics_name_routes_not_paths(service: Service) -> None:
    service.http.get("/collections/nowhere-in-particular")
    text = service.http.get("/metrics").text
    assert "nowhere-in-particular" not in text
    assert 'route="/collections/{name}",status="404"' in text


def test_description_loads(service: Service) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    promised = {
        "/ingest", "/jobs/{job_id}", "/jobs/{job_id}/events", "/jobs/{job_id}/cancel", "/collections",
        "/collections/{name}", "/query", "/retrieve", "/documents", "/documents/{document_id}",
        "/documents/{document_id}/text", "/feedback", "/interactions/{interaction_id}", "/health/live", "/health/ready",
        "/metrics", "/adapters", "/adapters/{name}", "/adapters/{name}/activate", "/adapters/rollback", "/adapters/moves",
    }  # fmt: skip
    assert promised <= set(paths)
    assert not any(path.startswith("/v1") for path in paths)
    page = service.http.get("/docs")
    assert page.status_code == 200
    assert "openapi.json" in page.text
