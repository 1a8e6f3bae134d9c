"""Settings of retrieval searched as one space, and the best one tried against the default on questions that it did not see.

A key is a field of the collection's settings: `chunking.tokens`, `retrieval.dense_weight`, `embedder`, `prompt`; `chunking.`
and `retrieval.` may be left out, and `k` is `retrieval.top_k`. What needs another index has a collection of its own, made
when the search first comes to it and gone at the end; the rest is told with each request. Half of the questions, by
default, is for the search; both settings are measured on the rest, and compared in pairs.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from eval.case_rows import reason
from eval.collection import Placed, Told, Tried, placed
from eval.compare import differences
from eval.groups import connected
from eval.report_figures import LOWER_IS_BETTER
from eval.retrieval import run_retrieval
from eval.retrieval_metrics import MEASURES, is_judged
from eval.samplers import Sampler
from eval.schemas import AnswersRun, DataSet, Difference, Run, RunFacts
from eval.space import Setting, Space, Value
from eval.study import Study, Trial, run_study, study_name
from ingest.catalog import now
from ingest.errors import InvalidError
from ingest.schemas import Chunking, Frozen, Retrieval
from service.client import Client
from service.schemas import CollectionSettings

Kind = TypeVar("Kind", bound=BaseModel)
ALIASES = {"k": "retrieval.top_k", "strategy": "chunking.strategy", "weight": "retrieval.dense_weight"}
LEAST = 10  # questions in each half
COLLECTIONS = 24  # of one sweep: each is an index on disk
ONLY_ANSWERS = ("prompt", "retrieval.top_k", "retrieval.neighbours")  # the order of documents does not hang on them


class Plan(NamedTuple):
    """`holdout`: share of the questions that the search does not see. `storage`: the studies' folder."""

    space: Space
    trials: int = 30
    sampler: Sampler = "tpe"
    metric: str = "ndcg@10"
    holdout: float = 0.5
    seed: int = 0
    name: str | None = None
    storage: Path | None = None


class Sweep(Frozen):
    """`default` and `chosen`: what the space leaves open is the collection's. `held_out`: default -> chosen, by metric.

    `settings`: the chosen one, as `PUT /collections/{name}` takes it.
    """

    dataset: str
    metric: str
    searched: int
    held_out_questions: int
    study: Study
    default: Setting
    chosen: Setting
    held_out: tuple[Difference, ...]
    collections: int  # indexes that were made
    settings: dict[str, Any]


def sweep(
    client: Client,
    dataset: DataSet,
    plan: Plan,
    collection: str | None = None,
    on_trial: Callable[[Trial], None] = lambda _: None,
    on_documents: Told = lambda *_: None,
    on_questions: Told = lambda *_: None,
) -> Sweep:
    """`collection`: search this one as it is; then nothing can be in the space that needs another index, or an answer.

    Raises InvalidError for a space or a data set that does not fit.
    """
    space = named(plan.space)
    check(space, plan, collection)
    search_half, held_out_half = halves(dataset, plan.metric, plan.holdout, plan.seed)
    with ExitStack() as stack:
        places = _Places(client, dataset, collection, stack, on_documents)
        default = default_setting(space, places.default)
        name = plan.name or _study_name(dataset, space, plan)

        def measure(setting: Setting, half: DataSet) -> Run:
            if plan.metric in MEASURES:
                return run_retrieval(client, half, places.at(setting), on_progress=on_questions)
            return _answers(client, half, places.at(setting), setting, on_questions)

        def objective(setting: Setting) -> float:
            found = measure(setting, search_half).metrics
            if plan.metric not in found:
                raise InvalidError(f"no question has the metric {plan.metric!r}; there are {', '.join(found)}")
            return found[plan.metric]

        context = {"data": _digest(dataset), "metric": plan.metric, "holdout": plan.holdout, "collection": collection}
        study = run_study(
            space, objective, plan.trials, plan.sampler, plan.storage, name, plan.seed, context, [default], on_trial
        )
        if study.best is None:
            raise InvalidError(f"every setting was refused; the first: {study.trials[0].error}")
        chosen = study.best.setting
        before = measure(default, held_out_half)
        after = before if chosen == default else measure(chosen, held_out_half)
        return Sweep(
            dataset=dataset.name,
            metric=plan.metric,
            searched=len(search_half.cases),
            held_out_questions=len(held_out_half.cases),
            study=study,
            default=default,
            chosen=chosen,
            held_out=tuple(differences(before, after, plan.seed)),
            collections=len(places.made),
            settings=as_settings(chosen, places.at(chosen)),
        )


