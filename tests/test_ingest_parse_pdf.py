"""PDF: columns, passwords, scanned pages; images by OCR, with and without tesseract."""

import base64
import io
from pathlib import Path

import kreuzberg
import pytest
from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from ingest.errors import DocumentError, OcrMissingError, UnreadableTypeError
from ingest.parse import ParseOptions, parse
from ingest.parse_ocr import OCR_MISSING, joined_han, ocr_languages_installed
from ingest.settings import CHECKOUT

EXAMPLES = CHECKOUT / "examples"
ENGLISH = EXAMPLES / "reports/millbrook-commissioning.pdf"
OPTIONS = ParseOptions(max_chars=1_000_000)
OFF = OPTIONS._replace(ocr=False)
# 水泵每年需要维护, printed 40 pixels high; few machines have a font to draw it with
CHINESE_PRINT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAZAAAABQAQAAAAAfWx5hAAAC+UlEQVR42u2XzW7cVBiGn89jMUaKYgskFCHEca4AuiuodEaIC8klcAFR4opF2D"
    "WXwGWwQMVRI5Ud2bKqp9NFlnYViTOVxy8Le37sGSTYITRnM+PPfs73fn8+sol/uwIOyAE5IAfk/4jc/RPkLdt/fgYqM0taW7p4CynpjpfKzCIK"
    "gGhlm5nZ+qL8G2EhQDYw+mbLuoPkncMk1ku1+woSAL+DxP5SnoVZsjkNXH0x8aTV/oz91HrONmF804XRgACmQ+R7PCAnlc2k7DS16+vXSXgzu/"
    "kq2kTbCa5iaFKgXqdsEUH6x59769I0Ca/NOt9TYKSXytvLZ/kuMjPqlByozQzfT/Ki/KGqJ27c7bDyIj8lA3wGWQkgu7SM+mJCGezvsTKTqaEC"
    "sH6plKa7iKs45X0CfDSWJ8CD6Zk6gWG+0x8t68+Ao5xHfGzgCuDxYk8nr5EjyowG+OVRm2IF374QITgXLeOxH8byLkgwWQg83dqwE5Z0hdvpsU"
    "/any/IcF6FkXVI+/D7oTAriRYwJfpQ634QYwHLdFQdc7+wVl2wNYvxXOCD/rQkUE+3dYEkSa/mV5LmjSuAUeO8VABjNU4qq3mlcpwzliR1Xn7j"
    "CTNrmmFCb4KZhVwDdycj+X74DcDDVpmdnnfPlFkv7A65JgVU5u75774e+jpextFoEEvj5qVUFibFV14FMJJiSaXmKlQwlnvVhr2KJYUMI9jK/8"
    "IqS6kocPtefQ1EOWVwBMlZ7/4bboFR5YdIPSUseGMPQOJx8qo5v5jALT+uHOc9xGcE99zyAjjuNdi5gKs9wiqwmgyXaWZJsnV/+WlC1SY56iEB"
    "kC0jkuthfsv7M+5G223dISHw3cOXHD3slIRr0ifLOBwKO6EgvZsyCk2qyl7G3mH5Zmo21Z/lnJyeF+SbM6G1p07p5wA3OyOWwQfLKY9huemzCi"
    "iKEkaqWZ1IaySEk7bxgt5bK+azVlB6OpiXxklqYklqxlotf1lJ+lWaS/5yZbXDl8UBOSD/MeQvH5FtAhMC2F0AAAAASUVORK5CYII="
)
needs_ocr = pytest.mark.skipif(
    not {"eng", "chi_sim"} <= {*ocr_languages_installed()},
    reason="needs OCR: apt-get install tesseract-ocr tesseract-ocr-chi-sim",
)


