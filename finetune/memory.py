"""The memory that a run will take, by arithmetic over the base's config.json: no model is loaded, and no training stack.

What is counted follows `finetune.methods`: what is frozen in the recipe's data type (4 or 8 bits in a quantised base), what
trains in float32 with its gradients and the optimizer's states, and what the backward pass needs of the forward one. Measured
beside it by `python -m benchmarks tune_methods`; of methods that write answers as they train it is a rough count: the larger one
of what writing them takes and what learning from them does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.recipe import BY_REWARD, Recipe, Trained
from finetune.schemas import KtoRow, PreferenceRow, PromptRow, Row, Rows
from finetune.shape import Shape, read_shape
from ingest.errors import SettingsError, UnavailableError
from ingest.model_files import read_tokenizer
from ingest.runtime import has_gpu
from ingest.schemas import Frozen
from service.machine import has_avx512_bf16

FLOAT = 4  # bytes of a float32
FRAME = 8  # tokens that a chat template puts around a message, at most
MAX_LENGTH = 1024  # TRL's default
MAX_ANSWER = {"grpo": ("max_completion_length", 512), "ppo": ("max_new_tokens", 64)}  # tokens, where nothing is said
LIBRARIES = 1150 * 2**20  # of a process that trains on a CPU, and what its allocator keeps, without model (measured)
CUDA = 600 * 2**20  # what CUDA and its libraries hold on a GPU
NF4, NF4_DOUBLE = (
    0.5625,
    0.5159,
)  # bytes a weight: 4 bits, and a constant for 64 of them in 32 or, quantised again, in 8 bits
TILE = (4096, 32_768)  # tokens and words whose logits TRL holds at once
TILE_COPIES = 8  # in float32, without Triton
GIVEN_BACK = 32 * 2**20  # bytes from which on the C library gives what is freed back to the system
KEPT = 100  # times an inner activation in float32 and its token


class Estimate(Frozen):
    """Bytes. `weights`: of all models, frozen and trained; `process`: libraries. `assumptions`: in words."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int
    assumptions: str

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process

    def __str__(self) -> str:
        return (
            f"memory: about {_gib(self.bytes)} (weights {_gib(self.weights)}, gradients and optimizer "
            f"{_gib(self.gradients + self.optimizer)}, activations {_gib(self.activations)}, libraries {_gib(self.process)}); "
            f"{self.assumptions}"
        )


def estimate(
    recipe: Recipe,
    base: Path,
    rows: Rows | None = None,
    *,
    longest: int | None = None,
    answer: int | None = None,
    gpu: bool | None = None,
) -> Estimate:
    """`longest`: tokens of the longest row, `answer` of its answer; else those of `rows`, else `max_length` and a quarter of
    it. `gpu`: where it will run, else as this machine has one. Raises InvalidError when config.json says too little.
    """
    shape, gpu = read_shape(base), has_gpu() if gpu is None else gpu
    if rows is not None and longest is None:
        longest, answer = _longest(rows, base)
    length, answered = _tokens(recipe, longest, answer)
    trained, size = recipe.trained, _size(recipe, gpu)
    trains = trained_parameters(trained, shape)
    weights, apart = _weights(trained, shape, size), trained.weights not in {"full", "layers"}
    weights += trains * FLOAT if apart else 0
    if recipe.method not in {"sft", "reward"}:
        weights += _reference(trained, weights, trains)
    if recipe.reward.reward_model is not None:
        weights += shape.all * size
    return Estimate(
        weights=weights,
        gradients=trains * FLOAT,
        optimizer=trains * _state(str(recipe.training.get("optim", "adamw"))),
        activations=_activations(recipe, shape, size, length, answered, gpu),
        process=CUDA if gpu else LIBRARIES,
        assumptions=f"batches of {_batch(recipe)} x {length} tokens, {size * 8}-bit products on a {'GPU' if gpu else 'CPU'}",
    )


def longest_taken(recipe: Recipe) -> int | None:
    """-> tokens that a row, or where answers are rewarded a prompt, may have; None where the recipe sets no limit."""
    if recipe.method in BY_REWARD:
        return recipe.data.max_prompt_length
    return recipe.whole("max_length", MAX_LENGTH)


