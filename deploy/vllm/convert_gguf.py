"""Turns a GGUF file into the folder that vLLM, TRL and PEFT read: `python convert_gguf.py FILE.gguf FOLDER`.

Runs with the engine's Python (torch, transformers, gguf, accelerate). Weights are dequantized and kept in bfloat16; the
tokenizer and the chat template come along. FOLDER must not exist: it appears whole or not at all.
"""

import os
import shutil
import sys
from pathlib import Path

# Before transformers is imported: everything is in the file, no hub is asked.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
    for file in unfinished.iterdir():
        file.chmod(0o644)
    unfinished.rename(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python convert_gguf.py FILE.gguf FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
