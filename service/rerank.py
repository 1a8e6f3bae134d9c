"""Question + hits -> hits in the order of a cross-encoder (Nogueira and Cho, 2019). Off by default on a CPU."""

from collections.abc import Sequence

import numpy as np

from ingest.errors import SettingsError
from ingest.model_files import find_model, onnx_file, read_card, read_tokenizer
from ingest.runtime import choose_runtime, model_inputs, session
from ingest.schemas import Hit
from ingest.settings import IngestSettings


class Reranker:
    """Scores pairs one batch of 8 at a time. Raises SettingsError when the model is not there."""

    def __init__(self, name: str, settings: IngestSettings) -> None:
        folder = find_model(name, settings)
        file = onnx_file(folder)
        if file is None:
            raise SettingsError(f"reranker {name!r} has no ONNX file in {str(folder)!r}")
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.enable_truncation(read_card(name, folder).max_tokens, strategy="only_second")
        self._run = session(file, choose_runtime(file, settings), settings.threads)

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        scores: list[float] = []
        for start in range(0, len(hits), 8):
            pairs = [(question, hit.searched) for hit in hits[start : start + 8]]
            logits = self._run(model_inputs(self._tokenizer.encode_batch(pairs)))
            scores += [float(score) for score in 1 / (1 + np.exp(-logits.reshape(len(pairs), -1)[:, -1]))]
        scored = [hit.model_copy(update={"rerank_score": score}) for hit, score in zip(hits, scores, strict=True)]
        return sorted(scored, key=lambda hit: -(hit.rerank_score or 0.0))
