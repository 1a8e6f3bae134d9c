"""Linear probes: what is in the features is found, what is not there is not, and rows that hang together stay together."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from service_fixtures import WireEngine

from eval.cli_search import probe as command
from eval.probe import Row, control_labels, feature_maker, probe, read_rows, task_of
from ingest.errors import InvalidError, SettingsError
from ingest.settings import IngestSettings

BGE = "embedder:bge-small-en-v1.5"
TOPICS = {
    "cooking": ("the soup", "a roast chicken", "fresh bread", "the pancakes", "a salad"),
    "sailing": ("the mainsail", "an anchor", "the rudder", "a lifeboat", "the harbour"),
    "law": ("the contract", "a witness", "the verdict", "an appeal", "the statute"),
}
WORDS = ("stone", "river", "cloud", "paper", "glass", "metal", "wood", "cotton", "sand", "leaf")
PHRASES = ("We talked about {} all day.", "Nobody had expected {}.", "She wrote a letter on {}.", "What of {}?")


def topics() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"text": phrase.format(thing), "label": topic}
        for topic, things in TOPICS.items()
        for thing in things
        for phrase in PHRASES
    ]
    random.Random(0).shuffle(rows)
    return rows


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_the_features_hold_is_found_and_the_better_source_wins(
    tmp_path: Path, settings: IngestSettings, wire: WireEngine
) -> None:
    poor = f"embedder:{wire.url}#letters"  # the first letters of a text
    found = probe(write(tmp_path / "topics.jsonl", topics()), [BGE, poor], settings)
    good, letters = found.sources
    assert (found.task, found.metric, found.rows, found.labels) == ("classify", "accuracy", 60, 3)
    assert good.score.value > 0.9
    assert good.score.low > found.baseline
    assert good.control < 0.6
    assert good.selectivity.low > 0.2
    assert letters.score.value < 0.75
    (difference,) = found.differences
    assert difference.after - difference.before == pytest.approx(letters.score.value - good.score.value)
    assert difference.p < 0.05
    assert probe(tmp_path / "topics.jsonl", [BGE], settings).sources[0].score == good.score  # seeded


def test_numbers_are_estimated_by_a_ridge(tmp_path: Path, settings: IngestSettings) -> None:
    rows: list[dict[str, object]] = [
        {"text": row["text"], "label": {"cooking": 1.5, "sailing": 4.0, "law": 9.0}[str(row["label"])]}
        for row in topics()
    ]
    found = probe(write(tmp_path / "numbers.jsonl", rows), [BGE], settings)
    assert (found.task, found.metric) == ("regress", "r2")
    assert found.sources[0].score.value > 0.5
    assert found.baseline < 0.05  # the mean explains nothing
    assert found.sources[0].control < 0.2


def test_a_group_stays_in_one_fold(tmp_path: Path, settings: IngestSettings) -> None:
    """The label is known of each text's twin alone: a probe that has seen the twin knows it, one that has not does not."""
    words = random.Random(4)
    rows: list[dict[str, object]] = []
    for number in range(40):
        text = " ".join(words.choice(WORDS) for _ in range(9))
        label = words.choice(["a", "b"])
        rows += [{"text": text, "label": label, "group": number}, {"text": f"{text}.", "label": label, "group": number}]
    apart = [{key: value for key, value in row.items() if key != "group"} for row in rows]
    whole = probe(write(tmp_path / "groups.jsonl", rows), [BGE], settings)
    split = probe(write(tmp_path / "apart.jsonl", apart), [BGE], settings)
    assert whole.groups == 40
    assert split.sources[0].score.value > 0.8
    assert whole.sources[0].score.value < 0.7


def test_the_control_gives_equal_texts_equal_labels() -> None:
    rows = [Row(text=f"t{n % 10}", label=f"l{n % 10}") for n in range(30)]
    labels = np.array([str(row.label) for row in rows])
    dealt = control_labels(rows, labels, seed=1)
    assert {(row.text, label) for row, label in zip(rows, dealt, strict=True)} == {
        (f"t{n}", dealt[n]) for n in range(10)
    }
    assert sorted(dealt) == sorted(labels)
    assert (dealt != labels).any()


