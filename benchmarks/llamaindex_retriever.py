"""Runs in `.venv-bench`: `python llamaindex_retriever.py TASK.json WEIGHTS STORE`, LlamaIndex' stock retriever over Qdrant.

TASK holds `documents` ([id, text]), `queries` ([id, text]) and `depth`. Prints, as JSON, the documents found for each query,
best first, and the milliseconds that each took. Everything is as its documentation shows it; the model's own tokenizer
counts the 224 tokens. Knows nothing of graft.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from tokenizers import Tokenizer


def main(task: dict[str, Any], weights: Path, store: Path) -> dict[str, Any]:
    model = HuggingFaceEmbedding(model_name=str(weights))
    client = QdrantClient(path=str(store))
    storage = StorageContext.from_defaults(vector_store=QdrantVectorStore(client=client, collection_name="bench"))
    index = VectorStoreIndex.from_documents(
        [
            Document(text=text, metadata={"id": id}, excluded_embed_metadata_keys=["id"])
            for id, text in task["documents"]
        ],
        storage_context=storage,
        embed_model=model,
        transformations=[SentenceSplitter(chunk_size=224, chunk_overlap=0, tokenizer=counter(weights))],
    )
    retriever = index.as_retriever(similarity_top_k=task["depth"])
    retriever.retrieve("warm up")
    found, milliseconds = {}, []
    for id, text in task["queries"]:
        start = time.perf_counter()
        nodes = retriever.retrieve(text)
        milliseconds.append((time.perf_counter() - start) * 1000)
        found[id] = [node.node.metadata["id"] for node in nodes]
    points = client.count("bench").count
    client.close()
    return {"found": found, "milliseconds": milliseconds, "points": points}


def counter(weights: Path) -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3]))))
