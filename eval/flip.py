"""A change of a collection measured on held-out questions, and made only if they find better: another index, a query adapter.

Both ways are asked through the service, question by question, while the collection answers as before. The change is made where
nDCG@10 is higher and a paired test says that chance alone would hardly do that; else all stays, and the verdict says why.
"""

from collections.abc import Callable

from eval.collection import placed
from eval.compare import differences
from eval.retrieval import run_retrieval
from eval.schemas import DataSet, Difference
from ingest.errors import ConflictError, GraftError, InvalidError
from ingest.schemas import Frozen, Retrieval, with_query_adapter
from service.client import Client
from service.schemas import CollectionSettings

METRIC = "ndcg@10"
SIGNIFICANT = 0.05
FEWEST = 20  # questions: fewer cannot tell a change from chance
Told = Callable[[int, int], None]


class Verdict(Frozen):
    """`change`: as "index 0a1b2c3d4e5f". `made`: whether it is in force now. `why`: in a sentence."""

    collection: str
    change: str
    dataset: str
    difference: Difference
    made: bool
    why: str


def flip_if_better(
    client: Client, name: str, index: str, dataset: DataSet, threads: int = 4, on_progress: Told = lambda *_: None
) -> Verdict:
    """Makes an index that was built beside the live one (`graft reindex --no-flip`) live. `index`: the first characters of its
    fingerprint. Raises InvalidError when there is nothing to decide by, ConflictError when the collection changed meanwhile,
    GraftError when the index cannot be made live, and what the service says.
    """
    found = [one for one in client.indexes(name) if one.fingerprint.startswith(index)]
    if len(found) != 1 or found[0].state == "live":
        said = "is live already" if found and found[0].state == "live" else f"names {len(found)} indexes"
        raise InvalidError(
            f"index {index!r} of collection {name!r} {said}; `graft collections indexes {name}` lists them"
        )
    fingerprint, live = found[0].fingerprint, client.collection(name).fingerprint
    difference = _measured(client, name, dataset, threads, on_progress, other_index=fingerprint)

    def flip() -> None:
        if client.collection(name).fingerprint != live:
            raise ConflictError(
                f"collection {name!r} got another live index while the questions were asked: give the same command again"
            )
        job = client.wait(client.activate_index(name, fingerprint).job_id)
        if job.state != "succeeded":
            raise GraftError(
                f"index {index!r} was not made live: its job ended {job.state}: {job.error or 'see the logs'}"
            )

    return _decided(name, f"index {fingerprint[:12]}", dataset, difference, flip)


def adopt_if_better(
    client: Client, name: str, adapter: str, dataset: DataSet, threads: int = 4, on_progress: Told = lambda *_: None
) -> Verdict:
    """Gives a collection a query adapter. Raises InvalidError when there is nothing to decide by, and what the service says."""
    retrieval = with_query_adapter(client.collection(name).retrieval, adapter)
    difference = _measured(client, name, dataset, threads, on_progress, retrieval=retrieval)

    def adopt() -> None:
        held = client.collection(name).retrieval  # what else was set while the questions were asked stays
        client.put_collection(name, CollectionSettings(retrieval=with_query_adapter(held, adapter)))

    return _decided(name, f"query adapter {adapter}", dataset, difference, adopt)


def _measured(
    client: Client,
    name: str,
    dataset: DataSet,
    threads: int,
    tell: Told,
    retrieval: Retrieval | None = None,
    other_index: str | None = None,
) -> Difference:
    """-> nDCG@10 as the collection answers now, and by other settings or from another index."""
    if len(dataset.cases) < FEWEST:
        raise InvalidError(f"{len(dataset.cases)} held-out questions are too few to decide by: give at least {FEWEST}")
    total = 2 * len(dataset.cases)
    with placed(client, dataset, collection=name) as now:
        then = now._replace(retrieval=retrieval, other_index=other_index)
        before = run_retrieval(client, dataset, now, threads=threads, on_progress=lambda done, _: tell(done, total))
        after = run_retrieval(
            client, dataset, then, threads=threads, on_progress=lambda done, _: tell(len(before.cases) + done, total)
        )
    return next(one for one in differences(before, after) if one.metric == METRIC)


def _decided(name: str, change: str, dataset: DataSet, found: Difference, make: Callable[[], object]) -> Verdict:
    better = found.difference > 0 and found.p < SIGNIFICANT
    if better:
        make()
    figures = (
        f"{METRIC} {found.before:.3f} -> {found.after:.3f} ({found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}], "
        f"p {found.p:.4f}) on {found.cases} held-out questions"
    )
    if better:
        why = f"{figures}: it is in force now"
    elif found.difference > 0:
        why = f"{figures}: chance alone may do that, so all stays as it was; more questions would tell"
    else:
        why = f"{figures}: it finds no better, so all stays as it was"
    return Verdict(collection=name, change=change, dataset=dataset.name, difference=found, made=better, why=why)
