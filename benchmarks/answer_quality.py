"""The bundled model's answers on public sets, with retrieval and without passages, by `graft eval answers`.

The model is tiny and its answers are checked before they are shown, so the figures are low where it has to write and citations
are right almost by construction; what counts is that they are right. 200 questions a set by seed 0; `--quick` asks 4.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import Options, Row, say, shown, skipped
from benchmarks.service_process import with_engine
from ingest.settings import CHECKOUT

SAMPLE = 200
SETS = {
    "PubMedQA": "pubmedqa_cv/pubmedqa_l_non_test_500.json",
    "BeerQA": "beerqa_sample/beerqa_train_subsample.json",
    "COVID-QA": "covid_qa/200423_covidQA.json",
    "XQuAD English": "xquad/xquad.en.json",
    "XQuAD Chinese": "xquad/xquad.zh.json",
}
SHOWN = (
    "accuracy", "f1", "exact_match", "contains", "good", "gold_citation", "citation_precision", "citation_recall",
    "faithfulness", "answered",
)  # fmt: skip


def run(options: Options) -> list[Row]:
    if not (CHECKOUT / ".venv-vllm").is_dir():
        return [skipped("answers", "no engine is installed (make engine)")]
    files = {name: options.data / file for name, file in SETS.items()} if options.data else {}
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found:
        return [skipped("answers", f"it needs --data with {', '.join(SETS.values())}")]
    rows = []
    sample = 4 if options.quick else SAMPLE
    folder = options.scratch / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    with with_engine(options.scratch / "answers-home") as url:
        for name, file in found.items():
            say(f"{name}, {sample} questions")
            with_passages = _answers(url, file, folder / f"{name}.json", sample, "--keep")
            kept = with_passages["configuration"]["collection"]
            without = _answers(
                url, file, folder / f"{name}, without.json", sample, "--collection", kept, "--control", "none"
            )
            rows += [_row(name, with_passages), _row(f"{name}, without passages", without)]
    return rows


def _answers(url: str, file: Path, to: Path, sample: int, *options: str) -> dict[str, Any]:
    code = "from service.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", "answers", str(file), "--sample", str(sample)]
    command += ["--json", str(to), *options]
    environment = {**os.environ, "GRAFT_URL": url}
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)
    run: dict[str, Any] = json.loads(to.read_text())
    return run


def _row(name: str, run: dict[str, Any]) -> Row:
    metrics, counts = run["metrics"], run["counts"]
    main = "accuracy" if counts.get("accuracy", 0) > counts.get("f1", 0) else "f1"
    others = ", ".join(f"{one} {metrics[one]:.3f}" for one in SHOWN if one in metrics and one != main)
    total = run["latency_ms"].get("total", {})
    took = f"; p50 {total['p50']:,.0f} ms" if total else ""
    return shown(
        f"{main}, {name}",
        round(metrics.get(main, float("nan")), 3),
        "",
        f"{len(run['cases'])} questions: {others}{took}",
    )
