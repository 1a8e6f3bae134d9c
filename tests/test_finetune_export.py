"""What was trained, as the engine takes it: merged, converted, measured, and nothing that it cannot load."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Trained
from ingest.errors import ConflictError, InvalidError, NotFoundError

pytestmark = pytest.mark.slow

WAYS = {
    "lora": Trained(weights="lora", r=4, lora_alpha=8),
    "dora": Trained(weights="lora", r=4, lora_alpha=8, use_dora=True),
    "qlora": Trained(weights="qlora", r=4, lora_alpha=8),
    "qlora-8": Trained(weights="qlora", r=4, lora_alpha=8, bits=8),
    "ia3": Trained(weights="ia3"),
    "full": Trained(weights="full"),
    "layers": Trained(weights="layers", layers=(1,)),
    "bottleneck": Trained(weights="bottleneck", bottleneck=8),
}
CLOSE = 1e-4  # of logits, in float32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import tiny_model

    return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """-> what makes the folder that a way of training leaves; each is made once."""
    folder = tmp_path_factory.mktemp("trained")
    return lambda way: folder / way if (folder / way).exists() else train(base, way, folder / way)


def train(base: Path, way: str, out: Path) -> Path:
    import torch

    from finetune.methods import apply, load_base, save

    torch.manual_seed(3)
    ids = torch.randint(5, 40_000, (2, 24))
    model = apply(load_base(base, WAYS[way], "float32"), WAYS[way])
    if way == "full":  # what a LoRA can hold of it
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.endswith("_proj.weight"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-2 if way in {"ia3", "bottleneck"} else 1e-2, weight_decay=0.0)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, WAYS[way], out, base)
    return finish(base, way, out)


def finish(base: Path, way: str, out: Path) -> Path:
    from finetune import runs
    from finetune.methods import why_not_servable
    from finetune.schemas import Manifest
    from ingest.catalog import now
    from service.base_model import read_base

    recipe = {"name": way, "method": "sft", "trained": WAYS[way].model_dump(mode="json"), "model": {"base": str(base)}}
    manifest = Manifest(
        created_at=now(), recipe=recipe, method="sft", weights=WAYS[way].weights, seed=1, data="rows.jsonl",
        data_digest="0" * 64, rows=2, held_out_rows=0, documents=("a.md",), acl=("staff",), prompt_version="brief-2",
        base=read_base(str(base), None).identity, tokenizer="0" * 64, trainable_parameters=1, all_parameters=2,
        metrics={"loss": 1.5}, versions={}, hardware={}, seconds=1.0, peak_memory_bytes=1,
        servable=why_not_servable(WAYS[way]) is None, why_not=why_not_servable(WAYS[way]),
    )  # fmt: skip
    runs.finish(out, manifest)
    return out


def exported(folder: Path, out: Path, base: Path, **asked: Any) -> Any:
    from finetune.export import Asked, export

    return export(folder, out, base, Asked(**asked))


def logits(model: Any) -> Any:
    import torch

    ids = torch.randint(5, 40_000, (2, 24), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def apart(one: Any, other: Any) -> float:
    return float((logits(one) - logits(other)).abs().max())


def taken_in(folder: Path, base: Path, tmp_path: Path, rank: int = 64) -> Any:
    """As the service registers an adapter."""
    from service.base_model import read_base
    from service.preflight import Limits, take_in

    (tmp_path / "copy").mkdir()
    return take_in(folder, tmp_path / "copy", read_base(str(base), None), Limits((folder.parent,), rank, 100))


@pytest.mark.parametrize(("way", "kind"), [("lora", None), ("dora", None), ("ia3", "merged")])
def test_merged_answers_as_the_adapter(base: Path, trained: Any, tmp_path: Path, way: str, kind: str | None) -> None:
    from finetune.methods import load_plain, load_tuned

    before = [file.read_bytes() for file in sorted(base.iterdir())]
    found = exported(trained(way), tmp_path / "out", base, kind=kind)
    assert [file.read_bytes() for file in sorted(base.iterdir())] == before
    tuned, merged = load_tuned(trained(way), base, "float32"), load_plain(tmp_path / "out", "float32")
    assert found.kind == "merged"
    assert apart(tuned, merged) < CLOSE < 0.003 < apart(tuned, load_plain(base, "float32"))
    assert found.difference.largest < CLOSE
    assert found.difference.same == 1
    assert found.bare.largest > 0.003


def test_merged_is_a_model_of_its_own(base: Path, trained: Any, tmp_path: Path) -> None:
    """Its name is not the base's, so that adapters of that are not taken for its own."""
    from safetensors import safe_open

    from service.base_model import read_base

    found = exported(trained("lora"), tmp_path / "out", base, dtype="bfloat16")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "manifest.json"} <= names
    assert not {"adapter_config.json", "graft-model.json"} & names
    own, given = read_base(str(tmp_path / "out"), None), read_base(str(base), None)
    assert own.shapes == given.shapes
    assert own.identity != given.identity
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert found.dtype == "bfloat16"
    assert CLOSE < found.difference.largest < 0.05


