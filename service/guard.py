"""Retrieved text is data: what imitates the frame of a prompt is defused, and sentences that speak to whoever answers are found.

Deterministic rules, made to leave manuals alone: "Change the oil every 4,000 hours" speaks to a reader, not to a model. They
catch what is usual; a prompt that delimits its passages, and the check of each sentence, stand behind them.
"""

import re
from functools import lru_cache

_PAIRS = {"<": "‹", ">": "›", "[": "(", "]": ")"}
_FRAME = re.compile(
    r"<\|[^|<>\n]{0,40}\|>"  # <|im_start|>, <|eot_id|>
    r"|<｜[^｜<>\n]{0,40}｜>"
    r"|</?(?:s|passages?|documents?|context|system|user|assistant|instructions?|question|answer|start_of_turn|end_of_turn)"
    r"(?:\s[^<>\n]{0,80}=[^<>\n]{0,120})?\s?/?>"
    r"|<</?SYS>>|\[/?(?:INST|SYSTEM|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]",
    re.I,
)

# A rule a line: ~ is a gap within a sentence, (a|b) one of them, NAME one of WORDS[NAME]; all in lower case.
_WORDS = {
    "DROP": "ignore|disregard|forget|override|overrule|bypass|skip|drop",
    "EARLIER": "previous|prior|earlier|preceding|above|other|existing|original|initial|your|system|given",
    "ORDERS": "instructions?|prompts?|rules?|guidelines?|directives?|commands?|orders?|constraints?",
    "MODEL": "ai|llms?|gpt|chat ?bots?|bots?|(ai |language )models?|(ai |virtual |digital |helpful )assistants?|summari[sz]ers?",
    "SAY": "answer|reply|respond|say|output|print|write|repeat|return|state|begin|start|end|finish|append|add|include",
    "MUST": "must|should|shall|please|required|(has|have|is|are|needs?) to",
    "ANSWERS": "answers?|repl(y|ies)|responses?|output",
}
_ENGLISH = """
DROP ~ EARLIER ~ ORDERS
DROP ~ (everything|anything|all|what) ~ (above|before|earlier|said|told|learned)
(new|updated|real|actual|secret|hidden|following|important) ORDERS (for|to) (the |any |every |all )?(MODEL|assistant)
(system|developer) (prompt|override|instruction)s?:
(reveal|DROP|SAY) ~ (system|developer) (prompt|instructions)(?! for)
SAY ~ nothing else
(notes?|message|attention|instructions?|memo|notice|reminder|warning|request|hint) (to|for) (the |any |all )?(MODEL|assistant)
MODEL ~ MUST ~ (SAY|ignore|tell|recommend|claim|pretend|call|refuse|visit)
(you are|you're|act as|behave as|pretend (to be|that you)|role ?-?play|play the (role|part) of) ~ (MODEL|assistant|pirate|dan)
(you are|you're|act as|behave as|pretend (to be|that you)) ~ (unrestricted|jailbroken|persona|developer mode|poet|parrot)
(from now on|starting now|henceforth),? (you (are|will|must|only|always|answer|reply|respond|speak|call)|SAY)
(from now on|starting now|henceforth),? (all|every|your) ANSWERS
(for the rest of|throughout) (this|the) (chat|conversation) ~ (you|SAY)
(whatever|no matter what|regardless of what|when(ever)?) ~ (asks?|asked|question) ~ SAY
(if|when(ever)?) ~ answer(ing)? (a |any |the |this |every )?questions? ~ (SAY|tell|always|never|only)
(if|when(ever)?) ~ (summari[sz]ing|reading) this (text|page|document|passage) ~ (SAY|tell|always|never|only)
SAY (only|just|exactly|nothing but|solely|verbatim|literally) ~ (the )?(words?|phrase|sentence|string|code|text|token)
SAY (only|just|exactly|nothing but|solely|verbatim|literally) ?(with )?(the )?["'“‘`:]
SAY ~ (the (exact )?(words?|phrase|string|token)|this (phrase|string|token)) ~ ["'“‘`:]
your (final |next |whole |entire |only )?ANSWERS ~ (must|should|shall|has to|have to|will)
(every|each|all) (of your )?ANSWERS ~ (must|should|shall|has to|have to|will) ~ (SAY|contain|be)
(do not|don't|never) (answer|reveal|mention|use|cite|tell|follow) ~ (the (user|question|passages?)|instead)
(send|post|forward|append|attach|leak|transmit|encode|upload) ~ (the )?user's (question|data|name|words|message)
(send|post|forward|append|attach|leak|transmit|encode|upload) ~ (the (question|conversation|chat|prompt)|chat history)
the (correct|right|true|real|only|only correct) answer (to (every|any|all|this|the) ~ )?is
"""
_CHINESE = """
(忽略|无视|忘记|忘掉|不要理会|跳过|推翻|作废)~(以上|之前|此前|前面|先前|上述|上面|原有|原来|所有|全部|其他|系统|你的)~(指令|指示|说明|要求|规则|提示|设定|内容|命令)
(系统|开发者)(提示词|指令|消息)(:|：)|系统提示(:|：)~(回答|回复|输出|说|你)
(ai|人工智能|智能|聊天|语言|问答)(助手|模型|机器人|系统)~(必须|应当|应该|请|需要|须|务必|只能|不得|注意|:|：)
(致|给|告)~(ai|人工智能|助手|机器人|大模型|语言模型)~(:|：|的)
你现在是|从现在(起|开始)[，,]?(请)?你(?!们)|请扮演|你扮演|你将扮演|假装(你|自己)|你不再是
(只|仅|一律|统一|都|必须|务必|直接)(能|可|要|需)?(回答|回复|答复|输出|写|说)~[“「『"'：:]
(回答|回复|答复|输出)(任何|所有|每个|用户的?|这个)?(问题)?(时|之前|之后|的最后|末尾|结尾|开头)~(必须|务必|都要|一律|请|只|加上|附上|写上)
(无论|不管|不论)~(问|提问|问题)~(回答|回复|答|输出|说)
(不要|不得|禁止|切勿)(回答|引用|提及)~(用户|问题|文档|段落|原文)
(把|将)~(用户的?问题|对话|聊天记录|提问)~(发送|发到|上传|附在|提交|转发)
(正确|唯一|标准|真正)(的)?答案(是|为|：)
"""
_IMAGE = (
    r"!\[[^\]\n]*\]\(\s*https?://[^)\n]*[?&](?:q|question|prompt|data|chat|history|leak|conversation|user)=[^)\n]*\)"
)


