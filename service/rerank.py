"""Question + hits -> hits in the order of a cross-encoder (Nogueira and Cho, 2019), as many as fit into a time.

Off by default on a CPU. The best hits are read first; those that time does not allow follow in the order that they had.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ingest.errors import SettingsError
from ingest.model_files import find_model, onnx_file, read_card, read_tokenizer
from ingest.runtime import RUNTIMES, choose_runtime, model_inputs, session
from ingest.schemas import Hit
from ingest.settings import IngestSettings

FIRST, BATCH = 4, 8  # pairs of the first batch at least, of any batch at most


class Pace:
    """What a batch takes, learned from those before it: a moving mean of seconds for a padded token."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._per_token: float | None = None

    def batches(self, tokens: Sequence[int], seconds: float) -> Iterator[range]:
        """Ranges of places in `tokens` (of each pair), in order, for as long as the next one is expected to end in time.

        The first one always comes. What the caller does with a range before it asks for the next is what is timed.
        """
        started = self._clock()
        at = 0
        while at < len(tokens):
            left = seconds - (self._clock() - started)
            size = self._fitting(tokens[at : at + BATCH], left)
            if not size and at:
                return
            size = size or min(FIRST, len(tokens))
            begun = self._clock()
            yield range(at, at + size)
            self._learn(_padded(tokens[at : at + size]), self._clock() - begun)
            at += size

    def _fitting(self, tokens: Sequence[int], seconds: float) -> int:
        if self._per_token is None:
            return 0
        return max(
            (n for n in range(1, len(tokens) + 1) if _padded(tokens[:n]) * self._per_token <= seconds), default=0
        )

    def _learn(self, tokens: int, seconds: float) -> None:
        latest = seconds / tokens
        self._per_token = latest if self._per_token is None else 0.7 * self._per_token + 0.3 * latest


def _padded(tokens: Sequence[int]) -> int:
    return len(tokens) * max(tokens)


class Reranker:
    """Raises SettingsError when the model is not there. `seconds`: for the pairs of one question."""

    def __init__(self, name: str, settings: IngestSettings, seconds: float) -> None:
        folder = find_model(name, settings)
        file = onnx_file(folder)
        if file is None:
            raise SettingsError(f"reranker {name!r} has no ONNX file in {str(folder)!r}")
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.enable_truncation(read_card(name, folder).max_tokens, strategy="only_second")
        runtime = next((one for one in RUNTIMES if one == settings.embedder_runtime), None)
        self._run = session(file, runtime or choose_runtime(file, settings), settings.threads)
        self._pace = Pace()
        self._seconds = seconds

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """All of `hits`: first those that were read, by their `rerank_score`, then the others as they stood, without one."""
        encodings = self._tokenizer.encode_batch([(question, hit.searched) for hit in hits])
        scored: list[Hit] = []
        for batch in self._pace.batches([len(encoding.ids) for encoding in encodings], self._seconds):
            logits = self._run(model_inputs([encodings[place] for place in batch]))
            scores = 1 / (1 + np.exp(-logits.reshape(len(batch), -1)[:, -1]))
            for place, score in zip(batch, scores, strict=True):
                scored.append(hits[place].model_copy(update={"rerank_score": float(score)}))
        return [*sorted(scored, key=lambda hit: -(hit.rerank_score or 0.0)), *hits[len(scored) :]]
