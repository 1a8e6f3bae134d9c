"""How much of a label lies open in frozen features: a linear probe, cross-validated, against a baseline and a control.

Features come from an embedder or from a language model's hidden states; the head is a logistic regression for classes and a
ridge for numbers, on features that are standardised within each fold. The control is the same probe on labels drawn
anew for each text (Hewitt and Liang, 2019); selectivity = score - control, since a probe that does well on any labels says
nothing of the features. Scores of two sources are of the same rows in the same folds, so they are compared in pairs.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from eval.case_rows import refuse, rows
from eval.resample import Estimate, compared, estimate
from eval.schemas import Difference
from ingest.embed import load_embedder, token_batches
from ingest.errors import InvalidError, SettingsError
from ingest.model_files import find_model
from ingest.schemas import Frozen
from ingest.settings import IngestSettings

Features = NDArray[np.float32]  # (rows, dimension)
Scores = NDArray[np.float64]  # (rows,), whose mean is the score
Task = Literal["classify", "regress"]
ROWS, TOKENS = 100_000, 512  # rows at most; tokens of a text that a model reads


class Row(Frozen):
    """A line of the file. Rows of one `group` stay in one fold."""

    text: Annotated[StrictStr, Field(min_length=1)]
    label: StrictBool | StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictStr
    group: StrictStr | StrictInt | None = None


class Probed(Frozen):
    """A source of features. `score`: accuracy, or R2 of the numbers; `folds`: of each fold alone."""

    source: str
    dimension: int
    score: Estimate
    control: float
    selectivity: Estimate
    folds: tuple[float, ...]
    seconds: float  # to make the features


class Probes(Frozen):
    """`baseline`: the score of the most frequent label, or the mean, of the rows that a fold learns from."""

    data: str
    task: Task
    metric: Literal["accuracy", "r2"]
    rows: int
    labels: int
    groups: int | None
    seed: int
    regularisation: float
    baseline: float
    sources: tuple[Probed, ...]
    differences: tuple[Difference, ...]  # of each further source to the first
    notes: tuple[str, ...] = ()


class Split(NamedTuple):
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def probe(
    data: Path,
    sources: Sequence[str],
    settings: IngestSettings,
    task: Task | None = None,
    folds: int = 5,
    regularisation: float = 1.0,
    seed: int = 0,
    on_source: Callable[[str], None] = lambda _: None,
) -> Probes:
    """Raises InvalidError for bad rows, SettingsError for a source that cannot be had."""
    if len(set(sources)) != len(sources) or not sources:
        raise InvalidError("name each source of features once, as --features embedder:bge-small-en-v1.5")
    makers = [(source, feature_maker(source, settings)) for source in sources]
    found = read_rows(data)
    task = task or task_of(found)
    labels, splits = _labels(found, task), _splits(found, task, folds, seed)
    control = control_labels(found, labels, seed)
    groups = None if found[0].group is None else [row.group for row in found]
    metric: Literal["accuracy", "r2"] = "accuracy" if task == "classify" else "r2"
    by_source: dict[str, Scores] = {}
    probed: list[Probed] = []
    for source, make in makers:
        on_source(source)
        start = time.perf_counter()
        features = make([row.text for row in found])
        seconds = round(time.perf_counter() - start, 1)
        scores = _scored(features, labels, splits, task, regularisation)
        of_control = _scored(features, control, splits, task, regularisation)
        by_source[source] = scores
        probed.append(
            Probed(
                source=source,
                dimension=features.shape[1],
                score=estimate(scores, seed, groups),
                control=float(of_control.mean()),
                selectivity=estimate(scores - of_control, seed, groups),
                folds=tuple(float(scores[split.test].mean()) for split in splits),
                seconds=seconds,
            )
        )
    names = [str(place) for place in range(len(found))]
    return Probes(
        data=str(data),
        task=task,
        metric=metric,
        rows=len(found),
        labels=len(set(labels.tolist())),
        groups=len(set(groups)) if groups else None,
        seed=seed,
        regularisation=regularisation,
        baseline=float(_scored(None, labels, splits, task, regularisation).mean()),
        sources=tuple(probed),
        differences=tuple(
            compared(f"{metric} {source}", names, by_source[sources[0]], by_source[source], seed, groups)
            for source in sources[1:]
        ),
        notes=tuple(_notes(found, task)),
    )


def read_rows(file: Path) -> list[Row]:
    """Raises InvalidError, which names the lines that are no rows."""
    refused: list[str] = []
    found = [row for _, row in islice(rows(file, Row, refused), ROWS + 1)]
    refuse(file, refused)
    if not found:
        raise InvalidError(f'{str(file)!r} holds no row, as {{"text": "...", "label": "..."}}')
    if len(found) > ROWS:
        raise InvalidError(f"{str(file)!r} has more than {ROWS} rows; take a sample")
    if len({row.group is None for row in found}) == 2:
        raise InvalidError(f"{str(file)!r}: either every row has a group, or none")
    if len({_kind(row.label) for row in found}) > 1:
        raise InvalidError(f"{str(file)!r}: labels are all strings, all true or false, or all numbers")
    return found


def task_of(rows: Sequence[Row]) -> Task:
    """Numbers are estimated, unless there are but two whole ones."""
    numbers = {row.label for row in rows if _kind(row.label) == "number"}
    two = len(numbers) == 2 and all(isinstance(one, int) for one in numbers)
    return "regress" if numbers and not two else "classify"


def feature_maker(source: str, settings: IngestSettings) -> Callable[[Sequence[str]], Features]:
    """`embedder:NAME`, or `hidden:MODEL_FOLDER:LAYER`. Raises InvalidError, SettingsError."""
    kind, _, name = source.partition(":")
    if kind == "embedder" and name:
        embedder = load_embedder(name, settings)
        return lambda texts: embedder.embed(texts)
    folder, _, layer = name.rpartition(":")
    if kind == "hidden" and folder and layer.lstrip("-").isdigit():
        return _hidden_states(folder, int(layer), settings)
    raise InvalidError(
        f"features {source!r}: write embedder:NAME or hidden:MODEL_FOLDER:LAYER, as hidden:smollm2-135m-instruct:15"
    )


def control_labels(rows: Sequence[Row], labels: NDArray[Any], seed: int) -> NDArray[Any]:
    """The labels dealt out anew, by text: the same text has the same label, as in a control task."""
    first = {row.text: place for place, row in reversed(list(enumerate(rows)))}
    places = sorted(first.values())
    dealt = dict(zip(places, np.random.default_rng(seed).permutation(labels[places]), strict=True))
    return np.array([dealt[first[row.text]] for row in rows])


def _hidden_states(name: str, layer: int, settings: IngestSettings) -> Callable[[Sequence[str]], Features]:
    """Of a layer (0: the embeddings, -1: the last), the mean over a text's tokens."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise SettingsError(f"hidden states of {name!r} need torch and transformers: run `make train`")
    folder = find_model(name, settings)
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{str(folder)!r} is no folder of a transformers model: {str(error).splitlines()[0]}"
        ) from error
    count = model.config.num_hidden_layers
    if not -count - 1 <= layer <= count:
        raise InvalidError(f"layer {layer} of {name!r}: it has 0 (the embeddings) to {count}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def make(texts: Sequence[str]) -> Features:
        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]]
        rows = np.empty((len(texts), model.config.hidden_size), np.float32)
        for batch in token_batches(lengths):
            some = [texts[place] for place in batch]
            inputs = tokenizer(some, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**inputs, output_hidden_states=True).hidden_states[layer]
            mask = inputs["attention_mask"][:, :, None]
            rows[batch] = ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).numpy()
        return rows

    return make


