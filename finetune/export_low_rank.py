"""What training changed of a model's matrices, as a LoRA: the best approximation of a given rank (Eckart and Young, 1936).

Any way of training is the difference of two models, so full fine-tuning, IA3 and DoRA come here alike.
"""

import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import PlainSerializer
from safetensors.torch import save_file
from torch import nn

from finetune.methods import base_name
from ingest.errors import InvalidError
from ingest.schemas import Frozen
from service.lora_file import NOT_SERVED
from service.preflight import WEIGHTS

EXACT = 2048  # of a matrix' smaller side: above it a randomised decomposition saves hours (Halko et al., 2011)
OVERSAMPLED, ITERATIONS = 32, 4  # of that one

# Of an update's norm to the weight's; infinite, in JSON null, where that was zero.
Share = Annotated[float, PlainSerializer(lambda share: share if math.isfinite(share) else None, when_used="json")]


class Fit(Frozen):
    """A matrix' update in the LoRA. `kept`: share of its squared Frobenius norm; `error`: relative, of the norm itself.

    `update`: norm of the update, relative to the matrix.
    """

    module: str
    update: Share
    kept: float
    error: float


class LeftOut(Frozen):
    """A weight that training changed and no LoRA of the engine's holds. `update`: relative to the weight, by norms."""

    name: str
    update: Share


class Approximated(NamedTuple):
    """`kept`: share of the squared Frobenius norm of the whole update, with what is left out."""

    rank: int
    kept: float
    fits: tuple[Fit, ...]
    left_out: tuple[LeftOut, ...]


class Changed(NamedTuple):
    """Names of the parameters that training changed: `matrices` that a LoRA may hold, and `others`, with their updates' norms."""

    matrices: dict[str, tuple[int, int]]  # module -> (out, in)
    others: dict[str, tuple[float, float]]  # name -> norms of update and weight


def changed(tuned: Any, base: Any) -> Changed:
    """`tuned`, `base`: plain models of one shape."""
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    before = dict(base.named_parameters())
    matrices, others = {}, {}
    for name, weight in tuned.named_parameters():
        if torch.equal(weight, before[name]):
            continue
        module, _, last = name.rpartition(".")
        if last == "weight" and module in linear and not NOT_SERVED.search(module):
            matrices[module] = (weight.shape[0], weight.shape[1])
        else:
            others[name] = (_norm(weight - before[name]), _norm(before[name]))
    return Changed(matrices, others)


def write_low_rank(
    tuned: Any, base: Any, found: Changed, rank: int, dtype: str, out: Path, base_folder: Path
) -> Approximated:
    """Writes PEFT's folder. `rank` is cut to what the largest matrix can have; smaller ones are filled up with zeros."""
    from peft import LoraConfig

    rank = min(rank, max(min(shape) for shape in found.matrices.values()))
    after, before = dict(tuned.named_parameters()), dict(base.named_parameters())
    tensors, fits = {}, []
    lost = whole = sum(norm**2 for norm, _ in found.others.values())
    for module in found.matrices:
        weight = before[f"{module}.weight"].detach()
        update = after[f"{module}.weight"].detach() - weight
        b, a = (side.to(getattr(torch, dtype)).contiguous() for side in factors(update, rank))
        missed, norm = _norm(update - b.float() @ a.float()), _norm(update)
        lost, whole = lost + missed**2, whole + norm**2
        error = missed / norm
        fits.append(Fit(module=module, update=_share(norm, _norm(weight)), kept=1 - error**2, error=error))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_targets(base, found), task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=base_name(base_folder),
    )  # fmt: skip
    config.save_pretrained(str(out))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    left_out = tuple(LeftOut(name=name, update=_share(*norms)) for name, norms in found.others.items())
    return Approximated(rank, 1 - lost / whole, tuple(fits), left_out)


def factors(update: Any, rank: int) -> tuple[Any, Any]:
    """(out, in) -> (out, rank) and (rank, in), whose product is nearest to it; both carry the root of the singular values, which
    keeps their values in the range of a short data type.
    """
    kept = min(rank, *update.shape)
    near = update.to("cuda") if torch.cuda.is_available() else update
    if min(update.shape) <= EXACT:
        u, s, v = torch.linalg.svd(near, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(near, q=min(kept + OVERSAMPLED, *update.shape), niter=ITERATIONS)
        v = v.mT
    root = s[:kept].sqrt()
    b, a = (u[:, :kept] * root).cpu(), (root[:, None] * v[:kept]).cpu()
    missing = rank - kept
    return nn.functional.pad(b, (0, missing)), nn.functional.pad(a, (0, 0, 0, missing))


def refuse_left_out(found: Changed, folder: Path, lossy: bool) -> None:
    """Raises InvalidError."""
    if not found.matrices:
        what = "changed none of the matrices that a LoRA can hold" if found.others else "changed nothing"
        raise InvalidError(f"the training in {str(folder)!r} {what}, so there is no LoRA to make of it")
    if found.others and not lossy:
        shares = {name: _share(*norms) for name, norms in found.others.items()}
        worst = sorted(shares, key=lambda name: -shares[name])[:3]
        said = ", ".join(f"{name} by {shares[name]:.2%}" for name in worst)
        raise InvalidError(
            f"the training in {str(folder)!r} changed {len(found.others)} weights that no LoRA of the engine's holds, most of "
            f"all {said}: serve it as a model (`graft up --model {folder}`), or leave them out with --lossy"
        )


def _targets(base: Any, found: Changed) -> list[str]:
    """Last parts of the names where these name just the changed matrices, else whole names."""
    last = {module.rpartition(".")[2] for module in found.matrices}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if meant == found.matrices.keys() else found.matrices)


def _share(update: float, weight: float) -> float:
    return update / weight if weight else math.inf


def _norm(tensor: Any) -> float:
    """In float64: the squares of small updates are zero in float32."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
