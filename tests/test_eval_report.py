"""The report: its figures are the run's, what is missing is said, and nothing of a run's texts becomes markup."""

import html
import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from eval.report import render, write_report
from eval.schemas import AnswerCase, AnswersRun, Case, Passage, Ranked, RetrievalCase, RetrievalRun, Run, RunFacts
from ingest.errors import InvalidError

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title><img src=https://example.org/x onerror=alert(2)>",
    '"><svg onload="alert(3)">',
    "{{ 7 * 7 }}{% raw %}",
    "a\x00b\x1b[31m\ufffe",
    "\u202eright to left\u202d مرحبا",
    "W" * 5000,
    "word " * 20_000,
    "长" * 100_000,
]
INLINE = {"bdi", "mark", "b", "strong", "code", "a", "time", "path", "g"}
VOID = {"meta", "col", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """The page as a parser sees it; the tags must close in their order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._part(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._part(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def _part(self, tag: str) -> None:
        if tag not in INLINE:
            self.texts.append(((), " "))

    @property
    def text(self) -> str:
        return " ".join("".join(text for inside, text in self.texts if "style" not in inside).split())


def facts(**given: Any) -> RunFacts:
    known = {"name": "fused", "dataset": "tides", "created_at": datetime(2026, 3, 4, 5, 6, tzinfo=UTC), "machine": "M7"}
    return RunFacts.model_validate({**known, "configuration": {"retrieval": {"top_k": 8}}, "seconds": 75, **given})


def retrieval_case(n: int, score: float, question: str = "", **case: Any) -> RetrievalCase:
    rank = {1.0: 1, 0.5: 2}.get(score)
    ranked = [Ranked(document=f"other{at}", score=1 / at, text=f"passage {at} of {n}") for at in range(1, 13)]
    if rank:
        ranked[rank - 1] = Ranked(document=f"gold{n}", score=1 / rank, text=f"the tide of {n}")
    asked = Case(id=f"q{n}", question=question or f"question {n}?", relevant={f"gold{n}": 1}, **case)
    return RetrievalCase(
        case=asked,
        ranked=tuple(ranked),
        metrics={"ndcg@10": score, "recall@10": float(score > 0)},
        timings_ms={"total": n + 1},
    )


def retrieval_run(*cases: RetrievalCase, **given: Any) -> RetrievalRun:
    names = dict.fromkeys(name for case in cases for name in case.metrics)
    means = {name: sum(case.metrics[name] for case in cases) / len(cases) for name in names}
    return RetrievalRun(facts=facts(**given), metrics=means, cases=cases)


def answer_case(n: int, f1: float | None, text: str = "The tide turns [1].", **given: Any) -> AnswerCase:
    case = Case(
        id=f"a{n}", question=f"when {n}?", answers=("at noon",), relevant={"gold": 1}, slices={"language": "en"}
    )
    passages = (
        Passage(document="other", text="It rains.", score=0.9, in_prompt=True),
        Passage(document="gold", text="The tide turns at noon, and again at night.", score=0.8, in_prompt=False),
    )
    sentence = {
        "text": text,
        "start": 0,
        "end": len(text),
        "citations": [1],
        "supported": False,
        "unsupported": "words",
    }
    known: dict[str, Any] = {
        "case": case,
        "answer": text,
        "refused": False,
        "finish_reason": "stop",
        "interaction_id": f"i{n}",
        "passages": passages,
        "citations": ({"n": 1, "path": "tides.md", "page": 4, "quote": "It rains."},),
        "sentences": (sentence,),
        "scores": {} if f1 is None else {"f1": f1, "good": float(f1 >= 0.5)},
        "not_evaluated": {"f1": "the judge was away"} if f1 is None else {},
        "good": bool(f1 and f1 >= 0.5),
        "blame": None if f1 is None or f1 >= 0.5 else "ignored",
        "blame_detail": "" if f1 is None or f1 >= 0.5 else "the passage at rank 2 was in the prompt",
        "timings_ms": {"total": 100.0},
        "usage": {"prompt_tokens": 50 + n},
    }
    return AnswerCase.model_validate({**known, **given})


def answers_run(*cases: AnswerCase, **given: Any) -> AnswersRun:
    held: dict[str, list[float]] = {}
    for case in cases:
        for name, value in case.scores.items():
            held.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in held.items()}
    counts = {name: len(values) for name, values in held.items()} | {
        "ignored": sum(one.blame == "ignored" for one in cases)
    }
    control = given.pop("control", None)
    return AnswersRun(facts=facts(**given), metrics=means, counts=counts, cases=cases, control=control)


MIXED = retrieval_run(*(retrieval_case(n, (1.0, 0.5, 0.0, 1.0)[n % 4]) for n in range(40)))


def hostile_runs() -> Iterator[Run]:
    configuration = {text[:200]: text for text in HOSTILE}
    told = {"name": HOSTILE[0], "dataset": HOSTILE[1], "machine": HOSTILE[2], "configuration": configuration}
    cases = []
    for n, text in enumerate(HOSTILE):
        slices = {"language": '"><b>', text[:50]: text}
        asked = Case(id=text, question=text, answers=(text,), relevant={text: 1, "no" + text: 1}, slices=slices)
        ranked = tuple(Ranked(document=text, score=0.5, text=text) for _ in range(40))
        cases.append(
            RetrievalCase(case=asked, ranked=ranked, metrics={"ndcg@10": n / 20, text[:99]: 0.5}, timings_ms={text: n})
        )
    yield RetrievalRun(
        facts=facts(**told), metrics={"ndcg@10": 0.2} | {text[:99]: 0.5 for text in HOSTILE}, cases=tuple(cases)
    )
    answered = []
    for n, (text, one) in enumerate(zip(HOSTILE, cases, strict=True)):
        sentence = {"text": text, "citations": [text, 1], "supported": text, "unsupported": text}
        passages = tuple(Passage(document=text, text=text, score=0.5, in_prompt=False) for _ in range(50))
        answered.append(
            answer_case(n, 0.0, text, case=one.case, passages=passages, sentences=(sentence,) * 30, finish_reason=text,
                        citations=({"n": 1, "path": text, "quote": text},), blame_detail=text,
                        not_evaluated={text: text}, usage={text: 3})
        )  # fmt: skip
    yield answers_run(*answered, **told)


@pytest.fixture(scope="module", params=["retrieval", "answers"])
def hostile(request: pytest.FixtureRequest) -> str:
    run = next(run for run in hostile_runs() if run.kind == request.param)
    return render(run, before=run)


def test_hostile_texts_stay_text(hostile: str) -> None:
    page = Page(hostile)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "base", "form"}
    assert [tag for tag, attributes in page.tags if any(name.startswith("on") for name in attributes)] == []
    assert HOSTILE[0] in page.text
    assert HOSTILE[3] in page.text
    assert all(re.fullmatch(r"[A-Za-z-]+", attributes.get("lang") or "en") for _, attributes in page.tags)


def test_no_character_that_a_page_may_not_hold(hostile: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ufffe]", hostile)
    assert "a\ufffdb\ufffd[31m\ufffd" in hostile


def test_page_of_long_texts_stays_small_and_says_what_it_cut(hostile: str) -> None:
    assert len(hostile.encode()) < 2_000_000
    assert re.search(r"cut here: 98,500 more characters", hostile)


@pytest.mark.parametrize("run", [*hostile_runs(), MIXED], ids=["retrieval", "answers", "plain"])
def test_page_needs_nothing_beside_it(run: Run) -> None:
    page = Page(render(run, before=run))
    for tag, attributes in page.tags:
        assert tag not in ("link", "script")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert "url(" not in "".join(text for inside, text in page.texts if "style" in inside)
    policy = next(one["content"] for tag, one in page.tags if tag == "meta" and one.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    linked = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert linked <= {f"#{target}" for target in targets}


def test_figures_are_the_runs() -> None:
    text = Page(render(MIXED)).text
    assert "nDCG@10 0.625 95 % interval 0.4" in text or "nDCG@10 0.625 95 % interval 0.5" in text
    assert "Recall@10 0.750" in text
    assert "40 cases" in text
    assert "tides" in text
    assert "2026-03-04 05:06 UTC" in text
    assert "1 min 15 s" in text
    assert "Total 20.5 38.0 39.6 40" in text  # p50, p95, p99 of 1 to 40
    assert "retrieval.top_k 8" in text
    assert "1: 20, 2: 10, 3: 0, 4–10: 0, none: 10" in text


def test_worst_cases_come_first_and_show_what_was_found() -> None:
    text = Page(render(retrieval_run(retrieval_case(1, 1.0), retrieval_case(2, 0.0), retrieval_case(3, 0.5)))).text
    worst = text.partition("The worst cases")[2]
    assert worst.index("question 2?") < worst.index("question 3?")
    assert "question 1?" not in worst
    assert "All 2 questions below a full score" in worst
    assert "No relevant document among the 12 found." in worst
    assert "Not found: ★ gold2" in worst
    assert "First relevant document at rank 2." in worst
    assert "2 gold3 ★ relevant 0.500" in worst


def test_relevant_document_far_down_is_shown_at_its_rank() -> None:
    ranked = tuple(Ranked(document=f"d{at}", score=1 / at, text=f"text {at}") for at in range(1, 61))
    case = Case(id="q", question="deep?", relevant={"d47": 2})
    one = RetrievalCase(case=case, ranked=ranked, metrics={"ndcg@10": 0.0})
    worst = Page(render(retrieval_run(one))).text.partition("The worst cases")[2]
    assert "47 d47 ★ relevant 0.021 text 47" in worst
    assert "First relevant document at rank 47." in worst
    assert "49 more are not shown" in worst


def test_answer_beside_gold_and_passages_with_its_blame() -> None:
    source = render(answers_run(answer_case(1, 0.0), answer_case(2, 1.0)))
    text = Page(source).text
    assert "Ignored What helps:" in text
    worst = text.partition("The worst cases")[2]
    assert "when 2?" not in worst
    assert "The passage at rank 2 was in the prompt." in worst
    assert "Gold at noon Answer The tide turns [1]." in worst
    assert worst.count("The tide turns [1].") == 1
    assert "✕ not supported: its sources hold too little of it" in worst
    assert "[1] tides.md, page 4 It rains." in worst
    assert "2 gold ★ gold not in the prompt 0.800 The tide turns at noon, and again at night." in worst
    assert "<mark>at noon</mark>" in source


def test_missing_score_is_said_and_never_a_zero() -> None:
    text = Page(render(answers_run(answer_case(1, 1.0), answer_case(2, None), answer_case(3, 0.8)))).text
    assert "Token F1 0.900" in text
    assert "Not evaluated 1 of 3 cases" in text
    assert re.search(r"Token F1 0\.900 \S+ 2 1: the judge was away", text)
    nothing = Page(render(answers_run(answer_case(1, None), answer_case(2, None)))).text
    assert "Nothing was evaluated" in nothing
    assert "Token F1 not evaluated 0 2: the judge was away" in nothing
    assert "0.000" not in nothing.partition("The worst cases")[0]


def test_score_that_is_no_number_is_not_evaluated() -> None:
    run = answers_run(answer_case(1, 1.0), answer_case(2, None, scores={"f1": float("nan")}, not_evaluated={}))
    text = Page(
        render(run.model_copy(update={"metrics": {"f1": 1.0, "judge": float("nan")}, "counts": {"f1": 1}}))
    ).text
    assert "1: its value is no number" in text
    assert "Judge not evaluated" in text
    assert not re.search(r"\bnan\b", text)


def test_question_that_got_no_answer_is_not_evaluated_rather_than_bad() -> None:
    failed = answer_case(2, None, "", finish_reason="error", passages=(), sentences=())
    text = Page(render(answers_run(answer_case(1, 1.0), failed))).text
    assert "when 2?" not in text.partition("The worst cases")[2]
    assert "Not evaluated 1 of 2 cases" in text


@pytest.mark.parametrize("empty", [retrieval_run(), answers_run()], ids=["retrieval", "answers"])
def test_run_without_cases(empty: Run) -> None:
    text = Page(render(empty, before=empty)).text
    assert "Nothing was evaluated: the run has no cases." in text
    assert "The two runs have no case in common" in text


def test_run_of_one_case_has_no_interval() -> None:
    one = retrieval_run(retrieval_case(1, 0.5))
    text = Page(render(one, before=one)).text
    assert "nDCG@10 0.500 no interval: one case 1 case" in text


def test_difference_has_sign_word_interval_and_p() -> None:
    before = retrieval_run(*(retrieval_case(n, 0.0 if n < 30 else 1.0) for n in range(40)), name="bm25",
                           configuration={"retrieval": {"top_k": 4}})  # fmt: skip
    after = retrieval_run(*(retrieval_case(n, 0.5) for n in range(40)))
    text = Page(render(after, before)).text
    assert re.search(r"▲ \+0\.250 better \+0\.1\d\d to \+0\.3\d\d, p = 0\.00\d", text)
    assert "Compared with bm25 of 2026-03-04 05:06 UTC on the 40 cases that both have." in text
    assert "retrieval.top_k 4 → 8" in text
    assert re.search(r"nDCG@10 0\.250 0\.500 ▲ \+0\.250 better \S+ to \S+ 0\.00\d 30 / 10 40", text)
    assert "0.000 → 0.500 (+0.500) · first relevant: not in the first 12 → rank 2" in text
    assert "1.000 → 0.500 (−0.500) · first relevant: rank 1 → rank 2" in text
    back = Page(render(before, after)).text
    assert "▼ −0.250 worse" in back
    assert "unclear" in Page(render(after, after)).text


def test_runs_that_share_nothing_are_not_compared() -> None:
    before = retrieval_run(*(retrieval_case(n, 1.0) for n in range(100, 105)))
    assert "no case in common" in Page(render(MIXED, before)).text
    other = before.model_copy(update={"facts": facts(dataset="rivers")})
    assert "of another data set, rivers, so nothing is compared" in Page(render(MIXED, other)).text


def test_runs_of_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="a run of answers is not compared with one of retrieval"):
        write_report(answers_run(answer_case(1, 1.0)), tmp_path / "report.html", MIXED)
    assert list(tmp_path.iterdir()) == []


def test_controls_stand_beside_the_run() -> None:
    run = answers_run(*(answer_case(n, 1.0 if n % 2 else 0.6) for n in range(20)))
    control = answers_run(*(answer_case(n, 0.0 if n % 2 else 0.2) for n in range(20)), control="none")
    text = Page(render(run, controls=[control])).text
    assert "Without passages" in text
    assert re.search(r"Token F1 0\.800 0\.100 ▲ \+0\.700 better \+0\.5\d\d to \+0\.8\d\d", text)
    assert "control, without passages" in Page(render(control)).text


def test_slices_show_the_worst_fifteen_of_many() -> None:
    cases = [
        retrieval_case(
            n, 1.0 if n >= 10 else 0.0, slices={"language": "zh" if n % 2 else "en", "document": f"doc{n // 2}"}
        )
        for n in range(60)
    ]
    text = Page(render(retrieval_run(*cases))).text.partition("By slice")[2].partition("The worst cases")[0]
    assert "Document the worst 15 of 30" in text
    assert len(re.findall(r"\bdoc\d+ 2 ", text)) == 15
    assert "doc0 2 0.000" in text
    assert "Chinese (zh) 30 0.833" in text


def test_texts_are_tagged_with_their_language() -> None:
    case = retrieval_case(1, 0.0, "潮汐什么时候转变方向？", slices={"language": "zh-TW"})
    english = Ranked(
        document="en", score=1, text="The tide turns twice a day, at noon and at midnight, all the year round."
    )
    page = Page(render(retrieval_run(case.model_copy(update={"ranked": (english,)}))))
    tagged = {attributes["lang"] for tag, attributes in page.tags if attributes.get("lang") and tag != "html"}
    assert tagged == {"zh-TW", "en"}


def test_headings_and_tables_are_semantic() -> None:
    run = answers_run(*(answer_case(n, n / 10) for n in range(10)))
    page = Page(render(run, run, [run.model_copy(update={"control": "wrong"})]))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_same_run_gives_the_same_page() -> None:
    assert render(MIXED, MIXED) == render(RetrievalRun.model_validate_json(MIXED.model_dump_json()), MIXED)


def test_page_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(MIXED, path)
    assert path.read_text() == render(MIXED)
    assert list(tmp_path.iterdir()) == [path]
    beside = tmp_path / "made"
    beside.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)


@pytest.mark.parametrize("place", ["missing/report.html", "file/report.html", "folder", "n\x00l.html", "x" * 300])
def test_path_that_cannot_be_written_is_told(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidError, match=r"the report cannot be written to .*; name a file in a folder"):
        write_report(retrieval_run(), tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    case = retrieval_case(1, 0.0)
    broken = case.model_copy(update={"case": case.case.model_copy(update={"question": "half \ud800 pair"})})
    write_report(retrieval_run(broken), tmp_path / "report.html")
    assert "half \ufffd pair" in html.unescape((tmp_path / "report.html").read_text())