def advice(recipe: Recipe, estimated: Estimate | None = None) -> str:
    """What makes a run take less, the cheapest first. `estimated`: names what only helps where that is large."""
    training, trained, says, by_reward = recipe.training, recipe.trained, [], recipe.method in BY_REWARD
    activations = estimated is None or estimated.activations * 4 > estimated.bytes
    if activations and (batch := _batch(recipe)) > (2 if recipe.method == "kto" else 1):
        steps = recipe.whole("gradient_accumulation_steps", 1)
        less = max(batch // 2, 2 if recipe.method == "kto" else 1)
        kept = f" --set gradient_accumulation_steps={max(steps * batch // less, 1)}"
        said = "" if recipe.method == "ppo" else kept  # which makes its steps of parts by itself
        says.append(f"smaller batches with as many rows a step (--set per_device_train_batch_size={less}{said})")
    if activations and not training.get("gradient_checkpointing"):
        says.append("activations computed twice (--set gradient_checkpointing=true)")
    if activations:
        most, name = longest_taken(recipe) or MAX_LENGTH, "max_prompt_length" if by_reward else "max_length"
        says.append(
            f"shorter {'prompts' if by_reward else 'rows'} (--set {name}={max(most // 2, 64)}: longer ones are left out)"
        )
    if trained.weights in {"full", "layers"}:
        says.append("a LoRA in place of whole weights (the recipes sft-lora, dpo-lora, kto-lora)")
    elif trained.weights != "qlora":
        says.append("a base in 4 bits (--set weights=qlora)" if trained.weights == "lora" else "the recipe sft-qlora")
    elif trained.bits == 8:
        says.append("4 bits (--set bits=4)")
    return "try " + ", or ".join([*says, "a smaller base (--base)"])


def check_fits(estimated: Estimate, free: int, share: float, recipe: Recipe) -> None:
    """`free`: bytes of the device, of which a run may take `share`. Raises UnavailableError."""
    if estimated.bytes > free * share:
        raise UnavailableError(
            f"the training takes about {_gib(estimated.bytes)}, and of the {_gib(free)} that are free it may take {share:.0%} "
            f"(FINETUNE_MEMORY_SHARE): {advice(recipe, estimated)}"
        )


def trained_parameters(trained: Trained, shape: Shape) -> int:
    """How many parameters train."""
    match trained.weights:
        case "full":
            return shape.all
        case "layers":
            return len({number % shape.layers for number in trained.layers}) * shape.layer
        case "bottleneck":
            return shape.layers * 2 * (2 * shape.hidden * trained.bottleneck + trained.bottleneck + shape.hidden)
        case "ia3":
            return shape.layers * (2 * shape.keys + shape.inner)
    each = [wide + high for wide, high in _targets(trained, shape).values()]
    sizes = sum(high for _, high in _targets(trained, shape).values()) if trained.use_dora else 0
    return shape.layers * (trained.r * sum(each) + sizes)


def _targets(trained: Trained, shape: Shape) -> Mapping[str, tuple[int, int]]:
    """As PEFT reads `target_modules`: a list of last names, or one expression for the whole name."""
    asked, matrices = trained.target_modules, shape.matrices()
    if asked == "all-linear":
        return matrices
    if isinstance(asked, str):
        return {name: size for name, size in matrices.items() if re.fullmatch(asked, f"model.layers.0.{name}")}
    return {name: size for name, size in matrices.items() if name.rpartition(".")[2] in asked}


def _weights(trained: Trained, shape: Shape, size: int) -> int:
    """Bytes of the base as it is loaded."""
    if trained.weights in {"full", "layers"}:
        return shape.all * FLOAT
    if trained.weights != "qlora":
        return shape.all * size
    linear = shape.layers * sum(wide * high for wide, high in shape.matrices().values())
    each = 1.0 if trained.bits == 8 else NF4_DOUBLE if trained.double_quant else NF4
    return int(linear * each) + (shape.all - linear) * size


def _reference(trained: Trained, weights: int, trains: int) -> int:
    """DPO and KTO compare with the model as it was: a second one, the adapter it began with, or no adapter at all."""
    if trained.weights in {"full", "layers", "bottleneck"}:
        return weights
    return trains * FLOAT if trained.parent else 0


def _activations(recipe: Recipe, shape: Shape, size: int, length: int, answer: int, gpu: bool) -> int:
    """Bytes that the backward pass needs of the forward one, and what is alive for a moment."""
    tokens = _batch(recipe) * length * (2 if recipe.method in {"dpo", "reward"} else 1)
    held = _held(recipe.trained, shape, size)
    if recipe.model.attn_implementation == "eager":
        held += shape.heads * length * (FLOAT + 2 * size)
    if recipe.training.get("gradient_checkpointing"):
        layers = shape.layers * shape.hidden * size + held
    else:
        layers = _depth(recipe.trained, shape) * held
    words = min(shape.vocabulary, TILE[1])
    scored = 0 if recipe.method == "reward" else min(tokens * answer // length, TILE[0])
    tile = scored * words * (size if gpu else size + TILE_COPIES * FLOAT)
    passing = _passing(shape, size, tokens, gpu) + _copies(recipe.trained, shape, size, gpu)
    return max(int(tokens * layers + tile + passing), _written(recipe, shape, size, length))


def _written(recipe: Recipe, shape: Shape, size: int, length: int) -> int:
    """Bytes of keys and values while answers are written, many at once; none where rows hold them."""
    training = recipe.training
    if recipe.method not in BY_REWARD:
        return 0
    if recipe.method == "ppo":
        answers = int(training.get("forward_batch_size", 16))
    else:
        steps = training.get("steps_per_generation") or training.get("gradient_accumulation_steps", 1)
        answers = int(training.get("generation_batch_size") or _batch(recipe) * steps)
    return answers * length * shape.layers * 2 * shape.keys * size


def _held(trained: Trained, shape: Shape, size: int) -> int:
    """Bytes that the backward pass needs of one layer and token, as torch saves them for a layer of Llama."""
    hidden, whole = shape.hidden, trained.weights in {"full", "layers"}
    norms = 2 * hidden * FLOAT  # what enters them, always in float32
    attention = 2 * (shape.queries + shape.keys) * size  # queries, keys, values, and what comes out
    inner = 4 * shape.inner * size  # two inputs of the product, what SiLU was given, and the product
    if whole:
        return norms + attention + inner + 2 * hidden * FLOAT + (5 * hidden * size if size < FLOAT else 0)
    if trained.weights not in {"lora", "qlora"}:
        return norms + attention + inner
    targets = _targets(trained, shape)
    inputs = sum(wide for name, (wide, _) in targets.items() if name != "mlp.down_proj")
    scaled = 2 * sum(high for _, high in targets.values()) * size if trained.use_dora else 0  # its two parts' results
    return norms + attention + inner + scaled + (inputs * size if size < FLOAT else 2 * hidden * FLOAT)


def _passing(shape: Shape, size: int, tokens: int, gpu: bool) -> int:
    """One layer's own work; on a CPU what the C library keeps of freed tensors (measured), of which those over 32 MiB go back."""
    if gpu:
        return tokens * (6 * shape.inner * size + 4 * shape.hidden * FLOAT)
    kept = min(tokens, GIVEN_BACK // (shape.inner * size))
    return kept * KEPT * shape.inner * FLOAT


def _copies(trained: Trained, shape: Shape, size: int, gpu: bool) -> int:
    """Whole weights in the type of the products, which autocast keeps for a step. Of a quantised base the matrix in use; on a
    CPU what the C library keeps of the matrices that were quantised, half of them where they are small.
    """
    if trained.weights in {"full", "layers"} and size < FLOAT:
        return trained_parameters(trained, shape) * size
    if trained.use_dora and not gpu:  # PEFT sends an identity through each of its pairs; measured
        return shape.layers * sum(2 * FLOAT * wide * wide for wide, _ in _targets(trained, shape).values())
    if trained.weights != "qlora":
        return 0
    sizes = [wide * high * size for wide, high in shape.matrices().values()]
    kept = 0 if gpu else sum(one for one in sizes if one < GIVEN_BACK) * shape.layers // 2
    return 2 * max(sizes) + kept * (6 if trained.bits == 8 else 1)  # in 8 bits measured


def _depth(trained: Trained, shape: Shape) -> int:
    """Layers that gradients go through."""
    if trained.weights == "layers":
        return shape.layers - min(number % shape.layers for number in trained.layers)
    return shape.layers


def _state(optim: str) -> int:
    """Bytes a parameter."""
    if "8bit" in optim:
        return 2
    return 0 if optim in {"sgd", "adafactor"} else 2 * FLOAT


def _size(recipe: Recipe, gpu: bool) -> int:
    """Bytes of a number in products. As `hardware.training_dtype` finds where nothing is said, without its probe."""
    if recipe.model.dtype == "auto":
        return 2 if gpu or has_avx512_bf16() else FLOAT
    return FLOAT if recipe.model.dtype == "float32" else 2


def _batch(recipe: Recipe) -> int:
    return recipe.whole("per_device_train_batch_size", 4 if recipe.method == "ppo" else 8)


def _tokens(recipe: Recipe, longest: int | None, answer: int | None) -> tuple[int, int]:
    """-> those of a sequence, and of the answer at its end. `longest`: of a row, or of a prompt where answers are rewarded."""
    most = longest_taken(recipe)
    length = min(longest or most or MAX_LENGTH, most or longest or MAX_LENGTH)
    if recipe.method in MAX_ANSWER:
        name, otherwise = MAX_ANSWER[recipe.method]
        written = int(recipe.training.get(name) or otherwise)
        return length + written, written
    if recipe.training.get("packing"):
        length = most or length
    return length, min(answer or max(length // 4, 1), length)


def _longest(rows: Rows, base: Path) -> tuple[int | None, int | None]:
    """-> tokens of the longest row and of its longest answer; by characters where the base has no tokenizer.json."""
    parts = [_parts(row) for row in rows.rows]
    if not parts:
        return None, None
    longest = max(parts, key=lambda part: len(part[0]) + len(part[1]))
    try:
        tokenizer = read_tokenizer(base)
        prompt, answer = (len(tokenizer.encode(text).ids) for text in longest)
    except SettingsError:
        prompt, answer = (len(text) // 3 for text in longest)
    return prompt + answer + 4 * FRAME, answer + FRAME


def _parts(row: Row) -> tuple[str, str]:
    """-> the texts of prompt and (the longer) answer."""
    if isinstance(row, PreferenceRow):
        return _text(row.prompt), max(_text(row.chosen), _text(row.rejected), key=len)
    if isinstance(row, PromptRow):
        return _text(row.prompt), ""
    if isinstance(row, KtoRow) or row.completion:
        return _text(row.prompt), _text(row.completion)
    answers = [one for one in row.prompt if one.role == "assistant"]
    return _text([one for one in row.prompt if one.role != "assistant"]), _text(answers)


def _text(messages: Any) -> str:
    return "\n".join(message.content for message in messages)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