def scan(file: Path, page: int = 1, kind: str = "png", share: float = 1) -> bytes:
    """A page of a PDF, or the upper share of it, as a picture."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(kreuzberg.render_pdf_page(file, page - 1, dpi=150)))
    image.crop((0, 0, image.width, int(image.height * share))).convert("RGB").save(out, kind)
    return out.getvalue()


def pdf(*pages: str | bytes, encrypt: StandardEncryption | None = None) -> bytes:
    """A page with text for each string, a scanned page for each picture."""
    out = io.BytesIO()
    canvas = Canvas(out, encrypt=encrypt)
    for page in pages:
        if isinstance(page, bytes):
            canvas.drawImage(ImageReader(io.BytesIO(page)), 0, 0, 595, 842)
        elif page:
            canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def pages(data: bytes, options: ParseOptions = OPTIONS) -> dict[int, str]:
    parsed = parse(data, "a.pdf", options)
    assert parsed.text == "\n\n".join(parsed.text[page.start : page.end] for page in parsed.pages)
    return {page.number: parsed.text[page.start : page.end] for page in parsed.pages}


def test_two_columns_are_read_one_after_the_other() -> None:
    out = io.BytesIO()
    canvas = Canvas(out)
    left = [f"Left column, line {n}, which speaks of pumps" for n in range(30)]
    right = [f"Right column, line {n}, which speaks of taps" for n in range(30)]
    for at, column in ((50, left), (320, right)):
        for n, line in enumerate(column):
            canvas.drawString(at, 780 - 14 * n, line)
    canvas.save()
    assert pages(out.getvalue(), OFF)[1].split("\n") == [*left, *right]


@pytest.mark.parametrize("strength", [40, 128])
def test_an_encrypted_file_opens_with_one_of_the_given_passwords(strength: int) -> None:
    data = pdf("The safe is behind the boiler.", encrypt=StandardEncryption("hunter2", "owner", strength=strength))
    for password in ("hunter2", "owner"):
        assert pages(data, OFF._replace(passwords=("wrong", password))) == {1: "The safe is behind the boiler."}
    with pytest.raises(DocumentError, match="it is encrypted with a password; INGEST_PASSWORDS takes") as caught:
        parse(data, "a.pdf", OFF)
    assert type(caught.value) is DocumentError
    with pytest.raises(DocumentError, match="none of those given fits") as caught:
        parse(data, "a.pdf", OFF._replace(passwords=("wrong",)))
    assert "wrong" not in caught.value.reason


def test_a_scan_without_ocr_says_what_is_missing() -> None:
    for data, name in ((pdf(scan(ENGLISH)), "scan.pdf"), (scan(ENGLISH), "scan.png")):
        with pytest.raises(OcrMissingError, match="INGEST_OCR is off") as caught:
            parse(data, name, OFF)
        assert caught.value.reason.startswith(OCR_MISSING)


def test_where_tesseract_is_missing_the_reason_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    assert ocr_languages_installed() == ()
    for data, name in ((pdf(scan(ENGLISH)), "scan.pdf"), (scan(ENGLISH, kind="jpeg"), "scan.jpg")):
        with pytest.raises(OcrMissingError, match="apt-get install tesseract-ocr") as caught:
            parse(data, name, OPTIONS)
        assert caught.value.reason.startswith(OCR_MISSING)


def test_without_ocr_the_pages_with_text_are_kept_and_the_others_named() -> None:
    data = pdf("The first page has text.", scan(ENGLISH), "", "The last page has text.")
    assert pages(data, OFF) == {1: "The first page has text.", 4: "The last page has text."}
    assert parse(data, "a.pdf", OFF).metadata["pages_without_text"] == [2, 3]


@needs_ocr
def test_scanned_pages_are_read_beside_those_with_text() -> None:
    read = pages(pdf("The first page has text.", scan(ENGLISH, 2), "", "The last page has text."))
    assert [*read] == [1, 2, 4]
    assert (read[1], read[4]) == ("The first page has text.", "The last page has text.")
    expected = pages(ENGLISH.read_bytes(), OFF)[2].split()
    assert sum(word in read[2].split() for word in expected) > 0.95 * len(expected)


@needs_ocr
def test_chinese_print_is_read_without_gaps() -> None:
    text = parse(CHINESE_PRINT, "a.png", OPTIONS).text
    assert sum(one == other for one, other in zip(text, "水泵每年需要维护", strict=True)) >= 6


def test_gaps_between_chinese_characters_are_closed_and_others_kept() -> None:
    assert joined_han("水 泵 每年 ， 需 DN 600 x a\n水 b") == "水泵每年，需 DN 600 x a\n水 b"


@needs_ocr
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp", "gif", "webp"])
def test_an_image_of_any_kind_is_read_by_ocr(kind: str) -> None:
    parsed = parse(scan(ENGLISH, 2, kind, 0.2), f"scan.{kind}", OPTIONS._replace(ocr_languages="eng+xyz"))
    assert parsed.mime == f"image/{kind}"
    assert "Hydraulic tests" in parsed.text


@needs_ocr
def test_an_image_without_text_is_no_error_of_the_users() -> None:
    out = io.BytesIO()
    Image.new("RGB", (400, 300), "steelblue").save(out, "png")
    with pytest.raises(UnreadableTypeError, match="OCR found none") as caught:
        parse(out.getvalue(), "photo.png", OPTIONS)
    assert not isinstance(caught.value, OcrMissingError)


@needs_ocr
def test_languages_that_are_not_installed_are_missed_only_when_all_are() -> None:
    with pytest.raises(OcrMissingError, match="'tlh\\+xyz'"):
        parse(scan(ENGLISH), "scan.png", OPTIONS._replace(ocr_languages="tlh+xyz"))


@needs_ocr
def test_a_broken_image_is_an_error() -> None:
    with pytest.raises(DocumentError, match="cannot be read as image/png") as caught:
        parse(scan(ENGLISH)[:2000], "scan.png", OPTIONS)
    assert not isinstance(caught.value, UnreadableTypeError)
