"""Runs in `.venv-bench`: `python llamaindex_stock.py FOLDER WEIGHTS STORE`, LlamaIndex' stock path from files to vectors on disk.

Everything is as its documentation shows it, with its defaults; the model's own tokenizer counts the 224 tokens. Prints the
seconds of each part as JSON. Knows nothing of graft.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from tokenizers import Tokenizer

embedding_seconds = 0.0


class TimedEmbedding(HuggingFaceEmbedding):  # type: ignore[misc]  # of an environment that is not here
    """The same, with a clock around its work."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        global embedding_seconds
        start = time.perf_counter()
        found: list[list[float]] = super()._get_text_embeddings(texts)
        embedding_seconds += time.perf_counter() - start
        return found


def main(folder: Path, weights: Path, store: Path) -> dict[str, Any]:
    start = time.perf_counter()
    model = TimedEmbedding(model_name=str(weights))
    loaded = time.perf_counter()
    documents = SimpleDirectoryReader(str(folder)).load_data()
    read = time.perf_counter()
    client = QdrantClient(path=str(store))
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=224, chunk_overlap=0, tokenizer=counter(weights)), model],
        vector_store=QdrantVectorStore(client=client, collection_name="bench"),
    )
    pipeline.run(documents=documents)
    end = time.perf_counter()
    points = client.count("bench").count
    client.close()
    return {
        "load": loaded - start,
        "read": read - loaded,
        "pipeline": end - read,
        "embedding": embedding_seconds,
        "points": points,
    }


def counter(weights: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))))