@pytest.mark.parametrize("way", ["qlora", "qlora-8"])
def test_quantised_base_is_merged_as_it_was_trained(base: Path, trained: Any, tmp_path: Path, way: str) -> None:
    """Into what its bits stand for; the difference that another base makes is shown beside."""
    from finetune.methods import load_base, load_plain, put_adapter

    found = exported(trained(way), tmp_path / "out", base)
    in_training = put_adapter(load_base(base, WAYS[way], "float32"), trained(way))
    assert apart(load_plain(tmp_path / "out", "float32"), in_training) < (CLOSE if way == "qlora" else 0.02)
    assert found.difference.mean < found.unquantized.mean < found.bare.mean


def test_ia3_becomes_a_lora(base: Path, trained: Any, tmp_path: Path) -> None:
    """Exact at the smaller width of the largest matrix, which is what it takes by itself."""
    from finetune.methods import load_plain, load_tuned, put_adapter

    found = exported(trained("ia3"), tmp_path / "out", base)
    assert (found.kind, found.rank) == ("lora", 64)
    assert {fit.module.rpartition(".")[2] for fit in found.modules} == {"k_proj", "v_proj", "down_proj"}
    assert found.kept > 1 - 1e-8
    assert all(fit.error < 1e-5 for fit in found.modules)
    assert not found.left_out
    tuned = load_tuned(trained("ia3"), base, "float32")
    assert apart(put_adapter(load_plain(base, "float32"), tmp_path / "out"), tuned) < CLOSE < 0.003
    assert apart(load_plain(base, "float32"), tuned) > 0.003
    assert taken_in(tmp_path / "out", base, tmp_path).rank == 64


def test_full_becomes_a_lora_of_its_exact_rank(base: Path, tmp_path: Path) -> None:
    import torch

    from finetune.methods import load_plain, load_tuned, put_adapter, save

    torch.manual_seed(4)
    model = load_plain(base, "float32")
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data += 0.03 * torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1])
    save(model, WAYS["full"], tmp_path / "trained", base)
    finish(base, "full", tmp_path / "trained")
    found = exported(tmp_path / "trained", tmp_path / "out", base, rank=3)
    assert found.rank == 3
    assert found.kept > 1 - 1e-8
    assert len(found.modules) == 14
    tuned = load_tuned(tmp_path / "trained", base, "float32")
    assert apart(put_adapter(load_plain(base, "float32"), tmp_path / "out"), tuned) < CLOSE
    assert taken_in(tmp_path / "out", base, tmp_path).target_modules == tuple(sorted({
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }))  # fmt: skip


