"""Fifty conversations of two turns over `examples/`: does a follow-up find what its standalone form finds?

Each has the form that stands alone, and a passage that only the right chunk holds. `examples/` is small, so the collection
also gets manuals and reports on pumps and stations that do not exist (`write_distractors`), which say the same of others:
who does not know what "it" is finds one of those. Half of the conversations (`tune`) was looked at while the rules of
`service.rewrite` were made; `check` was not.
"""

import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from eval.schemas import Case, Ranked, RetrievalCase, RetrievalRun, RunFacts
from ingest.catalog import now
from ingest.schemas import Frozen, Hit
from service.client import Client
from service.records import Turn
from service.rewrite import by_rules, shared
from service.schemas import QueryRequest, SearchRequest

SETS = Path(__file__).parent / "sets"
TOP_K = 10
Form = Literal["as_is", "rules", "served", "standalone"]
FORMS: tuple[Form, ...] = ("as_is", "rules", "standalone")

_BIRDS = ("Osprey", "Curlew", "Plover", "Merlin", "Gannet", "Avocet", "Dunlin", "Fulmar")
_PLACES = ("Fernside", "Oakwell", "Brackley", "Ashcombe", "Larkhill", "Stonebeck", "Willowby", "Elmford")
_PLACES_ZH = ("白沙", "石桥", "云岭", "双河", "南塘", "北港", "梅溪", "竹园")
_DUTIES = ("cooling water", "sea water", "sludge", "rain water")
_METALS, _METALS_ZH = ("bronze", "cast steel", "titanium", "nickel alloy"), ("不锈钢", "青铜", "铸钢", "钛合金")


class Conversation(Frozen):
    """`kind`: what the follow-up lacks: a "pronoun"'s noun, what an "ellipsis" leaves out, the other side of a "contrast",
    something that only the "answer" before names; a "shift" lacks nothing, for it is of another subject. `passage`: as in
    the text of the one chunk that answers, white space aside.
    """

    id: str
    language: Literal["en", "zh"]
    kind: Literal["pronoun", "ellipsis", "contrast", "answer", "shift"]
    split: Literal["tune", "check"]
    turns: tuple[Turn, ...]
    question: str
    standalone: str
    path: str
    passage: str


def conversations() -> tuple[Conversation, ...]:
    lines = (SETS / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Conversation.model_validate_json(line) for line in lines)


def write_distractors(folder: Path, seed: int = 0) -> None:
    """32 documents: a manual and a report for each of 8 pumps and stations, in English and Chinese; always the same."""
    dice = random.Random(seed)
    templates = {path.stem.removeprefix("distractor_"): path.read_text(encoding="utf-8") for path in SETS.glob("*.md")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, template in sorted(templates.items()):
        chinese = name.endswith("_zh")
        for at, bird in enumerate(_BIRDS):
            code = f"{bird[0]}{10 * at + 15}"
            fields = {
                "name": f"YW-{10 * at + 105}" if chinese else f"{bird} {code}",
                "code": code,
                "place": (_PLACES_ZH if chinese else _PLACES)[at],
                "metal": dice.choice(_METALS_ZH if chinese else _METALS),
                "duty": dice.choice(_DUTIES),
                **_figures(dice),
            }
            (folder / f"{name}-{at + 1:02}.md").write_text(template.format(**fields), encoding="utf-8")


def _figures(dice: random.Random) -> dict[str, str]:
    def among(low: int, high: int, step: int) -> str:
        return f"{dice.randrange(low, high, step):,}"

    return {
        "few": among(2, 9, 1), "starts": among(12, 30, 1), "wait": among(16, 40, 1), "load": among(1300, 9000, 100),
        "months": among(7, 12, 1), "oil": among(2100, 9000, 200), "litres": among(5, 19, 1),
        "grease": among(2200, 9000, 300), "grams": among(41, 90, 1), "life": among(26000, 60000, 1000),
        "alarm": f"{dice.randrange(32, 44) / 10:.1f}", "trip": f"{dice.randrange(73, 88) / 10:.1f}",
        "warm": among(61, 69, 1), "hot": among(92, 99, 1), "gap": f"{dice.randrange(13, 29) / 10:.1f}",
    }  # fmt: skip


def measure(
    client: Client,
    collection: str,
    asked: Sequence[Conversation],
    forms: Sequence[Form] = FORMS,
    on_case: Callable[[Form, RetrievalCase], None] = lambda *_: None,
) -> dict[Form, RetrievalRun]:
    """Each form of each follow-up, searched in a collection that holds `examples/`. "served" asks `POST /query` with the
    turns, so what its service is set to rewrites; it needs an engine, the others none. Raises GraftError.
    """
    runs: dict[Form, RetrievalRun] = {}
    for form in forms:
        started = time.perf_counter()
        cases = []
        for one in asked:
            cases.append(_scored(one, *_found(client, collection, one, form)))
            on_case(form, cases[-1])
        facts = RunFacts(
            name=f"conversations: {form}",
            dataset="conversations",
            created_at=now(),
            configuration={"collection": collection, "form": form, "top_k": TOP_K},
            seconds=round(time.perf_counter() - started, 3),
        )
        runs[form] = RetrievalRun(facts=facts, metrics=means(cases), cases=tuple(cases))
    return runs


def means(cases: Sequence[RetrievalCase]) -> dict[str, float]:
    names = cases[0].metrics if cases else ()
    return {name: sum(case.metrics[name] for case in cases) / len(cases) for name in names}


def of_slice(run: RetrievalRun, **wanted: str) -> dict[str, float]:
    """The means over the cases of a slice, as language="zh", split="check"."""
    return means([one for one in run.cases if wanted.items() <= one.case.slices.items()])


def _found(client: Client, collection: str, one: Conversation, form: Form) -> tuple[str, tuple[Hit, ...]]:
    """-> what was searched for, and the hits."""
    if form == "served":
        query = QueryRequest(
            question=one.question,
            collection=collection,
            messages=list(one.turns),
            top_k=TOP_K,
            max_tokens=1,
            source="eval",
        )
        answer = client.query(query)
        hits = client.interaction(answer.interaction_id)["hits"]
        return answer.search or one.question, tuple(Hit.model_validate(hit) for hit in hits)

    def found(text: str) -> tuple[Hit, ...]:
        return client.retrieve(SearchRequest(question=text, collection=collection, top_k=TOP_K)).hits

    if form == "standalone":
        return one.standalone, found(one.standalone)
    search = by_rules(one.question, one.turns)
    if form == "as_is" or search.leans == "no":
        return one.question, found(one.question)
    return search.text, tuple(shared(search.leans, found(search.text), found(one.question), TOP_K))


def _scored(one: Conversation, text: str, hits: Sequence[Hit]) -> RetrievalCase:
    """One passage is relevant, so recall is whether it was found, and nDCG is its rank's discount."""
    ranks = [n for n, hit in enumerate(hits, 1) if _bare(one.passage) in _bare(hit.text)]
    rank = ranks[0] if ranks else math.inf
    metrics = {f"recall@{k}": float(rank <= k) for k in (1, 3, 10)}
    metrics["ndcg@10"] = 1 / math.log2(rank + 1) if ranks else 0.0
    slices: dict[str, str] = {"language": one.language, "kind": one.kind, "split": one.split}
    case = Case(id=one.id, question=text, relevant={one.path: 1}, turns=one.turns, slices=slices)
    ranked = tuple(Ranked(document=hit.path, score=hit.score, text=hit.text) for hit in hits)
    return RetrievalCase(case=case, ranked=ranked, metrics=metrics)


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
