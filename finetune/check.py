"""Compares an adapter in the engine with PEFT: the same prompts in the same tokens, and the same probabilities of the answers.

The bare base is compared in the same way beside it, so that what engine and transformers compute differently of themselves is
seen. An adapter trained on a quantised base is compared on the base as it is served: what the quantisation changed belongs to
its training, not to the engine.
"""

import asyncio
import json
import shutil
import statistics
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from finetune import check_prompts
from finetune.check_engine import Answered, ScoredEngine
from ingest.catalog import now
from ingest.errors import GraftError, InvalidError, SettingsError, UnavailableError
from ingest.files import write_whole
from ingest.settings import IngestSettings
from service.adapter_serving import load_into
from service.adapters import CHECK_LABEL
from service.base_model import BaseModel, read_base
from service.generate import AdapterLostError
from service.preflight import MANIFEST, Limits, digest_of, take_in, write_config
from service.prompt import CURRENT, Message, built_in_versions
from service.schemas_adapters import Checked
from service.settings import ServiceSettings

BOUNDS = {"float32": 0.02, "bfloat16": 0.1, "float16": 0.1}  # mean absolute difference of log-probabilities
IN_FLOAT32 = 0.002  # a base that agrees better than this with float32 is served in float32: half precision rounds more
SAME = 1e-5  # of two log-probabilities of the same computation
ANSWER_TOKENS = 12
Prompts = Sequence[Sequence[Message]]
Tell = Callable[[str], None]


class Offered(NamedTuple):
    """An adapter as the engine has it, under `name`; `folder` is the copy that the engine reads."""

    name: str
    folder: Path
    digest: str


class _Answers(NamedTuple):
    engine: str  # its version
    prompts: list[list[int]]  # tokens, as the engine lays them out
    bare: list[Answered]
    tuned: list[Answered]


def check_adapter(
    folder: Path,
    *,
    url: str,
    settings: ServiceSettings,
    ingest: IngestSettings,
    registered: bool = False,
    prompts: Prompts | None = None,
    threads: int | None = None,
    tell: Tell = lambda _: None,
) -> Checked:
    """Blocks for a minute or two. `folder`: PEFT's, or one of the registry's, `registered` under its name. `url`: of the
    engine, which reads the adapter folder of `settings`. `prompts`: in place of the fixed set. `threads`: of PEFT's side.

    Raises AdapterRefusedError, InvalidError, SettingsError, UnavailableError. An adapter that fails is no error.
    """
    held = settings.adapter_folder or ingest.home / "adapters"
    with asyncio.Runner() as runner:  # the comparison itself stands outside of the loop, so that Ctrl-C ends it
        engine = ScoredEngine(url, settings.llm_api_key, settings.first_token_seconds)
        try:
            base = read_base(runner.run(engine.model()).root, settings.llm_model_folder)
            trained_on = _manifest(folder).get("base", base.identity)
            if trained_on != base.identity:
                raise InvalidError(
                    f"{str(folder)!r} was trained on {trained_on!r}, and the engine serves {base.identity!r}"
                )
            asked = list(prompts) if prompts is not None else _prompts(folder)
            with _offered(folder, None if registered else held, base, engine, runner, settings) as offered:
                tell(f"the engine answers {len(asked)} prompts without the adapter and with it")
                answers = runner.run(_answered(engine, offered.name, asked))
                tell("PEFT scores the same answers")
                return _compared(asked, answers, offered, base, settings.engine_dtype, threads)
        finally:
            runner.run(engine.close())


