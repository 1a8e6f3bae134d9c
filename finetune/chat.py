"""Conversations as tokens, exactly as serving sends them, and which of those tokens are learned.

A prompt is laid out by the base's own chat template, through its own tokenizer, as the engine does it for a request of ours: so
a default system message that the template adds is in both. What is learned is the assistant's text and the token that ends its
turn, and nothing else. No thinking is learned: what stands before `</think>` is dropped from answers, as serving drops it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.schemas import Message, SftRow
from ingest.errors import InvalidError, SettingsError
from service.generate import strip_thinking

IGNORED = -100  # the label of a token without a loss
SAMPLE = 32  # rows that are checked before training

# By a base's own template: the same with marks around what is learned. SmolLM2-135M-Instruct:
_SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SMOLLM2_TRAINING = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEMPLATES = {_SMOLLM2: _SMOLLM2_TRAINING}


class Chat(NamedTuple):
    """A base's tokenizer; its template with marks, where we have one; the tokens that end a turn."""

    tokenizer: Any
    marked: str | None
    ends: frozenset[int]


class Encoded(NamedTuple):
    """`ids`: (tokens,); `learned`: (tokens,), whether a token has a loss."""

    ids: list[int]
    learned: list[bool]

    def labels(self) -> list[int]:
        return [token if learned else IGNORED for token, learned in zip(self.ids, self.learned, strict=True)]


class Reply(NamedTuple):
    """A prompt up to where the model goes on, and what it should say, its end of turn included."""

    prompt: list[int]
    answer: list[int]


def read_chat(base: Path) -> Chat:
    """Raises SettingsError for a model that has no conversation format."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as error:  # the library raises OSError, ValueError and its own kinds
        raise SettingsError(f"the tokenizer of {str(base)!r} cannot be read: {error}") from error
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise SettingsError(
            f"the model in {str(base)!r} has no chat template, so that nothing says how a prompt is laid out: take its "
            "instruction-tuned version, or put the chat_template.jinja that it is served with into the folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = {tokenizer.eos_token_id}
    if (base / "generation_config.json").is_file():
        held = GenerationConfig.from_pretrained(base).eos_token_id
        ends |= set(held) if isinstance(held, list) else {held}
    return Chat(tokenizer, TRAINING_TEMPLATES.get(template.strip()), frozenset(ends - {None}))


def prompt_ids(chat: Chat, messages: Sequence[Message]) -> list[int]:
    """-> (tokens,) of a request's messages as the engine lays them out, up to where the answer starts."""
    return _rendered(chat, messages, add_generation_prompt=True)["input_ids"]  # type: ignore[no-any-return]  # the tokenizer is untyped


def encode(chat: Chat, row: SftRow, place: str = "a row") -> Encoded:
    """The answer's tokens are learned; where there is no completion, those of every assistant turn. Raises InvalidError."""
    prompt, completion = _plain(row.prompt, place), _plain(row.completion, place)
    messages = [*prompt, *completion]
    ids, learned = _marked(chat, messages) if chat.marked else _by_turns(chat, messages, len(prompt), place)
    if completion:
        start = len(_prefix(chat, prompt, ids, place))
        learned = [False] * start + learned[start:]
    last = max((at for at, one in enumerate(learned) if one), default=-1) + 1
    if not last:
        raise InvalidError(f"{place}: the chat template leaves no token of an assistant to learn")
    return Encoded(ids[:last], learned[:last])


def encode_reply(chat: Chat, prompt: Sequence[Message], completion: Sequence[Message], place: str = "a row") -> Reply:
    """Of a preference or a labelled row. Raises InvalidError."""
    if [one.role for one in completion] != ["assistant"]:
        raise InvalidError(f"{place}: a preferred, rejected or labelled answer is one assistant message")
    encoded = encode(chat, SftRow(prompt=tuple(prompt), completion=tuple(completion)), place)
    start = encoded.learned.index(True)
    return Reply(encoded.ids[:start], encoded.ids[start:])


