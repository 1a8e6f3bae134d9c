"""finetune.rewards: what an answer is worth, reward by reward; and what is no number."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from eval.answer_metrics import token_f1 as graded_f1
from finetune.prompt_rows import prompts_of
from finetune.recipe import Rewards, read_recipe, recipe_of
from finetune.rewards import (
    LONG,
    Sample,
    check_known,
    citation_correct,
    combined,
    exact_match,
    named,
    refusal_right,
    sample_of,
    scored,
    short,
    token_f1,
)
from finetune.rows import read_all, read_rows, write_rows
from finetune.rows_lines import rows_of
from finetune.schemas import Known, Message, PreferenceRow, PromptRow, Provenance, SftRow
from ingest.errors import InvalidError
from service.refusal import REFUSAL, REFUSAL_ZH

PASSAGES = (
    "The pump P-17 stands in Rotterdam and holds 4,250 hours.",
    "The valve stands in Hamburg.",
    "泵在鹿特丹，阀门在汉堡。",
)
ASKED = (Message(role="user", content="Where is the pump?"),)


def said(
    answer: str, refuse: bool = False, answers: Sequence[str] = ("Rotterdam",), gold: Sequence[int] = (1,)
) -> Sample:
    known = {"passages": PASSAGES, "answers": () if refuse else tuple(answers), "gold": () if refuse else tuple(gold)}
    return Sample(prompt=ASKED, answer=answer, question="Where is the pump?", refuse=refuse, **known)


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Rotterdam [1]", 1.0),
        ("Rotterdam", 0.0),  # cites nothing, though the service could say where it is from
        ("Rotterdam [2]", 0.0),
        ("Hamburg [2]", 0.0),  # supported, and not by a gold passage
        ("The pump is in Rotterdam [1]. The valve is in Hamburg [2].", 0.5),
        ("The pump is in Rotterdam [1]. It was painted green by nobody.", 0.5),
        ("Rotterdam [9]", 0.0),
        (REFUSAL, 0.0),
        ("", 0.0),
    ],
)
def test_a_citation_is_worth_what_it_supports(answer: str, worth: float) -> None:
    assert citation_correct([said(answer)]) == [pytest.approx(worth)]


def test_where_no_passage_answers_a_refusal_is_what_is_right() -> None:
    for reward in (citation_correct, exact_match, token_f1, refusal_right):
        assert reward([said(REFUSAL, refuse=True), said("Rotterdam [1]", refuse=True), said("", refuse=True)]) == [
            1,
            0,
            0,
        ]
    assert refusal_right([said(REFUSAL), said("Rotterdam"), said("")]) == [0, 1, 0]
    assert refusal_right([said(REFUSAL_ZH, refuse=True)]) == [1]


def test_words_are_graded_as_eval_grades_them() -> None:
    answers = ["Rotterdam [1]", "the Rotterdam!", "in Rotterdam", "Hamburg", "", REFUSAL]
    assert exact_match([said(one) for one in answers]) == [1, 1, 0, 0, 0, 0]
    assert token_f1([said(one) for one in answers[2:4]]) == [graded_f1(one, ["Rotterdam"]) for one in answers[2:4]]
    assert token_f1([said("鹿特丹 [3]", answers=["鹿特丹"]), said("在汉堡", answers=["汉堡"])]) == [
        1,
        pytest.approx(0.8),
    ]
    assert exact_match([said("Yes, it is.", answers=["yes"])]) == [1]  # as `eval` decides a yes or no


def test_short_counts_words_of_any_script_but_no_markers() -> None:
    one, ten, chinese, none = short([said("a [1]"), said("a " * 10), said("鹿特丹"), said("")])
    assert (one, ten, chinese, none) == (1 - 1 / LONG, 1 - 10 / LONG, 1 - 3 / LONG, 0)
    assert short([said("a " * 3 * LONG)]) == [0]


def test_rewards_add_up_by_their_weights() -> None:
    rewards = Rewards(rewards={"exact_match": 2.0, "short": -1.0})
    parts = named(rewards, Path(), "float32")
    samples = [said("Rotterdam"), said("Hamburg")]
    assert combined(parts, rewards.rewards)(samples) == [2 - (1 - 1 / LONG), -(1 - 1 / LONG)]
    assert list(scored(parts, samples)) == ["exact_match", "short"]


def test_what_is_no_number_is_refused_with_the_reward_and_the_sample() -> None:
    def broken(samples: Sequence[Sample]) -> list[float]:
        return [float("nan") if "pump" in one.answer else 1.0 for one in samples]

    with pytest.raises(InvalidError, match=r"'broken' is nan for the answer 'a pump' to 'Where is the pump\?'"):
        scored({"broken": broken}, [said("a valve"), said("a pump")])
    with pytest.raises(InvalidError, match="1 numbers for 2 answers"):
        scored({"few": lambda _: [1.0]}, [said("a"), said("b")])


def test_a_prompt_that_lacks_what_a_reward_needs_is_refused_by_its_place() -> None:
    bare = PromptRow(prompt=ASKED)
    rows = rows_of([PromptRow(prompt=ASKED, known=Known(refuse=True)), bare], ["rows.jsonl:1", "rows.jsonl:2"])
    for name, needed in (
        ("citation_correct", "passages"),
        ("exact_match", "known.answers"),
        ("token_f1", "right answer"),
    ):
        with pytest.raises(InvalidError, match=f"rows.jsonl:2: reward '{name}' needs .*{needed}"):
            check_known([name], rows)
    check_known(["short", "refusal_right"], rows)


def test_prompts_come_from_rows_of_every_kind(tmp_path: Path) -> None:
    shown = "".join(f"[{n}] {text}\n\n" for n, text in enumerate(PASSAGES, 1)) + "Question: Where is the pump?"
    prompt = (Message(role="system", content="Answer."), Message(role="user", content=shown))
    right = (Message(role="assistant", content="Rotterdam [1]"),)
    wrong = (Message(role="assistant", content="Hamburg [2]"),)
    source = Provenance(documents=("a.md",), acl=("staff",))
    refused = (Message(role="assistant", content=REFUSAL),)
    rows = [
        SftRow(prompt=prompt, completion=right, source=source),
        PreferenceRow(prompt=prompt, chosen=right, rejected=wrong, source=source),
        SftRow(prompt=prompt, completion=refused),
        SftRow(prompt=(*ASKED, *right)),
    ]
    made = [row for row in prompts_of(rows_of(rows)).rows if isinstance(row, PromptRow)]
    known = Known(question="Where is the pump?", answers=("Rotterdam",), passages=PASSAGES, gold=(1,))
    assert [row.known for row in made] == [
        known,
        known,
        known.model_copy(update={"answers": (), "gold": (), "refuse": True}),
        Known(question="Where is the pump?", answers=("Rotterdam",)),
    ]
    assert made[0].source == source
    assert made[3].prompt == ASKED
    assert sample_of(made[0], "<think>no</think> Rotterdam [1] ").answer == "Rotterdam [1]"
    write_rows(made, tmp_path / "prompts.jsonl")
    assert read_rows(tmp_path / "prompts.jsonl", "ppo").rows == tuple(made)
    assert read_all(tmp_path / "prompts.jsonl").rows.rows == tuple(made)
    with pytest.raises(InvalidError, match="rows for grpo, not for sft"):
        read_rows(tmp_path / "prompts.jsonl", "sft")
    write_rows([*rows[:1], *made[:1]], tmp_path / "mixed.jsonl")
    assert len(read_rows(tmp_path / "mixed.jsonl", "grpo").rows) == 2
    with pytest.raises(InvalidError, match=r"mixed\.jsonl:2: it has a prompt and no completion"):
        read_rows(tmp_path / "mixed.jsonl", "sft")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Where?", "known": {"answer": "x"}}\n{"prompt": []}\n')
    with pytest.raises(InvalidError, match=r"bad\.jsonl:1: known: .*answer.*\n.*bad\.jsonl:2: prompt is empty"):
        read_rows(tmp_path / "bad.jsonl", "grpo")


def test_a_recipe_has_rewards_where_its_method_learns_from_them() -> None:
    grpo = {"name": "mine", "method": "grpo"}
    for wrong, said_so in (
        (grpo, "'grpo' needs rewards"),
        ({**grpo, "method": "sft", "reward": {"rewards": {"short": 1}}}, "'sft' learns from rows"),
        ({**grpo, "reward": {"rewards": {"shorter": 1}}}, "citation_correct"),
        ({**grpo, "reward": {"rewards": {"reward_model": 1}}}, "set reward_model to the folder"),
        ({**grpo, "reward": {"rewards": {"short": 1}, "reward_model": "m"}}, "no weight"),
    ):
        with pytest.raises(InvalidError, match=said_so):
            recipe_of(wrong)
    found = read_recipe("grpo", ["rewards={short=0.5, reward_model=1.0}", "reward_model=models/rm"]).reward
    assert found == Rewards(rewards={"short": 0.5, "reward_model": 1.0}, reward_model=Path("models/rm"))
