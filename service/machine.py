"""What the machine must have: `python3 -I service/machine.py` before the set-up, `graft doctor` after it.

Standard library only and written for any Python 3, so that an old one is told which Python is needed (-I: without this
folder on the import path). Prints the command that mends what is missing. Changes nothing.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GB = 1000**3
PYTHONS = ((3, 11), (3, 12), (3, 13))
# What the set-up puts where: the setting that moves it, its default name in the checkout, its size in GB when finished.
PARTS = (("", ".venv", 1.3), ("GRAFT_VLLM_VENV", ".venv-vllm", 2.6), ("GRAFT_MODELS", ".models", 0.4))
# Downloads on their way, pip's cache, the index and the database.
SLACK_GB = 2.0
MEMORY_GB = 7.0


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    remedy: str
    """The command that mends it; a sentence where no command can."""


def checks() -> "list[Check]":
    return [processor(), avx2(), c_library(), python(), venv_module(), make(), numa_library(), disk(), memory()]


def processor() -> Check:
    found = platform.machine()
    return Check("processor", found == "x86_64", found, "use a machine with an x86-64 processor")


def avx2() -> Check:
    found = "avx2" in cpu_flags()
    remedy = "use a machine (or set the virtual machine's processor to a model) that has AVX2"
    return Check("AVX2", found, "yes" if found else "no", remedy)


def has_avx512_bf16() -> bool:
    """Whether the processor multiplies in bfloat16 by itself."""
    return not cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def cpu_flags() -> "frozenset[str]":
    return frozenset(_field("/proc/cpuinfo", "flags").split())


def c_library() -> Check:
    name, found = platform.libc_ver()
    version = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    remedy = "use a Linux with glibc 2.28 or newer (Debian 10, Ubuntu 20.04, RHEL 8)"
    return Check("glibc 2.28", name == "glibc" and version >= (2, 28), " ".join((name, found)), remedy)


def python() -> Check:
    names = ["python{}.{}".format(*version) for version in PYTHONS]
    there = [name for name in names if shutil.which(name)]
    ok = sys.version_info[:2] in PYTHONS
    remedy = "make run PYTHON=" + there[-1] if there else "sudo apt-get install python3.11 python3.11-venv"
    return Check("Python 3.11 to 3.13", ok, platform.python_version(), remedy)


def venv_module() -> Check:
    ok = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
    remedy = "sudo apt-get install python{}.{}-venv".format(*sys.version_info[:2])
    return Check("venv", ok, "yes" if ok else "no", remedy)


def make() -> Check:
    found = shutil.which("make")
    return Check("make", found is not None, found or "no", "sudo apt-get install make")


def numa_library() -> Check:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return Check("libnuma", False, "no", "sudo apt-get install libnuma1")
    return Check("libnuma", True, "yes", "")


def disk() -> Check:
    """Room for what is not set up yet, on every file system that takes a part of it."""
    needs = {}  # type: dict[int, tuple[str, float]]
    for setting, name, size in (*PARTS, ("GRAFT_HOME", ".graft", SLACK_GB)):
        path = os.environ.get(setting) or os.path.join(ROOT, name)
        there = _existing(path)
        _, need = needs.get(os.stat(there).st_dev, (there, 0.0))
        needs[os.stat(there).st_dev] = (there, need + (0.0 if there == path else size))
    rooms = [(shutil.disk_usage(path).free / GB, need, path) for path, need in needs.values()]
    free, need, path = min(rooms, key=lambda room: room[0] - room[1])
    remedy = "free {:.1f} GB below {}".format(max(need - free, 0.1), path)
    return Check("disk {:.0f} GB".format(need), free >= need, "{:.1f} GB free".format(free), remedy)


def memory() -> Check:
    """The machine's memory, or the container's share of it."""
    total = float(_field("/proc/meminfo", "MemTotal").split()[0] or 0) * 1024 / GB
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            total = min(total, float(limit.read()) / GB)
    except (OSError, ValueError):  # no such limit, or "max"
        pass
    remedy = "use a machine (or a container limit) with {:.0f} GB of memory".format(MEMORY_GB)
    return Check("memory {:.0f} GB".format(MEMORY_GB), total >= MEMORY_GB, "{:.1f} GB".format(total), remedy)


def _field(path: str, name: str) -> str:
    """The value of the first `name : value` line of a /proc file; "0" when there is none."""
    try:
        with open(path) as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return "0"


def _existing(path: str) -> str:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def main() -> int:
    found = checks()
    for check in found:
        if not check.ok:
            print("missing: {} (found: {})\n    {}".format(check.name, check.found, check.remedy))
    if all(check.ok for check in found):
        print("this machine will do ({})".format("; ".join("{}: {}".format(*check[::2]) for check in found)))
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
