"""Documents: what was taken in, in which state, and the text that offsets point into; uploads and deletion."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request

from ingest.catalog import Document, State
from ingest.errors import NotFoundError
from ingest.schemas import Frozen, Heading, PageSpan
from service import uploads
from service.deps import Parts, WithAdmin, WithParts, WithPrincipal
from service.jobs import IngestPayload
from service.schemas import CollectionName, DocumentView
from service.schemas_jobs import Job, UploadFields

router = APIRouter(prefix="/documents", tags=["documents"])
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "collection": {"type": "string", "default": "default"},
                        "acl": {"type": "string", "description": "a JSON list of groups"},
                        "metadata": {"type": "string", "description": "a JSON object"},
                    },
                }
            }
        },
    }
}


class DocumentText(Frozen):
    """`text` is what citations' `start` and `end` point into, in code points."""

    text: str
    pages: tuple[PageSpan, ...]
    headings: tuple[Heading, ...]


@router.get("")
async def documents(
    parts: WithParts,
    principal: WithPrincipal,
    collection: CollectionName = "default",
    path: Annotated[str | None, Query(max_length=4096)] = None,
    state: State | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> list[DocumentView]:
    """By path; those that the principal may see, an admin all. `path`: this file, or those of this folder.

    Deleted ones are listed with `state=removed` alone.
    """

    def listed() -> list[DocumentView]:
        parts.catalog.collection(collection)
        found = parts.catalog.documents(collection, principal.manages(), limit, offset, path=path, state=state)
        return [_view(one) for one in found]

    return await to_thread.run_sync(listed)


@router.post("", status_code=202, openapi_extra=FORM)
async def upload(request: Request, parts: WithParts, principal: WithAdmin) -> Job:
    """Keeps the files and takes them in; a file under the name of an earlier one is its new version.

    `acl` and `metadata` are set on all of them; left out, an earlier version's stay.
    """
    limit = parts.ingest.max_file_mb * 2**20
    async with request.form(max_files=uploads.MAX_FILES, max_fields=10, max_part_size=2**20) as form:
        fields = UploadFields.of_form({key: form.get(key) for key in ("collection", "acl", "metadata")})
        files = uploads.files_of(form.getlist("files"), limit)
        folder = parts.documents.uploads(fields.collection)
        places = await to_thread.run_sync(lambda: uploads.keep(files, folder, fields))

    def enqueue() -> Job:
        parts.documents.ensure_collection(fields.collection)
        payload = IngestPayload(
            target=str(folder), root=str(folder), collection=fields.collection, only=places, restore=True
        )
        return parts.jobs.enqueue(payload, principal.id)

    return await to_thread.run_sync(enqueue)


@router.get("/{document_id}")
async def document(document_id: str, parts: WithParts, principal: WithPrincipal) -> DocumentView:
    return await to_thread.run_sync(lambda: _view(_visible(parts, principal.manages(), document_id)))


@router.delete("/{document_id}", status_code=204)
async def delete_document(document_id: str, parts: WithParts, principal: WithAdmin) -> None:
    """It leaves every search and the kept texts at once. A folder's file stays where it is and is kept out of later jobs,
    until one with `restore`; an uploaded file is deleted.
    """

    def remove() -> None:
        parts.catalog.document(
            document_id
        )  # one that was deleted before is deleted again: the first time may be cut off
        parts.documents.remove(document_id)

    await to_thread.run_sync(remove)


@router.get("/{document_id}/text")
async def document_text(document_id: str, parts: WithParts, principal: WithPrincipal) -> DocumentText:
    def read() -> DocumentText:
        _visible(parts, principal.groups, document_id)
        parsed = parts.catalog.text(document_id)
        return DocumentText(text=parsed.text, pages=parsed.pages, headings=parsed.headings)

    return await to_thread.run_sync(read)


def _visible(parts: Parts, groups: frozenset[str] | None, document_id: str) -> Document:
    """Raises NotFoundError, also for one that was deleted, or that none of the groups may see."""
    found = parts.catalog.document(document_id)
    hidden = groups is not None and found.acl and not groups & set(found.acl)
    if hidden or found.state == "removed":
        raise NotFoundError(f"there is no document {document_id!r}; GET /documents lists them")
    return found


def _view(document: Document) -> DocumentView:
    values = {name: getattr(document, name) for name in DocumentView.model_fields if name != "metadata"}
    return DocumentView(**values, metadata=document.labels())
