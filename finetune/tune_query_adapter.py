"""`query-adapter`, from questions to a folder below GRAFT_HOME. Needs no training stack: numpy and SciPy do it."""

import time

import numpy as np

from finetune.curve import write_curve
from finetune.passages import searched
from finetune.query_adapter import learn_from
from finetune.retrieval_run import Ready, RetrievalManifest, difference, embedded, manifest_of
from ingest.query_adapter import QueryAdapter, write_query_adapter
from ingest.schemas import Retrieval
from service.tuning import TuneProgress


def tune_query_adapter(run: Ready) -> RetrievalManifest:
    """Raises InvalidError where no question has a passage to learn from."""
    started = time.perf_counter()
    found = embedded(run)
    learned, stop, held_out = run.sides

    def tell(step: int, steps: int, loss: float, eval_loss: float | None) -> None:
        run.hooks.progress(TuneProgress(stage="training", step=step, steps=steps, loss=loss, eval_loss=eval_loss))

    made = learn_from(learned, stop, found.of, found.passages, found.vectors, run.recipe.adapter, tell)
    adapter = QueryAdapter(made.matrix, run.embedder.name, run.embedder.fingerprint)
    write_query_adapter(run.out, adapter)
    write_curve(made.log, run.out)
    asked = found.of(held_out)
    with searched(found.passages, found.vectors, run.embedder.languages) as search:
        scores = {
            name: difference(
                held_out, search.scores(held_out, asked, how), search.scores(held_out, adapter.apply(asked), how)
            )
            for name, how in (("fused", Retrieval()), ("dense", Retrieval(dense_weight=1)))
        }
    away = float(np.linalg.norm(made.matrix - np.eye(len(made.matrix))))
    metrics = {
        "penalty": made.penalty if made.penalty is not None else 0.0,
        "is_identity": float(made.penalty is None),
        "distance_to_identity": away,
        "stop_loss_before": made.losses[None],
        "stop_loss": made.losses.get(made.penalty, 0.0),
    }
    return manifest_of(run, len(found.passages.texts), scores, metrics, time.perf_counter() - started)
