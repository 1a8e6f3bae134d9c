"""`python -m benchmarks [NAME ...] [--data DIR] [--scratch DIR] [--quick] [--json FILE]`, in the product's environment.

Prints one table. A figure below its bar is shown, and fails nothing; a benchmark that breaks gives exit status 1.
"""

import argparse
import json
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import (
    adapter_limits,
    adapter_swap,
    adapter_tokens,
    answer_quality,
    blame_agreement,
    conversations,
    embedder_quality,
    example_answers,
    first_search,
    index_dump,
    ingest_memory,
    ingest_speed,
    ingest_vs_llamaindex,
    injection,
    languages,
    parse_pages,
    query_overhead,
    retrieval_quality,
    retrieval_vs_llamaindex,
    retrieve_scale,
    retrieve_stages,
    sync_unchanged,
    tune_answers,
    tune_methods,
    tune_preferences,
    tune_speed,
)
from benchmarks.report import Options, Row, machine, say, skipped, table

BENCHMARKS: dict[str, Callable[[Options], list[Row]]] = {
    "ingest_speed": ingest_speed.run,
    "parse_pages": parse_pages.run,
    "ingest_memory": ingest_memory.run,
    "sync_unchanged": sync_unchanged.run,
    "first_search": first_search.run,
    "index_dump": index_dump.run,
    "ingest_vs_llamaindex": ingest_vs_llamaindex.run,
    "retrieve_scale": retrieve_scale.run,
    "retrieve_stages": retrieve_stages.run,
    "retrieval_quality": retrieval_quality.run,
    "retrieval_vs_llamaindex": retrieval_vs_llamaindex.run,
    "query_overhead": query_overhead.run,
    "embedder_quality": embedder_quality.run,
    "languages": languages.run,
    "conversations": conversations.run,
    "example_answers": example_answers.run,
    "injection": injection.run,
    "answer_quality": answer_quality.run,
    "blame_agreement": blame_agreement.run,
    "adapter_tokens": adapter_tokens.run,
    "adapter_swap": adapter_swap.run,
    "adapter_limits": adapter_limits.run,
    "tune_answers": tune_answers.run,
    "tune_preferences": tune_preferences.run,
    "tune_methods": tune_methods.run,
    "tune_speed": tune_speed.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures graft on this machine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all when left out")
    parser.add_argument("--data", type=Path, help="a folder with the data sets that benchmarks/README.md lists")
    parser.add_argument("--scratch", type=Path, help="where vectors and indexes are kept for the next run")
    parser.add_argument("--quick", action="store_true", help="a few seconds each: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if given.data and not given.data.is_dir():
        parser.error(f"--data {str(given.data)!r} is no folder")
    with ExitStack() as stack:
        scratch = given.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-bench-")))
        scratch.mkdir(parents=True, exist_ok=True)
        data = given.data.absolute() if given.data else None
        rows, broken = measure(given.names or list(BENCHMARKS), Options(data, scratch.absolute(), given.quick))
    facts = machine()
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    print(table(rows, facts, command))
    if given.quick:
        print("\nWith --quick: these figures show that it runs, and nothing else.")
    if given.json:
        content = {"command": command, "machine": facts, "rows": [row._asdict() for row in rows]}
        given.json.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return 1 if broken else 0


def measure(names: list[str], options: Options) -> tuple[list[Row], bool]:
    """-> all rows, and whether a benchmark broke; the others are measured all the same."""
    rows, broken = [], False
    for name in names:
        say(f"{name} ...")
        try:
            rows += BENCHMARKS[name](options)
        except Exception as error:
            traceback.print_exc()
            rows.append(skipped(name, f"it broke: {type(error).__name__}: {str(error).splitlines()[0][:200]}"))
            broken = True
    return rows, broken


if __name__ == "__main__":
    sys.exit(main())
