"""What rows are like before anything trains on them: lengths, what is there twice, what contradicts, what held-out rows share.

A row that is too long is named, never cut: an answer without its end teaches to stop early or never.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from eval.answer_metrics import is_refusal
from finetune.rows_lines import digest_of
from finetune.rows_split import asked, normal, prompt_text
from finetune.schemas import KtoRow, Message, PreferenceRow, PromptRow, Row, Rows, who_may_see
from ingest.errors import InvalidError
from ingest.schemas import Frozen
from service.show import out

FRAME = 5  # tokens that a chat template puts around a message, where the template is not known
Render = Callable[[Sequence[Message], str], str]  # messages, and the place to name -> the prompt
SHOWN = 5  # places that are named on the terminal


class Lengths(Frozen):
    """In tokens. `p95`: of 100 rows, 95 are at most so long."""

    min: int
    median: int
    p95: int
    max: int


class Report(Frozen):
    """Of rows that train. Groups of places are rows that belong together; a place is as "rows.jsonl:7".

    `too_long`: rows with more than `max_length` tokens. `contradictions`: the same prompt with different answers; of
    preferences, an answer that one row prefers and another rejects; of labelled ones, one with both labels. `overlap`: places of
    rows that ask what is also held out. `overlap_documents`: documents on both sides.
    """

    name: str
    method: str
    digest: str
    rows: int
    held_out: int | None = None
    documents: int
    acl: tuple[str, ...] | None = None  # groups that may see every row; None: all may
    kinds: dict[str, int] = {}
    prompt_tokens: Lengths | None = None
    answer_tokens: Lengths | None = None
    total_tokens: Lengths | None = None
    estimated: bool = False  # the lengths, since the chat template is not known
    max_length: int | None = None
    too_long: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    contradictions: tuple[tuple[str, ...], ...] = ()
    empty_answers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # each with the reason
    overlap: tuple[str, ...] = ()
    overlap_documents: tuple[str, ...] = ()
    refusals: float = 0.0  # share of the answers
    wanted: float | None = None  # share of the labels that are true


def report(
    rows: Rows,
    held_out: Rows | None,
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
    template: str | None = None,
) -> Report:
    """`tokenizer` and `template`, the base's chat template, count tokens; without a tokenizer there are no lengths. Raises
    InvalidError for a row whose messages the template does not take.
    """
    places = places_of(rows)
    answers = [answers_of(row) for row in rows.rows]
    render = _renderer(template) if template else None
    lengths = _lengths(rows.rows, places, answers, tokenizer, render) if tokenizer and rows.rows else []
    totals = [prompt + answer for prompt, answer in lengths]
    labels = [row.label for row in rows.rows if isinstance(row, KtoRow)]
    return Report(
        name=rows.name,
        method=method_of(rows),
        digest=rows.digest or digest_of(rows.rows),
        rows=len(rows.rows),
        held_out=None if held_out is None else len(held_out.rows),
        documents=len({one for row in rows.rows for one in row.source.documents}),
        acl=who_may_see(row.source.acl for row in rows.rows),
        kinds=dict(Counter(row.source.kind or "row" for row in rows.rows)),
        prompt_tokens=_summary([prompt for prompt, _ in lengths]),
        answer_tokens=_summary([answer for _, answer in lengths]),
        total_tokens=_summary(totals),
        estimated=bool(lengths) and render is None,
        max_length=max_length,
        too_long=tuple(
            place for place, total in zip(places, totals, strict=False) if max_length and total > max_length
        ),
        duplicates=_same(places, [(prompt_text(row), *map(normal, said)) for row, said in _pairs(rows, answers)]),
        contradictions=_contradictions(rows, places),
        empty_answers=tuple(
            place for place, said in zip(places, answers, strict=True) if not all(map(str.strip, said))
        ),
        left_out=rows.left_out,
        refusals=sum(is_refusal(said[0], "") for said in answers if said) / max(1, len(answers)),
        wanted=sum(labels) / len(labels) if labels else None,
        **_overlap(rows, held_out, places),
    )


def answers_of(row: Row) -> tuple[str, ...]:
    """What a row teaches: its last answer, or the one that is chosen and the one that is rejected."""
    if isinstance(row, PreferenceRow):
        return row.chosen[-1].content, row.rejected[-1].content
    if isinstance(row, PromptRow):  # the model is to write it
        return ()
    return ((row.completion or row.prompt)[-1].content,)


def places_of(rows: Rows) -> tuple[str, ...]:
    return rows.places or tuple(f"row {number}" for number, _ in enumerate(rows.rows, 1))


def method_of(rows: Rows) -> str:
    kinds = {PreferenceRow: "dpo", KtoRow: "kto", PromptRow: "grpo"}
    return next((kinds.get(type(row), "sft") for row in rows.rows), "sft")


def visible(text: str) -> str:
    """With what a terminal would act on, or not show, as its escape: control characters, marks of direction, half characters."""
    return "".join(
        sign if sign == "\n" or unicodedata.category(sign)[0] not in "CZ" or sign == " " else _escaped(sign)
        for sign in text
    )


def show(found: Report) -> None:
    """On the terminal. What comes from rows is never read as markup."""
    held = "" if found.held_out is None else f", {found.held_out} held out"
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items()) if set(found.kinds) != {"row"} else ""
    _say(f"{found.name}: {found.rows} rows for {found.method}{held}" + (f" ({kinds})" if kinds else ""))
    if found.documents:
        groups = f"; every row may be seen by {', '.join(found.acl) or 'nobody'}" if found.acl is not None else ""
        _say(f"  from {found.documents} documents{groups}")
    if found.total_tokens:
        _show_lengths(found)
    share = f"{found.refusals:.0%} of the answers are refusals"
    _say(f"  {share}" + (f"; {found.wanted:.0%} of the labels are true" if found.wanted is not None else ""))
    _told(f"longer than {found.max_length} tokens, so not trained on", found.too_long)
    _told("the same as another", [one for group in found.duplicates for one in group[1:]])
    _told("in contradiction (same prompt, another answer)", [", ".join(group) for group in found.contradictions])
    _told("without an answer", found.empty_answers)
    _told("that are left out", found.left_out)
    _told("that ask what is held out too", found.overlap)
    _told("documents on both sides", found.overlap_documents, "")
    if found.held_out == 0:
        _say(
            "  nothing is held out: the rows hang together by their documents or prompts, so training has no early stop"
        )


def _show_lengths(found: Report) -> None:
    table = Table("tokens" + (" (estimated)" if found.estimated else ""), "least", "median", "95 %", "most", box=None)
    for name, one in (("prompt", found.prompt_tokens), ("answer", found.answer_tokens), ("both", found.total_tokens)):
        if one:
            table.add_row(f"  {name}", str(one.min), str(one.median), str(one.p95), str(one.max))
    out.print(table)


def _told(what: str, places: Sequence[str], unit: str = "rows ") -> None:
    if places:
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        _say(f"  {len(places)} {unit}{what}: {', '.join(places[:SHOWN])}{more}", "yellow")


def _say(line: str, style: str = "") -> None:
    out.print(Text(visible(line), style))


def _escaped(sign: str) -> str:
    return sign if unicodedata.category(sign) == "Zs" else sign.encode("unicode_escape").decode()


def _lengths(
    rows: Sequence[Row],
    places: Sequence[str],
    answers: Sequence[tuple[str, ...]],
    tokenizer: Tokenizer,
    render: Render | None,
) -> list[tuple[int, int]]:
    """-> tokens of each row's prompt, as far as to where the answer starts, and of its longest answer with its end."""
    prompts_of = [row.prompt if _has_reply(row) else row.prompt[:-1] for row in rows]
    if render:
        prompts = [render(messages, place) for messages, place in zip(prompts_of, places, strict=True)]
        frames = [0] * len(rows)
    else:
        prompts = ["\n".join(one.content for one in messages) for messages in prompts_of]
        frames = [FRAME * (len(messages) + 1) for messages in prompts_of]
    said = [answer for row in answers for answer in row]
    counted = iter(_count(tokenizer, said))
    longest = [max((next(counted) + 1 for _ in row), default=0) for row in answers]
    return [
        (prompt + frame, answer)
        for prompt, frame, answer in zip(_count(tokenizer, prompts), frames, longest, strict=True)
    ]


