"""Adapter folders before the engine sees them: what is taken, and every fault by its name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from service_fixtures import BUNDLED, write_lora, write_lora_folder

from service.base_model import BaseModel, read_base
from service.preflight import AdapterRefusedError, Examined, Limits, take_in

Q = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(models: Path) -> BaseModel:
    return read_base(str(models / BUNDLED), None)


def examine(folder: Path, base: BaseModel, tmp_path: Path, **limits: Any) -> Examined:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    return take_in(folder, copy, base, Limits(**{"roots": (tmp_path,), "rank": 64, "megabytes": 100} | limits))


def faults(folder: Path, base: BaseModel, tmp_path: Path, **limits: Any) -> dict[str, str]:
    with pytest.raises(AdapterRefusedError) as raised:
        examine(folder, base, tmp_path, **limits)
    found: dict[str, str] = {}
    for name, message in raised.value.faults:
        assert f"{name}: {message}" in str(raised.value)
        found[name] = f"{found.get(name, '')}; {message}"
    return found


def test_sound_folder_is_taken(base: BaseModel, tmp_path: Path) -> None:
    found = examine(write_lora(tmp_path / "lora"), base, tmp_path)
    assert (found.rank, found.target_modules) == (4, ("q_proj", "v_proj"))
    assert found.size == (tmp_path / "lora" / WEIGHTS).stat().st_size
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["adapter_config.json", WEIGHTS]


def test_digest_stands_for_weights_configuration_and_base(base: BaseModel, tmp_path: Path) -> None:
    def digest(folder: str, model: BaseModel = base, **options: Any) -> str:
        return examine(write_lora(tmp_path / folder, **options), model, tmp_path).digest

    first = digest("one")
    assert digest("again") == first
    assert digest("named-otherwise", base_model_name_or_path="/home/somebody/model") == first
    others = {digest("weights", seed=2), digest("alpha", lora_alpha=9), digest("base", base._replace(identity="other"))}
    assert len({first, *others}) == 4


@pytest.mark.slow
def test_peft_writes_what_is_taken(base: BaseModel, tmp_path: Path) -> None:
    """Every option that PEFT writes by itself is understood."""
    from peft import LoraConfig

    own = LoraConfig(task_type="CAUSAL_LM", r=4).to_dict()
    config = json.loads(json.dumps(own, default=str)) | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    examine(write_lora(tmp_path / "lora", **config), base, tmp_path)


@pytest.mark.slow
def test_bfloat16_and_float16_are_taken(base: BaseModel, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    for kind in (torch.bfloat16, torch.float16):
        folder = write_lora(tmp_path / str(kind))
        tensors = {name: torch.from_numpy(value).to(kind) for name, value in load_file(folder / WEIGHTS).items()}
        save_torch(tensors, folder / WEIGHTS)
        assert examine(folder, base, tmp_path).rank == 4
        tensors[f"{Q}.lora_B.weight"][1, 1] = float("inf")
        save_torch(tensors, folder / WEIGHTS)
        assert f"{Q}.lora_B.weight holds NaN or infinity" in faults(folder, base, tmp_path)["nan"]


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder with other tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, str(folder / WEIGHTS))
    return folder


def other_width(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"] = np.zeros((4, 512), np.float32)


def other_height(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_B.weight"] = np.zeros((192, 4), np.float32)


def not_a_number(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"][3, 575] = np.nan


def renamed(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.model.layers.77.self_attn.q_proj.lora_A.weight"] = tensors.pop(f"{Q}.lora_A.weight")


def half(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def magnitude(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_magnitude_vector"] = np.zeros(576, np.float32)


def head(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 576), np.float32)
    tensors["base_model.model.lm_head.lora_B.weight"] = np.zeros((49152, 4), np.float32)


def whole_numbers(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"] = np.zeros((4, 576), np.int8)


@pytest.mark.parametrize(
    ("change", "fault", "said"),
    [
        (other_width, "shape", "576 x 512"),
        (other_height, "shape", "192 x 576"),
        (not_a_number, "nan", "NaN"),
        (renamed, "name", "layers.77"),
        (half, "name", "only one"),
        (magnitude, "name", "lora_magnitude_vector"),
        (head, "module", "lm_head"),
        (whole_numbers, "dtype", "I8"),
        (dict.clear, "safetensors", "no LoRA matrix"),
    ],
    ids=["width", "height", "nan", "name", "half", "magnitude", "head", "integers", "empty"],
)
def test_weights_that_do_not_fit(
    base: BaseModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], fault: str, said: str
) -> None:
    assert said in faults(changed(write_lora(tmp_path / "lora"), change), base, tmp_path)[fault]


@pytest.mark.parametrize(
    ("config", "fault", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type", "IA3"),
        ({"task_type": "SEQ_CLS"}, "task_type", "SEQ_CLS"),
        ({"use_dora": True}, "use_dora", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "modules_to_save"),
        ({"bias": "all"}, "bias", "biases"),
        ({"lora_bias": True}, "lora_bias", "biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "pissa"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices", "tokens"),
        ({"some_new_option": {"x": 1}}, "option", "some_new_option"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}, "base", "Qwen/Qwen2.5-0.5B-Instruct"),
        ({"r": 128}, "rank", "SERVICE_MAX_LORA_RANK (64)"),
        ({"rank_pattern": {"q_proj": 128}}, "rank", "SERVICE_MAX_LORA_RANK (64)"),
        ({"rank_pattern": {"q_proj": 8}}, "rank", "the configuration says 8"),
        ({"rank_pattern": {"(a+)+$": 8}}, "rank_pattern", "plain module names"),
        ({"lora_alpha": float("inf")}, "lora_alpha", "finite"),
        ({"lora_alpha": "8"}, "lora_alpha", "finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_configurations_that_are_not_served(
    base: BaseModel, tmp_path: Path, config: dict[str, Any], fault: str, said: str
) -> None:
    rank = config.get("r", 4)
    folder = write_lora(tmp_path / "lora", **({"r": rank} | config))
    assert said in faults(folder, base, tmp_path)[fault]


def test_local_path_as_the_base_says_nothing(base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    for given in ("/data/models/other", "./here", "out/model", None, 3):
        examine(write_lora(tmp_path / "lora", base_model_name_or_path=given), base, tmp_path)


def test_rank_pattern_that_fits_is_taken(base: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", r=4)
    config = json.loads((folder / "adapter_config.json").read_text()) | {
        "r": 16,
        "rank_pattern": {"q_proj": 4, "v_proj": 4},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert examine(folder, base, tmp_path).rank == 4


def test_another_base_by_its_shapes(tmp_path: Path, base: BaseModel) -> None:
    other = {module: (out * 2, width * 2) for module, (out, width) in base.shapes.items() if module}
    assert "shape" in faults(write_lora(tmp_path / "lora"), base._replace(shapes=other), tmp_path)


def test_tokenizer_and_template_of_the_training_must_be_the_bases(base: BaseModel, tmp_path: Path) -> None:
    assert base.folder is not None
    folder = write_lora(tmp_path / "lora")
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(base.folder / name, folder / name)
    template = (folder / "chat_template.jinja").read_text()
    marked = template.replace("{{'<|im_start|>'", "{% generation %}{{'<|im_start|>'").replace(
        "{% endfor", "{% endgeneration %}{% endfor"
    )
    (folder / "chat_template.jinja").write_text(marked)
    examine(folder, base, tmp_path)
    assert not (tmp_path / "copy" / "tokenizer.json").exists()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_start|>", "[INST]"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"<|endoftext|>": 0, "a": 1}
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = faults(folder, base, tmp_path)
    assert {"tokenizer", "chat_template"} <= set(found)
    (folder / "tokenizer.json").write_text("{")
    assert "cannot be read" in faults(folder, base, tmp_path)["tokenizer"]


def test_all_faults_come_in_one_list(base: BaseModel, tmp_path: Path) -> None:
    folder = changed(write_lora(tmp_path / "lora", use_dora=True, modules_to_save=["lm_head"]), not_a_number)
    changed(folder, other_height)
    assert set(faults(folder, base, tmp_path)) == {"use_dora", "modules_to_save", "nan", "shape"}


def test_many_of_a_kind_are_told_by_a_few(base: BaseModel, tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.model.layers.{n}.nothing.lora_A.weight": np.zeros((4, 4), np.float32) for n in range(90)
    }
    found = faults(write_lora_folder(tmp_path / "lora", tensors, r=4), base, tmp_path)
    assert "85 more" in found["name"]


def test_missing_config_and_pickled_weights(base: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora")
    (folder / "adapter_config.json").unlink()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    found = faults(folder, base, tmp_path)
    assert set(found) == {"adapter_config.json", "safetensors"}
    assert "pickle" in found["safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"r": 1e999}'])
def test_broken_configuration(base: BaseModel, tmp_path: Path, content: bytes) -> None:
    folder = write_lora(tmp_path / "lora")
    (folder / "adapter_config.json").write_bytes(content)
    assert faults(folder, base, tmp_path)


def test_cut_and_foreign_weights(base: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora")
    whole = (folder / WEIGHTS).read_bytes()
    for content in (whole[:-100], whole[:4], b"", b"\x80\x04pickled", (2**62).to_bytes(8, "little") + b"{}"):
        (folder / WEIGHTS).write_bytes(content)
        assert "no whole safetensors file" in faults(folder, base, tmp_path)["safetensors"]


def test_outside_the_roots(base: BaseModel, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = write_lora(tmp_path / "outside")
    assert "SERVICE_ADAPTER_ROOTS" in faults(outside, base, tmp_path, roots=(inside,))["root"]
    (inside / "link").symlink_to(outside)
    assert "SERVICE_ADAPTER_ROOTS" in faults(inside / "link", base, tmp_path, roots=(inside,))["root"]
    assert "root" in faults(inside / ".." / "outside", base, tmp_path, roots=(inside,))
    folder = write_lora(inside / "lora")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside / WEIGHTS)
    assert "leads out" in faults(folder, base, tmp_path, roots=(inside,))["symlink"]
    assert "no folder" in faults(inside / "nothing", base, tmp_path, roots=(inside,))["path"]


def test_pipe_in_place_of_a_file(base: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    assert "no regular file" in faults(folder, base, tmp_path)["path"]


def test_too_large(base: BaseModel, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(2 * 2**20)
    assert "SERVICE_MAX_ADAPTER_MB (1)" in faults(folder, base, tmp_path, megabytes=1)["size"]


@pytest.mark.slow
def test_large_file_is_checked_in_little_memory(base: BaseModel, models: Path, tmp_path: Path) -> None:
    """400 MB of weights, in a process of its own, whose peak grows by less than a tenth of that."""
    shapes = {module: shape for module, shape in base.shapes.items() if shape and module.endswith("_proj")}
    rank = 400 * 2**20 // 4 // sum(out + width for out, width in shapes.values())
    tensors = {}
    for module, (out, width) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ones((rank, width), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ones((out, rank), np.float32)
    folder = write_lora_folder(tmp_path / "lora", tensors, r=rank)
    assert (folder / WEIGHTS).stat().st_size > 390 * 2**20
    del tensors
    (tmp_path / "copy").mkdir()
    program = f"""
import resource
from pathlib import Path
from service.base_model import read_base
from service.preflight import Limits, take_in
base = read_base({str(models / BUNDLED)!r}, None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
root = Path({str(tmp_path)!r})
take_in(root / "lora", root / "copy", base, Limits((root,), {rank}, 500))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 40 * 1024, run.stdout
