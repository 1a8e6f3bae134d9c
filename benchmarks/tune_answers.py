"""What fine-tuning is worth: rows from public sets, an adapter of an hour, and answers to held-out questions through `/query`.

Every step is a command that a user would give, and is kept in the scratch folder: what is there is not done again. The untuned
model answers with the same passages, once as the product serves it and by few-shot prompts for short answers, there through an
adapter of zeros: its own words, neither checked nor quoted. Several prompts and rules for shortening are tried on a part of the
held-out questions; the best prompt as it is and the best with a rule then answer all of them.
Needs --data; `--quick` trains for 4 steps and asks 4 questions a set.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Options, Row, at_least, at_most, say, shown, skipped
from benchmarks.service_process import with_engine
from eval.answer_metrics import contains, markers, plain, token_f1
from eval.cases import read_dataset
from eval.compare import read_run
from eval.resample import compared
from eval.schemas import AnswerCase, AnswersRun, DataSet, Document
from finetune.rows_questions import hit
from finetune.split import split_dataset
from ingest.settings import CHECKOUT
from service.client import Client
from service.excerpt import nearest
from service.schemas import CollectionSettings, PromptRequest

SETS = {
    "XQuAD English": "xquad/xquad.en.json",
    "BeerQA": "beerqa_sample/beerqa_train_subsample.json",
    "COVID-QA": "covid_qa/200423_covidQA.json",
    "PubMedQA": "pubmedqa_cv/pubmedqa_l_non_test_500.json",
}
SAMPLE, TRIED = 110, 40  # questions a set: that are answered, that each prompt is tried on
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
    adapter = exported(_tuned(scratch, options.quick))
    tried = 4 if options.quick else TRIED
    settings = {"SERVICE_ADAPTER_ROOTS": str(scratch), "SERVICE_MAX_TOKENS": "96"}
    with with_engine(scratch / "home", **settings) as url, Client(url) as client:
        graft(["check", str(adapter)], url)
        name, zeros = registered(client, adapter), registered(client, _zeros(scratch / "zeros", scratch / "answers"))
        runs = {one: _asked(client, url, scratch, one, name, sample) for one in SETS}
        runs["missing"] = _asked_without(client, url, scratch, name, sample)
        best = _few_shot(client, url, scratch, zeros, tried)
        for one in SPAN_SETS:
            for prompt in dict.fromkeys(best[:2]):
                runs[one][prompt] = _prompted(client, url, scratch, one, zeros, prompt, sample)
    return [*_rows_of(runs, best), *_rows_of_missing(runs["missing"])]


def few_shot() -> dict[str, str]:
    """-> by name, the prompts that the untuned model is tried with."""
    found = {}
    for way, system in INSTRUCTIONS.items():
        for count, said in ((0, "none"), (2, "two"), (4, "four")):
            source = HEADER.format(system=system, ending="" if way == "plain" else "\nAnswer:")
            for asked, answered in EXAMPLES[:count]:
                source += f"\n[[all.examples]]\nuser = {json.dumps(asked)}\nassistant = {json.dumps(answered)}\n"
            found[f"short-{way}-{said}"] = source
    return found


def _rows(scratch: Path, files: dict[str, Path]) -> None:
    for name, file in files.items():
        folder = scratch / name
        if not (folder / "held-out.json").exists():
            say(f"splitting {name}")
            graft(["dataset", "split", str(file), "--out", str(folder)])
    held = [part for name in files for part in ("--held-out", str(scratch / name / "held-out.json"))]
    learn = [str(scratch / name / "learn.json") for name in files]
    for rows, mix in (("rows", ["--refusals", "0.2"]), ("rows-2", ["--refusals", "0.06", "--seed", "18"])):
        if not (scratch / f"{rows}.jsonl").exists():
            say(f"making {rows}")
            made = ["dataset", "raft", *learn, *held, *mix, "--out", str(scratch / f"{rows}.jsonl")]
            graft(made, GRAFT_HOME=str(scratch / "rows-home"))


def _tuned(scratch: Path, quick: bool) -> Path:
    """First what answers are and when there is none; then fewer refusals, which it gives too readily by then."""
    first, second = scratch / "answers", scratch / "answers-2"
    on = [f"parent={first}", "learning_rate=5e-4", "max_rows=960"]
    for out, rows, given in ((first, "rows", []), (second, "rows-2", on)):
        if not (out / "manifest.json").exists():
            say(f"training {out.name}")
            more = [part for one in [*given, *(["max_steps=4"] if quick else [])] for part in ("--set", one)]
            graft(["tune", "raft-lora", "--data", str(scratch / f"{rows}.jsonl"), "--out", str(out), *more])
    return second


def exported(adapter: Path) -> Path:
    """-> the adapter as it may be served: below 6 MB, in the engine's own precision."""
    to = adapter.with_name(f"{adapter.name}-served")
    if not (to / "manifest.json").exists():
        graft(["export", str(adapter), "--as", "lora", "--dtype", "bfloat16", "--out", str(to)])
    return to


