"""Broken and hostile files, generated: what a folder full of trouble holds, and how each file may end.

`write` takes a second or two and under 40 MB. None of it harms the machine that only keeps it.
"""

import io
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docx import Document
from reportlab.pdfgen.canvas import Canvas

PASSWORD = "open sesame"  # of the encrypted files
TEXT = "The pump is serviced twice a year. Switch off the power first, then check the seal.\n"
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
LEFT, EITHER = "failed or skipped", "done or failed"
LAUGHS = (
    '<?xml version="1.0"?>\n<!DOCTYPE lolz [<!ENTITY lol0 "lol">'
    + "".join(f'<!ENTITY lol{n} "{f"&lol{n - 1};" * 10}">' for n in range(1, 10))
    + "]>\n"
)
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
SHEET = "application/vnd.openxmlformats-officedocument.spreadsheetml."
OFFICE = "http://schemas.openxmlformats.org/"


def write(folder: Path, line_bytes: int = 10 * 2**20) -> dict[str, str]:
    """Fills `folder`, which exists. -> path below it, names as os.fsdecode gives them -> how the file may end.

    Of an archive: how it or any file in it may end. `line_bytes`: of the file that is one line.
    """
    expected: dict[str, str] = {}
    contents = {**_good(), **_documents(), **_deep(), **_misnamed(), **_texts(line_bytes), **_archives()}
    for name, (outcome, data) in contents.items():
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
        expected[name] = outcome
    return {**expected, **_odd_names(folder), **_no_files(folder)}


@contextmanager
def vanishing(folder: Path) -> Iterator[Path]:
    """While it is entered, vanishing.md in `folder` is written and deleted, over and over; it is gone afterwards."""
    place = folder / "vanishing.md"
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            place.write_text("# Here now\n\n" + TEXT * 1000)
            ended.wait(0.002)
            place.unlink()
            ended.wait(0.002)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield place
    finally:
        ended.set()
        thread.join()


Contents = dict[str, tuple[str, bytes]]


def _good() -> Contents:
    return {
        "a-good.md": (DONE, b"# A good file\n\n" + TEXT.encode()),
        "good/good.pdf": (DONE, pdf("A good page. " + TEXT)),
        "good/good.docx": (DONE, docx("A good document. " + TEXT)),
        "good/good.html": (DONE, f"<html><body><h1>Good</h1><p>{TEXT}</p></body></html>".encode()),
        "zz-good.txt": (DONE, b"The last file is good too. " + TEXT.encode()),
    }