def _count(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(one.ids) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _renderer(template: str) -> Render | None:
    """-> prompts as transformers lays them out, as far as to where the answer starts; None: it needs more than messages."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
        compiled.render(messages=[{"role": "user", "content": "a"}], add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        return None

    def render(messages: Sequence[Message], place: str) -> str:
        plain = [{"role": one.role, "content": one.content} for one in messages]
        try:
            return compiled.render(messages=plain, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            roles = [one.role for one in messages]
            raise InvalidError(
                f"{place}: the model's chat template does not take messages of the roles {roles}: {error}; change the row, or "
                "take another model"
            ) from error

    return render


def _refuse(why: str) -> NoReturn:
    """What templates call for messages that they do not take."""
    raise TemplateError(why)


def _has_reply(row: Row) -> bool:
    return isinstance(row, (PreferenceRow, PromptRow)) or bool(row.completion)


def _summary(lengths: list[int]) -> Lengths | None:
    if not lengths:
        return None
    held, last = sorted(lengths), len(lengths) - 1
    return Lengths(min=held[0], median=held[last // 2], p95=held[-(-last * 95 // 100)], max=held[-1])


def _pairs(rows: Rows, answers: Sequence[tuple[str, ...]]) -> list[tuple[Row, tuple[str, ...]]]:
    """Each row with what makes it another one than a row with the same prompt."""
    return [
        (row, (*said, str(row.label)) if isinstance(row, KtoRow) else said)
        for row, said in zip(rows.rows, answers, strict=True)
    ]


def _same(places: Sequence[str], keys: Sequence[Any]) -> tuple[tuple[str, ...], ...]:
    groups: dict[Any, list[str]] = defaultdict(list)
    for place, key in zip(places, keys, strict=True):
        groups[key].append(place)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _contradictions(rows: Rows, places: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    said: dict[Any, dict[str, str]] = defaultdict(dict)  # by what is judged: the first place of each judgement
    for place, row in zip(places, rows.rows, strict=True):
        prompt, answers = prompt_text(row), [normal(one) for one in answers_of(row)]
        if isinstance(row, PreferenceRow):
            for answer, judgement in zip(answers, ("chosen", "rejected"), strict=True):
                said[prompt, answer].setdefault(judgement, place)
        elif isinstance(row, KtoRow):
            said[prompt, answers[0]].setdefault(str(row.label), place)
        elif answers:
            said[prompt].setdefault(answers[0], place)
    return tuple(tuple(one.values()) for one in said.values() if len(one) > 1)


def _overlap(rows: Rows, held_out: Rows | None, places: Sequence[str]) -> Mapping[str, Any]:
    if held_out is None:
        return {}
    texts = {one for row in held_out.rows for one in asked(row)}
    shown = {one for row in held_out.rows for one in row.source.documents}
    both = {one for row in rows.rows for one in row.source.documents} & shown
    return {
        "overlap": tuple(place for place, row in zip(places, rows.rows, strict=True) if asked(row) & texts),
        "overlap_documents": tuple(sorted(both)),
    }
