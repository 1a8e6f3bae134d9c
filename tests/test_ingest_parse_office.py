"""Word, PowerPoint, Excel, OpenDocument, HTML, EPUB and RTF: structure as Markdown, words as they stand in the file."""

import io
import zipfile
from xml.sax.saxutils import escape

import pytest
from docx import Document
from docx.enum.text import WD_BREAK

from ingest.errors import DocumentError
from ingest.parse import ParseOptions, parse
from ingest.schemas import ParsedText

OPTIONS = ParseOptions(max_chars=10_000_000)
ODF = "urn:oasis:names:tc:opendocument:xmlns"
OOXML = "http://schemas.openxmlformats.org"
TRICKY = "R&D: 5 < 6, a_b_c, 3*4*5, [1] #5 <b> \\ `x` ~100% $x$ 水泵"


def zipped(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def docx(document: object) -> bytes:
    out = io.BytesIO()
    document.save(out)  # type: ignore[attr-defined]
    return out.getvalue()


def odf(kind: str, body: str, manifest: str = "") -> bytes:
    mime = f"application/vnd.oasis.opendocument.{kind}"
    names = {"office": "office:1.0", "text": "text:1.0", "table": "table:1.0", "draw": "drawing:1.0"}
    names |= {"presentation": "presentation:1.0", "dc": "dc:1.0"}
    declared = " ".join(f'xmlns:{short}="{ODF}:{name}"' for short, name in names.items())
    content = f"<office:document-content {declared}><office:body>{body}</office:body></office:document-content>"
    meta = f"<office:document-meta {declared}><dc:title>Works</dc:title><dc:creator>Ingrid</dc:creator></office:document-meta>"
    return zipped(
        {"mimetype": mime, "content.xml": content, "meta.xml": meta, "META-INF/manifest.xml": manifest or "<m/>"}
    )


def odf_table(name: str, *rows: str) -> str:
    lines = "".join(f"<table:table-row>{row}</table:table-row>" for row in rows)
    return f'<table:table table:name="{name}">{lines}</table:table>'


def odf_cells(*cells: str) -> str:
    return "".join(f"<table:table-cell><text:p>{cell}</text:p></table:table-cell>" for cell in cells)


def ooxml(main: str, main_type: str, parts: dict[str, tuple[str, str]]) -> bytes:
    """`parts`: path below the main part's folder -> (content, kind of relation)."""
    folder = main.split("/")[0]
    relations = "".join(
        f'<Relationship Id="rId{n}" Type="{OOXML}/officeDocument/2006/relationships/{kind}" Target="{path}"/>'
        for n, (path, (_, kind)) in enumerate(parts.items(), start=1)
    )
    files = {
        "[Content_Types].xml": f'<Types xmlns="{OOXML}/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{OOXML}/package/2006/relationships"><Relationship Id="rId1" '
        f'Type="{OOXML}/officeDocument/2006/relationships/officeDocument" Target="{main}"/></Relationships>',
        main: main_type,
        f"{folder}/_rels/{main.split('/')[1]}.rels": f'<Relationships xmlns="{OOXML}/package/2006/relationships">'
        f"{relations}</Relationships>",
    }
    return zipped(files | {f"{folder}/{path}": content for path, (content, _) in parts.items()})


def xlsx(**sheets: list[list[str]]) -> bytes:
    names = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="rId{n}"/>' for n, name in enumerate(sheets, start=1))
    main, relations = f"{OOXML}/spreadsheetml/2006/main", f"{OOXML}/officeDocument/2006/relationships"
    parts = {}
    for n, rows in enumerate(sheets.values(), start=1):
        cells = "".join(
            f'<row r="{y}">'
            + "".join(
                f'<c r="{chr(65 + x)}{y}" t="inlineStr"><is><t>{escape(text)}</t></is></c>'
                for x, text in enumerate(row)
                if text
            )
            + "</row>"
            for y, row in enumerate(rows, start=1)
        )
        parts[f"sheet{n}.xml"] = (f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>', "worksheet")
    workbook = f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets>{names}</sheets></workbook>'
    return ooxml("xl/workbook.xml", workbook, parts)


def pptx(*slides: tuple[str, str]) -> bytes:
    """A title and a paragraph each."""
    main, drawing = f"{OOXML}/presentationml/2006/main", f"{OOXML}/drawingml/2006/main"
    relations = f"{OOXML}/officeDocument/2006/relationships"
    ids = "".join(f'<p:sldId id="{255 + n}" r:id="rId{n}"/>' for n in range(1, len(slides) + 1))

    def shape(text: str, kind: str) -> str:
        place = '<p:nvPr><p:ph type="title"/></p:nvPr>' if kind == "title" else "<p:nvPr/>"
        return (
            f'<p:sp><p:nvSpPr><p:cNvPr id="2" name="{kind}"/><p:cNvSpPr/>{place}</p:nvSpPr><p:spPr/><p:txBody><a:bodyPr/>'
            f"<a:p><a:r><a:t>{escape(text)}</a:t></a:r></a:p></p:txBody></p:sp>"
        )

    parts = {
        f"slides/slide{n}.xml": (
            f'<p:sld xmlns:p="{main}" xmlns:a="{drawing}"><p:cSld><p:spTree>{shape(title, "title")}{shape(body, "body")}'
            "</p:spTree></p:cSld></p:sld>",
            "slide",
        )
        for n, (title, body) in enumerate(slides, start=1)
    }
    presentation = (
        f'<p:presentation xmlns:p="{main}" xmlns:r="{relations}"><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>'
    )
    return ooxml("ppt/presentation.xml", presentation, parts)


def outline(parsed: ParsedText) -> list[tuple[int, str]]:
    for heading in parsed.headings:
        assert parsed.text[heading.start :].split("\n")[0].lstrip("# ") == heading.title
    return [(heading.level, heading.title) for heading in parsed.headings]


def test_a_word_file_keeps_its_words_its_lines_and_its_tables() -> None:
    document = Document()
    document.add_heading(TRICKY, 1)
    paragraph = document.add_paragraph(TRICKY)
    paragraph.add_run().add_break(WD_BREAK.LINE)
    paragraph.add_run("next line").bold = True
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["Part", "Life | years", "Seal &\nring", "2"], strict=True):
        cell.text = text
    document.add_paragraph("1. no list\n# no heading")
    parsed = parse(docx(document), "a.docx", OPTIONS)
    assert parsed.text == "\n\n".join(
        [
            f"# {TRICKY}",
            f"{TRICKY}\nnext line",
            "| Part | Life \\| years |\n| --- | --- |\n| Seal & ring | 2 |",
            "1. no list\n# no heading",
        ]
    )
    assert outline(parsed) == [(1, TRICKY)]


def test_lists_and_footnotes_of_a_word_file_are_kept() -> None:
    main = f"{OOXML}/wordprocessingml/2006/main"
    number = '<w:pPr><w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr></w:pPr>'
    run = "<w:r><w:t>{}</w:t></w:r>"
    items = "".join(f"<w:p>{number}{run.format(item)}</w:p>" for item in ("Oil", "Seal"))
    body = f'<w:p>{run.format("Grease it.")}<w:r><w:footnoteReference w:id="2"/></w:r></w:p>{items}'
    level = '<w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/></w:lvl>'
    numbering = f'<w:abstractNum w:abstractNumId="0">{level}</w:abstractNum>'
    numbering += '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
    note = f'<w:footnote w:id="2"><w:p>{run.format("Below 5 &lt; 6 &#176;C.")}</w:p></w:footnote>'
    parts = {
        "footnotes.xml": (f'<w:footnotes xmlns:w="{main}">{note}</w:footnotes>', "footnotes"),
        "numbering.xml": (f'<w:numbering xmlns:w="{main}">{numbering}</w:numbering>', "numbering"),
    }
    document = f'<w:document xmlns:w="{main}"><w:body>{body}</w:body></w:document>'
    parsed = parse(ooxml("word/document.xml", document, parts), "a.docx", OPTIONS)
    assert parsed.text == "Grease it.[^1]\n\n- Oil\n- Seal\n\n[^1]: Below 5 < 6 °C."


def test_a_web_page_keeps_its_structure_and_loses_its_addresses() -> None:
    page = f"""<html><head><title>Pumps &amp; taps</title><meta name="description" content="How to care"></head>
    <body><nav><a href="/">Home</a></nav><form action="/x"><h1>Care</h1>
    <p>See <a href="javascript:void(0)">the <b>plan</b></a><img src="data:image/png;base64,AAAA" alt="A pump">.</p>
    <p>{escape(TRICKY)} and __init__</p><p><img src="x.png" alt="Cut view"></p>
    <ul><li>Oil<ul><li>weekly</li></ul></li><li>Seal</li></ul><ol start="3"><li>Stop</li><li>Drain</li></ol>
    <pre><code class="language-python">def f(x):
    return "| x | &amp; _y_"</code></pre>
    <table><tr><th>Part</th><th>Life</th></tr><tr><td>Seal<br>ring</td><td>2 | 3</td></tr></table>
    <blockquote>Switch it off.</blockquote></form></body></html>"""
    parsed = parse(page.encode(), "a.html", OPTIONS)
    assert parsed.text == "\n\n".join(
        [
            "# Care",
            "See the planA pump.",
            f"{TRICKY} and __init__",
            "Cut view",
            "- Oil\n  - weekly\n- Seal",
            "3. Stop\n4. Drain",
            '```python\ndef f(x):\n    return "| x | & _y_"\n```',
            "| Part | Life |\n| --- | --- |\n| Seal ring | 2 \\| 3 |",
            "> Switch it off.",
        ]
    )
    assert outline(parsed) == [(1, "Care")]
    assert parsed.metadata["title"] == "Pumps & taps"


def test_a_workbook_is_a_table_for_each_sheet() -> None:
    sheets = {"Parts": [["Part", "Life"], ["Seal & <ring>", "2 | 3"], ["Pump"]], "Empty": [], "Sites": [["Site"]]}
    parsed = parse(xlsx(**sheets), "a.xlsx", OPTIONS)
    parts = "| Part | Life |\n| --- | --- |\n| Seal & <ring> | 2 \\| 3 |\n| Pump |  |"
    assert parsed.text == f"## Parts\n\n{parts}\n\n## Sites\n\n| Site |\n| --- |"
    assert outline(parsed) == [(2, "Parts"), (2, "Sites")]


def test_a_date_in_a_sheet_reads_as_a_date() -> None:
    main, relations = f"{OOXML}/spreadsheetml/2006/main", f"{OOXML}/officeDocument/2006/relationships"
    cells = '<c r="A1" s="1"><v>45717</v></c><c r="B1" s="1"><v>45717.5</v></c><c r="C1"><f>1+2</f><v>3</v></c>'
    styles = (
        f'<styleSheet xmlns="{main}"><cellXfs count="2"><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs></styleSheet>'
    )
    parts = {
        "sheet1.xml": (
            f'<worksheet xmlns="{main}"><sheetData><row r="1">{cells}</row></sheetData></worksheet>',
            "worksheet",
        ),
        "styles.xml": (styles, "styles"),
    }
    sheet = '<sheet name="S" sheetId="1" r:id="rId1"/>'
    workbook = f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets>{sheet}</sheets></workbook>'
    parsed = parse(ooxml("xl/workbook.xml", workbook, parts), "a.xlsx", OPTIONS)
    assert parsed.text.split("\n")[2] == "| 2025-03-01 | 2025-03-01 12:00:00 | 3 |"


def test_a_sheet_of_a_hundred_thousand_cells_is_read() -> None:
    rows = [[f"r{y} c{x}" for x in range(20)] for y in range(5000)]
    assert parse(xlsx(Big=rows), "a.xlsx", OPTIONS).text.count("\n") == 5000 + 2


def test_a_slide_is_a_page() -> None:
    parsed = parse(pptx(("Pumps", TRICKY), ("Taps & valves", "Turn them.")), "a.pptx", OPTIONS)
    assert {page.number: parsed.text[page.start : page.end] for page in parsed.pages} == {
        1: f"## Pumps\n\n{TRICKY}",
        2: "## Taps & valves\n\nTurn them.",
    }
    assert outline(parsed) == [(2, "Pumps"), (2, "Taps & valves")]


def test_a_text_of_opendocument_keeps_headings_lists_tables_and_notes() -> None:
    item = "<text:list-item><text:p>{}</text:p>{}</text:list-item>"
    inner = f"<text:list>{item.format('weekly', '')}</text:list>"
    body = f"""<office:text><text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>
    <text:h text:outline-level="2">Care</text:h>
    <text:p>{escape(TRICKY)}<text:s text:c="2"/>wide<text:line-break/>next <text:span>line</text:span><text:note>
    <text:note-citation>1</text:note-citation><text:note-body><text:p>See there.</text:p></text:note-body></text:note>.</text:p>
    <text:list>{item.format("Oil", inner)}{item.format("Seal", "")}</text:list>
    {odf_table("T", odf_cells("Part", "Life | y"), odf_cells("Seal", "2"))}</office:text>"""
    parsed = parse(odf("text", body), "a.odt", OPTIONS)
    assert parsed.text == (
        f"## Care\n\n{TRICKY}  wide\nnext line [See there.].\n\n- Oil\n  - weekly\n- Seal\n\n"
        "| Part | Life \\| y |\n| --- | --- |\n| Seal | 2 |"
    )
    assert outline(parsed) == [(2, "Care")]
    assert parsed.metadata == {"title": "Works", "authors": ["Ingrid"]}


def test_a_spreadsheet_of_opendocument_is_a_table_for_each_sheet_without_its_empty_million() -> None:
    empty = '<table:table-cell table:number-columns-repeated="16384"/>'
    repeated = '<table:table-cell table:number-columns-repeated="2"><text:p>x</text:p></table:table-cell>'
    million = f'<table:table-row table:number-rows-repeated="1048573">{empty}</table:table-row>'
    sheet = odf_table("Parts", odf_cells("Part", "Life") + empty, repeated + empty)
    sheet = sheet.replace("</table:table>", f"{million}</table:table>")
    parsed = parse(odf("spreadsheet", f"<office:spreadsheet>{sheet}</office:spreadsheet>"), "a.ods", OPTIONS)
    assert parsed.text == "## Parts\n\n| Part | Life |\n| --- | --- |\n| x | x |"


def odf_slide(title: str, body: str, notes: str = "") -> str:
    frame = "<draw:frame{}><draw:text-box><text:p>{}</text:p></draw:text-box></draw:frame>"
    titled = frame.format(' presentation:class="title"', title)
    noted = f"<presentation:notes>{frame.format('', notes)}</presentation:notes>" if notes else ""
    return f"<draw:page>{titled}{frame.format('', body)}{noted}</draw:page>"


def test_a_presentation_of_opendocument_has_pages_and_notes() -> None:
    slides = odf_slide("Pumps", "Grease &amp; go.", "Say it slowly.") + "<draw:page/>" + odf_slide("Taps", "Turn them.")
    parsed = parse(odf("presentation", f"<office:presentation>{slides}</office:presentation>"), "a.odp", OPTIONS)
    assert {page.number: parsed.text[page.start : page.end] for page in parsed.pages} == {
        1: "## Pumps\n\nGrease & go.\n\nNotes: Say it slowly.",
        3: "## Taps\n\nTurn them.",
    }
    assert outline(parsed) == [(2, "Pumps"), (2, "Taps")]


def test_office_files_with_a_password_say_so() -> None:
    compound = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600 + "EncryptedPackage".encode("utf-16-le") + b"\0" * 600
    for data, name in ((compound, "a.docx"), (odf("text", "", "<encryption-data/>"), "a.odt")):
        with pytest.raises(DocumentError, match="which only PDF and archives can be opened with; save it without"):
            parse(data, name, OPTIONS)


def test_a_book_is_its_chapters() -> None:
    chapter = '<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>{}</h1><p>{}</p></body></html>'
    book = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
        '<rootfile full-path="b.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        "b.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        "<dc:title>Waterworks</dc:title></metadata><manifest>"
        '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="b" href="b.xhtml" media-type="application/xhtml+xml"/>'
        '</manifest><spine><itemref idref="b"/><itemref idref="a"/></spine></package>',
        "a.xhtml": chapter.format("Second", "Turn <em>it</em> off."),
        "b.xhtml": chapter.format("First", "R&amp;D"),
    }
    parsed = parse(zipped(book), "a.epub", OPTIONS)
    assert parsed.text == "# First\n\nR&D\n\n# Second\n\nTurn it off."
    assert outline(parsed) == [(1, "First"), (1, "Second")]
    assert parsed.metadata["title"] == "Waterworks"


def test_rich_text_keeps_its_words_and_tables() -> None:
    row = rb"\trowd\cellx9\cellx99 %b\cell %b\cell\row"
    words = rb"{\rtf1\ansi\pard{\b Manual}\par Grease \'e9 \u27700? it.\par"
    rtf = words + row % (b"A", b"B") + row % (b"1", b"2") + b"}"
    assert parse(rtf, "a.rtf", OPTIONS).text == "Manual\n\nGrease é 水 it.\n\n| A | B |\n| --- | --- |\n| 1 | 2 |"
