"""An embedder is tuned: each question nearer to its passage than to mined hard negatives and to the other questions' passages.

MultipleNegativesRankingLoss of sentence-transformers. What comes out is a folder of its kind with an ONNX file beside it that the
fast CPU runtimes load; how far their vectors are from torch's is measured, and too far is refused.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from finetune.encoder_onnx import write_encoder
from finetune.encoder_weights import copy_tokenizer, load_encoder
from finetune.hard_negatives import Mined, evenly, mine
from finetune.passages import Passages, searched
from finetune.retrieval_run import Exported, Ready, RetrievalManifest, Searchable, difference, embedded, manifest_of
from finetune.retrieval_trainer import train_with, training_arguments
from ingest.embed import load_embedder
from ingest.errors import InvalidError
from ingest.model_files import ModelCard, find_model, read_card
from ingest.schemas import Retrieval

MOST_DIFFERENCE = 0.001  # one less cosine, between torch and the CPU runtime
COMPARED = 64  # passages
CARD = "graft-model.json"
START = "start"  # what training starts from, as sentence-transformers reads it


def tune_embedder(run: Ready, resume: bool) -> RetrievalManifest:
    """Raises InvalidError, SettingsError, StoppedError."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import set_seed

    started = time.perf_counter()
    folder = find_model(run.embedder.name, run.ingest)
    card = read_card(run.embedder.name, folder)
    before = embedded(run)
    with searched(before.passages, before.vectors, run.embedder.languages) as search:
        learn, stop = (
            mine(cases, before.of(cases), before.vectors, search, run.recipe.mining, run.asked.negatives)
            for cases in (run.sides.learn, run.sides.stop)
        )
        old = {
            name: search.scores(run.sides.held_out, before.of(run.sides.held_out), how) for name, how in WAYS.items()
        }
    if not learn:
        raise InvalidError(f"no question of {run.asked.dataset.name!r} has a passage with text to learn from")
    set_seed(run.recipe.seed)
    model = SentenceTransformer(modules=_modules(folder, card, run.out / START), device=None)
    count = run.recipe.mining.negatives
    rows = [_rows(evenly(side, count, len(before.passages.texts), run.recipe.seed), before.passages, card, count)
            for side in (learn, stop)]  # fmt: skip
    metrics = train_with(
        SentenceTransformerTrainer,
        run,
        resume,
        model=model,
        args=training_arguments(SentenceTransformerTrainingArguments, run, bool(stop), batch_sampler="no_duplicates"),
        train_dataset=rows[0],
        eval_dataset=rows[1],
        loss=MultipleNegativesRankingLoss(model),
    )
    exported = export_embedder(model, card, folder, run, before.passages)
    shutil.rmtree(run.out / START)
    tuned = load_embedder(str(run.out), run.ingest, threads=run.settings.threads)
    scores = _compared(run, old, embedded(run, tuned), tuned.languages)
    metrics |= {"rows": float(len(learn)), "mined": float(np.mean([len(one.negatives) for one in learn]))}
    return manifest_of(
        run, len(before.passages.texts), scores, metrics, time.perf_counter() - started, exported=exported
    )


WAYS = {"fused": Retrieval(), "dense": Retrieval(dense_weight=1)}


def export_embedder(model: Any, card: ModelCard, source: Path, run: Ready, passages: Passages) -> Exported:
    """Writes model.onnx, the tokenizer and the card beside sentence-transformers' files, and compares the vectors.

    Raises InvalidError where they differ by more than MOST_DIFFERENCE.
    """
    model.save_pretrained(str(run.out), create_model_card=False)
    write_encoder(model[0].auto_model, run.out / "model.onnx")
    copy_tokenizer(source, run.out)
    facts = card.model_dump() | {
        "name": run.out.name,
        "kind": "embedder",
        "languages": list(card.languages),
        "tuned_from": card.name,
    }
    (run.out / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    texts = list(passages.texts[:: max(1, len(passages.texts) // COMPARED)][:COMPARED])
    given = load_embedder(str(run.out), run.ingest, runtime="onnxruntime").embed(texts)
    made = model.encode(
        [card.document_prefix + text for text in texts], normalize_embeddings=True, show_progress_bar=False
    )
    return check_export("cosine", 1 - (np.asarray(made) * given).sum(axis=1), MOST_DIFFERENCE, run.out)


def check_export(measure: Any, differences: Any, bound: float, out: Path) -> Exported:
    """Raises InvalidError where the largest difference is above the bound."""
    found = Exported(
        measure=measure,
        texts=len(differences),
        mean_difference=float(np.mean(differences)),
        most_difference=float(np.max(differences)),
        bound=bound,
    )
    if not found.most_difference <= bound:  # also where it is no number
        raise InvalidError(
            f"the ONNX file in {str(out)!r} does not give what was trained: {measure} differs by {found.most_difference:.4f}, "
            f"above {bound}; its safetensors are kept"
        )
    return found


def _modules(folder: Path, card: ModelCard, start: Path) -> list[Any]:
    """A transformer and its pooling, from a folder that is written for it."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = load_encoder(folder)
    start.mkdir(exist_ok=True)
    encoder.save_pretrained(start)
    copy_tokenizer(folder, start)
    transformer = Transformer(str(start), max_seq_length=card.max_tokens)
    return [transformer, Pooling(encoder.config.hidden_size, card.pooling)]


def _rows(mined: list[Mined], passages: Passages, card: ModelCard, count: int) -> Any:
    """-> anchor, positive, negative_1, ... with the prefixes that the embedder wants; None where there are none."""
    from datasets import Dataset

    if not mined:
        return None
    full = min(count, *(len(one.negatives) for one in mined))
    columns = {
        "anchor": [card.query_prefix + one.question for one in mined],
        "positive": [card.document_prefix + passages.texts[one.positive] for one in mined],
    }
    for at in range(full):
        columns[f"negative_{at + 1}"] = [card.document_prefix + passages.texts[one.negatives[at]] for one in mined]
    return Dataset.from_dict(columns)


def _compared(run: Ready, old: dict[str, list[float]], after: Searchable, languages: tuple[str, ...]) -> dict[str, Any]:
    held_out = run.sides.held_out
    with searched(after.passages, after.vectors, languages) as search:
        return {
            name: difference(held_out, old[name], search.scores(held_out, after.of(held_out), how))
            for name, how in WAYS.items()
        }
