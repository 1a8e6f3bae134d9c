"""A reward model: a conversation as one number, by a base with a LoRA and a head of one output. Imports torch.

The number is read where the answer ends: from the hidden state of its end-of-turn token, of the tokens that serving would have
sent and got. The head is computed in float32 whatever the rest is in, since margins are smaller than bfloat16's steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune import chat, methods, runs
from finetune.base_folder import tokenizer_digest
from finetune.chat import Chat
from finetune.schemas import Message
from ingest.errors import InvalidError
from service.base_model import read_base
from service.generate import strip_thinking

BATCH = 8  # conversations at a time, of like lengths


class Head(nn.Linear):  # type: ignore[misc]  # torch is not read by mypy
    """(..., hidden) -> (..., 1), begun small: a standard deviation of 1 / sqrt(hidden + 1) (Stiennon et al., 2020)."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False)
        nn.init.normal_(self.weight, std=(hidden + 1) ** -0.5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight.float())


class RewardModel(NamedTuple):
    """`model`: transformers' for one label, with its adapter."""

    model: Any
    chat: Chat

    def score(self, conversations: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """`conversations`: (prompt, answer); an empty answer has a score too. Raises InvalidError for a prompt that the chat
        template does not take.
        """
        return self.score_tokens([conversation_ids(self.chat, prompt, answer) for prompt, answer in conversations])

    def score_tokens(self, conversations: Sequence[Sequence[int]]) -> list[float]:
        """Each (tokens,), up to and with the end of the answer."""
        order = sorted(range(len(conversations)), key=lambda at: len(conversations[at]))
        scores = [0.0] * len(conversations)
        was, _ = self.model.training, self.model.eval()
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                for at, score in zip(batch, self._scored([conversations[at] for at in batch]), strict=True):
                    scores[at] = score
        self.model.train(was)
        return scores

    def _scored(self, batch: Sequence[Sequence[int]]) -> list[float]:
        longest, device = max(map(len, batch)), self.model.device
        ids = torch.full((len(batch), longest), padding(self.chat), device=device)
        mask = torch.zeros_like(ids)
        for at, one in enumerate(batch):
            ids[at, : len(one)] = torch.tensor(one, device=device)
            mask[at, : len(one)] = 1
        found: list[float] = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].tolist()
        return found


def load_reward_model(folder: Path, base: Path, dtype: str) -> RewardModel:
    """What `graft tune reward` wrote into `folder`, on the base that it was trained on. Raises NotFoundError, InvalidError; for
    one that reads other tokens than `base` does, by name.
    """
    manifest = runs.read_manifest(folder)
    if manifest.method != "reward":
        raise InvalidError(
            f"{str(folder)!r} holds a run of {manifest.method!r}, and no reward model: name a folder that `graft tune reward` "
            "wrote"
        )
    if manifest.tokenizer != tokenizer_digest(base):
        raise InvalidError(
            f"the reward model in {str(folder)!r} reads the tokens of {manifest.base!r}, and {str(base)!r} has another "
            "tokenizer, so that its scores would mean nothing: train one with `graft tune reward --base` on that model"
        )
    if manifest.base != (given := read_base(str(base.absolute()), None).identity):
        raise InvalidError(
            f"the reward model in {str(folder)!r} was trained on {manifest.base!r}, and {str(base)!r} is {given!r}: give the "
            "base that it was trained on"
        )
    model = methods.put_scores(with_head(methods.load_plain(base, dtype, scores=True)), folder)
    read = chat.read_chat(base)
    model.config.get_text_config().pad_token_id = padding(read)
    model.requires_grad_(False).eval()
    return RewardModel(model.to("cuda") if torch.cuda.is_available() else model, read)


def with_head(model: Any) -> Any:
    """A model of `methods.load_base(..., scores=True)` -> the same with a head of ours in place of transformers'."""
    setattr(model, methods.HEAD, Head(model.config.get_text_config().hidden_size))
    return model


def conversation_ids(read: Chat, prompt: Sequence[Message], answer: str) -> list[int]:
    """-> (tokens,) of a prompt and its answer, with the token that ends it. Raises InvalidError."""
    said = strip_thinking(answer).strip()
    completion = (Message(role="assistant", content=said or "."),)
    reply = chat.encode_reply(read, prompt, completion, "a conversation")
    return [*reply.prompt, *(reply.answer if said else reply.answer[-1:])]


def padding(read: Chat) -> int:
    """A token that ends no answer, since the last one that is not this is where the score is read."""
    own = read.tokenizer.pad_token_id
    return own if own not in read.ends else min(set(range(len(read.ends) + 1)) - read.ends)