def registered(client: Client, adapter: Path) -> str:
    from service.schemas_adapters import RegisterRequest

    return client.register_adapter(RegisterRequest(path=str(adapter), label=adapter.name)).name


def _zeros(to: Path, like: Path) -> Path:
    """A LoRA that changes nothing: what the engine says with it are the base's own words."""
    from safetensors.numpy import load_file, save_file

    to.mkdir(exist_ok=True)
    save_file(
        {key: value * 0 for key, value in load_file(like / "adapter_model.safetensors").items()},
        to / "adapter_model.safetensors",
    )
    shutil.copy(like / "adapter_config.json", to)
    return to


def _asked(client: Client, url: str, scratch: Path, name: str, adapter: str, sample: int) -> dict[str, AnswersRun]:
    """-> the runs by who answered: "tuned", "tuned, none", "tuned, wrong", and "as served" of the base."""
    folder = scratch / name
    held = str(folder / "held-out.json")
    first = answers(url, folder / "tuned.json", held, sample, "--adapter", adapter, "--keep")
    collection = str(first.configuration["collection"])
    found = {"tuned": first}
    for control in ("none", "wrong"):
        given: tuple[str, ...] = ("--adapter", adapter, "--collection", collection, "--control", control)
        found[f"tuned, {control}"] = answers(url, folder / f"tuned-{control}.json", held, sample, *given)
    given = ("--adapter", "base", "--collection", collection)
    return found | {"as served": answers(url, folder / "as-served.json", held, sample, *given)}


def _few_shot(client: Client, url: str, scratch: Path, zeros: str, sample: int) -> tuple[str, str, str]:
    """-> the prompt that is best as it is, the best with a rule, and that rule; each tried on a part of the questions."""
    scores: dict[tuple[str, str], float] = {}
    for prompt, source in few_shot().items():
        client.put_prompt(prompt, PromptRequest(template=source))
        runs = [_prompted(client, url, scratch, name, zeros, prompt, sample, "tried") for name in SPAN_SETS]
        cases = [case for run in runs for case in run.cases]
        scores |= {(prompt, rule): sum(f1(case, RULES[rule]) for case in cases) / len(cases) for rule in RULES}
    for (prompt, rule), score in sorted(scores.items(), key=lambda one: -one[1]):
        say(f"tried {prompt}, {rule}: F1 {score:.3f}")
    plain_best = max(few_shot(), key=lambda prompt: scores[prompt, "as it is"])
    return plain_best, *max(scores, key=lambda one: scores[one])


def _prompted(
    client: Client, url: str, scratch: Path, name: str, zeros: str, prompt: str, sample: int, kind: str = "asked"
) -> AnswersRun:
    collection = str(answers_of(scratch / name / "tuned.json").configuration["collection"])
    client.put_collection(collection, CollectionSettings(prompt=prompt))
    held, to = str(scratch / name / "held-out.json"), scratch / name / f"{kind}-{prompt}.json"
    return answers(url, to, held, sample, "--adapter", zeros, "--collection", collection)


def _asked_without(client: Client, url: str, scratch: Path, adapter: str, sample: int) -> dict[str, AnswersRun]:
    """Held-out questions, asked of a collection of the same set that lacks the documents they are about."""
    found = {}
    for name in SETS:
        file = scratch / name / "missing.json"
        if not file.exists():
            file.write_text(missing(read_dataset(scratch / name / "held-out.json")).model_dump_json())
        found[name] = answers(url, scratch / name / "tuned-missing.json", str(file), sample, "--adapter", adapter)
    return found


def missing(held: DataSet) -> DataSet:
    """The documents of one half, the questions of the other."""
    there, gone = split_dataset(held, 0.5, 3)
    cases = tuple(one.model_copy(update={"answerable": False, "answers": (), "relevant": {}}) for one in gone.cases)
    return DataSet(name=f"{held.name}/missing", documents=there.documents, cases=cases)


def answers(url: str, to: Path, file: str, sample: int, *more: str) -> AnswersRun:
    if not to.exists():
        say(f"asking: {to.parent.name}, {to.stem}")
        graft(["eval", "answers", file, "--sample", str(sample), "--json", str(to), *more], url)
    return answers_of(to)


def answers_of(file: Path) -> AnswersRun:
    run = read_run(file)
    assert isinstance(run, AnswersRun)
    return run


def graft(arguments: Sequence[str], url: str | None = None, **settings: str) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FINETUNE_", "SERVICE_", "GRAFT_"))}
    environment = {**kept, **settings, **({"GRAFT_URL": url} if url else {})}
    command = [sys.executable, "-c", "from service.cli import main; main()", *arguments]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def f1(case: AnswerCase, rule: Callable[[str], str] = RULES["as it is"]) -> float:
    return 0.0 if case.refused else token_f1(rule(plain(case.answer)), case.case.answers)


