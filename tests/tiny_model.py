"""A language model made on the spot: two layers, random weights, the bundled model's tokenizer and chat template."""

import json
import shutil
from pathlib import Path

from ingest.settings import IngestSettings
from service.settings import ServiceSettings

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def tiny_model(folder: Path, heads: int = 4) -> Path:
    """A model folder as the bundled one's, made anew in `folder`: 3.2 million float32 parameters, the same in each run. vLLM
    takes it with two heads, of 32 each.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    bundled = IngestSettings().models / ServiceSettings().model
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TEXT_FILES:
        shutil.copy(bundled / name, folder / name)
    like = json.loads((bundled / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=like["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64 // heads,
        max_position_embeddings=2048,
        rms_norm_eps=like["rms_norm_eps"],
        rope_parameters=like["rope_parameters"],
        tie_word_embeddings=like["tie_word_embeddings"],
        bos_token_id=like["bos_token_id"],
        eos_token_id=like["eos_token_id"],
        pad_token_id=like["pad_token_id"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    # `save_pretrained` writes a generation config of its own over the copied one.
    shutil.copy(bundled / "generation_config.json", folder / "generation_config.json")
    return folder