def test_what_was_zero_or_hardly_changed_divides_nothing(base: Path, tmp_path: Path) -> None:
    """Such as the last matrices of blocks that begin as nothing."""
    from finetune.methods import load_plain, save

    empty = tmp_path / "empty"
    model = load_plain(base, "float32")
    shutil.copytree(base, empty)
    zero = ("model.layers.0.self_attn.o_proj", "model.layers.1.input_layernorm")
    for name in zero:
        model.get_submodule(name).weight.data.zero_()
    small = model.get_submodule("model.layers.0.mlp.up_proj").weight.data
    small[0, 0] = 0
    model.save_pretrained(empty)
    for name in zero:
        model.get_submodule(name).weight.data += 0.1
    small[0, 0] = 1e-25
    save(model, WAYS["full"], tmp_path / "trained", empty)
    finish(empty, "full", tmp_path / "trained")
    with pytest.raises(InvalidError, match=r"1 weights .* model\.layers\.1\.input_layernorm\.weight by inf%"):
        exported(tmp_path / "trained", tmp_path / "out", empty)
    found = exported(tmp_path / "trained", tmp_path / "out", empty, lossy=True)
    assert [one.update for one in found.left_out] == [math.inf]
    assert found.model_dump(mode="json")["left_out"][0]["update"] is None
    assert {fit.module: fit.update for fit in found.modules}[zero[0]] == math.inf
    assert all(0 <= fit.error <= 1 for fit in found.modules)


def test_more_rank_keeps_more(base: Path, trained: Any, tmp_path: Path) -> None:
    found = [exported(trained("full"), tmp_path / f"{rank}", base, rank=rank) for rank in (2, 16, 512)]
    kept = [one.kept for one in found]
    assert kept == sorted(kept)
    assert kept[0] < 0.9
    assert kept[-1] > 1 - 1e-8
    assert found[-1].rank == 64  # no more is in any matrix
    assert [one.difference.mean for one in found] == sorted((one.difference.mean for one in found), reverse=True)
    assert found[0].size < found[1].size < found[2].size


def test_whole_model_in_a_smaller_type(base: Path, trained: Any, tmp_path: Path) -> None:
    found = exported(trained("full"), tmp_path / "out", base, kind="merged", dtype="bfloat16")
    assert found.size < 0.6 * (trained("full") / "model.safetensors").stat().st_size
    assert found.difference.mean < found.bare.mean


def test_large_matrices_are_approximated_by_chance_and_well() -> None:
    """Above EXACT: a tenth more than the best error, which is what is beyond the rank."""
    import torch

    from finetune.export_low_rank import EXACT, factors

    torch.manual_seed(2)
    size, rank = EXACT + 52, 8
    update = torch.randn(size, 12) @ torch.diag(2.0 ** -torch.arange(12)) @ torch.randn(12, size)
    b, a = factors(update, rank)
    best = torch.linalg.svdvals(torch.linalg.qr(update @ torch.randn(size, 12))[0].T @ update)
    assert (b.shape, a.shape) == ((size, rank), (rank, size))
    assert torch.linalg.vector_norm(update - b @ a) < 1.1 * torch.linalg.vector_norm(best[rank:])
    assert 0.5 < b.abs().max() / a.abs().max() < 2


def test_norms_are_in_no_lora(base: Path, trained: Any, tmp_path: Path) -> None:
    """Whole layers: their norms changed too. The matrices of the other layer are not in the LoRA."""
    with pytest.raises(InvalidError, match=r"changed 2 weights .*layernorm.*graft up --model.*--lossy"):
        exported(trained("layers"), tmp_path / "out", base)
    assert not list(tmp_path.iterdir())
    found = exported(trained("layers"), tmp_path / "out", base, lossy=True)
    assert len(found.left_out) == 2
    assert all("layernorm" in one.name and one.update > 0 for one in found.left_out)
    assert found.kept < 1 - 1e-4
    assert all(fit.kept > 1 - 1e-8 for fit in found.modules)
    assert found.difference.mean < found.bare.mean
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert all(name.startswith("model.layers.1.") for name in config["target_modules"])
    taken_in(tmp_path / "out", base, tmp_path)


def test_dora_becomes_a_lora_where_that_is_asked(base: Path, trained: Any, tmp_path: Path) -> None:
    found = exported(trained("dora"), tmp_path / "out", base, kind="lora")
    assert found.rank == 64
    assert found.kept > 1 - 1e-6
    assert found.difference.largest < CLOSE
    taken_in(tmp_path / "out", base, tmp_path)