def _rows_of(runs: dict[str, dict[str, AnswersRun]], best: tuple[str, str, str]) -> list[Row]:
    rows = []
    prompt = best[0]
    cases = {who: [case for name in SPAN_SETS for case in runs[name][who].cases] for who in runs[SPAN_SETS[0]]}
    scores = {who: [f1(case) for case in cases[who]] for who in cases}
    ids = [case.case.id for case in cases["tuned"]]
    untuned = [who for who in cases if not who.startswith("tuned")]
    rated = {(who, rule): [f1(case, RULES[rule]) for case in cases[who]] for who in untuned for rule in RULES}
    shortened, rule = max(rated, key=lambda one: sum(rated[one]))
    documents = [min(case.case.relevant, default=case.case.id) for case in cases["tuned"]]
    for who in cases:
        rows.append(shown(f"F1, {who}", mean(scores[who]), "", f"{len(ids)} questions of {', '.join(SPAN_SETS)}"))
    for said, bar, before in (
        (f"over the best prompt ({prompt})", 0.25, scores[prompt]),
        (f"over the best rule ({rule}, {shortened})", 0.15, rated[shortened, rule]),
    ):
        found = compared("f1", ids, before, scores["tuned"], 0, documents)
        note = f"[{found.low:.3f}, {found.high:.3f}], p {found.p:.4f}"
        rows.append(at_least(f"F1 gained {said}", round(found.difference, 3), "", bar, note))
    for name, of in runs.items():
        if name in SETS:
            tuned, bare = of["tuned"].metrics, of["as served"].metrics
            main = "f1" if name in SPAN_SETS else "accuracy"
            others = ", ".join(f"{one} {value:.3f}" for one, value in sorted(tuned.items()) if one != main)
            title = f"{main}, {name}, tuned (untuned, as served {bare.get(main, 0):.3f})"
            rows.append(shown(title, round(tuned.get(main, 0), 3), "", others))
    rows += _parts(cases["tuned"], scores[prompt], max((rated[prompt, one] for one in RULES), key=sum))
    return rows + _positions(cases["tuned"])


def _parts(tuned: Sequence[AnswerCase], before: Sequence[float], short: Sequence[float]) -> list[Row]:
    """The gain over a prompt as a sum: what the best rule gives the same answers; what is beyond it where the adapter answers,
    and where it refuses.
    """
    form = sum(short) - sum(before)
    said = sum(f1(case) - one for case, one in zip(tuned, short, strict=True) if not case.refused)
    left = sum(-one for case, one in zip(tuned, short, strict=True) if case.refused)
    parts = {"form": form, "grounding": said, "abstention": left}
    return [shown(f"F1 gained by {name}", round(value / len(tuned), 3), "", "") for name, value in parts.items()]


def _positions(cases: Sequence[AnswerCase]) -> list[Row]:
    """Where the gold passage was in the prompt: how many answers cite it, by where it stood, and how many refuse."""
    by_rank: dict[int, list[float]] = {}
    for case in cases:
        gold = gold_passages(case)
        if gold and not case.refused:
            by_rank.setdefault(gold[0], []).append(float(bool({*gold} & {*markers(case.answer)})))
    there = [case for case in cases if gold_passages(case, whole=True)]
    refused = [case.refused for case in cases if gold_passages(case)]
    note = (
        f"{len(refused)} questions; {mean([case.refused for case in there]):.3f} of {len(there)} whose passage was "
        "retrieved, some without the part that answers"
    )
    return [
        *(
            at_least(f"gold passage cited, where it is passage {rank}", mean(values), "", 0.8, f"{len(values)} answers")
            for rank, values in sorted(by_rank.items())
        ),
        at_most("refused, though the answer is shown", mean(refused), "", 0.1, note),
    ]


def gold_passages(case: AnswerCase, whole: bool = False) -> list[int]:
    """-> the numbers of the passages in the prompt that are of a relevant document and show a gold answer's words. `whole`: or
    hold them, in a part that the prompt does not show.
    """
    there = [one for one in case.passages if one.in_prompt]
    right = [n for n, one in enumerate(there, 1) if one.document in case.case.relevant]
    return [n for n in right if contains(_shown(case, there[n - 1].text, whole), case.case.answers)]


def _shown(case: AnswerCase, text: str, whole: bool) -> str:
    """What a prompt of "tuned-1" shows of a passage."""
    return text if whole else nearest(case.case.question, hit(Document(id="", title="", text=text)))


def _rows_of_missing(runs: dict[str, AnswersRun]) -> list[Row]:
    refused = [case.refused for run in runs.values() for case in run.cases]
    note = ", ".join(f"{name} {mean([case.refused for case in run.cases]):.2f}" for name, run in runs.items())
    return [
        at_least("refused, where the passage is missing", mean(refused), "", 0.7, f"{len(refused)} questions; {note}")
    ]


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 3)
