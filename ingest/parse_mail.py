"""Messages (RFC 5322) and mailboxes of them: head, body, text attachments."""

import re
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default

from ingest.errors import DocumentError
from ingest.parse_decode import decode
from ingest.parse_office import read_html
from ingest.parse_types import EML, MBOX
from ingest.schemas import Heading, ParsedText

SHOWN = ("Subject", "From", "To", "Cc", "Date")
# Each message of a mailbox begins with such a line (RFC 4155); one in a body has a > before it.
_FROM_LINE = re.compile(rb"^From [^\r\n]*\d{4}[^\r\n]*\r?\n", re.MULTILINE)


def read_mail(data: bytes, mime: str = EML) -> ParsedText:
    """Raises DocumentError for what is no message."""
    message = _message(data)
    if not any(message.get(name) for name in (*SHOWN, "Message-ID", "Received")):
        raise DocumentError("parse", "it cannot be read as a message: it has no head")
    text = _text(message)
    title = _header(message, "Subject")
    metadata: dict[str, object] = {"title": title} if title else {}
    if sender := _header(message, "From"):
        metadata["authors"] = [sender]
    if date := _header(message, "Date"):
        metadata["created_at"] = date
    if attachments := [name for part in message.walk() if (name := part.get_filename())]:
        metadata["attachments"] = attachments
    return ParsedText(text=text, mime=mime, metadata=metadata)


def read_mailbox(data: bytes, mime: str = MBOX) -> ParsedText:
    """Every message, under its subject."""
    starts = [*_FROM_LINE.finditer(data)]
    if not starts or data[: starts[0].start()].strip():
        raise DocumentError("parse", "it cannot be read as a mailbox: it does not begin with a From line")
    ends = [*(match.start() for match in starts[1:]), len(data)]
    parts, headings, at = [], [], 0
    for match, end in zip(starts, ends, strict=True):
        message = _message(re.sub(rb"^>(>*From )", rb"\1", data[match.end() : end], flags=re.MULTILINE))
        title = _header(message, "Subject") or "(no subject)"
        headings.append(Heading(level=1, start=at, title=title))
        parts.append(f"# {title}\n\n{_text(message)}".rstrip())
        at += len(parts[-1]) + 2
    return ParsedText(text="\n\n".join(parts), mime=mime, headings=tuple(headings), metadata={"messages": len(parts)})


def _message(data: bytes) -> EmailMessage:
    message = message_from_bytes(data.lstrip(b"\r\n"), policy=default)
    assert isinstance(message, EmailMessage)  # by the policy
    return message


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name, "")).split())
    except Exception:  # the parser of broken heads raises many kinds
        return ""


def _text(message: EmailMessage) -> str:
    head = "\n".join(f"{name}: {value}" for name in SHOWN if (value := _header(message, name)))
    body = message.get_body(("plain", "html"))
    parts = [head, _content(body) if isinstance(body, EmailMessage) else ""]
    for part in message.iter_attachments() if message.is_multipart() else ():
        if not isinstance(part, EmailMessage):
            continue
        if part.get_content_type() == EML:
            parts += [_text(inner) for inner in part.iter_parts() if isinstance(inner, EmailMessage)]
        elif part.get_content_maintype() == "text":
            parts.append(f"Attachment: {part.get_filename() or '(no name)'}\n\n{_content(part)}")
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def _content(part: EmailMessage) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes) or not payload:
        return ""
    if part.get_content_subtype() == "html":
        return read_html(payload).text
    try:
        text = payload.decode(part.get_content_charset() or "utf-8")
    except (LookupError, UnicodeDecodeError):
        text = decode(payload)
    return text.replace("\r\n", "\n").replace("\0", "")
