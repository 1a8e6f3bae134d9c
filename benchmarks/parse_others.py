"""Runs in `.venv-bench`: pypdf and markitdown, for `parse_pages`. Knows nothing of graft.

Each line of standard input is a JSON list, [tool, file]; the answer is one line: {"seconds", "text", "pages"}, or {"error"}.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from markitdown import MarkItDown
from pypdf import PdfReader

converter = MarkItDown(enable_plugins=False)


def by_pypdf(file: str) -> str:
    return "\n\n".join(page.extract_text() for page in PdfReader(file).pages)


def by_markitdown(file: str) -> str:
    return str(converter.convert(file).text_content)


TOOLS: dict[str, Callable[[str], str]] = {"pypdf": by_pypdf, "markitdown": by_markitdown}


def answer(tool: str, file: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        text = TOOLS[tool](file)
    except Exception as error:  # whatever a file does to a tool is that tool's answer
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    return {"seconds": time.perf_counter() - start, "text": text, "pages": len(PdfReader(file).pages)}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