def test_bad_rows_are_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(
        '{"text": "a", "label": "x"}\n\n{"text": "", "label": "x"}\n{"label": "x"}\nnot json\n{"text": "b", "label": null}\n'
    )
    with pytest.raises(InvalidError) as error:
        read_rows(file)
    assert re.findall(r"bad\.jsonl:(\d)", str(error.value)) == ["3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no row"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], "all strings"),
        ([{"text": "a", "label": "x", "group": 1}, {"text": "b", "label": "y"}], "either every row has a group"),
        ([{"text": f"t{n}", "label": "x"} for n in range(20)], "the same label"),
        (
            [{"text": f"t{n}", "label": "rare" if n == 3 else "x"} for n in range(20)],
            'fewer rows than the 5 folds, as "rare"',
        ),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "too few for 5 folds"),
    ],
)
def test_data_that_cannot_be_learned_is_refused(
    rows: list[dict[str, object]], said: str, tmp_path: Path, settings: IngestSettings
) -> None:
    with pytest.raises(InvalidError, match=said):
        probe(write(tmp_path / "rows.jsonl", rows), [BGE], settings)


def test_two_whole_numbers_are_classes_and_more_are_numbers() -> None:
    assert task_of([Row(text="a", label=0), Row(text="b", label=1)]) == "classify"
    assert task_of([Row(text="a", label=n) for n in range(5)]) == "regress"
    assert task_of([Row(text="a", label=True), Row(text="b", label=False)]) == "classify"


@pytest.mark.parametrize(
    ("source", "said"),
    [("bge", "embedder:NAME or hidden"), ("hidden:model", "embedder:NAME or hidden"), ("embedder:", "write")],
)
def test_a_source_is_named_in_full(source: str, said: str, settings: IngestSettings) -> None:
    with pytest.raises(InvalidError, match=said):
        feature_maker(source, settings)


def test_hidden_states_without_a_training_stack_name_the_command(
    settings: IngestSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SettingsError, match="make train"):
        feature_maker("hidden:smollm2-135m-instruct:15", settings)


@pytest.mark.slow
def test_hidden_states_are_those_of_the_layer_whatever_else_is_in_the_batch(tmp_path: Path, models: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaModel

    folder, bundled = tmp_path / "tiny", models / "smollm2-135m-instruct"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=49152,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)
    settings = IngestSettings(models=models, embedder_runtime="onnxruntime", threads=2)
    texts = ["A short one.", "A much longer text, so that the short one is padded beside it in the batch.", "Another."]
    by_layer = [feature_maker(f"hidden:{folder}:{layer}", settings)(texts) for layer in (0, 2, 3)]
    alone = feature_maker(f"hidden:{folder}:2", settings)(texts[:1])
    assert by_layer[0].shape == (3, 32)
    assert np.allclose(by_layer[1][0], alone[0], atol=1e-5)
    assert not np.allclose(by_layer[0], by_layer[1], atol=1e-3)
    assert np.allclose(feature_maker(f"hidden:{folder}:-1", settings)(texts), by_layer[2], atol=1e-6)
    with pytest.raises(InvalidError, match=r"0 .* to 3"):
        feature_maker(f"hidden:{folder}:4", settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match="no folder of a transformers model"):
        feature_maker(f"hidden:{tmp_path / 'empty'}:1", settings)


def test_the_command_shows_a_table_and_writes_json(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_MODELS", str(models))
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("INGEST_EMBEDDER_RUNTIME", "onnxruntime")
    command([BGE], write(tmp_path / "topics.jsonl", topics()), to=str(tmp_path / "probe.json"))
    shown = capsys.readouterr().out
    assert "baseline accuracy" in shown
    assert "selectivity" in shown
    assert json.loads((tmp_path / "probe.json").read_text())["sources"][0]["dimension"] == 384
