"""What fine-tuning is worth: rows from public sets, an adapter of an hour, and answers to held-out questions through `/query`.

Every step is a command that a user would give, and is kept in the scratch folder: what is there is not done again. The untuned
model answers with the same passages, once as the product asks it and by each of several few-shot prompts for short answers; then
its answers are also shortened by each of several rules. Its best prompt and rule are chosen on the held-out questions themselves.
Needs --data; `--quick` trains for 4 steps and asks 4 questions a set.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Options, Row, say, shown, skipped
from benchmarks.service_process import with_engine
from eval.answer_metrics import plain, token_f1
from eval.cases import read_dataset
from eval.compare import read_run
from eval.resample import compared
from eval.schemas import AnswerCase, AnswersRun, DataSet
from finetune.split import split_dataset
from ingest.settings import CHECKOUT
from service.client import Client
from service.schemas import CollectionSettings, PromptRequest

SETS = {
    "XQuAD English": "xquad/xquad.en.json",
    "BeerQA": "beerqa_sample/beerqa_train_subsample.json",
    "COVID-QA": "covid_qa/200423_covidQA.json",
    "PubMedQA": "pubmedqa_cv/pubmedqa_l_non_test_500.json",
}
SAMPLE = 110  # questions a set
SPAN_SETS = tuple(SETS)[:3]  # scored by F1
HEADER = """passages = 3
guard = true