def _documents() -> Contents:
    whole_pdf, whole_docx = pdf(*[f"Page {n}. {TEXT}" for n in range(30)]), docx(TEXT)
    loop = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R] /Count 1 /Parent 2 0 R >>"]
    itself = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"]
    itself += [b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R >>", b"4 0 R"]
    return {
        "documents/truncated.pdf": (EITHER, whole_pdf[: len(whole_pdf) // 2]),
        "documents/truncated.docx": (FAILED, whole_docx[: len(whole_docx) // 2]),
        "documents/truncated.png": (LEFT, png()[:200]),
        "documents/empty.md": (LEFT, b""),
        "documents/empty.pdf": (LEFT, b""),
        "documents/empty.docx": (LEFT, b""),
        "documents/encrypted.pdf": (FAILED, pdf(TEXT, password=PASSWORD)),
        "documents/page-loop.pdf": (EITHER, raw_pdf(loop)),
        "documents/self-reference.pdf": (EITHER, raw_pdf(itself)),
        "documents/sheet.xlsx": (DONE, sheet(rows=1000, columns=100)),
    }


def _deep() -> Contents:
    """Small, until they are read: nested a hundred thousand times, or growing a thousandfold."""
    start = f'<w:document xmlns:w="{OFFICE}wordprocessingml/2006/main"><w:body>'
    body = start + "<w:p><w:r><w:t>%s</w:t></w:r></w:p></w:body></w:document>"
    table = "<w:tbl><w:tr><w:tc>" * 20_000 + "<w:p><w:r><w:t>%s</w:t></w:r></w:p>" + "</w:tc></w:tr></w:tbl>" * 20_000
    mail = f"Content-Type: text/plain\n\n{TEXT}"
    for level in range(300):
        mail = f'Content-Type: multipart/mixed; boundary="b{level}"\n\n--b{level}\n{mail}\n--b{level}--\n'
    return {
        "deep/laughs.docx": (EITHER, _word((LAUGHS + body % "&lol9;").encode())),
        "deep/laughs.xml": (EITHER, (LAUGHS + "<lolz>&lol9;</lolz>").encode()),
        "deep/large.docx": (EITHER, _word(_filled(body, 90 * 2**20))),
        "deep/huge.docx": (EITHER, _word(_filled(body, 150 * 2**20))),
        "deep/tables.docx": (EITHER, _word((start + table % TEXT + "</w:body></w:document>").encode())),
        "deep/divs.html": (EITHER, b"<html><body>" + b"<div>" * 50_000 + TEXT.encode() + b"</div>" * 50_000),
        "deep/headings.html": (EITHER, b"<h1>a a</h1>" * 50_000),
        "deep/quotes.md": (EITHER, b">" * 50_000 + TEXT.encode()),
        "deep/arrays.json": (EITHER, b"[" * 100_000 + b"]" * 100_000),
        "deep/arrays.ipynb": (EITHER, b'{"nbformat": 4, "cells": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "deep/elements.xml": (EITHER, b"<a>" * 100_000 + TEXT.encode() + b"</a>" * 100_000),
        "deep/parts.eml": (EITHER, f"From: a@example.org\nSubject: deep\nMIME-Version: 1.0\n{mail}".encode()),
    }


def _misnamed() -> Contents:
    return {
        "misnamed/pdf.txt": (EITHER, pdf(TEXT)),
        "misnamed/docx.pdf": (EITHER, docx(TEXT)),
        "misnamed/png.md": (LEFT, png()),
        "misnamed/text.pdf": (EITHER, TEXT.encode()),
        "misnamed/text.zip": (FAILED, TEXT.encode()),
        "misnamed/zip.md": (LEFT, archive({"a.md": TEXT.encode()})),
    }


def _texts(line_bytes: int) -> Contents:
    words = b"every word on the same line goes on and on "
    return {
        "texts/one-line.txt": (EITHER, (words * (line_bytes // len(words) + 1))[:line_bytes]),
        "texts/one-word.txt": (EITHER, b"a" * 2**20),
        "texts/invalid-utf8.txt": (
            EITHER,
            TEXT.encode() * 20 + b"\xc3\x28 \xff\xfe \xf0\x28\x8c\xbc\n" + TEXT.encode() * 20,
        ),
        "texts/utf16-no-mark.txt": (EITHER, (TEXT * 20).encode("utf-16-le")),
        "texts/zeros.txt": (LEFT, bytes(100_000)),
        "texts/white.txt": (LEFT, b" \n" * 50_000),
        ".hidden.md": (SKIPPED, TEXT.encode()),
    }


def _archives() -> Contents:
    inner = archive({"10.md": TEXT.encode()})
    for level in range(9, 0, -1):
        inner = archive({f"{level}.md": f"Level {level}. {TEXT}".encode(), f"{level + 1}.zip": inner})
    good = {"good.md": TEXT.encode()}
    evil = {"../../etc/evil.md": TEXT.encode(), "/etc/evil.md": TEXT.encode(), "..\\..\\evil.md": TEXT.encode(), **good}
    whole = archive({f"{n}.md": os.urandom(500) for n in range(20)})
    return {
        "archives/truncated.zip": (FAILED, whole[: len(whole) // 2]),
        "archives/truncated.tar.gz": (FAILED, special_tar("gz")[:-20]),
        "archives/empty.zip": (FAILED, b""),
        "archives/encrypted.zip": (FAILED, encrypted_zip(good, PASSWORD)),
        "archives/bomb.zip": (FAILED, archive({"zeros.txt": bytes(128 * 2**20)})),
        "archives/overlap.zip": (FAILED, overlapping_zip()),
        "archives/nested.zip": (EITHER, inner),
        "archives/evil-names.zip": (EITHER, archive(evil)),
        "archives/special.tar": (EITHER, special_tar()),
    }


def _odd_names(folder: Path) -> dict[str, str]:
    """Good files, all of them."""
    names = [
        "new\nline.md",
        "\N{GRINNING FACE}.md",
        os.fsdecode(b"caf\xe9-\xff.md"),
        "n" * 247 + ".md",
        "-rf.md",
        "a b'\"$(x).md",
    ]
    place = folder / "names"
    place.mkdir()
    for number, name in enumerate(names):
        (place / name).write_text(f"# Name {number}\n\n{TEXT}")
    unreadable = place / "no-permission.md"
    unreadable.write_text(TEXT)
    unreadable.chmod(0)  # which root reads all the same
    return {f"names/{name}": DONE for name in names} | {"names/no-permission.md": EITHER}


def _no_files(folder: Path) -> dict[str, str]:
    place = folder / "no-files"
    (place / "empty-folder").mkdir(parents=True)
    links = {
        "loop-a.md": "loop-b.md",
        "loop-b.md": "loop-a.md",
        "round": ".",
        "dangling.md": "nowhere.md",
        "out.txt": "/etc/passwd",
    }
    for name, target in links.items():
        (place / name).symlink_to(target)
    os.mkfifo(place / "pipe.txt")
    os.mknod(place / "socket.txt", stat.S_IFSOCK | 0o600)
    return {f"no-files/{name}": LEFT for name in [*links, "pipe.txt", "socket.txt"]}


# what the files are made of


def pdf(*pages: str, password: str | None = None) -> bytes:
    out = io.BytesIO()
    canvas = Canvas(out, encrypt=password)
    for page in pages:
        canvas.drawString(72, 700, page)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def raw_pdf(objects: list[bytes]) -> bytes:
    """From the objects 1, 2, ...; the first is the catalog."""
    out = b"%PDF-1.7\n"
    offsets = []
    for number, one in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    return (
        out
        + head
        + table
        + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    )


def docx(text: str) -> bytes:
    out = io.BytesIO()
    document = Document()
    document.add_paragraph(text)
    document.save(out)
    return out.getvalue()


def png() -> bytes:
    """A grey square of 64 x 64 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + os.urandom(64) for _ in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def office(parts: dict[str, bytes]) -> bytes:
    return archive(parts, level=1)


def _word(document: bytes) -> bytes:
    return office({**_package("word/document.xml", WORD), "word/document.xml": document})


def _package(main: str, kind: str, more: str = "") -> dict[str, bytes]:
    types = f'<Types xmlns="{OFFICE}package/2006/content-types"><Default Extension="rels" ContentType='
    types += '"application/vnd.openxmlformats-package.relationships+xml"/>'
    types += '<Default Extension="xml" ContentType="application/xml"/>'
    types += f'<Override PartName="/{main}" ContentType="{kind}"/>{more}</Types>'
    return {"[Content_Types].xml": types.encode(), "_rels/.rels": _relations("officeDocument", main)}


def _relations(kind: str, target: str) -> bytes:
    head = f'<Relationships xmlns="{OFFICE}package/2006/relationships"><Relationship Id="rId1" '
    return (
        head + f'Type="{OFFICE}officeDocument/2006/relationships/{kind}" Target="{target}"/></Relationships>'
    ).encode()


def _filled(body: str, size: int) -> bytes:
    words = b"more and more "
    before, after = body.encode().split(b"%s")
    return before + words * (size // len(words)) + after


def sheet(rows: int, columns: int) -> bytes:
    """A workbook of one sheet; each cell holds a number."""
    main = f"{OFFICE}spreadsheetml/2006/main"
    cells = "".join(
        f"<row>{''.join(f'<c><v>{row * columns + column}</v></c>' for column in range(columns))}</row>"
        for row in range(rows)
    )
    more = f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{SHEET}worksheet+xml"/>'
    named = f'<sheet xmlns:r="{OFFICE}officeDocument/2006/relationships" name="Numbers" sheetId="1" r:id="rId1"/>'
    return office(
        {
            **_package("xl/workbook.xml", f"{SHEET}sheet.main+xml", more),
            "xl/workbook.xml": f'<workbook xmlns="{main}"><sheets>{named}</sheets></workbook>'.encode(),
            "xl/_rels/workbook.xml.rels": _relations("worksheet", "worksheets/sheet1.xml"),
            "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>'.encode(),
        }
    )


def archive(files: dict[str, bytes], level: int = 6) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return out.getvalue()


def special_tar(compression: str = "") -> bytes:
    """A file, and members that are none: links, a device, a named pipe."""
    out = io.BytesIO()
    kinds = {"link.md": tarfile.SYMTYPE, "hard.md": tarfile.LNKTYPE, "disk": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE}
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as opened:
        good = tarfile.TarInfo("good.md")
        good.size = len(TEXT)
        opened.addfile(good, io.BytesIO(TEXT.encode()))
        for name, kind in kinds.items():
            special = tarfile.TarInfo(name)
            special.type, special.linkname = kind, "/etc/passwd"
            opened.addfile(special)
    return out.getvalue()


def overlapping_zip(files: int = 250, kernel: int = 2**20) -> bytes:
    """Each file's data is the next file's header, quoted, and its data (Fifield, A better zip bomb, 2019): 250 MiB in 32 kB."""
    compressor = zlib.compressobj(9, wbits=-15)
    data = compressor.compress(bytes(kernel)) + compressor.flush()
    content = bytes(kernel)
    sizes: list[tuple[bytes, tuple[int, int, int]]] = []
    header = b""
    for number in range(files, 0, -1):
        if header:
            data = b"\0" + struct.pack("<HH", len(header), len(header) ^ 0xFFFF) + header + data
            content = header + content
        name = b"%04d.txt" % number
        size = (zlib.crc32(content), len(data), len(content))
        header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, *size, len(name), 0) + name
        sizes.append((name, size))
    whole, directory, at = header + data, b"", 0
    for name, size in reversed(sizes):
        directory += (
            struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 33, *size, len(name), *[0] * 4, 0, at) + name
        )
        at += len(header) + 5
    return whole + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, files, files, len(directory), len(whole), 0)


def encrypted_zip(files: dict[str, bytes], password: str) -> bytes:
    """With the old cipher of PKZIP, which zipfile reads but does not write."""
    whole, directory = b"", b""
    for name, text in files.items():
        crc = zlib.crc32(text)
        data = _pkzip(os.urandom(11) + bytes([crc >> 24]) + text, password.encode())
        size, raw = (crc, len(data), len(text)), name.encode()
        directory += (
            struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 1, 0, 0, 33, *size, len(raw), *[0] * 4, 0, len(whole)) + raw
        )
        whole += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 1, 0, 0, 33, *size, len(raw), 0) + raw + data
    count = len(files)
    return whole + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(whole), 0)


def _pkzip(data: bytes, password: bytes) -> bytes:
    """Encrypts (APPNOTE.TXT 6.1)."""
    table = [zlib.crc32(bytes([n]), 0xFFFFFFFF) ^ 0xFFFFFFFF for n in range(256)]
    keys = [0x12345678, 0x23456789, 0x34567890]

    def step(byte: int) -> None:
        keys[0] = (keys[0] >> 8) ^ table[(keys[0] ^ byte) & 0xFF]
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = (keys[2] >> 8) ^ table[(keys[2] ^ (keys[1] >> 24)) & 0xFF]

    for byte in password:
        step(byte)
    out = bytearray()
    for byte in data:
        mix = (keys[2] | 2) & 0xFFFF
        out.append(byte ^ ((mix * (mix ^ 1)) >> 8) & 0xFF)
        step(byte)
    return bytes(out)
