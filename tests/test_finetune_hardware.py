"""What this machine trains on, and what a run takes of it."""

import json
from pathlib import Path

import pytest

from finetune import hardware
from ingest.runtime import processor

pytestmark = pytest.mark.slow
MIB = 2**20


def on_a_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def test_the_faster_data_type_is_found_kept_and_read_again(tmp_path: Path) -> None:
    chosen = hardware.training_dtype(tmp_path / "home", 1)
    if on_a_gpu():
        assert chosen == "bfloat16"
        return
    file = tmp_path / "home/training-probe.json"
    kept = json.loads(file.read_text())
    rates = kept["tokens_per_s"]
    assert set(rates) == {"float32", "bfloat16"}
    assert rates[chosen] == max(rates.values()) > 0
    other = min(rates, key=lambda dtype: rates[dtype])
    file.write_text(json.dumps({**kept, "dtype": other}))
    assert hardware.training_dtype(tmp_path / "home", 1) == other, "the kept one is read"
    file.write_text(json.dumps({**kept, "dtype": other, "processor": "another"}))
    hardware.training_dtype(tmp_path / "home", 1)
    assert json.loads(file.read_text())["processor"] == processor(), "another processor's is not"


def test_a_broken_file_is_written_anew_and_the_probe_leaves_seeds_and_threads_as_they_were(tmp_path: Path) -> None:
    import torch

    (tmp_path / "training-probe.json").write_text("{")
    threads = torch.get_num_threads()
    torch.manual_seed(17)
    wanted = torch.rand(3)
    torch.manual_seed(17)
    hardware.training_dtype(tmp_path, threads + 1)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.get_num_threads() == threads


def test_the_peak_is_counted_from_the_last_reset() -> None:
    import torch

    device = "cuda" if on_a_gpu() else "cpu"
    hardware.reset_peak_memory()
    before = hardware.peak_memory()
    held = torch.ones(300 * MIB // 4, device=device)
    assert hardware.peak_memory() - before >= 280 * MIB
    del held
    peak = hardware.peak_memory()
    assert peak - before >= 280 * MIB, "what is freed was taken all the same"
    hardware.reset_peak_memory()
    assert peak - hardware.peak_memory() >= 200 * MIB


def test_what_is_free_goes_down_by_what_is_taken_and_the_machine_is_described() -> None:
    import torch

    held = hardware.hardware()
    assert json.loads(json.dumps(held)) == held
    assert held["processor"] == processor()
    assert len(held["gpus"]) == torch.cuda.device_count()
    if not on_a_gpu():
        assert 0 < hardware.free_memory() < held["memory_bytes"]