def test_lora_of_half_the_size(base: Path, trained: Any, tmp_path: Path) -> None:
    found = exported(trained("lora"), tmp_path / "out", base, kind="lora", dtype="bfloat16")
    before = (trained("lora") / "adapter_model.safetensors").stat().st_size
    assert found.rank == 4
    assert found.size < 0.6 * before
    assert found.kept > 0.999
    assert exported(trained("lora"), tmp_path / "less", base, kind="lora", rank=2).rank == 2
    taken_in(tmp_path / "out", base, tmp_path)
    with pytest.raises(InvalidError, match="a LoRA already: `graft adapters add"):
        exported(trained("lora"), tmp_path / "same", base, kind="lora")


def test_manifest_goes_with_it(base: Path, trained: Any, tmp_path: Path) -> None:
    from finetune.runs import read_manifest

    exported(trained("ia3"), tmp_path / "out", base, rank=8)
    before, after = read_manifest(trained("ia3")), read_manifest(tmp_path / "out")
    assert (before.servable, after.servable, after.why_not, after.exported) == (False, True, None, "lora")
    changed = {"metrics", "servable", "why_not", "exported"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert after.metrics["loss"] == 1.5
    assert after.metrics["export_rank"] == 8
    assert 0 < after.metrics["export_kept"] < 1
    assert taken_in(tmp_path / "out", base, tmp_path).manifest["acl"] == ["staff"]


def test_what_cannot_be_is_refused(base: Path, trained: Any, tmp_path: Path) -> None:
    from finetune.methods import load_plain

    other = tmp_path / "other"
    load_plain(base, "bfloat16").save_pretrained(other)
    for folder, asked, said in (
        (trained("bottleneck"), {}, "no bottleneck adapters"),
        (trained("bottleneck"), {"kind": "merged"}, "no bottleneck adapters"),
        (trained("lora"), {"base": other}, "--base DIR"),
        (trained("lora"), {"rank": 8}, "a merged model has none"),
        (trained("ia3"), {"rank": 513}, "from 1 to 512"),
        (trained("full"), {"kind": "merged"}, "a model already"),
    ):
        with pytest.raises(InvalidError, match=said):
            exported(folder, tmp_path / "out", **({"base": base} | asked))
    with pytest.raises(NotFoundError, match=r"no manifest\.json"):
        exported(other, tmp_path / "out", base)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConflictError, match="is there already"):
        exported(trained("lora"), tmp_path / "there", base)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "there"]


def test_killed_export_leaves_nothing_that_looks_finished(base: Path, trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"""
from pathlib import Path
from finetune.export import Asked, export
export(Path({str(trained("lora"))!r}), Path({str(out)!r}), Path({str(base)!r}), Asked())
"""
    with subprocess.Popen([sys.executable, "-c", program]) as run:
        while run.poll() is None and not list(tmp_path.glob(".unfinished-out-*")):
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not list(tmp_path.glob("*/manifest.json"))
    exported(trained("lora"), out, base)
    assert out.is_dir()


def test_command(base: Path, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from typer.testing import CliRunner

    from finetune import cli_export

    app = typer.Typer()
    app.command()(cli_export.export)
    out, to = tmp_path / "out", tmp_path / "found.json"
    done = CliRunner().invoke(
        app, [str(trained("ia3")), "--out", str(out), "--as", "lora", "--rank", "8", "--json", str(to)]
    )
    assert done.exit_code == 0, done.output
    for said in ("graft adapters add", "down_proj", "kept of the whole update", "the untuned base"):
        assert said in done.output
    assert json.loads(to.read_text())["rank"] == 8
    assert CliRunner().invoke(app, [str(trained("ia3")), "--out", str(out), "--as", "onnx"]).exit_code == 2
    again = CliRunner().invoke(app, [str(trained("ia3")), "--out", str(out)])
    assert isinstance(again.exception, ConflictError)


def test_help_is_light() -> None:
    program = "import sys; from finetune import cli_export; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
