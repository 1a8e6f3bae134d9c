"""Documents: what was taken in, in which state, and the text that offsets point into."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query

from ingest.catalog import Document
from ingest.errors import NotFoundError
from ingest.schemas import Frozen, Heading, PageSpan
from service.deps import Parts, WithParts, WithPrincipal
from service.principals import Principal
from service.schemas import CollectionName, DocumentView

router = APIRouter(prefix="/documents", tags=["documents"])


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
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> list[DocumentView]:
    """By path; those that the principal may see."""

    def listed() -> list[DocumentView]:
        parts.catalog.collection(collection)
        return [_view(one) for one in parts.catalog.documents(collection, principal.groups, limit, offset)]

    return await to_thread.run_sync(listed)


@router.get("/{document_id}")
async def document(document_id: str, parts: WithParts, principal: WithPrincipal) -> DocumentView:
    return await to_thread.run_sync(lambda: _view(_visible(parts, principal, document_id)))


@router.get("/{document_id}/text")
async def document_text(document_id: str, parts: WithParts, principal: WithPrincipal) -> DocumentText:
    def read() -> DocumentText:
        _visible(parts, principal, document_id)
        parsed = parts.catalog.text(document_id)
        return DocumentText(text=parsed.text, pages=parsed.pages, headings=parsed.headings)

    return await to_thread.run_sync(read)


def _visible(parts: Parts, principal: Principal, document_id: str) -> Document:
    """Raises NotFoundError, also for one that the principal may not see."""
    found = parts.catalog.document(document_id)
    if principal.groups is not None and found.acl and not principal.groups & set(found.acl):
        raise NotFoundError(f"there is no document {document_id!r}; GET /documents lists them")
    return found


def _view(document: Document) -> DocumentView:
    values = {name: getattr(document, name) for name in DocumentView.model_fields if name != "metadata"}
    return DocumentView(**values, metadata={**document.properties, **document.metadata})
