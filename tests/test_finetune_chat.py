"""finetune.chat: rows as tokens, the same that serving sends, and which of them are learned."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from finetune.chat import Chat, Encoded, check, encode, encode_reply, prompt_ids, read_chat
from finetune.schemas import Message, SftRow
from ingest.errors import InvalidError, SettingsError

pytestmark = pytest.mark.slow
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def said(*messages: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in messages)  # type: ignore[arg-type]


CONVERSATIONS = {
    "one turn": said(("user", "What is it made of?"), ("assistant", "Bronze [1].")),
    "with a system message": said(("system", "Be short."), ("user", "Who?"), ("assistant", "Ada.\n\nAda Lovelace.")),
    "several turns": said(("user", "a"), ("assistant", "b b"), ("user", "c"), ("assistant", "<b>d</b>")),
    "Chinese": said(("system", "请简短。"), ("user", "泵的叶轮是什么做的？"), ("assistant", "青铜 [1]。")),
    "signs": said(("user", "{{ 1 }} \t| é 👍"), ("assistant", "`x`: {% y %}  z")),
}


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    return models / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return read_chat(folder)


def served(folder: Path, messages: tuple[Message, ...], opens: bool) -> list[int]:
    """The engine's way: the model's own template over the request's messages, then its tokenizer."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    plain = [message.model_dump() for message in messages]
    text = template.render(messages=plain, add_generation_prompt=opens)
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def learned(chat: Chat, encoded: Encoded) -> str:
    text: str = chat.tokenizer.decode([one for one, yes in zip(encoded.ids, encoded.learned, strict=True) if yes])
    return text


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_row_is_token_for_token_what_serving_sends_and_what_it_should_answer(
    name: str, chat: Chat, folder: Path
) -> None:
    messages = CONVERSATIONS[name]
    assert prompt_ids(chat, messages[:-1]) == served(folder, messages[:-1], opens=True)
    row = SftRow(prompt=messages[:-1], completion=messages[-1:])
    encoded = encode(chat, row)
    whole, prompt = served(folder, messages, opens=False), served(folder, messages[:-1], opens=True)
    assert encoded.ids == whole[:-1]  # the template's line break after the end is neither generated nor learned
    assert encoded.learned == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert learned(chat, encoded) == messages[-1].content + "<|im_end|>"
    check(chat, [row], [encoded])
    assert encoded.labels().count(-100) == len(prompt)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_our_marked_template_and_the_way_for_any_template_agree(name: str, chat: Chat) -> None:
    assert chat.marked is not None
    plain = chat._replace(marked=None)
    messages = CONVERSATIONS[name]
    for row in (SftRow(prompt=messages), SftRow(prompt=messages[:-1], completion=messages[-1:])):
        assert encode(chat, row) == encode(plain, row)


def test_without_a_completion_every_answer_is_learned_and_nothing_between_them(chat: Chat) -> None:
    encoded = encode(chat, SftRow(prompt=CONVERSATIONS["several turns"]))
    assert learned(chat, encoded) == "b b<|im_end|><b>d</b><|im_end|>"


def test_with_a_completion_earlier_answers_are_not_learned(chat: Chat) -> None:
    messages = CONVERSATIONS["several turns"]
    encoded = encode(chat, SftRow(prompt=messages[:-1], completion=messages[-1:]))
    assert learned(chat, encoded) == "<b>d</b><|im_end|>"


def test_thinking_is_dropped_from_answers_and_nothing_else_is_refused(chat: Chat) -> None:
    row = SftRow(prompt=said(("user", "q")), completion=said(("assistant", "<think>\nhm\n</think>\n\n Yes. ")))
    assert learned(chat, encode(chat, row)) == "Yes.<|im_end|>"
    for content in ("<think>never ended", "<think>all of it</think>"):
        row = SftRow(prompt=said(("user", "q")), completion=said(("assistant", content)))
        with pytest.raises(InvalidError, match="rows:3: an answer holds a <think> block"):
            encode(chat, row, "rows:3")


def test_a_preference_is_a_prompt_and_what_follows_it(chat: Chat, folder: Path) -> None:
    messages = CONVERSATIONS["Chinese"]
    reply = encode_reply(chat, messages[:-1], messages[-1:])
    assert reply.prompt == served(folder, messages[:-1], opens=True)
    assert chat.tokenizer.decode(reply.answer) == "青铜 [1]。<|im_end|>"
    with pytest.raises(InvalidError, match="one assistant message"):
        encode_reply(chat, messages[:1], messages[1:])


def test_the_check_finds_a_mask_and_a_template_that_do_not_fit(chat: Chat) -> None:
    row = SftRow(prompt=CONVERSATIONS["one turn"])
    encoded = encode(chat, row)
    start = encoded.learned.index(True)
    without_end = Encoded(encoded.ids[:-1], encoded.learned[:-1])
    too_much = Encoded(encoded.ids, [at >= start - 3 for at in range(len(encoded.ids))])
    for wrong in (without_end, too_much):
        with pytest.raises(SettingsError, match="what would be learned"):
            check(chat, [row], [wrong])
    assert chat.marked is not None
    other = chat._replace(marked=chat.marked.replace("AI assistant", "assistant"))
    with pytest.raises((SettingsError, InvalidError), match="template"):
        check(chat, [row], [encode(other, row)])


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Any:
    """-> what makes a model's folder with another template."""

    def make(template: str | None) -> Path:
        for name in TEXT_FILES:
            shutil.copy(folder / name, tmp_path / name)
        (tmp_path / "chat_template.jinja").unlink()
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def test_any_template_does_where_a_prompt_begins_what_follows_it(other: Any) -> None:
    template = (
        "{% for one in messages %}{% if one.role == 'user' %}Q: {{ one.content }}\nA:{% elif one.role == 'assistant' %}"
        " {{ one.content }}<|im_end|>\n{% else %}{{ raise_exception('no ' + one.role) }}{% endif %}{% endfor %}"
    )
    chat = read_chat(other(template))
    assert chat.marked is None
    row = SftRow(prompt=CONVERSATIONS["several turns"])
    encoded = encode(chat, row)
    check(chat, [row], [encoded])
    assert learned(chat, encoded) == " b b<|im_end|> <b>d</b><|im_end|>"
    with pytest.raises(InvalidError, match=r"does not take messages of the roles \['system', 'user', 'assistant'\]"):
        encode(chat, SftRow(prompt=CONVERSATIONS["with a system message"]))


def test_a_template_that_lays_out_a_prompt_otherwise_once_it_is_answered_is_refused(other: Any) -> None:
    template = (
        "{% for one in messages %}{{ one.role }}{% if loop.last %} (last){% endif %}: {{ one.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = read_chat(other(template))
    with pytest.raises(InvalidError, match="rows:7: the model's chat template lays out a prompt otherwise"):
        encode(chat, SftRow(prompt=CONVERSATIONS["one turn"]), "rows:7")


def test_a_template_without_an_end_of_turn_is_refused(other: Any) -> None:
    chat = read_chat(other("{% for one in messages %}{{ one.role }}:\n{{ one.content }}\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant:\n{% endif %}"))  # fmt: skip
    with pytest.raises(InvalidError, match="without an end-of-turn token"):
        encode(chat, SftRow(prompt=CONVERSATIONS["one turn"]))


def test_a_model_without_a_template_is_refused(other: Any) -> None:
    folder = other(None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    with pytest.raises(SettingsError, match="has no chat template"):
        read_chat(folder)
