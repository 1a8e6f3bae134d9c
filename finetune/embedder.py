"""An embedder is tuned: each question nearer to its passage than to mined hard negatives and to the other questions' passages.

MultipleNegativesRankingLoss of sentence-transformers. What comes out is a folder of its kind with an ONNX file beside it that the
fast CPU runtimes load; how far their vectors are from torch's is measured, and too far is refused.
"""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune import hardware
from finetune.encoder_onnx import write_encoder
from finetune.encoder_weights import copy_tokenizer, load_encoder
from finetune.frozen_layers import States, freeze
from finetune.hard_negatives import Mined, evenly, mine
from finetune.passages import Passages, Searched, searched
from finetune.retrieval_run import Exported, Ready, RetrievalManifest, Searchable, difference, embedded, manifest_of
from finetune.retrieval_trainer import train_with, training_arguments
from ingest.embed import load_embedder, unit
from ingest.errors import InvalidError
from ingest.model_files import ModelCard, find_model, read_card
from ingest.schemas import Retrieval

WAYS = {"fused": Retrieval(), "dense": Retrieval(dense_weight=1)}
MOST_DIFFERENCE = 0.001  # one less cosine, between torch and the CPU runtime
COMPARED = 64  # passages
CARD = "graft-model.json"
START = "start"  # what training starts from, as sentence-transformers reads it


def tune_embedder(run: Ready, resume: bool) -> RetrievalManifest:
    """Raises InvalidError, SettingsError, StoppedError."""
    started = time.perf_counter()
    folder = find_model(run.embedder.name, run.ingest)
    card = read_card(run.embedder.name, folder)
    model = start_model(run, folder, card)  # first: what cannot be tuned is said before anything is embedded
    before = embedded(run)
    with searched(before.passages, before.vectors, run.embedder.languages) as search:
        learn, stop = mine_sides(run, before, search)
        old = scores_of(run, before, search)
    metrics = train_embedder(run, model, card, before.passages, learn, stop, resume)
    exported = export_embedder(model, card, folder, run, before.passages)
    shutil.rmtree(run.out / START)
    tuned = load_embedder(str(run.out), run.ingest, threads=run.settings.threads)
    after = embedded(run, tuned, before.passages)
    with searched(after.passages, after.vectors, tuned.languages) as search:
        new = scores_of(run, after, search)
    scores = {name: difference(run.sides.held_out, old[name], new[name]) for name in WAYS}
    metrics |= {"rows": float(len(learn)), "mined": float(np.mean([len(one.negatives) for one in learn]))}
    return manifest_of(
        run, len(before.passages.texts), scores, metrics, time.perf_counter() - started, exported=exported
    )


def start_model(run: Ready, folder: Path, card: ModelCard) -> Any:
    """-> a SentenceTransformer with the weights of `folder`. Raises InvalidError, SettingsError."""
    from finetune.train import quiet

    quiet()  # first: the other libraries speak as they are loaded
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from transformers import set_seed

    hardware.reset_peak_memory()
    training_arguments(SentenceTransformerTrainingArguments, run)  # refused here where they do not fit
    set_seed(run.recipe.seed)
    model = SentenceTransformer(modules=_modules(folder, card, run.out / START), prompts=_prompts(card))
    freeze(model[0].auto_model, run.recipe.model.frozen_layers)
    return model


def train_embedder(
    run: Ready,
    model: Any,
    card: ModelCard,
    passages: Passages,
    learn: Sequence[Mined],
    stop: Sequence[Mined],
    resume: bool,
    states: States | None = None,
) -> dict[str, float]:
    """-> `train_with`'s numbers. `states`: of the frozen layers, where some are there. Raises InvalidError, StoppedError."""
    import torch
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.losses.merged_forward import column_merging_disabled
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    count = run.recipe.mining.negatives
    rows = [
        _rows(evenly(side, count, run.recipe.seed), passages, card, count) if side else None for side in (learn, stop)
    ]
    settled = training_arguments(SentenceTransformerTrainingArguments, run, batch_sampler="no_duplicates")
    # In one pass with passages, questions are padded to their length: on a CPU that is so much more to compute.
    with nullcontext() if torch.cuda.is_available() else column_merging_disabled():
        return train_with(
            SentenceTransformerTrainer,
            run,
            resume,
            states,
            model=model,
            args=settled(bool(stop)),
            train_dataset=rows[0],
            eval_dataset=rows[1],
            loss=MultipleNegativesRankingLoss(model),
        )


