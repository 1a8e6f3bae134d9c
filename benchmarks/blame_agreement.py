"""How far the classes of blame agree with failures that were labelled by reading (`eval/sets/failures.jsonl`)."""

from collections.abc import Sequence

from benchmarks.report import Options, Row, at_least, say, shown
from eval.failures import BAR, CLASSES, Failure, agreement, confusion_table, disagreements, read_failures


def run(options: Options) -> list[Row]:
    del options  # it takes milliseconds, and needs no data but the project's own
    failures = read_failures()
    whole = agreement(failures)
    say(f"labels down, classes across:\n{confusion_table(whole)}")
    for one, found, words in disagreements(failures):
        say(f"{one.id} ({one.half} half): {one.label} ({one.why}), not {found} ({words})")
    by_class = ", ".join(f"{name} {whole.recall(name) or 0:.2f}" for name in CLASSES)
    kappa = f"kappa {whole.kappa:.3f}; always the commonest label: {whole.commonest:.3f}; by label: {by_class}"
    return [
        at_least(
            "blame agrees with the labels, whole set", whole.share, "", BAR, f"{whole.failures} failures; {kappa}"
        ),
        _row("the first half, which the classifier was changed by", [one for one in failures if one.half == "first"]),
        _row("the second half", [one for one in failures if one.half == "second"]),
        _row(
            "different answers to a question alone",
            list({(one.question, one.answer): one for one in failures}.values()),
        ),
        _row("a gold passage in the prompt alone", [one for one in failures if _reached(one)]),
    ]


def _row(name: str, failures: Sequence[Failure]) -> Row:
    found = agreement(failures)
    said = f"{found.failures} failures; kappa {found.kappa:.3f}; {found.allowing:.3f} where a second label may count"
    return shown(f"blame agrees with the labels, {name}", found.share, "", said)


def _reached(failure: Failure) -> bool:
    return failure.answerable and any(rank <= failure.seen.in_prompt for rank in failure.seen.gold)