def _kind(label: object) -> str:
    return "bool" if isinstance(label, bool) else "text" if isinstance(label, str) else "number"


def _labels(rows: Sequence[Row], task: Task) -> NDArray[Any]:
    if task == "classify":
        return np.array([json.dumps(row.label, ensure_ascii=False) for row in rows])
    if _kind(rows[0].label) != "number":
        raise InvalidError("only numbers can be estimated; leave --task out, or say classify")
    return np.array([float(row.label) for row in rows])


def _splits(rows: Sequence[Row], task: Task, folds: int, seed: int) -> list[Split]:
    """Stratified by class, whole groups in one fold. Raises InvalidError when there are too few."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    if not 2 <= folds <= 20:
        raise InvalidError(f"{folds} folds: 2 to 20 can be made")
    groups = None if rows[0].group is None else [row.group for row in rows]
    if len(set(groups) if groups else rows) < folds:
        raise InvalidError(f"{len(rows)} rows (or groups of them) are too few for {folds} folds")
    labels = _labels(rows, task)
    if task == "classify":
        counts = Counter(labels.tolist())
        if len(counts) < 2:
            raise InvalidError("all rows have the same label, so there is nothing to tell apart")
        if rare := sorted(label for label, count in counts.items() if count < folds):
            raise InvalidError(
                f"{len(rare)} labels have fewer rows than the {folds} folds, as {rare[0]}: leave them out, or ask for fewer folds"
            )
    elif float(np.var(labels)) == 0:
        raise InvalidError("all rows have the same label, so there is nothing to tell apart")
    of_classes, of_numbers = (StratifiedGroupKFold, GroupKFold) if groups else (StratifiedKFold, KFold)
    cut = (of_classes if task == "classify" else of_numbers)(n_splits=folds, shuffle=True, random_state=seed)
    return [Split(train, test) for train, test in cut.split(np.zeros(len(rows)), labels, groups)]


def _scored(
    features: Features | None, labels: NDArray[Any], splits: Sequence[Split], task: Task, regularisation: float
) -> Scores:
    """-> of each row, by the probe that did not learn from it: right or wrong, or its part of R2, which is
    1 - its squared error / the variance. Without features, of the baseline.
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.empty(len(labels), np.float64)
    for train, test in splits:
        if features is None:
            head = DummyClassifier() if task == "classify" else DummyRegressor()
        elif task == "classify":
            head = make_pipeline(StandardScaler(), LogisticRegression(C=1 / regularisation, max_iter=1000))
        else:
            head = make_pipeline(StandardScaler(), Ridge(alpha=regularisation))
        x = np.zeros((len(labels), 1)) if features is None else features
        found = head.fit(x[train], labels[train]).predict(x[test])
        if task == "classify":
            scores[test] = found == labels[test]
        else:
            scores[test] = 1 - (found - labels[test]) ** 2 / np.var(labels)
    return scores


def _notes(rows: Sequence[Row], task: Task) -> list[str]:
    notes = []
    if (again := len(rows) - len({row.text for row in rows})) and rows[0].group is None:
        notes.append(f"{again} rows repeat a text of another; give those a group, so that they stay in one fold")
    if task == "regress":
        notes.append("labels are taken for numbers (R2); --task classify takes them for classes")
    return notes