def check(chat: Chat, rows: Sequence[SftRow], encoded: Sequence[Encoded], places: Sequence[str] = ()) -> None:
    """Reads a sample of encoded rows back: the learned tokens must be the answers and their ends, nothing else, and all tokens
    those that the base's own template gives. Raises SettingsError, since then it is the template that does not fit.
    """
    step = max(1, len(rows) // SAMPLE)
    for at in range(0, len(rows), step):
        place = places[at] if places else f"row {at + 1}"
        row, one = rows[at], encoded[at]
        prompt, completion = _plain(row.prompt, place), _plain(row.completion, place)
        own = _rendered(chat, [*prompt, *completion])["input_ids"]
        if own[: len(one.ids)] != one.ids:
            raise SettingsError(f"{place}: the training template does not give the tokens that the model's own gives")
        wanted = [message.content for message in completion or prompt if message.role == "assistant"]
        learned = list(_spans(one))
        said = [chat.tokenizer.decode(span[:-1]).strip() for span in learned]
        if said != wanted or any(span[-1] not in chat.ends for span in learned):
            raise SettingsError(
                f"{place}: what would be learned is {said!r}, not the answers {wanted!r} and their ends"
            )


def _plain(messages: Sequence[Message], place: str) -> tuple[Message, ...]:
    """Answers without thinking and without white space around them, which would join the template's tokens."""
    plain = []
    for message in messages:
        if message.role == "assistant":
            content = strip_thinking(message.content).strip()
            if content.startswith("<think>") or (not content and message.content.strip()):
                raise InvalidError(f"{place}: an answer holds a <think> block and nothing after it; leave the row out")
            message = message.model_copy(update={"content": content})
        plain.append(message)
    return tuple(plain)


def _rendered(chat: Chat, messages: Sequence[Message], template: str | None = None, **options: Any) -> Any:
    """`enable_thinking` as serving sets it; templates that know no such switch ignore it."""
    plain = [message.model_dump() for message in messages]
    try:
        return chat.tokenizer.apply_chat_template(
            plain, chat_template=template, tokenize=True, return_dict=True, enable_thinking=False, **options
        )
    except Exception as error:  # a template refuses roles or their order in its own ways
        roles = [message.role for message in messages]
        raise InvalidError(f"the model's chat template does not take messages of the roles {roles}: {error}") from error


def _marked(chat: Chat, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    encoded = _rendered(chat, messages, chat.marked, return_assistant_tokens_mask=True)
    return encoded["input_ids"], [bool(one) for one in encoded["assistant_masks"]]


def _by_turns(chat: Chat, messages: Sequence[Message], first: int, place: str) -> tuple[list[int], list[bool]]:
    """For any template that lays out a conversation as its beginning and what follows. `first`: message to learn from on; at
    the end of the messages there is none to leave out, so all assistant turns count.
    """
    ids: list[int] = _rendered(chat, messages)["input_ids"]
    learned = [False] * len(ids)
    for at, message in enumerate(messages):
        if message.role != "assistant" or at < (first if first < len(messages) else 0):
            continue
        start = len(_prefix(chat, messages[:at], ids, place))
        end = next((n for n in range(start, len(ids)) if ids[n] in chat.ends), None)
        if end is None:
            raise InvalidError(f"{place}: the model's chat template ends an answer without an end-of-turn token")
        learned[start : end + 1] = [True] * (end + 1 - start)
    return ids, learned


def _prefix(chat: Chat, messages: Sequence[Message], ids: list[int], place: str) -> list[int]:
    head = prompt_ids(chat, messages)
    if ids[: len(head)] != head:
        raise InvalidError(
            f"{place}: the model's chat template lays out a prompt otherwise when an answer follows, so that training would "
            "not show what serving sends; split the conversation into rows of one answer, or take another base"
        )
    return head


def _spans(encoded: Encoded) -> Iterator[list[int]]:
    """-> each run of learned tokens."""
    span: list[int] = []
    for token, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned:
            span.append(token)
        elif span:
            yield span
            span = []
    if span:
        yield span
