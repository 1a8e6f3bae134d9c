"""Messages and mailboxes."""

from email.message import EmailMessage

from ingest.parse import ParseOptions, parse

OPTIONS = ParseOptions(max_chars=1_000_000)


def message(subject: str, text: str = "", html: str = "") -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = subject, "Ingrid Sallow <ingrid@example.org>", "works@example.org"
    mail["Date"] = "Mon, 02 Mar 2026 10:00:00 +0000"
    if text:
        mail.set_content(text)
    if html:
        (mail.add_alternative if text else mail.set_content)(html, subtype="html")
    return mail


HEAD = "From: Ingrid Sallow <ingrid@example.org>\nTo: works@example.org\nDate: Mon, 02 Mar 2026 10:00:00 +0000"


def test_a_message_is_its_head_and_its_body() -> None:
    mail = message("Größe der *Pumpe*", "Order two.\n> quoted line\n\nThanks\n", "<p>Order <b>three</b>.</p>")
    parsed = parse(bytes(mail), "a.eml", OPTIONS)
    assert parsed.text == f"Subject: Größe der *Pumpe*\n{HEAD}\n\nOrder two.\n> quoted line\n\nThanks"
    assert parsed.metadata["title"] == "Größe der *Pumpe*"
    assert parsed.metadata["authors"] == ["Ingrid Sallow <ingrid@example.org>"]


def test_a_message_in_html_alone_is_read() -> None:
    parsed = parse(
        bytes(message("水泵", html="<h2>Order</h2><p>Two &amp; <a href='x'>more</a>.</p>")), "a.eml", OPTIONS
    )
    assert parsed.text == f"Subject: 水泵\n{HEAD}\n\n## Order\n\nTwo & more."


def test_text_attachments_and_messages_within_are_read_and_others_named() -> None:
    mail = message("Order", "See the list.")
    mail.add_attachment("part,life\nseal,2\n", filename="list.csv", subtype="csv")
    mail.add_attachment(message("Forwarded", "The first order."))
    mail.add_attachment(b"%PDF-1.4", maintype="application", subtype="pdf", filename="plan.pdf")
    parsed = parse(bytes(mail), "a.eml", OPTIONS)
    assert "Attachment: list.csv\n\npart,life\nseal,2" in parsed.text
    assert f"Subject: Forwarded\n{HEAD}\n\nThe first order." in parsed.text
    assert parsed.metadata["attachments"] == ["list.csv", "plan.pdf"]


def test_a_mailbox_is_every_message_under_its_subject() -> None:
    first, second = message("Pumps", "Order two.\n"), message("Taps", "From here on, order none.\n")
    written = b"".join(
        b"From ingrid@example.org Mon Mar  2 10:00:00 2026\n"
        + bytes(mail).replace(b"\nFrom here", b"\n>From here")
        + b"\n"
        for mail in (first, second)
    )
    parsed = parse(written, "archive.mbox", OPTIONS)
    assert [heading.title for heading in parsed.headings] == ["Pumps", "Taps"]
    assert all(parsed.text[heading.start :].startswith(f"# {heading.title}\n") for heading in parsed.headings)
    assert "Order two." in parsed.text
    assert "\nFrom here on, order none." in parsed.text
    assert parsed.metadata == {"messages": 2}


def test_a_message_in_an_old_encoding_is_read() -> None:
    raw = b"Subject: pump\nFrom: a@example.org\nContent-Type: text/plain; charset=gb2312\n\n"
    assert "先切断电源" in parse(raw + "先切断电源。\n".encode("gb2312"), "a.eml", OPTIONS).text
    unannounced = b"Subject: pump\nFrom: a@example.org\n\n" + "Die Pumpe läuft ölgeschmiert, über Jahre.\n".encode(
        "latin-1"
    )
    assert "läuft ölgeschmiert" in parse(unannounced, "a.eml", OPTIONS).text
