"""The words of training: a row, a data set's card, what a run is asked for and what it leaves."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from ingest.schemas import Frozen
from service.schemas_adapters import Checked as Checked

Method = Literal["sft", "dpo", "kto", "reward", "grpo", "ppo"]
RewardName = Literal["citation_correct", "exact_match", "token_f1", "short", "refusal_right", "reward_model"]
Weights = Literal["full", "layers", "lora", "qlora", "ia3", "bottleneck"]
Fault = Literal["wrong", "uncited", "miscited", "refused", "unsupported"]  # of an answer that a pair rejects
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Message(Frozen):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Provenance(Frozen):
    """Where a row comes from. `documents`: ids or paths whose text it shows; `acl`: who may see them, None where all may."""

    id: str | None = None
    documents: tuple[str, ...] = ()
    acl: tuple[str, ...] | None = None
    kind: str | None = None  # as "answer", "refusal"
    question: str | None = None


class SftRow(Frozen):
    """Loss is on the completion alone; where `completion` is empty, on every assistant message of `prompt`."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...] = ()
    source: Provenance = Provenance()

    @model_validator(mode="after")
    def _has_a_target(self) -> "SftRow":
        trained = self.completion or self.prompt
        if not any(one.role == "assistant" and one.content.strip() for one in trained):
            raise ValueError("no assistant message with text to learn from")
        return self


class PreferenceRow(Frozen):
    prompt: tuple[Message, ...] = Field(min_length=1)
    chosen: tuple[Message, ...] = Field(min_length=1)
    rejected: tuple[Message, ...] = Field(min_length=1)
    source: Provenance = Provenance()


class KtoRow(Frozen):
    """`label`: whether the completion is wanted."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    completion: tuple[Message, ...] = Field(min_length=1)
    label: bool
    source: Provenance = Provenance()


class Known(Frozen):
    """What is known of a prompt, which rewards are computed from. `passages`: as the prompt numbers them, from 1; `gold`: the
    numbers of those that hold the answer; `refuse`: none of them does.
    """

    question: str | None = None
    answers: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    refuse: bool = False


class PromptRow(Frozen):
    """For reinforcement learning: the model writes the answer, and a reward says what it is worth."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    known: Known = Known()
    source: Provenance = Provenance()


Row = SftRow | PreferenceRow | KtoRow | PromptRow
# What a method learns from; `finetune.prompt_rows` makes prompts of other rows.
ROW_OF: dict[Method, type[SftRow] | type[PreferenceRow] | type[KtoRow] | type[PromptRow]] = {
    "sft": SftRow,
    "dpo": PreferenceRow,
    "kto": KtoRow,
    "reward": PreferenceRow,
    "grpo": PromptRow,
    "ppo": PromptRow,
}


def who_may_see(acls: Iterable[Iterable[str] | None]) -> tuple[str, ...] | None:
    """`acls`: of each document or row the groups that may see it, None for one that all may. -> those that may see all of
    them; None: everybody.
    """
    limited = [set(one) for one in acls if one is not None]
    return tuple(sorted(set.intersection(*limited))) if limited else None


class Rows(Frozen):
    """Rows of one kind. `digest`: SHA-256 over the rows in their order; `places`: as "rows.jsonl:7", one a row. `left_out`:
    places of what was passed over, with the reason.
    """

    rows: tuple[Row, ...]
    digest: str
    places: tuple[str, ...] = ()
    name: str = ""
    prompt_version: str | None = None  # that all prompts were built with, where the data set says so
    left_out: tuple[str, ...] = ()


class Manifest(Frozen):
    """What a run leaves beside its weights, written last: a folder without one is unfinished."""

    made_by: Literal["graft"] = "graft"
    version: int = 1
    created_at: datetime
    recipe: dict[str, Any]
    method: Method
    weights: Weights
    seed: int
    data: str  # name
    data_digest: str
    rows: int
    held_out_rows: int
    documents: tuple[str, ...]
    acl: tuple[str, ...] | None  # groups that may see every row; None: all may
    prompt_version: str | None = None
    languages: tuple[str, ...] = ()  # of at least a twentieth of the rows
    base: str  # identity, as `service.base_model` has it
    base_revision: str | None = None
    parent: str | None = None
    tokenizer: str  # SHA-256 of its files
    trainable_parameters: int
    all_parameters: int
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()  # as why it ended before its time
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    servable: bool  # by vLLM as it is
    why_not: str | None = None
    checked: Checked | None = None
    exported: Literal["merged", "lora"] | None = None  # what `graft export` made of it