def record(folder: Path, checked: Checked) -> bool:
    """Puts the check into the folder's manifest; one of another tool has none, and gets none. -> whether it has."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = {**_manifest(folder), "checked": checked.model_dump(mode="json")}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return True


@contextmanager
def _offered(
    folder: Path,
    held: Path | None,
    base: BaseModel,
    engine: ScoredEngine,
    runner: asyncio.Runner,
    settings: ServiceSettings,
) -> Iterator[Offered]:
    """The adapter in the engine: `folder` under its own name where `held` is None, else a copy in `held` under a name that no
    other check ever has.
    """
    if held is None:
        try:
            offered = Offered(folder.name, folder, digest_of(folder, base))
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the registry's copy {str(folder)!r} cannot be read: {error}") from error
        runner.run(load_into(engine, offered.name, folder.parent))
        yield offered
        return
    offered = _copied(folder, held, base, settings)
    try:
        runner.run(load_into(engine, offered.name, held))
        yield offered
    finally:
        _forget(offered, engine, runner)


def _forget(offered: Offered, engine: ScoredEngine, runner: asyncio.Runner) -> None:
    """The copy goes once the engine does not know its name: while it does, it may read it again, and would die of its absence.
    What is left here is removed when the engine is started next (`Registry.purge`).
    """
    for _ in range(2):  # a connection that lay idle while PEFT computed may be gone, which the first request finds out
        try:
            runner.run(engine.unload_adapter(offered.name))
        except AdapterLostError:  # it never knew it, or forgot it at the first request
            pass
        except GraftError:
            continue
        shutil.rmtree(offered.folder, ignore_errors=True)
        return


def _copied(folder: Path, held: Path, base: BaseModel, settings: ServiceSettings) -> Offered:
    """What is checked is a copy that has passed the preflight, as a registered one."""
    staging = held / f".staging-{uuid.uuid4()}"
    try:
        staging.mkdir(parents=True)
        limits = Limits((folder.absolute(),), settings.max_lora_rank, settings.max_adapter_mb)
        found = take_in(folder.absolute(), staging, base, limits)
        name = f"{CHECK_LABEL}-{found.digest[:8]}-{uuid.uuid4().hex[:8]}"
        write_config(staging, found.config, base.root)
        staging.rename(held / name)
    except OSError as error:
        raise SettingsError(f"the adapter could not be copied to {str(held)!r}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Offered(name, held / name, found.digest)


async def _answered(engine: ScoredEngine, adapter: str, prompts: Prompts) -> _Answers:
    """One after the other: in a batch the same question would be computed otherwise."""
    base = (await engine.model()).base
    tokens = [await engine.tokens(adapter, messages) for messages in prompts]
    bare = [await engine.greedy(base, prompt, ANSWER_TOKENS) for prompt in tokens]
    tuned = [await engine.greedy(adapter, prompt, ANSWER_TOKENS) for prompt in tokens]
    return _Answers(await engine.version(), tokens, bare, tuned)


def _compared(
    prompts: Prompts,
    answers: _Answers,
    offered: Offered,
    base: BaseModel,
    engine_dtype: str,
    threads: int | None,
) -> Checked:
    from finetune import check_peft

    if base.folder is None:
        raise SettingsError(
            f"the engine's model {base.root!r} is no folder of this machine, so that PEFT has nothing to compare with; set "
            "SERVICE_LLM_MODEL_FOLDER to a folder with the same model"
        )
    laid_out = check_peft.prompt_tokens(base.folder, prompts)
    other = sum(one != given for one, given in zip(laid_out, answers.prompts, strict=True))
    with check_peft.computing(threads):
        model, bare, dtype = _bare(answers, base.folder, engine_dtype)
        model = check_peft.with_adapter(model, offered.folder)
        tuned = _difference(answers.tuned, check_peft.log_probabilities(model, answers.prompts, answers.tuned))
    changed = sum(map(_is_changed, answers.bare, answers.tuned))
    why_not = _why_not(other, len(prompts), bare, tuned, BOUNDS[dtype], changed)
    return Checked(
        at=now(),
        passed=why_not is None,
        digest=offered.digest,
        dtype=dtype,
        difference=tuned,
        bound=BOUNDS[dtype],
        base_difference=bare,
        tokens_equal=not other,
        prompts=len(prompts),
        changed=changed,
        engine=f"{answers.engine}, {base.root}"[:512],
        why_not=why_not,
    )


def _bare(answers: _Answers, base: Path, engine_dtype: str) -> tuple[Any, float, str]:
    """-> the base in the type that the engine computes in, how far the two differ, and that type, which the engine does not
    name: in float32 both agree far better than half precision rounds.
    """
    from finetune import check_peft

    half = "float16" if engine_dtype == "float16" else "bfloat16"
    for dtype in ("float32", half):
        model = check_peft.load_bare(base, dtype)
        found = _difference(answers.bare, check_peft.log_probabilities(model, answers.prompts, answers.bare))
        if found <= IN_FLOAT32:
            break
    return model, found, dtype


def _why_not(other: int, prompts: int, bare: float, tuned: float, bound: float, changed: int) -> str | None:
    """What speaks against an adapter; None: nothing."""
    said = []
    if other:
        said.append(f"the engine lays {other} of {prompts} prompts out in other tokens than the base's tokenizer")
    if bare > bound:
        said.append(
            f"without the adapter, engine and transformers differ by {bare:.4f} in the mean already (at most {bound}): they "
            "have different bases"
        )
    if tuned > bound:
        said.append(f"with the adapter, engine and PEFT differ by {tuned:.4f} in the mean (at most {bound})")
    if not changed:
        said.append(
            "the engine answers the same with and without the adapter: it changes nothing, or the engine does not apply it"
        )
    return "; ".join(said) or None


def _difference(answers: Sequence[Answered], scored: Any) -> float:
    """-> mean over all tokens of the absolute difference of log-probabilities."""
    pairs = zip(answers, scored, strict=True)
    return statistics.fmean(
        abs(one - other) for answer, own in pairs for one, other in zip(answer.logprobs, own, strict=True)
    )


def _is_changed(bare: Answered, tuned: Answered) -> bool:
    apart = (abs(one - other) > SAME for one, other in zip(bare.logprobs, tuned.logprobs, strict=False))
    return bare.tokens != tuned.tokens or any(apart)


def _prompts(folder: Path) -> list[list[Message]]:
    """The fixed set, as the adapter is asked in service; by a prompt of the product's own where it has one of the user's."""
    own = _manifest(folder).get("prompt_version")
    return list(check_prompts.prompts(own if own in built_in_versions() else CURRENT["brief"]))


def _manifest(folder: Path) -> dict[str, Any]:
    """Empty where there is none. Raises InvalidError."""
    with suppress(FileNotFoundError):
        try:
            held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidError(f"{str(folder / MANIFEST)!r} is no JSON: {error}") from error
        if isinstance(held, dict):
            return held
    return {}
