"""Runs in `.venv-bench`: `python minilm_export.py WEIGHTS TARGET` writes TARGET/float32 and TARGET/int8, folders as
`ingest.embed` reads them. The int8 one has its matrix products' weights quantized per channel, activations as they come.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from transformers import AutoModel

CARD = {"name": "all-MiniLM-L6-v2", "pooling": "mean", "normalize": True, "languages": ["en"], "max_tokens": 256}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def main(weights: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        exported = Path(work) / "exported.onnx"
        export(weights, exported)
        fused = optimizer.optimize_model(str(exported), "bert", num_heads=12, hidden_size=384, opt_level=0)
        float32, int8 = folder(target / "float32", weights), folder(target / "int8", weights)
        fused.save_model_to_file(str(float32 / "model.onnx"))
        quantize_dynamic(
            float32 / "model.onnx",
            int8 / "model.onnx",
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what the fused operators give
        )


class Encoder(torch.nn.Module):  # type: ignore[misc]  # of an environment that is not here
    """The model with its inputs by place, as the exporter wants them."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager").eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state


def export(weights: Path, file: Path) -> None:
    example = tuple(torch.ones((2, 16), dtype=torch.int64) for _ in INPUTS)
    axes = {name: {0: "texts", 1: "tokens"} for name in (*INPUTS, "last_hidden_state")}
    torch.onnx.export(
        Encoder(weights),
        example,
        str(file),
        input_names=list(INPUTS),
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


def folder(path: Path, weights: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights / "tokenizer.json", path)
    (path / "graft-model.json").write_text(json.dumps(CARD) + "\n")
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
