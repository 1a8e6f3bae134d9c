"""PEFT's side of a check: the probabilities that transformers and PEFT give to the engine's answers."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.check_engine import Answered
from finetune.methods import load_base
from finetune.recipe import Trained
from ingest.errors import InvalidError
from service.prompt import Message

ROOM = 1.5  # of a GPU's free memory, times the weights: an engine may be beside


def prompt_tokens(base: Path, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """-> each prompt as the base's own tokenizer and template lay it out for an answer. Raises InvalidError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        return [
            list(tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=False
            ))
            for messages in prompts
        ]  # fmt: skip
    except (OSError, ValueError) as error:
        raise InvalidError(f"the tokenizer in {str(base)!r} lays out no conversation: {error}") from error


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """With so many threads; None: as many as torch takes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_bare(base: Path, dtype: str) -> Any:
    """-> the base as it is served, never quantised; on a GPU where it has room beside an engine."""
    import torch

    model = load_base(base, Trained.model_validate({}), dtype)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM * size:
        model = model.to("cuda")
    return model.eval()


def with_adapter(model: Any, adapter: Path) -> Any:
    """-> the same model, whose answers are the adapter's from now on."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's to mend
        # Modules that the configuration names and the file does not hold: nothing is added there, as in the engine.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        tuned = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:  # alone: the base's buffers may be of a type of their own
            weight.data = weight.data.to(model.dtype)
    return tuned.eval()


def log_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Answered]
) -> Iterator[tuple[float, ...]]:
    """-> for each prompt, the natural logarithm of the probability of each token of its answer."""
    import torch

    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.tokens]], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens[:, :-1], logits_to_keep=len(answer.tokens)).logits[0].float()
        scored = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, -len(answer.tokens) :, None])
        yield tuple(scored[:, 0].tolist())
