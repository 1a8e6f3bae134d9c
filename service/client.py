"""The typed client of the HTTP surface. The command line, evaluation and training all go through it.

Error replies become the errors that the service raised; a service that does not answer is an UnavailableError.
"""

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import httpx

from ingest.errors import (
    ConflictError,
    ForbiddenError,
    GraftError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from service.records import Turn
from service.schemas import (
    Answer,
    Citation,
    CollectionSettings,
    CollectionView,
    DocumentView,
    FeedbackRequest,
    IndexView,
    PromptMove,
    PromptRequest,
    PromptView,
    QueryRequest,
    Ready,
    Retrieved,
    SearchRequest,
    Sentence,
)
from service.schemas_adapters import ActivateRequest, AdapterView, Checked, Move, RegisterRequest, RollbackRequest
from service.schemas_jobs import (
    EngineView,
    IngestRequest,
    Job,
    PauseRequest,
    ReindexRequest,
    ResumeRequest,
    TuneRequest,
)

ERRORS: dict[int, type[GraftError]] = {
    401: ForbiddenError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidError,
    422: InvalidError,
    503: UnavailableError,
}
MOST_TURNS = 50  # that a query may have
ENDED = frozenset({"succeeded", "failed", "cancelled"})


class Client:
    """`url`: of the service, as http://127.0.0.1:8000."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 300) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(timeout, connect=5))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    def query(self, request: QueryRequest, on_token: Callable[[str], None] | None = None) -> Answer:
        """With `on_token` the answer streams, and each piece of text is given to it as it comes."""
        body = request.model_dump(mode="json", exclude_unset=True)
        if on_token is None:
            return Answer.model_validate(self._send("POST", "/query", body | {"stream": False}))
        cited: dict[str, Any] = {}
        with closing(self._events("POST", "/query", body | {"stream": True})) as events:
            for event, data in events:
                if event == "token":
                    on_token(data["text"])
                elif event == "citations":
                    cited = {
                        "sentences": [Sentence.model_validate(one) for one in data["sentences"]],
                        "citations": [Citation.model_validate(one) for one in data["citations"]],
                    }
                elif event == "error":
                    raise UnavailableError(data["detail"])
                elif event == "done":
                    return Answer.model_validate(data | cited)
        raise UnavailableError("the service broke off before the end of the answer")

    def retrieve(self, request: SearchRequest) -> Retrieved:
        return Retrieved.model_validate(self._send("POST", "/retrieve", request.model_dump(exclude_unset=True)))

    def ingest(self, request: IngestRequest) -> Job:
        return Job.model_validate(self._send("POST", "/ingest", request.model_dump(mode="json", exclude_unset=True)))

    def tune(self, request: TuneRequest) -> Job:
        body = request.model_dump(mode="json", exclude_unset=True, by_alias=True)
        return Job.model_validate(self._send("POST", "/tune", body))

    def pause_engine(self, request: PauseRequest) -> EngineView:
        return EngineView.model_validate(self._send("POST", "/engine/pause", request.model_dump(exclude_unset=True)))

    def resume_engine(self, request: ResumeRequest) -> EngineView:
        return EngineView.model_validate(self._send("POST", "/engine/resume", request.model_dump()))

    def job(self, job_id: str) -> Job:
        return Job.model_validate(self._send("GET", f"/jobs/{job_id}"))

    def cancel(self, job_id: str) -> Job:
        return Job.model_validate(self._send("POST", f"/jobs/{job_id}/cancel"))

    def retry(self, job_id: str) -> Job:
        return Job.model_validate(self._send("POST", f"/jobs/{job_id}/retry"))

    def jobs(self, collection: str | None = None, limit: int = 20) -> list[Job]:
        query = {"limit": limit} | ({"collection": collection} if collection else {})
        return [Job.model_validate(one) for one in self._send("GET", f"/jobs?{urlencode(query)}")]

    def wait(self, job_id: str, on_progress: Callable[[Job], None] = lambda _: None) -> Job:
        """Follows a job to its end."""
        while True:
            job = self.job(job_id)
            on_progress(job)
            if job.state in ENDED:
                return job
            time.sleep(0.2)

    def collections(self) -> list[CollectionView]:
        return [CollectionView.model_validate(one) for one in self._send("GET", "/collections")]

    def collection(self, name: str) -> CollectionView:
        return CollectionView.model_validate(self._send("GET", f"/collections/{name}"))

    def put_collection(self, name: str, settings: CollectionSettings) -> CollectionView:
        body = settings.model_dump(mode="json", exclude_unset=True)
        return CollectionView.model_validate(self._send("PUT", f"/collections/{name}", body))

    def delete_collection(self, name: str) -> None:
        self._send("DELETE", f"/collections/{name}")

    def reindex(self, name: str, request: ReindexRequest) -> Job:
        body = request.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return Job.model_validate(self._send("POST", f"/collections/{name}/reindex", body))

    def indexes(self, name: str) -> list[IndexView]:
        return [IndexView.model_validate(one) for one in self._send("GET", f"/collections/{name}/indexes")]

    def activate_index(self, name: str, index: str) -> Job:
        return Job.model_validate(self._send("POST", f"/collections/{name}/indexes/{index}/activate"))

    def delete_index(self, name: str, index: str) -> None:
        self._send("DELETE", f"/collections/{name}/indexes/{index}")

    def dump(self, name: str, target: str) -> Job:
        return Job.model_validate(self._send("POST", f"/collections/{name}/dump", {"target": target}))

    def load(self, name: str, target: str) -> Job:
        return Job.model_validate(self._send("POST", f"/collections/{name}/load", {"target": target}))

    def register_adapter(self, request: RegisterRequest) -> AdapterView:
        return AdapterView.model_validate(self._send("POST", "/adapters", request.model_dump(exclude_unset=True)))

    def adapters(self) -> list[AdapterView]:
        return [AdapterView.model_validate(one) for one in self._send("GET", "/adapters")]

    def adapter(self, name: str) -> AdapterView:
        return AdapterView.model_validate(self._send("GET", f"/adapters/{name}"))

    def activate_adapter(self, name: str, request: ActivateRequest | None = None) -> Move:
        body = request.model_dump(exclude_unset=True) if request else {}
        return Move.model_validate(self._send("POST", f"/adapters/{name}/activate", body))

    def roll_back(self, request: RollbackRequest | None = None) -> Move:
        body = request.model_dump(exclude_unset=True) if request else {}
        return Move.model_validate(self._send("POST", "/adapters/rollback", body))

    def record_check(self, name: str, checked: Checked) -> AdapterView:
        return AdapterView.model_validate(
            self._send("PUT", f"/adapters/{name}/checked", checked.model_dump(mode="json"))
        )

    def delete_adapter(self, name: str) -> None:
        self._send("DELETE", f"/adapters/{name}")

    def adapter_moves(self) -> list[Move]:
        return [Move.model_validate(one) for one in self._send("GET", "/adapters/moves")]

    def prompts(self) -> list[PromptView]:
        return [PromptView.model_validate(one) for one in self._send("GET", "/prompts")]

    def prompt(self, name: str) -> list[PromptView]:
        """All versions of a name, oldest first; or the one that is named."""
        return [PromptView.model_validate(one) for one in self._send("GET", f"/prompts/{name}")]

    def put_prompt(self, name: str, request: PromptRequest) -> PromptView:
        return PromptView.model_validate(self._send("PUT", f"/prompts/{name}", request.model_dump()))

    def roll_back_prompt(self, collection: str) -> PromptMove:
        return PromptMove.model_validate(self._send("POST", f"/collections/{collection}/prompt/rollback"))

    def prompt_moves(self, collection: str) -> list[PromptMove]:
        return [PromptMove.model_validate(one) for one in self._send("GET", f"/collections/{collection}/prompt/moves")]

    def documents(
        self,
        collection: str = "default",
        limit: int = 1000,
        offset: int = 0,
        path: str | None = None,
        state: str | None = None,
    ) -> list[DocumentView]:
        query = {"collection": collection, "limit": limit, "offset": offset, "path": path, "state": state}
        given = {key: value for key, value in query.items() if value is not None}
        return [DocumentView.model_validate(one) for one in self._send("GET", f"/documents?{urlencode(given)}")]

    def document(self, document_id: str) -> DocumentView:
        return DocumentView.model_validate(self._send("GET", f"/documents/{document_id}"))

    def upload(
        self,
        files: Sequence[Path],
        collection: str = "default",
        acl: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Job:
        """Each is kept under its name, without the folders above it. Raises OSError when one cannot be read."""
        form = {"collection": collection}
        form |= {} if acl is None else {"acl": json.dumps(list(acl))}
        form |= {} if metadata is None else {"metadata": json.dumps(dict(metadata))}
        with ExitStack() as opened:
            parts = [("files", (file.name, opened.enter_context(file.open("rb")))) for file in files]
            return Job.model_validate(self._send("POST", "/documents", form=form, files=parts))

    def delete_document(self, document_id: str) -> None:
        self._send("DELETE", f"/documents/{document_id}")

    def document_text(self, document_id: str) -> str:
        return str(self._send("GET", f"/documents/{document_id}/text")["text"])

    def feedback(self, request: FeedbackRequest, idempotency_key: str | None = None) -> str:
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        body = request.model_dump(exclude_unset=True)
        return str(self._send("POST", "/feedback", body, headers)["feedback_id"])

    def interaction(self, interaction_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._send("GET", f"/interactions/{interaction_id}")
        return found

    def turns(self, interaction_id: str) -> list[Turn]:
        """The conversation up to this interaction's answer, as a follow-up sends it. Raises NotFoundError."""
        held = self.interaction(interaction_id)
        said = [{"role": "user", "content": held["question"]}, {"role": "assistant", "content": held["answer"]}]
        return [Turn.model_validate(turn) for turn in (*held["turns"], *said)][-MOST_TURNS:]

    def ready(self) -> Ready:
        """Whether it can answer; unlike the other calls it takes a 503 for an answer."""
        try:
            return Ready.model_validate(self._http.get("/health/ready").json())
        except (httpx.HTTPError, ValueError) as error:
            raise _unreachable(self.url, error) from error

    def _send(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        form: dict[str, str] | None = None,
        files: Any = None,
    ) -> Any:
        try:
            reply = self._http.request(method, path, json=body, headers=headers, data=form, files=files)
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error
        if not reply.is_success:
            raise _error(reply)
        return reply.json() if reply.content else None

    def _events(self, method: str, path: str, body: object) -> Generator[tuple[str, Any]]:
        try:
            with self._http.stream(method, path, json=body) as reply:
                if not reply.is_success:
                    reply.read()
                    raise _error(reply)
                event = "message"
                for line in reply.iter_lines():
                    if line.startswith("event:"):
                        event = line[6:].strip()
                    elif line.startswith("data:"):
                        yield event, json.loads(line[5:])
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error


def _error(reply: httpx.Response) -> GraftError:
    try:
        detail = str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"the service answered {reply.status_code}"
    return ERRORS.get(reply.status_code, GraftError)(detail)


def _unreachable(url: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"no service answers at {url} ({error or type(error).__name__}); start one with `graft up`")