def named(space: Mapping[str, Any]) -> Space:
    """Keys by their full names. Raises InvalidError for one that is no setting."""
    full: Space = {}
    for key, dimension in space.items():
        name = full_name(key)
        if name in full:
            raise InvalidError(f"the space has {name!r} twice")
        full[name] = dimension
    return full


def full_name(key: str) -> str:
    """Raises InvalidError."""
    key = ALIASES.get(key, key)
    if key in {"embedder", "prompt"}:
        return key
    room, _, field = key.rpartition(".")
    rooms: dict[str, type[BaseModel]] = {"retrieval": Retrieval, "chunking": Chunking}
    for name, kind in rooms.items():
        if room in {"", name} and field in kind.model_fields:
            return f"{name}.{field}"
    known = [f"{name}.{field}" for name, kind in rooms.items() for field in kind.model_fields]
    raise InvalidError(
        f"{key!r} is no setting that can be searched; there are {', '.join([*known, 'embedder', 'prompt'])}"
    )


def check(space: Space, plan: Plan, collection: str | None) -> None:
    """Raises InvalidError when a key cannot change the metric, or cannot be tried on a collection as it is."""
    if plan.metric in MEASURES:
        if idle := [key for key in ONLY_ANSWERS if key in space]:
            raise InvalidError(
                f"{idle[0]} does not change {plan.metric}; leave it out, or search by an answers' metric as f1"
            )
    elif collection is not None:
        raise InvalidError(
            f"{plan.metric} would change the settings of {collection!r}; leave --collection out to use a copy"
        )
    if plan.metric in LOWER_IS_BETTER:
        raise InvalidError(f"of {plan.metric} less is better, and a search looks for more; choose another metric")
    if collection is not None and (fixed := [key for key in space if not key.startswith("retrieval.")]):
        raise InvalidError(f"{fixed[0]} needs an index of its own; leave --collection out to make it from the data set")
    if not 0.1 <= plan.holdout <= 0.9:
        raise InvalidError(f"--holdout {plan.holdout:g}: hold out a share from .1 to .9")


def halves(dataset: DataSet, metric: str, holdout: float, seed: int) -> tuple[DataSet, DataSet]:
    """-> what the search sees, what it does not. Questions about one document are in one half. Raises InvalidError."""
    cases = [case for case in dataset.cases if metric not in MEASURES or is_judged(case.relevant)]
    keys = [sorted(case.relevant) or [case.id] for case in cases]  # documents that are shared bind questions together
    groups = sorted(connected(keys), key=lambda group: min(keys[at][0] for at in group))
    random.Random(seed).shuffle(groups)
    wanted, held = round(holdout * len(cases)), set[int]()
    for group in groups:
        if len(held) + len(group) <= wanted:
            held.update(group)
    seen = tuple(case for at, case in enumerate(cases) if at not in held)
    unseen = tuple(case for at, case in enumerate(cases) if at in held)
    if min(len(seen), len(unseen)) < LEAST:
        raise InvalidError(
            f"{len(cases)} questions that can be scored make {len(seen)} to search by and {len(unseen)} held out; "
            f"each needs {LEAST}"
        )
    return dataset.model_copy(update={"cases": seen}), dataset.model_copy(update={"cases": unseen})


def default_setting(space: Space, place: Placed) -> Setting:
    """What the collection has at the keys of the space."""
    held = _held(place)
    return {key: value for key in space if (value := held.get(key)) is not None}


def as_settings(setting: Setting, place: Placed) -> dict[str, Any]:
    """As `PUT /collections/{name}` takes it: the whole of `retrieval` and `chunking` where a field of theirs was searched."""
    retrieval, chunking = _of(setting, "retrieval"), _of(setting, "chunking")
    fields: dict[str, Any] = {key: setting[key] for key in ("embedder", "prompt") if key in setting}
    if retrieval:
        fields["retrieval"] = _fitting(Retrieval, {**place.view.retrieval.model_dump(), **retrieval})
    if chunking:
        fields["chunking"] = place.view.chunking
    return CollectionSettings(**fields).model_dump(mode="json", exclude_unset=True)


