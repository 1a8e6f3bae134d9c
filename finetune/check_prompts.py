"""The fixed set that adapters are checked on: questions with passages as the service asks them, and plain conversation.

Never changed without reason: a later check of the same adapter asks the same.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ingest.schemas import Hit
from service.prompt import Message, build


class Asked(NamedTuple):
    """A question, and the passages that it is asked with: (heading, text)."""

    question: str
    passages: tuple[tuple[str, str], ...]


PUMP = (
    "Pump P-12 > Oil",
    "Change the oil of the P-12 every 2,000 running hours. The chamber holds 1.8 litres of Lumo 46.",
)
START = ("Pump P-12 > Starts", "The P-12 may be started at most eight times per hour.")
LEAVE = ("Leave", "Employees have 28 days of leave in a year. Six of them may be carried over until 30 April.")
TRAVEL = ("Travel", "Claims are handed in within 40 days after the journey. Mara Feld signs those over 3,000 euros.")
CODES = (
    "Gateway G4 > Codes",
    "E17: the antenna is not connected. E23: the clock has not been set. E31: the flash is full.",
)
HARBOUR = ("Harbour", "The lighthouse was built in 1874 and stands 31 metres above the sea. It was automated in 1988.")
BREAD = ("Recipes > Rye", "The dough rests for 14 hours at 22 degrees and is baked for 55 minutes.")
ROUTER = ("Network", "The guest network is called linden-guest. Its password changes on the first Monday of a month.")
ENGLISH = (
    Asked("How often is the oil of the P-12 changed?", (PUMP, START)),
    Asked("How much oil does the chamber hold?", (START, PUMP)),
    Asked("How many days of leave may be carried over?", (LEAVE,)),
    Asked("Who signs a claim of 4,000 euros?", (LEAVE, TRAVEL)),
    Asked("What does E23 mean?", (CODES,)),
    Asked("When was the lighthouse built?", (ROUTER, HARBOUR)),
    Asked("How long does the rye dough rest?", (BREAD, HARBOUR)),
    Asked("When does the password of the guest network change?", (ROUTER, CODES)),
    Asked("What is the warranty of the P-12?", (PUMP, START)),
    Asked("How tall is the gateway?", (CODES, HARBOUR)),
)
OIL_ZH = ("水泵 P-12 > 润滑", "P-12 每运行 2000 小时更换一次机油，油室容量 1.8 升。")
LEAVE_ZH = ("休假", "员工每年有 12 天年休假，其中 5 天可结转到次年四月底。")
CLAIM_ZH = ("报销", "出差后 40 天内提交报销单，超过 3000 元由梅芳签字。")
LAMP_ZH = ("港口", "灯塔建于 1874 年，高出海面 31 米。")
CODE_ZH = ("网关 G4", "E17：天线未连接。E23：时钟未设置。")
CHINESE = (
    Asked("P-12 多久换一次机油？", (OIL_ZH,)),
    Asked("油室容量是多少？", (LAMP_ZH, OIL_ZH)),
    Asked("每年有几天年休假？", (LEAVE_ZH,)),
    Asked("4000 元的报销单由谁签字？", (LEAVE_ZH, CLAIM_ZH)),
    Asked("灯塔建于哪一年？", (LAMP_ZH,)),
    Asked("E23 是什么意思？", (CODE_ZH,)),
    Asked("食堂几点开门？", (LEAVE_ZH,)),
    Asked("What is the height of the lighthouse?", (LAMP_ZH,)),
)
CHATS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Name three colours."},),
    ({"role": "user", "content": "Write one sentence about rain."},),
    ({"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is a pump for?"}),
    (
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello. What would you like to know?"},
        {"role": "user", "content": "How many minutes are two hours?"},
    ),
    ({"role": "user", "content": "用一句话介绍北京。"},),
    ({"role": "user", "content": "你好！"},),
)


def prompts(version: str) -> Iterator[list[Message]]:
    """The whole set, with the questions laid out by this version of the product's prompts."""
    for asked in (*ENGLISH, *CHINESE):
        yield build(version, asked.question, [], [_hit(n, *one) for n, one in enumerate(asked.passages)])
    yield from map(list, CHATS)


def _hit(n: int, heading: str, text: str) -> Hit:
    return Hit(
        chunk_id=f"c{n}", document_id=f"d{n}", path=f"set/{n}.md", text=text, start=0, end=len(text), score=1.0,
        language="zh" if not text.isascii() else "en", heading=heading,
    )  # fmt: skip