def mine_sides(run: Ready, found: Searchable, search: Searched) -> tuple[list[Mined], list[Mined]]:
    """Of the questions to learn from, and of those to stop by. Raises InvalidError where there is nothing to learn from."""
    learn, stop = (
        mine(cases, found.of(cases), found.vectors, search, run.recipe.mining, run.asked.negatives)
        for cases in (run.sides.learn, run.sides.stop)
    )
    if not learn:
        raise InvalidError(f"no question of {run.asked.dataset.name!r} has a passage with text to learn from")
    return learn, stop


def scores_of(run: Ready, found: Searchable, search: Searched) -> dict[str, list[float]]:
    """-> of the held-out questions, by what is searched."""
    held_out = run.sides.held_out
    return {name: search.scores(held_out, found.of(held_out), how) for name, how in WAYS.items()}


def export_embedder(model: Any, card: ModelCard, source: Path, run: Ready, passages: Passages) -> Exported:
    """Writes model.onnx, the tokenizer and the card beside sentence-transformers' files, and compares the vectors.

    Raises InvalidError where they differ by more than MOST_DIFFERENCE.
    """
    write_model(model, card, source, run.out, "embedder")
    texts = list(passages.texts[:: max(1, len(passages.texts) // COMPARED)][:COMPARED])
    given = load_embedder(str(run.out), run.ingest, runtime="onnxruntime").embed(texts)
    made = model.encode(
        [card.document_prefix + text for text in texts], normalize_embeddings=True, show_progress_bar=False
    )
    return check_export("cosine", 1 - (unit(np.asarray(made)) * unit(given)).sum(axis=1), MOST_DIFFERENCE, run.out)


def write_model(model: Any, card: ModelCard, source: Path, out: Path, kind: Literal["embedder", "reranker"]) -> None:
    """As sentence-transformers saves it, with an ONNX file, the tokenizer of `source` and a card. Raises InvalidError."""
    model.save_pretrained(str(out), create_model_card=False)
    write_encoder(model[0].auto_model, out / "model.onnx")
    copy_tokenizer(source, out)
    facts = card.model_dump(mode="json") | {"name": out.name, "kind": kind, "tuned_from": card.name}
    (out / CARD).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


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
    """A transformer, its pooling and its norm, from a folder that is written for it. Raises InvalidError, SettingsError."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    encoder = load_encoder(folder)
    start.mkdir(exist_ok=True)
    encoder.save_pretrained(start)
    copy_tokenizer(folder, start)
    transformer = Transformer(str(start), max_seq_length=card.max_tokens)
    pooling = Pooling(encoder.config.hidden_size, card.pooling)
    return [transformer, pooling, Normalize()] if card.normalize else [transformer, pooling]


def _prompts(card: ModelCard) -> dict[str, str]:
    """For those who load the folder with sentence-transformers; the rows have them already."""
    held = {"query": card.query_prefix, "document": card.document_prefix}
    return {name: prefix for name, prefix in held.items() if prefix}


def _rows(mined: list[Mined], passages: Passages, card: ModelCard, count: int) -> Any:
    """-> anchor, positive, negative_1, ... with the prefixes that the embedder wants."""
    from datasets import Dataset

    full = min(count, *(len(one.negatives) for one in mined))
    columns = {
        "anchor": [card.query_prefix + one.question for one in mined],
        "positive": [card.document_prefix + passages.texts[one.positive] for one in mined],
    }
    for at in range(full):
        columns[f"negative_{at + 1}"] = [card.document_prefix + passages.texts[one.negatives[at]] for one in mined]
    return Dataset.from_dict(columns)