[all]
system = "{system}"
user = '''
{{% for passage in passages %}}[{{{{ passage.n }}}}] {{% if passage.heading %}}{{{{ passage.heading }}}}: {{% endif %}}\
{{{{ passage.near }}}}

{{% endfor %}}Question: {{{{ question }}}}{ending}'''
"""
EXAMPLES = (
    (
        "[1] Pumps: The pump P-4 was built in 1987 in Lyon. It lifts water from the lower basin.\n\n"
        "[2] Valves: The valve V-3 is rated for 16 bar.\n\nQuestion: In which city was the pump P-4 built?",
        "Lyon",
    ),
    (
        "[1] Staff: Maria Lind heads the stores. The canteen is open for two hours at noon.\n\nQuestion: Who heads the stores?",
        "Maria Lind",
    ),
    (
        "[1] The filter F-2 is changed every 90 days.\n\n[2] The motor M-1 weighs 42 kg.\n\n"
        "Question: How often is filter F-2 changed?",
        "every 90 days",
    ),
    ("[1] The lamp is on. The door is closed.\n\nQuestion: Is the door open?", "no"),
)
INSTRUCTIONS = {
    "plain": "Answer the question from the passages with as few words as possible.",
    "span": "Copy the answer to the question from the passages. Write only the words of the answer, no sentence.",
}
RULES: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "first line": lambda text: text.strip().split("\n")[0],
    "first sentence": lambda text: re.split(r"(?<=[.!?])\s", text.strip())[0],
    "first clause": lambda text: re.split(r"[,;:.]\s|\s(?:which|because|and|who|that)\s", text.strip())[0],
    "after the verb": lambda text: re.split(
        r"[,;.]\s", re.split(r"\b(?:is|are|was|were|by|in|to)\b", text.strip(), maxsplit=1)[-1]
    )[0],
    "last words": lambda text: " ".join(re.split(r"(?<=[.!?])\s", text.strip())[0].split()[-4:]),
}  # fmt: skip


def run(options: Options) -> list[Row]:
    if not (CHECKOUT / ".venv-vllm").is_dir():
        return [skipped("tuned answers", "no engine is installed (make engine)")]
    files = {name: options.data / file for name, file in SETS.items()} if options.data else {}
    if not files or not all(file.is_file() for file in files.values()):
        return [skipped("tuned answers", f"it needs --data with {', '.join(SETS.values())}")]
    scratch = options.scratch / "tune_answers"
    scratch.mkdir(parents=True, exist_ok=True)
    sample = 4 if options.quick else SAMPLE
    _rows(scratch, files)
    adapter = _tuned(scratch, options.quick)
    home = scratch / "home"
    with with_engine(home, SERVICE_ADAPTER_ROOTS=str(scratch)) as url, Client(url) as client:
        graft(["check", str(adapter)], url)
        name = _registered(client, adapter)
        for prompt, source in few_shot().items():
            client.put_prompt(prompt, PromptRequest(template=source))
        runs = {one: _asked(client, url, scratch, one, name, sample) for one in SETS}
        runs["missing"] = _asked_without(client, url, scratch, name, sample)
    return [*_rows_of(runs), *_rows_of_missing(runs["missing"])]


def few_shot() -> dict[str, str]:
    """-> by name, the prompts that the untuned model is tried with."""
    found = {}
    for way, system in INSTRUCTIONS.items():
        for count in (0, 2, 4):
            source = HEADER.format(system=system, ending="" if way == "plain" else "\nAnswer:")
            for asked, said in EXAMPLES[:count]:
                source += f"\n[[all.examples]]\nuser = {json.dumps(asked)}\nassistant = {json.dumps(said)}\n"
            found[f"short-{way}-{count}"] = source
    return found


def _rows(scratch: Path, files: dict[str, Path]) -> None:
    for name, file in files.items():
        folder = scratch / name
        if not (folder / "held-out.json").exists():
            say(f"splitting {name}")
            graft(["dataset", "split", str(file), "--out", str(folder)])
    rows = scratch / "rows.jsonl"
    if not rows.exists():
        say("making rows")
        held = [part for name in files for part in ("--held-out", str(scratch / name / "held-out.json"))]
        learn = [str(scratch / name / "learn.json") for name in files]
        graft(["dataset", "raft", *learn, *held, "--out", str(rows)], GRAFT_HOME=str(scratch / "rows-home"))


def _tuned(scratch: Path, quick: bool) -> Path:
    adapter = scratch / "answers"
    if not (adapter / "manifest.json").exists():
        say("training")
        more = ["--set", "max_steps=4"] if quick else []
        graft(["tune", "raft-lora", "--data", str(scratch / "rows.jsonl"), "--out", str(adapter), *more])
    return adapter


def _registered(client: Client, adapter: Path) -> str:
    from service.schemas import RegisterRequest

    return client.register_adapter(RegisterRequest(path=str(adapter), label="answers")).name


def _asked(client: Client, url: str, scratch: Path, name: str, adapter: str, sample: int) -> dict[str, AnswersRun]:
    """-> the runs by who answered: "tuned", "tuned, none", "tuned, wrong", "untuned" and each few-shot prompt."""
    folder = scratch / name
    held = str(folder / "held-out.json")
    first = _answers(url, folder / "tuned.json", held, sample, "--adapter", adapter, "--keep")
    collection = str(first.configuration["collection"])
    found = {"tuned": first}
    for control in ("none", "wrong"):
        given: tuple[str, ...] = ("--adapter", adapter, "--collection", collection, "--control", control)
        found[f"tuned, {control}"] = _answers(url, folder / f"tuned-{control}.json", held, sample, *given)
    for prompt in ("auto", *few_shot()):
        client.put_collection(collection, CollectionSettings(prompt=prompt))
        given = ("--adapter", "base", "--collection", collection)
        found[prompt] = _answers(url, folder / f"{prompt}.json", held, sample, *given)
    client.put_collection(collection, CollectionSettings(prompt="auto"))
    return found


def _asked_without(client: Client, url: str, scratch: Path, adapter: str, sample: int) -> dict[str, AnswersRun]:
    """Held-out questions, asked of a collection of the same set that lacks the documents they are about."""
    found = {}
    for name in SETS:
        file = scratch / name / "missing.json"
        if not file.exists():
            file.write_text(missing(read_dataset(scratch / name / "held-out.json")).model_dump_json())
        found[name] = _answers(url, scratch / name / "tuned-missing.json", str(file), sample, "--adapter", adapter)
    return found


def missing(held: DataSet) -> DataSet:
    """The documents of one half, the questions of the other."""
    there, gone = split_dataset(held, 0.5, 3)
    cases = tuple(one.model_copy(update={"answerable": False, "answers": (), "relevant": {}}) for one in gone.cases)
    return DataSet(name=f"{held.name}/missing", documents=there.documents, cases=cases)


def _answers(url: str, to: Path, file: str, sample: int, *more: str) -> AnswersRun:
    if not to.exists():
        say(f"asking: {to.parent.name}, {to.stem}")
        graft(["eval", "answers", file, "--sample", str(sample), "--json", str(to), *more], url)
    run = read_run(to)
    assert isinstance(run, AnswersRun)
    return run


def graft(arguments: Sequence[str], url: str | None = None, **settings: str) -> None:
    environment = {**os.environ, **settings, **({"GRAFT_URL": url} if url else {})}
    command = [sys.executable, "-c", "from service.cli import main; main()", *arguments]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def _f1(case: AnswerCase, rule: Callable[[str], str] = RULES["as it is"]) -> float:
    return 0.0 if case.refused else token_f1(rule(plain(case.answer)), case.case.answers)


def _rows_of(runs: dict[str, dict[str, AnswersRun]]) -> list[Row]:
    rows = []
    untuned = [one for one in runs[SPAN_SETS[0]] if not one.startswith("tuned")]
    cases = {who: [case for name in SPAN_SETS for case in runs[name][who].cases] for who in runs[SPAN_SETS[0]]}
    scores = {who: [_f1(case) for case in cases[who]] for who in cases}
    best = max(untuned, key=lambda who: sum(scores[who]))
    rule = max(RULES, key=lambda one: max(sum(_f1(case, RULES[one]) for case in cases[who]) for who in untuned))
    shortest = max(untuned, key=lambda who: sum(_f1(case, RULES[rule]) for case in cases[who]))
    ids = [case.case.id for case in cases["tuned"]]
    for who in cases:
        rows.append(shown(f"F1, {who}", _mean(scores[who]), "", f"{len(ids)} questions of {', '.join(SPAN_SETS)}"))
    for said, before in (
        (f"over the best prompt ({best})", scores[best]),
        (f"over the best rule ({rule}, {shortest})", [_f1(case, RULES[rule]) for case in cases[shortest]]),
    ):
        found = compared("f1", ids, before, scores["tuned"], 0)
        rows.append(
            shown(
                f"F1 gained {said}",
                round(found.difference, 3),
                "",
                f"[{found.low:.3f}, {found.high:.3f}], p {found.p:.4f}",
            )
        )
    for name, of in runs.items():
        if name in SETS:
            tuned, bare = of["tuned"].metrics, of[best].metrics
            main = "f1" if name in SPAN_SETS else "accuracy"
            others = ", ".join(f"{one} {value:.3f}" for one, value in sorted(tuned.items()) if one != main)
            title = f"{main}, {name}, tuned (untuned {bare.get(main, 0):.3f})"
            rows.append(shown(title, round(tuned.get(main, 0), 3), "", others))
    rows += _positions([case for name in SPAN_SETS for case in runs[name]["tuned"].cases])
    return rows


def _positions(cases: Sequence[AnswerCase]) -> list[Row]:
    """Of the answers whose gold passage was in the prompt: how many cite it, by where it stood."""
    by_rank: dict[int, list[float]] = {}
    for case in cases:
        shown_ = [one for one in case.passages if one.in_prompt]
        ranks = [n for n, one in enumerate(shown_, 1) if one.document in case.case.relevant]
        if ranks and not case.refused:
            by_rank.setdefault(ranks[0], []).append(float(case.scores.get("gold_citation", 0) > 0))
    return [
        shown(f"gold passage cited, where it is passage {rank}", _mean(values), "", f"{len(values)} answers")
        for rank, values in sorted(by_rank.items())
    ]


def _rows_of_missing(runs: dict[str, AnswersRun]) -> list[Row]:
    refused = [case.refused for run in runs.values() for case in run.cases]
    return [shown("refused, where the passage is missing", _mean(refused), "", f"{len(refused)} questions")]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 3)
