"""What Prometheus reads at `/metrics`. One registry an application, so that two in a process do not mix."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.records import Interaction
from service.schemas import Sentence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("source", "adapter", "finish_reason")
        self._answers = Counter("graft_answers", "Answers by how they ended", labels, registry=self.registry)
        self._stages = Histogram(
            "graft_answer_stage_seconds",
            "Time of each stage of an answer",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "graft_tokens", "Tokens of prompts and answers", ("kind", "adapter"), registry=self.registry
        )
        self._citations = Counter("graft_citations", "Citations by who made them", ("by",), registry=self.registry)
        self._sentences = Counter(
            "graft_sentences",
            "Sentences of answers by whether the passages support them, and what they lack",
            ("supported", "lacks"),
            registry=self.registry,
        )
        self._requests = Counter(
            "graft_http_requests", "HTTP requests", ("method", "route", "status"), registry=self.registry
        )
        self._jobs = Counter("graft_jobs", "Jobs by how they ended", ("kind", "state"), registry=self.registry)
        self._engine_up = Gauge("graft_engine_up", "1 while the engine answers", registry=self.registry)
        self._engine_restarts = Counter(
            "graft_engine_restarts", "Starts of the engine after it died", registry=self.registry
        )

        self._live = Gauge("graft_adapter_live", "1 for the adapter that answers", ("adapter",), registry=self.registry)
        self._loads = Histogram(
            "graft_adapter_load_seconds",
            "Time until the engine answers with an adapter, by load",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._load_failures = Counter(
            "graft_adapter_load_failures", "Loads that the engine refused or missed", registry=self.registry
        )

    def answered(self, interaction: Interaction) -> None:
        adapter = interaction.adapter or ""
        self._answers.labels(interaction.source, adapter, interaction.finish_reason).inc()
        for stage, milliseconds in interaction.timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1000)
        for kind, count in interaction.usage.items():
            self._tokens.labels(kind, adapter).inc(count)
        for citation in interaction.citations:
            self._citations.labels(citation["by"]).inc()

    def judged(self, sentences: Sequence[Sentence]) -> None:
        """What the model had said, whether it was shown or not."""
        for sentence in sentences:
            self._sentences.labels(str(sentence.supported).lower(), sentence.unsupported or "").inc()

    def requested(self, method: str, route: str, status: int) -> None:
        self._requests.labels(method, route, str(status)).inc()

    def job_ended(self, kind: str, state: str) -> None:
        self._jobs.labels(kind, state).inc()

    def engine_up(self, up: bool) -> None:
        self._engine_up.set(up)

    def engine_restarted(self) -> None:
        self._engine_restarts.inc()

    def adapter_live(self, name: str | None) -> None:
        self._live.clear()
        self._live.labels(name or "").set(1)

    def adapter_loaded(self, seconds: float) -> None:
        self._loads.observe(seconds)

    def adapter_load_failed(self) -> None:
        self._load_failures.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