class _Places:
    """The collections of a sweep, one for each embedder and chunking, until the stack closes."""

    def __init__(self, client: Client, dataset: DataSet, collection: str | None, stack: ExitStack, told: Told) -> None:
        self._client, self._dataset, self._collection, self._stack, self._told = (
            client,
            dataset,
            collection,
            stack,
            told,
        )
        self.default = self._make(Tried())
        self.made = {self._key(self.default.view.embedder, self.default.view.chunking): self.default}

    def at(self, setting: Setting) -> Placed:
        """Raises InvalidError for a setting that is none."""
        fields = {**self.default.view.chunking.model_dump(), **_of(setting, "chunking")}
        if fields["strategy"] != "hierarchical":
            fields.pop("parent_tokens", None)  # of that strategy alone
        chunking, embedder = _fitting(Chunking, fields), str(setting.get("embedder", self.default.view.embedder))
        key = self._key(embedder, chunking)
        if key not in self.made:
            if len(self.made) == COLLECTIONS:
                raise InvalidError(
                    f"over {COLLECTIONS} indexes would be made; give fewer values to chunking and embedder"
                )
            self.made[key] = self._make(Tried(chunking=chunking.model_dump(exclude_none=True), embedder=embedder))
        place = self.made[key]
        retrieval = {**place.view.retrieval.model_dump(), **_of(setting, "retrieval")}
        return place._replace(retrieval=_fitting(Retrieval, retrieval))

    def _make(self, tried: Tried) -> Placed:
        return self._stack.enter_context(
            placed(self._client, self._dataset, collection=self._collection, tried=tried, on_progress=self._told)
        )

    def _key(self, embedder: str, chunking: Chunking) -> str:
        return f"{embedder} {chunking.model_dump_json()}"


def _answers(client: Client, half: DataSet, place: Placed, setting: Setting, told: Told) -> AnswersRun:
    """By the live adapter. The settings go into the collection, which is the sweep's own. A question that ends in an error
    refuses the setting, for means over the others would flatter it.
    """
    from eval.answer_totals import totals
    from eval.answers import Asking, ask_all

    retrieval = place.retrieval or place.view.retrieval
    fields = {"retrieval": retrieval, "prompt": setting.get("prompt", place.view.prompt)}
    client.put_collection(place.view.name, _fitting(CollectionSettings, fields))
    texts = {one.id: one.text for one in half.documents if one.id not in place.left_out}
    asking = Asking(collection=place.view.name, retrieval=retrieval, name_of=place.document, text_of=texts.get)
    asked = ask_all(client, half.cases, asking, told)
    if asked.ended is not None:
        raise asked.ended
    if failed := [one for one in asked.cases if one.finish_reason == "error"]:
        raise InvalidError(f"{len(failed)} questions ended in an error: {next(iter(failed[0].not_evaluated.values()))}")
    facts = RunFacts(name="sweep", dataset=half.name, created_at=now(), configuration=place.settings())
    return AnswersRun(facts=facts, cases=asked.cases, **totals(asked.cases)._asdict())


def _held(place: Placed) -> dict[str, Value]:
    view = place.view
    flat: dict[str, Any] = {"embedder": view.embedder, "prompt": view.prompt}
    flat |= {f"retrieval.{key}": value for key, value in view.retrieval.model_dump().items()}
    return flat | {f"chunking.{key}": value for key, value in view.chunking.model_dump().items()}


def _of(setting: Setting, room: str) -> dict[str, Value]:
    return {key.partition(".")[2]: value for key, value in setting.items() if key.startswith(f"{room}.")}


def _fitting(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise InvalidError(f"{kind.__name__.lower()} does not fit: {reason(error)}") from error


def _digest(dataset: DataSet) -> str:
    asked = json.dumps([[case.id, case.question, sorted(case.relevant.items())] for case in dataset.cases])
    documents = json.dumps([[one.id, one.title, one.text] for one in dataset.documents])
    return hashlib.sha256((asked + documents).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _study_name(dataset: DataSet, space: Space, plan: Plan) -> str:
    """The same search has the same name, so that it goes on after a kill."""
    dimensions = {key: one.model_dump(mode="json") for key, one in space.items()}
    return study_name(dataset.name, [_digest(dataset), dimensions, plan.sampler, plan.metric, plan.holdout, plan.seed])
