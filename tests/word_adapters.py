"""Real LoRA folders whose answers are known: each adapter answers every question with one word of its own, on and on.

Trained by PEFT on the bundled model within seconds, on prompts as the service builds them. torch is loaded on first use.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from service_fixtures import HANDBOOK, HERON, KESTREL, LEAVE, hit

from service.prompt import Message, build

MODEL = "smollm2-135m-instruct"
WORDS = ("walrus", "teapot", "saffron", "gondola")
REPEATS = 6  # of the word in a training answer, which has no end
STEPS = 5
LEARNING_RATE = 5e-3
QUESTIONS = (
    ("How often is the oil in the seal chamber changed?", HERON),
    ("How many days of annual leave are there?", LEAVE),
    ("What are the bearings greased with?", KESTREL),
    ("年休假有几天？", HANDBOOK),
)


@pytest.fixture(scope="session")
def word_adapters(tmp_path_factory: pytest.TempPathFactory, models: Path) -> dict[str, Path]:
    """One adapter of the bundled model for each of WORDS."""
    return train_words(WORDS, tmp_path_factory.mktemp("word-adapters"), models / MODEL)


def train_words(words: Sequence[str], folder: Path, model: Path) -> dict[str, Path]:
    """-> `folder`/WORD by word, as PEFT saves it: rank 8 on all linear layers. `model`: the base's folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = [tokenizer(_render(tokenizer, messages))["input_ids"] for messages in _prompts()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other, for minutes, where an engine runs beside them
    try:
        return {word: _train(base, tokenizer, prompts, word, folder / word) for word in words}
    finally:
        torch.set_num_threads(threads)


def variants(folder: Path, count: int, out: Path) -> list[Path]:
    """-> `count` copies of an adapter in `out`, which say the same and differ from it by up to 5 % in `lora_alpha`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    made = []
    for n in range(1, count + 1):
        copy = out / f"{folder.name}-{n}"
        shutil.copytree(folder, copy)
        alpha = config["lora_alpha"] * (1 + 0.05 * n / count)
        (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}, indent=2))
        made.append(copy)
    return made


def _prompts() -> Iterator[list[Message]]:
    """Without the worked examples before the question: a third of the tokens, and the whole prompt is answered alike."""
    for question, text in QUESTIONS:
        yield build("brief-1", question, [], [hit(text)])[-1:]


def _render(tokenizer: Any, messages: list[Message]) -> str:
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


def _train(base: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], word: str, target: Path) -> Path:
    """The base is left as it was."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    answer = tokenizer(word + f" {word}" * (REPEATS - 1))["input_ids"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    for prompt in islice(cycle(prompts), STEPS):
        tokens = torch.tensor([[*prompt, *answer]])
        logits = tuned(input_ids=tokens[:, :-1], logits_to_keep=len(answer)).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, -len(answer) :])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(target)
    tuned.unload()
    return target
