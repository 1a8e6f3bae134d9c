"""What travels over HTTP of adapters: requests, what there is, what a check found, and the moves of their pointers."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from ingest.schemas import Frozen
from service.schemas import CollectionName, Label, Request, Text


class RegisterRequest(Request):
    """`path`: a PEFT LoRA folder; `label` begins its name, left out the folder's own."""

    path: Annotated[Text, Field(min_length=1, max_length=4096)]
    label: Label | None = None


class ActivateRequest(Request):
    """`collection`: give this one an adapter of its own; left out, the live adapter of all others changes."""

    collection: CollectionName | None = None
    why: Annotated[Text, Field(max_length=2_000)] | None = None


class RollbackRequest(ActivateRequest):
    """To the adapter before, or to the bare base; for a collection the base means: follow the live adapter again."""

    to: Literal["previous", "base"] = "previous"


class Checked(Frozen):
    """An adapter's answers in the engine, compared with PEFT's. `digest`: of the weights, configuration and base that were
    compared, as the registry has it. `difference`: mean absolute difference of log-probabilities; `base_difference`: of the
    bare model, the same way. `changed`: of the `prompts`, those that the engine answers otherwise with the adapter than
    without, in words or in probabilities. `why_not`: where it has not passed.
    """

    at: datetime
    passed: bool
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dtype: Annotated[Text, Field(max_length=32)]
    difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bound: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    base_difference: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tokens_equal: bool
    prompts: Annotated[int, Field(ge=1)]
    changed: Annotated[int, Field(ge=0)]
    engine: Annotated[Text, Field(max_length=512)]
    why_not: Annotated[Text, Field(max_length=2_000)] | None = None


Standing = Literal["passed", "failed", "no"]


class AdapterView(Frozen):
    """`base`: the model that it was compared with; `size` in bytes. `checked`: whether its answers are known to be PEFT's;
    null where another tool made it and nobody looked.

    `live`: it answers for every collection without an adapter of its own; `collections`: it is their own.
    """

    name: str
    label: str
    digest: str
    base: str
    rank: int
    target_modules: tuple[str, ...]
    size: int
    parent: str | None
    principal: str
    created_at: datetime
    checked: Standing | None
    manifest: dict[str, Any] | None
    live: bool
    collections: tuple[str, ...]


class Move(Frozen):
    """One move of a pointer; `to_name` null is the bare base, or for a collection: follow the live pointer."""

    seq: int
    at: datetime
    principal: str
    role: Literal["answer"]
    collection: str | None
    kind: Literal["activate", "rollback"]
    from_name: str | None
    to_name: str | None
    why: str | None
