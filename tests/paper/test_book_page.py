"""Figures, tables and prose of a page of the book, as its cells give them, and as the book shows them."""

import base64
import json
import re

import build
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from polca_paper import page as module
from polca_paper.page import Page, number


@pytest.fixture
def shown(monkeypatch):
    """What a page shows, in turn."""
    outputs = []
    monkeypatch.setattr(module, "display", lambda output: outputs.append(output.data))
    return outputs


@pytest.fixture
def page(shown):
    return Page("05_polca", "smoke")


def cells_of(table):
    return [re.findall(r"<td[^>]*>(?:<span[^>]*>)?([^<]*)", row) for row in table.split("<tr>")[2:]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1,234"), (1.5e-7, "1.5e-07"), (2e16, "2.0e+16")],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


def test_table_shows_integers_as_integers_and_a_dash_for_nothing(page, shown):
    frame = pd.DataFrame({"tokens": [1200.0, None], "share": [0.25, -0.5], "low": [-1e-9, 0.3], "falls": [True, None]})
    page.table(frame, "tab", "What it shows.", formats={"low": ".2f"})
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert cells_of(shown[0]) == [["1,200", "0.250", "0.00", "yes"], [dash, f"{minus}0.500", "0.30", dash]]
    assert "<strong>Table 1.</strong> What it shows." in shown[0]


def test_table_has_the_columns_of_headers_and_its_csv_has_full_precision(page, shown):
    frame = pd.DataFrame({"a": [1 / 3], "b": [2], "hidden": [3]}, index=pd.Index(["x"], name="name"))
    page.table(frame, "tab", "What it shows.", headers={"name": "kind", "a": "share (nats)"})
    assert re.findall(r"<th scope[^>]*>([^<]*)", shown[0]) == ["kind", "share (nats)"]
    data = re.search(r'href="data:text/csv;base64,([^"]+)"', shown[0])[1]
    assert base64.b64decode(data).decode() == "name,a\nx,0.3333333333333333\n"


def test_long_tables_are_folded_and_wide_ones_become_cards(page, shown):
    page.table(pd.DataFrame({"n": range(40)}), "long", "Forty rows.")
    page.table(pd.DataFrame({name: [1] for name in "abcdef"}), "wide", "Six columns.")
    assert "<details><summary>" in shown[0]
    assert "(40 rows)" in shown[0]
    assert "cards" not in shown[0]
    assert "<details>" not in shown[1]
    assert 'class="polca cards"' in shown[1]


def test_table_without_rows_says_so(page, shown):
    page.table(pd.DataFrame({"a": []}), "tab", "None there.")
    assert "There is no row." in shown[0]
    assert "<table" not in shown[0]


def test_verdicts_are_coloured_and_worded_and_texts_are_never_html(page, shown):
    frame = pd.DataFrame({"claim": ["<b>x</b>", "[a](08_scale.ipynb)"], "verdict": ["partly", "not reproduced"]})
    page.table(frame, "tab", "Two claims.")
    assert 'class="verdict" style="border-left:0.35em solid #E69F00"' in shown[0]
    assert ">partly<" in shown[0].replace('<span class="short">', "")
    assert "&lt;b&gt;x&lt;/b&gt;" in shown[0]
    assert '<a href="08_scale.ipynb">a</a>' in shown[0]


def test_text_quotes_numbers_and_says_none_where_there_is_none(page, shown):
    page.text("Share {share:.1%} of {tokens:,}.", share=0.1234, tokens=5000)
    page.in_short("The purest\n   has {purest:.2f}, as above {share:.0%}.", purest=float("nan"))
    assert shown == ["Share 12.3% of 5,000.", "> **In short.** The purest has none, as above 12%."]


def test_one_name_has_one_number(page):
    page.save(share=0.5)
    page.save(share=0.5)
    with pytest.raises(ValueError, match=r"share = 0\.5 was there before; give 0\.6 another name"):
        page.save(share=0.6)


def test_figures_are_numbered_described_and_the_same_each_time(page, shown):
    for name in ("one", "two"):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1 / 3, 2 / 3])
        page.figure(figure, name, "It rises.", "A rising line & no more.")
    assert "<strong>Figure 2.</strong> It rises." in shown[1]
    assert 'alt="A rising line &amp; no more."' in shown[0]
    pictures = [re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', output)[1] for output in shown]
    assert pictures[0] == pictures[1]
    assert base64.b64decode(pictures[0]).startswith(b"<svg")
    assert not plt.get_fignums()


def test_page_ends_with_what_made_it_and_writes_its_numbers(page, shown, tmp_path, monkeypatch):
    monkeypatch.setenv("POLCA_RESULTS", str(tmp_path))
    page.save(share=0.5, missing=float("nan"))
    page.provenance(pd.DataFrame({"value": {"python": "3.11"}}))
    assert shown[0].startswith('<details class="polca provenance">')
    assert "<th>python</th><td>3.11</td>" in shown[0]
    kept = json.loads((tmp_path / "smoke" / "05_polca.json").read_text())
    assert kept == {"share": 0.5, "missing": None, "provenance": {"python": "3.11"}}


def test_book_keeps_pictures_and_tables_in_files_and_drops_what_it_does_not_use(tmp_path):
    picture, table = (base64.b64encode(data).decode() for data in (b"<svg/>", b"a\n1\n"))
    page = (
        '<script src="_static/fontawesome.js"></script><script src="own.js"></script>'
        '<script type="text/x-thebe-config">{ thebe }</script><script>kernelName = 1</script>'
        f'<img alt="x" src="data:image/svg+xml;base64,{picture}"><a href="data:text/csv;base64,{table}">CSV</a>'
        '<a href="08_scale.ipynb">scale</a><a href="../book/glossary.md#carry">carry</a>'
        '<a href="https://example.org/a.ipynb">away</a>'
    )
    (tmp_path / "notebooks").mkdir()
    light = build.lighten(page, tmp_path / "notebooks", tmp_path)
    files = re.findall(r'(?:src|href)="(\.\./_images/[^"]+)"', light)
    assert [(tmp_path / "notebooks" / file).read_bytes() for file in files] == [b"<svg/>", b"a\n1\n"]
    assert re.findall(r"<script[^>]*>", light) == ['<script src="own.js">']
    for link in ('"08_scale.html"', '"../book/glossary.html#carry"', '"https://example.org/a.ipynb"'):
        assert link in light
