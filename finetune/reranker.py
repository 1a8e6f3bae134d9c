"""A reranker is tuned: a cross-encoder (Nogueira and Cho, 2019) says of question and passage together whether it answers.

Binary cross-entropy on relevant passages and mined negatives. Exported as the embedder is, and compared by its probabilities.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.retrieval_metrics import scores as scored
from eval.schemas import Case
from finetune import hardware
from finetune.embedder import START, check_export, mine_sides, write_model
from finetune.encoder_onnx import write_encoder
from finetune.encoder_weights import copy_tokenizer, load_encoder
from finetune.frozen_layers import freeze
from finetune.hard_negatives import Mined
from finetune.passages import METRIC, Passages, Searched, searched
from finetune.retrieval_run import Exported, Ready, RetrievalManifest, difference, embedded, manifest_of
from finetune.retrieval_trainer import train_with, training_arguments
from ingest.model_files import ModelCard, find_model, onnx_file, read_card
from ingest.schemas import Hit
from service.rerank import Reranker

MOST_DIFFERENCE = 0.001  # of a probability, between torch and the CPU runtime
COMPARED = 32  # pairs
DEPTH = 20  # hits that are read, as a collection's own `rerank_depth`
MEASURED = 100  # held-out questions at most: each has DEPTH pairs read, twice
EVER = 1e9  # seconds


def tune_reranker(run: Ready, base: str, resume: bool) -> RetrievalManifest:
    """`base`: the cross-encoder's name. Raises InvalidError, SettingsError, StoppedError."""
    from finetune.train import quiet

    quiet()  # first: the other libraries speak as they are loaded
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import set_seed

    started = time.perf_counter()
    hardware.reset_peak_memory()
    settled = training_arguments(CrossEncoderTrainingArguments, run)
    folder = find_model(base, run.ingest)
    card = read_card(base, folder)
    set_seed(run.recipe.seed)
    start = _start(folder, run.out / START)  # first: what cannot be tuned is said before anything is embedded
    model = CrossEncoder(str(start), num_labels=1, max_length=card.max_tokens, local_files_only=True)
    freeze(model[0].auto_model, run.recipe.model.frozen_layers)
    found = embedded(run)
    held_out = run.sides.held_out[:MEASURED]
    with searched(found.passages, found.vectors, run.embedder.languages) as search:
        learn, stop = mine_sides(run, found, search)
        first = [_hits(search, case, vector) for case, vector in zip(held_out, found.of(held_out), strict=True)]
    before = _scores(Reranker(str(folder if onnx_file(folder) else start), run.ingest, EVER), held_out, first)
    rows = [_rows(side, found.passages) for side in (learn, stop)]
    metrics = train_with(
        CrossEncoderTrainer,
        run,
        resume,
        model=model,
        args=settled(bool(stop)),
        train_dataset=rows[0],
        eval_dataset=rows[1],
        loss=BinaryCrossEntropyLoss(model),
    )
    pairs = [(one.question, found.passages.texts[at]) for one in learn for at in (one.positive, *one.negatives)][
        :COMPARED
    ]
    exported = export_reranker(model, card, folder, run, pairs)
    shutil.rmtree(start)
    after = _scores(Reranker(str(run.out), run.ingest, EVER), held_out, first)
    return manifest_of(
        run,
        len(found.passages.texts),
        {"reranked": difference(held_out, before, after)},
        metrics | {"rows": float(len(rows[0]))},
        time.perf_counter() - started,
        base=base,
        exported=exported,
    )


def export_reranker(
    model: Any, card: ModelCard, source: Path, run: Ready, pairs: Sequence[tuple[str, str]]
) -> Exported:
    """Raises InvalidError where the probabilities differ by more than MOST_DIFFERENCE."""
    write_model(model, card, source, run.out, "reranker")
    made = 1 / (1 + np.exp(-np.asarray(_logits(model, pairs), np.float64)))
    given = []
    exactly = run.ingest.model_copy(update={"embedder_runtime": "onnxruntime"})  # the other may compute in bfloat16
    reader = Reranker(str(run.out), exactly, EVER)
    for question, text in pairs:
        (hit,) = reader.rerank(question, [_hit(0, text, "")])
        given.append(hit.rerank_score or 0.0)
    return check_export("probability", np.abs(made - np.asarray(given)), MOST_DIFFERENCE, run.out)


def _start(folder: Path, start: Path) -> Path:
    """-> what training starts from; where the base has no ONNX file, with one, since its own ranking is measured too. Raises
    InvalidError, SettingsError.
    """
    encoder = load_encoder(folder, with_head=True)
    start.mkdir(exist_ok=True)
    encoder.save_pretrained(start)
    copy_tokenizer(folder, start)
    if onnx_file(folder) is None:
        write_encoder(encoder, start / "model.onnx")
    return start


def _logits(model: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    import torch

    found = model.predict([list(pair) for pair in pairs], activation_fn=torch.nn.Identity(), show_progress_bar=False)
    return [float(one) for one in np.asarray(found).reshape(len(pairs))]


def _rows(mined: list[Mined], passages: Passages) -> Any:
    """-> question, passage, label: each relevant passage, and each negative of a question once; None where there are none."""
    from datasets import Dataset

    held: dict[tuple[str, int], float] = {}
    for one in mined:
        for at in one.negatives:
            held.setdefault((one.question, at), 0.0)
        held[(one.question, one.positive)] = 1.0
    if not held:
        return None
    return Dataset.from_dict(
        {
            "question": [question for question, _ in held],
            "passage": [passages.texts[at] for _, at in held],
            "label": list(held.values()),
        }
    )


def _hits(search: Searched, case: Case, vector: Any) -> list[Hit]:
    places = search.search(case.question, vector)[:DEPTH]
    return [_hit(at, search.passages.texts[at], search.passages.documents[at]) for at in places]


def _hit(at: int, text: str, document: str) -> Hit:
    return Hit(chunk_id=str(at), document_id=document, path=document, text=text, start=0, end=len(text), score=0.0)


def _scores(reranker: Reranker, cases: Sequence[Case], hits: Sequence[list[Hit]]) -> list[float]:
    orders = [
        list(dict.fromkeys(hit.document_id for hit in (reranker.rerank(case.question, own) if own else [])))
        for case, own in zip(cases, hits, strict=True)
    ]
    return [one[METRIC] for one in scored([case.relevant for case in cases], orders, [METRIC])]
