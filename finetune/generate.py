"""What a model answers, the likeliest token at each step, in batches: to measure it where no engine runs. Imports torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from finetune.chat import Chat
from service.generate import strip_thinking

BATCH = 16  # prompts at a time, of like lengths


def greedy(
    model: Any,
    chat: Chat,
    prompts: Sequence[Sequence[int]],
    most: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """-> for each prompt (tokens,) what `model` says, in at most `most` tokens; a prompt and its answer fit the model's window.

    `model` is transformers' or PEFT's, and may answer with nothing.
    """
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    answers = [""] * len(prompts)
    was, _ = model.training, model.eval()
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for at, answer in zip(batch, _answered(model, chat, [prompts[at] for at in batch], most), strict=True):
            answers[at] = answer
        progress(start + len(batch))
    model.train(was)
    return answers


def _answered(model: Any, chat: Chat, batch: Sequence[Sequence[int]], most: int) -> list[str]:
    """Padded on the left, so that every answer starts at the same place."""
    longest, padding = max(map(len, batch)), chat.tokenizer.pad_token_id
    ids = torch.full((len(batch), longest), padding, device=model.device)
    mask = torch.zeros_like(ids)
    for at, one in enumerate(batch):
        ids[at, longest - len(one) :] = torch.tensor(one, device=model.device)
        mask[at, longest - len(one) :] = 1
    how = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=sorted(chat.ends), pad_token_id=padding, use_cache=True
    )
    with torch.inference_mode():
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)[:, longest:].tolist()
    return [_text(chat, one) for one in said]


def _text(chat: Chat, tokens: Sequence[int]) -> str:
    end = next((at for at, token in enumerate(tokens) if token in chat.ends), len(tokens))
    return strip_thinking(str(chat.tokenizer.decode(tokens[:end], skip_special_tokens=True))).strip()