def _compiled(rules: str, gap: str, begin: str, end: str) -> re.Pattern[str]:
    """One pattern of all rules, for text in lower case: four times as fast as one that ignores case."""
    for name, words in _WORDS.items():
        rules = rules.replace(name, f"({words})")
    rules = re.sub(r"\((?!\?)", "(?:", rules)
    lines = (re.sub(r" ?~ ?", lambda _: gap, line) for line in rules.strip().splitlines())
    return re.compile("|".join(f"{begin}(?:{line}){end}" for line in lines))


_SPEAKS = re.compile(
    _compiled(_ENGLISH, r"\b[^.!?\n]{0,40}(?:\b|(?=[\"'“‘`:]))", r"\b", r"(?:(?<!\w)|\b)").pattern + "|" + _IMAGE
)
_SPEAKS_CHINESE = _compiled(_CHINESE, r"[^。！？\n]{0,16}", "", "")
_BLOCK_END = re.compile(r"\n\s*\n|\n(?=#{1,6} |[ \t]*\|)")  # a row of a table is a paragraph of its own
_PASSAGE = re.compile(r"<passage", re.I)


def neutral(text: str) -> str:
    """The text with all that imitates a chat template's markers or a prompt's delimiters in look-alike brackets.

    Part of the prompt versions that use it, so what it does to a text never changes.
    """
    if "<" not in text and "[" not in text:
        return text
    return _FRAME.sub(lambda found: "".join(_PAIRS.get(sign, sign) for sign in found.group()), text)


@lru_cache(maxsize=2048)  # the same passages answer many questions
def instructions(text: str) -> tuple[tuple[int, int], ...]:
    """-> (start, end) of what speaks to the model that answers: from there to the end of its paragraph; behind an imitated
    end of the passage, to its imitated beginning.
    """
    lower = text.lower() if len(text.lower()) == len(text) else text
    found: list[tuple[int, int]] = []
    for pattern in (_FRAME, _SPEAKS) if text.isascii() else (_FRAME, _SPEAKS, _SPEAKS_CHINESE):
        for match in pattern.finditer(lower):
            closes = match.group().startswith("</passage")
            end = (_PASSAGE if closes else _BLOCK_END).search(text, match.end())
            found.append((match.start(), end.start() if end else len(text)))
    return tuple(sorted(found))


def is_instruction(text: str) -> bool:
    """Whether any of it speaks to the model."""
    return bool(instructions(text))


def stated(text: str, start: int, end: int) -> int:
    """-> where text[start:end] ends, without what speaks to the model: `start` when that is all of it."""
    for first, last in instructions(text):
        if start < last and first < end:
            end = max(start, first)
    return end
