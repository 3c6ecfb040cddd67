"""What a script can see of how the pages read: sentences, words, boxes, alt texts, tables, roles; and their width."""

import html
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PROSE = {path.name: path for path in [*sorted((ROOT / "book").glob("*.md")), ROOT / "README.md"]}

LONGEST = 25  # words of a sentence

BANNED = (
    "by lot", "made anew", "computes anew", "to and fro", "of which the", "those of the", "the same of", "whatever",
    "in vain", "at hand", "is told of", "needs must", "lest", "whence", "thereof", "wherein", "hitherto", "upon",
    "not yet carrying", "up to version", "we used to", "used to hide", "had hidden", "until this page", "in print it",
    "it should be noted", "in order to", "utilize", "leverage", "respectively", "obviously", "clearly,",
    "simply put", "load_tables at",
)  # fmt: skip

ABBREVIATIONS = re.compile(r"\b(?:et al|Eq|Fig|e\.g|i\.e|vs|cf|No)\.")


def markdown_of(notebook):
    """Markdown of the cells, and of what they gave."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                yield output.data["text/markdown"]


def html_of(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                yield output.data["text/html"]


def captions_of(page):
    """Captions of the figures and tables in HTML, as plain text."""
    for text in re.findall(r"<(?:figcaption|summary)>(.*?)</(?:figcaption|summary)>", page, re.DOTALL):
        yield html.unescape(re.sub(r"<a class=.csv.*?</a>|<[^>]+>", "", text)).strip()


def sentences(text):
    """Sentences of Markdown, without code, formulas, tables, headings and addresses."""
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^(`{3,}|~{3,}|:{3,}).*?\n(?:.*?\n)??\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    text = re.sub(r"\{[\w:]+\}`([^`]*)`", r"\1", text)
    text = re.sub(r"`[^`]*`|\$[^$]*\$", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line.lstrip("> ").rstrip() for line in text.splitlines()]
    # A heading, a row of a table, or a line of a directive ends a paragraph, and so does the start of an item.
    lines = ["" if re.match(r"[#|<]|:{3,}|`{3,}|\(.*\)=$", line) else line for line in lines]
    lines = ["\n\n" + line if re.match(r"[-*+] |\d+\. |\*\*", line) else line for line in lines]
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        plain = ABBREVIATIONS.sub(lambda match: match[0].replace(".", ""), " ".join(paragraph.split()))
        yield from (part for part in re.split(r"(?<=[.!?])[\"'*_)\u201d]*\s+", plain) if part)


def faults_of_text(text):
    for sentence in sentences(text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > LONGEST:
            yield f"{len(words)} words: {sentence[:90]}..."
    flat = " ".join(text.split()).lower()
    yield from (f"banned: {phrase!r}" for phrase in BANNED if re.search(rf"\b{re.escape(phrase)}", flat))


def faults_of_notebook(notebook):
    texts, pages = list(markdown_of(notebook)), list(html_of(notebook))
    for text in texts:
        yield from faults_of_text(text)
        yield from (f"a role is raw: {role}" for role in re.findall(r"\{[a-z:]+\}`[^`]*`", text))
    if not any(text.startswith("> **In short.**") for text in texts):
        yield "no box 'In short'"
    for page in pages:
        for caption in captions_of(page):
            yield from faults_of_text(caption)
            if len(caption.split()) < 6 or caption.endswith("?"):
                yield f"a caption that says too little: {caption}"
        yield from (
            "an image without alt text"
            for tag in re.findall(r"<img[^>]*>", page)
            if not re.search(r'alt="[^"]{20}', tag)
        )
        yield from ("NaN in a table" for _ in re.findall(r">\s*(?:nan|NaN|None)\s*<", page))
        if "dataframe" in page:
            yield "a table of pandas: use Page.table"
    if any(
        name.startswith("image/")
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        for name in o.get("data", {})
    ):
        yield "an image without number and caption: use Page.figure"


def faults(name):
    if name in NOTEBOOKS:
        return list(faults_of_notebook(nbformat.read(NOTEBOOKS[name], 4)))
    return list(faults_of_text(PROSE[name].read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted({*NOTEBOOKS, *PROSE}))
def test_page_reads_well(name):
    assert faults(name) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" ".join(["word"] * 26) + ".", ["26 words"]),
        (" ".join(["word"] * 25) + ". Another one.", []),
        ("It swings to and fro.", ["banned"]),
        ("Cohen et al. found it. Eq. 4 says so.", []),
        ("```python\n" + "word " * 40 + "\n```\nShort.", []),
        ("| a | table " + "word " * 40 + "|\n\nShort.", []),
        ("- " + "word " * 15 + "\n- " + "word " * 15, []),
    ],
)
def test_linter_sees_long_sentences_and_banned_phrases(text, said):
    found = list(faults_of_text(text))
    assert len(found) == len(said)
    assert all(part in fault for part, fault in zip(said, found, strict=True))


def test_linter_sees_what_a_notebook_lacks():
    output = nbformat.v4.new_output(
        "display_data", {"text/html": "<img src='x'><td>NaN</td><figcaption>Why?</figcaption>"}
    )
    cells = [nbformat.v4.new_markdown_cell("See {doc}`x`."), nbformat.v4.new_code_cell("1", outputs=[output])]
    found = " ".join(faults_of_notebook(nbformat.v4.new_notebook(cells=cells)))
    for words in ("a role is raw", "no box", "says too little", "without alt text", "NaN in a table"):
        assert words in found


OVERFLOW = """() => {
  const width = document.documentElement.clientWidth, hidden = 'pre, details:not([open]), mjx-container, .math';
  const wide = [...document.querySelectorAll('.bd-article table, .bd-article img, .bd-article p')].filter(element =>
    !element.closest(hidden) && !element.closest('.polca-scroll') && element.getBoundingClientRect().right > width + 1);
  const scrolled = [...document.querySelectorAll('.bd-article .polca-scroll:has(table)')].filter(element =>
    !element.closest(hidden) && element.scrollWidth > element.clientWidth + 1);
  const name = element => {
    const figure = element.closest('figure');
    return figure ? figure.id : `${element.tagName} ${element.textContent.slice(0, 40)}`;
  };
  const names = [...wide, ...scrolled].map(name);
  return document.documentElement.scrollWidth > width + 1 ? ['the page itself', ...names] : names;
}"""


def overflows(browser, page):
    """What is wider than the window of a phone and of a desktop, on a page that is built."""
    view, found = browser.new_page(), {}
    try:
        for width in (390, 1440):
            view.set_viewport_size({"width": width, "height": 900})
            if not found:
                view.goto(page.as_uri())
            found[width] = view.evaluate(OVERFLOW)
        return found
    finally:
        view.close()


@pytest.mark.slow
def test_browser_sees_what_is_too_wide(browser, tmp_path):
    page = tmp_path / "page.html"
    start = '<!DOCTYPE html><meta name="viewport" content="width=device-width"><article class="bd-article">'
    page.write_text(f"{start}<p>Short.</p></article>")
    assert overflows(browser, page) == {390: [], 1440: []}
    page.write_text(f'{start}<table style="width: 600px"><td>wide</td></table></article>')
    found = overflows(browser, page)
    assert "TABLE wide" in found[390]
    assert found[1440] == []
    page.write_text(
        f'{start}<div class="polca-scroll" style="overflow: auto"><table style="width: 600px"><td>wide</table></div>'
    )
    assert overflows(browser, page) == {390: ["DIV wide"], 1440: []}
