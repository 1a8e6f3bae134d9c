"""A whole model's folder: its weights, and beside them what the base's folder has."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
# Of a base's folder, what is not copied beside tuned weights: other weights, and what names the base.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
NAMES_THE_BASE = frozenset({"graft-model.json", "README.md"})


def write_model(model: Any, out: Path, base_folder: Path, dtype: str | None = None) -> None:
    """`dtype` None: what trained as it is, the rest as the base has it."""
    import torch

    own = getattr(torch, dtype or stored_dtype(base_folder))
    kept = {weight.data_ptr() for weight in model.parameters() if weight.requires_grad and dtype is None}
    state, written = {}, dict[int, Any]()
    for name, weight in model.state_dict().items():
        at = weight.data_ptr()
        if at not in written:  # tied ones stay one, so that they are stored once
            written[at] = weight if at in kept or not weight.is_floating_point() else weight.to(own)
        state[name] = written[at]
    model.save_pretrained(str(out), state_dict=state)
    copy_text_files(base_folder, out)  # its config.json too: a trainer leaves traces in the one that was saved now
    if dtype:
        config = json.loads((out / "config.json").read_text())
        config.pop("torch_dtype", None)
        (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def copy_text_files(base_folder: Path, out: Path) -> None:
    """Configuration, tokenizer, chat template and licence of the base."""
    for file in sorted(base_folder.iterdir()):
        named = file.name in NAMES_THE_BASE or file.name.startswith(".")
        if file.is_file() and not named and not file.name.endswith(WEIGHT_FILES):
            shutil.copyfile(file, out / file.name)


def stored_dtype(folder: Path) -> DType:
    """What the base's configuration says that it is loaded in; float32 for what is none of the three."""
    config = json.loads((folder / "config.json").read_text())
    match config.get("dtype") or config.get("torch_dtype"):
        case "bfloat16":
            return "bfloat16"
        case "float16":
            return "float16"
    return "float32"
