"""Against LlamaIndex' stock path: the same files, the same model (all-MiniLM-L6-v2), chunks of 224 tokens without overlap.

Ours takes the float32 weights, exported to ONNX; the int8 row is beside it, and `embedder_quality` says what int8 loses. Both
sides run in new processes, in turn. Compared is from the first file read to the last vector on disk: ours holds the
start of the ingest child and its model load, theirs does not hold the model load.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import corpus, minilm
from benchmarks.ingest_once import Ingested, embed_alone, indexed_texts, ingest
from benchmarks.report import Options, Row, at_least, median, say, settings, shown, skipped, spread
from deploy.environment import SetupError
from ingest.embed import Embedder, load_counter, load_embedder
from ingest.runtime import processor

RATIO = 3.0


def run(options: Options) -> list[Row]:
    name = "LlamaIndex stock / ingest, wall time"
    scifact, covid = options.folder("scifact_train"), options.folder("covid_qa")
    if scifact is None or covid is None:
        return [skipped(name, "it needs --data with scifact_train/ and covid_qa/")]
    if options.quick and not minilm.is_ready():
        return [skipped(name, "its environment is not made yet, which takes minutes: run it once without --quick")]
    try:
        models = minilm.prepare()
    except SetupError as error:
        return [skipped(name, str(error).splitlines()[0])]
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as folder:
        work = Path(folder)
        documents = work / "documents"
        corpus.write_abstracts(documents, corpus.abstracts(scifact, 10 if options.quick else 100))
        corpus.write_papers(documents, corpus.papers(covid, 0 if options.quick else 5))
        return compare(options, work, documents, models)


def compare(options: Options, work: Path, documents: Path, models: minilm.MiniLM) -> list[Row]:
    configured = settings(options.scratch)
    float32 = load_embedder(str(models.float32), configured)
    int8 = load_embedder(str(models.int8), configured, "onnxruntime")
    ours: list[Ingested] = []
    quantized: list[Ingested] = []
    theirs: list[dict[str, Any]] = []
    alone: list[float] = []
    file = work / "texts.json"
    for n in range(1 if options.quick else 3):
        ours.append(ingest(work / f"float32-{n}", documents, float32))
        theirs.append(stock(models, documents, work / f"stock-{n}"))
        quantized.append(ingest(work / f"int8-{n}", documents, int8))
        if n == 0:
            file.write_text(json.dumps(indexed_texts(work / "float32-0")))
        alone.append(embed_alone(file, float32).seconds)
        say(f"ours {_total(ours[-1]):.1f} s, int8 {_total(quantized[-1]):.1f} s, LlamaIndex {_wall(theirs[-1]):.1f} s")
    rows = _rows(float32, int8, ours, quantized, theirs, alone)
    floor, peak = floor_seconds(json.loads(file.read_text()), float32)
    most = median([_wall(one) for one in theirs]) / floor
    note = f"at the {peak:.0f} GFLOP/s that numpy reaches here: float32 allows at most {most:.2f} times LlamaIndex"
    return [*rows, shown("the model's float32 products alone", floor, "s", note)]


def stock(models: minilm.MiniLM, documents: Path, store: Path) -> dict[str, Any]:
    start = time.perf_counter()
    command = [models.python, minilm.HERE / "llamaindex_stock.py", documents, models.weights, store]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"process": time.perf_counter() - start}


def floor_seconds(texts: list[str], embedder: Embedder) -> tuple[float, float]:
    """-> the time of the model's matrix products alone at the peak of this machine, and that peak in GFLOP/s.

    6 layers of width 384 with 1,536 inside: 2 x 1.77 million products a token and layer, and the attention's.
    """
    ids = load_counter(embedder.name, settings()).ids
    lengths = np.asarray([len(ids(text)) + 2 for text in texts], dtype=np.float64)
    work = float((6 * 2 * (4 * 384**2 + 2 * 384 * 1536) * lengths + 6 * 4 * 384 * lengths**2).sum())
    square = np.ones((2048, 2048), dtype=np.float32)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - start)
    peak = 2 * 2048**3 / min(times)
    return work / peak, peak / 1e9


def _rows(
    float32: Embedder,
    int8: Embedder,
    ours: list[Ingested],
    quantized: list[Ingested],
    theirs: list[dict[str, Any]],
    alone: list[float],
) -> list[Row]:
    ratios = [_wall(one) / _total(our) for one, our in zip(theirs, ours, strict=True)]
    int8_ratios = [_wall(one) / _total(our) for one, our in zip(theirs, quantized, strict=True)]
    processes = [one["process"] / our.process_seconds for one, our in zip(theirs, ours, strict=True)]
    chunks, nodes = ours[0].report.chunks.added, theirs[0]["points"]
    their_share = median([one["embedding"] / _wall(one) for one in theirs])
    our_share = median([one / _total(our) for one, our in zip(alone, ours, strict=True)])
    held = (
        f"both are bound by the same float32 matrix products on {processor()}: " if "avx512" not in processor() else ""
    )
    note = (
        f"{held}embedding is {their_share:.0%} of LlamaIndex' time, and takes ours {our_share:.0%} of its time when run alone; "
        f"each pair: {spread(ratios, 2)}"
    )
    return [
        at_least("LlamaIndex stock / ingest, wall time, float32", median(ratios), "times", RATIO, note),
        at_least(
            "LlamaIndex stock / ingest, wall time, int8", median(int8_ratios), "times", RATIO,
            f"our weights quantized, theirs float32; on {int8.runtime}; each pair: {spread(int8_ratios, 2)}",
        ),
        shown("the same with both processes' starts, float32", median(processes), "times", "imports and model loads of both"),
        shown("ingest, float32", median([_total(one) for one in ours]), "s", f"{chunks:,} chunks; on {float32.runtime}"),
        shown("ingest, int8", median([_total(one) for one in quantized]), "s", ""),
        shown("our embedder alone, float32", median(alone), "s", "the same chunks"),
        shown("LlamaIndex stock", median([_wall(one) for one in theirs]), "s", f"{nodes:,} nodes, cut by its own rules"),
        shown("LlamaIndex stock, its embedder", median([one["embedding"] for one in theirs]), "s", "as it comes"),
    ]  # fmt: skip


def _total(one: Ingested) -> float:
    return one.report.seconds["total"]


def _wall(one: dict[str, Any]) -> float:
    return float(one["read"] + one["pipeline"])
