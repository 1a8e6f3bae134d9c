"""What retrieval finds, and what each lever brings: SciFact's train questions, XQuAD in English and Chinese.

Through the service, by the `eval` package. The default's weight of .7 was once chosen on these SciFact questions, so beside its
score stands the cross-fitted one of weights tuned on four folds and scored on the fifth. SciFact's test questions are unseen.
"""

import tempfile
from pathlib import Path

from benchmarks.report import Options, Row, at_least, say, shown, skipped
from benchmarks.service_process import serving
from eval import weights
from eval.cases import read_dataset
from eval.collection import Placed, Tried, placed
from eval.compare import differences
from eval.resample import estimate
from eval.retrieval import run_retrieval
from eval.schemas import DataSet, Difference, RetrievalRun
from ingest.schemas import Retrieval
from service.client import Client

METRIC = "ndcg@10"
SCIFACT, XQUAD = 0.765, 0.95
RERANKED = 200  # questions, each a second
LEVERS = {
    "BM25 alone": Retrieval(dense_weight=0.0),
    "dense alone": Retrieval(dense_weight=1.0),
    "weighted, equal": Retrieval(dense_weight=0.5),
    "RRF, equal, k 60": Retrieval(fusion="rrf", dense_weight=0.5),
    "RRF .7/.3, k 10": Retrieval(fusion="rrf", rrf_k=10),
    "MMR .7": Retrieval(mmr=0.7),
    "exact vectors": Retrieval(quantized=False),
}


def run(options: Options) -> list[Row]:
    scifact, xquad = options.folder("scifact_train"), options.folder("xquad")
    if scifact is None or xquad is None:
        return [skipped("retrieval quality", "it needs --data with scifact_train/ and xquad/")]
    limit = 20 if options.quick else None
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="graft-bench-") as folder,
        serving(Path(folder) / "home", [Path(folder)]) as service,
        Client(service.url) as client,
    ):
        for language, name in (("en", "English"), ("zh", "Chinese")):
            rows += _xquad(client, read_dataset(xquad / f"xquad.{language}.json", limit=limit), name)
        if options.quick:
            return rows
        data = read_dataset(scifact)
        say("SciFact: 5,183 documents")
        with placed(client, data) as place:
            default = run_retrieval(client, data, place)
            rows += _scifact(client, data, place, default)
        with placed(client, data, tried=Tried(chunking={"headers": True})) as place:
            rows.append(_lever("chunk headers", run_retrieval(client, data, place), default))
    return rows


def _xquad(client: Client, data: DataSet, language: str) -> list[Row]:
    say(f"XQuAD {language}")
    with placed(client, data) as place:
        default = run_retrieval(client, data, place)
        rows = [at_least(f"XQuAD {language}, nDCG@10, default", _score(default), "", XQUAD, _interval(default))]
        for name in ("BM25 alone", "dense alone"):
            other = run_retrieval(client, data, place._replace(retrieval=LEVERS[name]))
            rows.append(_lever(name, other, default, f"XQuAD {language}"))
    return rows


def _scifact(client: Client, data: DataSet, place: Placed, default: RetrievalRun) -> list[Row]:
    tuned = weights.tune(client, place, data.cases, data.name)
    held = tuned.cross_fitted
    rows = [
        at_least("SciFact, nDCG@10, default", _score(default), "", SCIFACT, f"{_interval(default)}; .7 chosen here"),
        at_least("SciFact, nDCG@10, weights cross-fitted in five folds", held.value, "", SCIFACT,
                 f"[{held.low:.3f}, {held.high:.3f}]; the best of all: {tuned.best.fusion} {tuned.best.score:.4f}"),
    ]  # fmt: skip
    for name in ("BM25 alone", "dense alone"):
        won = tuned.against[name]
        rows.append(shown(f"cross-fitted, beyond {name}", won.difference, "", _said(won)))
    for name, retrieval in LEVERS.items():
        say(name)
        rows.append(_lever(name, run_retrieval(client, data, place._replace(retrieval=retrieval)), default))
    say("reranked")
    few = data.model_copy(update={"cases": data.cases[:RERANKED]})
    reranked = run_retrieval(client, few, place._replace(retrieval=Retrieval(rerank=True)), threads=1)
    return [*rows, _lever(f"reranked, {len(few.cases)} questions, in 1 s each", reranked, default)]


def _lever(name: str, after: RetrievalRun, default: RetrievalRun, data: str = "SciFact") -> Row:
    """A row of the score, beside the default's of the same questions."""
    found = next(one for one in differences(default, after) if one.metric == METRIC)
    note = f"recall@10 {after.metrics['recall@10']:.3f}; against the default {_said(found)}"
    return shown(f"{data}, nDCG@10, {name}", round(_score(after), 4), "", note)


def _score(run: RetrievalRun) -> float:
    return run.metrics[METRIC]


def _interval(run: RetrievalRun) -> str:
    found = estimate([case.metrics[METRIC] for case in run.cases])
    return f"{len(run.cases)} questions, 95 % [{found.low:.3f}, {found.high:.3f}]; recall@100 {run.metrics['recall@100']:.3f}"


def _said(found: Difference) -> str:
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p {found.p:.4f}"
