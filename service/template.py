"""A prompt version as a file: TOML with `passages`, `guard`, and the parts `en` and `zh`, or `all` for every language.

A part has a `system` message, worked `examples`, and the `user` message that asks; both messages are Jinja templates. They
are given text and choose where it stands: no calls, no arithmetic, no loops over anything but the passages.
"""

import tomllib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self, TypedDict

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2 import Template as Compiled
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from ingest.errors import InvalidError
from ingest.schemas import Frozen, Hit
from service.excerpt import Passage
from service.guard import neutral
from service.records import Turn
from service.refusal import is_chinese, refusal

MAX_CHARS = 16_000  # of a file
VARIABLES = frozenset({"question", "passages", "refusal", "language"})
FILTERS = ("trim", "lower", "upper", "length", "first", "last")
_LOOP = frozenset({"index", "index0", "first", "last", "length"})
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Getattr, nodes.Const, nodes.For, nodes.If,
    nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Concat, nodes.Filter,
)  # fmt: skip


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Example(Frozen):
    user: str
    assistant: str


class Part(Frozen):
    user: str
    system: str | None = None
    examples: tuple[Example, ...] = ()


class Template(Frozen):
    """`passages`: how many a prompt takes, at most. `tokens`: of the whole prompt, at most, where its model was trained on
    such; None: what the settings allow. `guard`: what passages and questions bring is defused (`service.guard`).
    """

    passages: int = Field(ge=0, le=50)
    tokens: int | None = Field(None, ge=64)
    guard: bool = True
    all: Part | None = None
    en: Part | None = None
    zh: Part | None = None

    @classmethod
    def of(cls, source: str) -> Self:
        """Raises InvalidError, which says all that is wrong with the file."""
        if len(source) > MAX_CHARS:
            raise InvalidError(f"the prompt is too long: {len(source)} characters, and {MAX_CHARS} are the most")
        try:
            template = cls.model_validate(tomllib.loads(source))
        except tomllib.TOMLDecodeError as error:
            raise InvalidError(f"the prompt is not valid TOML: {error}") from error
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors())
            raise InvalidError(f"the prompt does not fit: {said}") from error
        if wrong := list(dict.fromkeys(template._wrong())):
            raise InvalidError(f"the prompt does not fit: {'; '.join(wrong)}")
        return template

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there were `tokens`, where there are none: the store knows a content by what is written here."""
        written: dict[str, Any] = write(self)
        if self.tokens is None:
            written.pop("tokens", None)
        return written

    def messages(self, question: str, turns: Sequence[Turn], passages: Sequence[Hit]) -> list[Message]:
        """The prompt for `question` after `turns`, with the first of `passages`, best first."""
        part, compiled = self._compiled["zh" if is_chinese(question) else "en"]
        shown = neutral if self.guard else str
        values = {
            "question": shown(question),
            "passages": [Passage(n, hit, question, self.guard) for n, hit in enumerate(passages, 1)],
            "refusal": refusal(question),
            "language": "zh" if is_chinese(question) else "en",
        }
        messages: list[Message] = []
        if "system" in compiled:
            messages.append({"role": "system", "content": compiled["system"].render(values)})
        for example in part.examples:
            messages.append({"role": "user", "content": example.user})
            messages.append({"role": "assistant", "content": example.assistant})
        messages += [{"role": turn.role, "content": shown(turn.content)} for turn in turns]
        return [*messages, {"role": "user", "content": compiled["user"].render(values)}]

    @cached_property
    def _compiled(self) -> dict[str, tuple[Part, dict[str, Compiled]]]:
        environment = _environment()
        found = {}
        for language, part in (("en", self.en or self.all), ("zh", self.zh or self.all)):
            assert part is not None  # refused in `of`
            sources = {"system": part.system, "user": part.user}
            found[language] = (part, {name: environment.from_string(one) for name, one in sources.items() if one})
        return found

    def _wrong(self) -> list[str]:
        if (self.all is None) == (self.en is None) or (self.en is None) != (self.zh is None):
            return ["it has a part `all`, or a part `en` and a part `zh`"]
        parts = {"all": self.all, "en": self.en, "zh": self.zh}
        wrong = [
            f"{name}.{field}: {one}"
            for name, part in parts.items()
            if part
            for field, source in (("system", part.system), ("user", part.user))
            for one in _wrong_in(source or "")
        ]
        return wrong or self._wrong_shown()

    def _wrong_shown(self) -> list[str]:
        """What a trial shows: the question has to be in the user message, and something of each passage."""
        wrong = []
        for name, question in (("en", "Why Q17?"), ("zh", "为什么是 Q17？")):
            hits = [_trial_hit(n) for n in range(min(2, self.passages))]
            try:
                last = self.messages(question, [], hits)[-1]["content"]
            except (TemplateError, TypeError, ValueError) as error:
                return [f"{name}: {error}"]
            if "Q17" not in last:
                wrong.append(f"{name}.user: it does not show {{{{ question }}}}")
            if not all(hit.text in last for hit in hits):
                wrong.append(f"{name}.user: it shows neither the text nor the best sentence of each passage")
        return wrong


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in FILTERS}
    return environment


def _wrong_in(source: str) -> list[str]:
    try:
        tree = _environment().parse(source)
        _environment().from_string(source)
    except TemplateError as error:
        return [f"line {getattr(error, 'lineno', 1)}: {error.message}"]
    known = ", ".join(sorted(VARIABLES))
    wrong = [
        f"there is no variable {name!r}; there are {known}"
        for name in sorted(find_undeclared_variables(tree) - VARIABLES)
    ]
    fields = ", ".join(sorted(Passage.FIELDS))
    for node in tree.find_all(nodes.Node):
        if isinstance(node, nodes.Getattr):
            of = node.node.name if isinstance(node.node, nodes.Name) else ""
            if not of or of in VARIABLES:
                wrong.append(f"only a passage has fields, so there is no {node.attr!r} here")
            elif node.attr not in (_LOOP if of == "loop" else Passage.FIELDS):
                wrong.append(f"{of} has no {node.attr!r}; a passage has {fields}")
        elif isinstance(node, nodes.For) and not (
            isinstance(node.iter, nodes.Name) and node.iter.name == "passages" and not list(node.find_all(nodes.For))
        ):
            wrong.append("a loop goes over `passages`, and has no loop in it")
        elif not isinstance(node, _NODES):
            wrong.append(f"{type(node).__name__} is nothing for a prompt")
    return wrong


def _trial_hit(n: int) -> Hit:
    text = f"The valve V-{n} is rated for {n + 3} bar."
    return Hit(
        chunk_id=f"c{n}", document_id=f"d{n}", path=f"valves/{n}.md", text=text, start=0, end=len(text), score=1.0,
        language="en", heading="Valves > Ratings" if n else None, page=n or None, context="| valve | rating |" if n else None,
    )  # fmt: skip
