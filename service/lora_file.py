"""A LoRA's weights file: what it holds, and whether it fits the base model. Read in pieces, never unpickled, never whole."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
NOT_SERVED = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|lm_head|embed_out)$")
PIECE = 8 * 2**20  # bytes read at once
# By data type of the format: how it is looked at, and the bits that are all set in infinity and in what is no number.
EXPONENTS = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


class Pair(NamedTuple):
    """The two matrices of one module; `a` (rank, in), `b` (out, rank)."""

    a: Tensor | None
    b: Tensor | None


class WeightsError(ValueError):
    """The file is not one that the safetensors library reads."""


def read_header(file: Path) -> dict[str, Tensor]:
    """-> the tensors by name. Raises WeightsError for a cut file, or another format."""
    try:
        with safe_open(str(file), framework="numpy"):  # checks header, names, shapes and that the data is all there
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"is no whole safetensors file: {error}") from error
    with file.open("rb") as held:
        size = int.from_bytes(held.read(8), "little")
        header = json.loads(held.read(size))
    return {
        name: Tensor(one["dtype"], tuple(one["shape"]), *(8 + size + at for at in one["data_offsets"]))
        for name, one in header.items()
        if name != "__metadata__"
    }


def pairs(header: Mapping[str, Tensor]) -> tuple[dict[str, Pair], list[str]]:
    """-> the pairs by module, and the names that are no LoRA matrix."""
    found: dict[str, Pair] = {}
    strange = []
    for name, tensor in header.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        held = found.get(match["module"], Pair(None, None))
        found[match["module"]] = held._replace(a=tensor) if match["side"] == "A" else held._replace(b=tensor)
    return found, strange


def misfits(
    found: Mapping[str, Pair], shapes: Mapping[str, tuple[int, int] | None], transposed: bool
) -> Iterator[tuple[str, str]]:
    """-> (fault, what is wrong) for every module whose matrices do not fit the base's.

    `shapes`: module -> (out, in), None where the base stores it packed; `transposed`: they are stored as (in, out).
    """
    for module, pair in found.items():
        if NOT_SERVED.search(module):
            yield "module", f"{module} is an embedding or the head, which the engine does not adapt"
        elif module not in shapes:
            yield "name", f"the base has no matrix {module!r}"
        elif pair.a is None or pair.b is None:
            yield "name", f"{module} has only one of lora_A and lora_B"
        elif len(pair.a.shape) != 2 or len(pair.b.shape) != 2 or pair.a.shape[0] != pair.b.shape[1]:
            yield "shape", f"{module}: lora_A {_shown(pair.a.shape)} and lora_B {_shown(pair.b.shape)} do not multiply"
        else:
            wanted = shapes[module]
            if wanted is None:
                continue
            out, width = reversed(wanted) if transposed else wanted
            if (pair.b.shape[0], pair.a.shape[1]) != (out, width):
                given = f"{pair.b.shape[0]} x {pair.a.shape[1]}"
                yield "shape", f"{module}: the shape is {given}, the base's {out} x {width}"


def unfit_values(file: Path, header: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """-> (fault, what is wrong) for every tensor of another data type, or with a value that is no finite number."""
    with file.open("rb") as weights:
        for name, tensor in sorted(header.items(), key=lambda item: item[1].start):
            if tensor.dtype not in EXPONENTS:
                yield "dtype", f"{name} is of type {tensor.dtype}; the engine takes {', '.join(EXPONENTS)}"
                continue
            kind, bits = EXPONENTS[tensor.dtype]
            weights.seek(tensor.start)
            left = tensor.end - tensor.start
            while piece := weights.read(min(PIECE, left)):
                left -= len(piece)
                if bool(((np.frombuffer(piece, kind) & bits) == bits).any()):
                    yield "nan", f"{name} holds NaN or infinity"
                    break


def sha256(file: Path) -> str:
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
