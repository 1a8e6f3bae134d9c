"""What a query finds, and whether that is enough to answer from."""

from collections.abc import Sequence

from ingest.catalog import Collection
from ingest.schemas import Hit
from service.adapters import Adapter, Registry
from service.follow_up import cited_before
from service.principals import Principal
from service.records import Records
from service.retrieve import Found, Retriever
from service.rewrite import FollowUp, Search
from service.schemas import QueryRequest


def look_up(query: QueryRequest, search: Search, principal: Principal, retriever: Retriever, records: Records) -> Found:
    """The passages, of what the principal may see. Raises NotFoundError, InvalidError."""
    if query.without_passages:
        return Found(tuple(retriever.catalog.collection(name) for name in query.names()), [], {})
    cited = cited_before(query.previous, principal.id, query.names(), records) if query.previous else ()
    return retriever.retrieve(
        search.text,
        query.names(),
        query.filters,
        principal.groups,
        query.top_k,
        retrieval=query.retrieval,
        follow_up=FollowUp(query.question, search.leans, cited),
    )


def chosen_adapter(query: QueryRequest, registry: Registry) -> Adapter | None:
    """The query's own, else the first collection's, else the live one; None is the bare base. Raises NotFoundError."""
    if "adapter" not in query.model_fields_set:
        return registry.chosen(query.names()[0])
    return registry.adapter(query.adapter) if query.adapter else None


def is_too_weak(collections: Sequence[Collection], hits: Sequence[Hit]) -> bool:
    """Nothing was found, or only in collections whose threshold the best of their hits is below."""
    found = {one.name: [hit for hit in hits if hit.collection == one.name] for one in collections}
    return all(_is_below(one, found[one.name]) for one in collections if found[one.name])


def _is_below(collection: Collection, hits: Sequence[Hit]) -> bool:
    best = best_score(hits, collection.retrieval.rerank)
    return collection.threshold is not None and best is not None and best < collection.threshold


def best_score(hits: Sequence[Hit], reranked: bool) -> float | None:
    """The score that a collection's threshold is of: the cross-encoder's where it reranks, else the cosine; None: there is
    none, and the question is answered.
    """
    scores = [hit.rerank_score if reranked else hit.dense_score for hit in hits]
    return max((score for score in scores if score is not None), default=None)
