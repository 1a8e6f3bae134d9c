"""Sentences of an answer that claim nothing: refusals, questions, greetings. They need no source."""

import re

from ingest.language import reads

REFUSAL = "The documents say nothing about this."
REFUSAL_ZH = "文档中没有关于这个问题的内容。"

_SOURCES = r"(?:documents?|passages?|sources?|texts?|context|information provided)"
_SAYS = r"(?:say|state|mention|contain|provide|hold|include|give|specify|cover|tell|answer|address|describe)"
_REFUSALS = re.compile(
    rf"\b{_SOURCES}\b.{{0,40}}\b{_SAYS}s? nothing\b"
    rf"|\b{_SOURCES}\b.{{0,30}}\b(?:do|does|did)(?: not|n[’']t)\b.{{0,20}}\b{_SAYS}\b"
    rf"|\bI (?:do not|don[’']t|cannot|can[’']t|could not|couldn[’']t) (?:know|find|answer|say|tell)\b"
    rf"|\b(?:there is|contains?|provides?) no (?:information|mention|answer)\b"
    rf"|\bis(?: not|n[’']t) (?:mentioned|stated|specified|given|said|answered)\b.{{0,20}}\b{_SOURCES}\b"
    r"|(?:文档|文件|资料|段落|原文|上下文|材料).{0,12}(?:没有|并未|未|无)"
    r"|(?:我不知道|无法回答|无法确定|没有相关(?:信息|内容))",
    re.I,
)
_FACT = re.compile(r"\d|https?:|www\.|@")
_MORE = re.compile(r"[:：;；]|\b(?:but|however|except|although|instead|so)\b|但|不过|然而|所以|因此", re.I)
_GREETING = re.compile(
    r"(?:hello|hi|good (?:morning|day|evening)|thanks?|thank you|you(?:[’']re| are) welcome|sure|certainly|of course|okay"
    r"|i hope (?:this|that) helps|let me know if you (?:have|need) [\w ]{0,40}|here is (?:the|an|my) answer"
    r"|您好|你好|谢谢|不客气|当然|好的|希望(?:这|对您|对你)?.{0,6}(?:有所)?帮助)[\s,.!:，。！：]*",
    re.I,
)


def is_chinese(text: str) -> bool:
    return not text.isascii() and reads(("zh",), text)


def refusal(question: str) -> str:
    return REFUSAL_ZH if is_chinese(question) else REFUSAL


def is_refusal(sentence: str) -> bool:
    """It says that the documents do not answer, and nothing beside that: no number, no address, no "but"."""
    more = _FACT.search(sentence) or _MORE.search(sentence)
    return len(sentence) <= 240 and bool(_REFUSALS.search(sentence)) and not more


def claims_nothing(sentence: str) -> bool:
    """A refusal, a greeting, or a question that names no number or address. A bare "Yes." is a claim."""
    bare = sentence.strip()
    asks = bare[-1:] in {"?", "？"} and not _FACT.search(bare)
    return asks or bool(_GREETING.fullmatch(bare)) or is_refusal(bare)
