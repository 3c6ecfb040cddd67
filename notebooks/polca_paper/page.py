"""One page of the book: figures, tables, and prose with computed numbers.

All of it is output of cells, as HTML or Markdown. So a notebook reads the same in the book, in Jupyter and on Colab,
and what a page says is what its cells computed.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from IPython.display import HTML, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from polca_lib.report.explorer import plotly_source
from polca_paper import figures, tables

NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""

LONG = 12  # rows; a longer table is folded
WIDE = 3  # columns; a wider table becomes a list of cards on a phone

_HOVER = """
for (const box of document.querySelectorAll("details.polca.hover")) {
  box.ontoggle = () => loadPlotly(JSON.parse(box.dataset.source)).then((Plotly) => {
    const { data, layout } = JSON.parse(box.dataset.figure);
    Plotly.react(box.querySelector("div"), data, layout, { displayModeBar: false, responsive: true });
  }, (error) => box.querySelector("div").append(`plotly.js could not be loaded from ${error.message}`));
}
"""

VERDICTS = {
    "reproduced": "#009E73",
    "stronger here": "#0072B2",
    "partly": "#E69F00",
    "not reproduced": "#D55E00",
    "not run": "#808080",
    "met": "#009E73",
    "not met": "#D55E00",
    "not measured": "#808080",
}


class Page:
    """Numbers its figures and tables, and collects the numbers that its prose quotes.

    Args:
        name: of the notebook, such as ``05_polca``.
        preset: whose folder of results the numbers go to, when :meth:`provenance` ends the page.
    """

    def __init__(self, name: str, preset: str):
        self.name, self.preset = name, preset
        self.numbers: dict[str, object] = {}
        self._counts = {"Figure": 0, "Table": 0}
        figures.use_style()

    def text(self, template: str, **numbers: object) -> None:
        """Show Markdown with numbers, and keep them, see :meth:`save`.

        Args:
            template: as for ``str.format``, of ``numbers`` and all that the page has kept; "none" stands for missing
                ones. Braces of formulas are doubled.
        """
        self.save(**numbers)
        values = {name: _Missing() if _is_missing(value) else value for name, value in self.numbers.items()}
        display(Markdown(template.format(**values)))

    def in_short(self, template: str, **numbers: object) -> None:
        """Show the box that a page begins with: its result in two to four sentences. See :meth:`text`."""
        self.text("> **In short.** " + " ".join(template.split()), **numbers)

    def save(self, **numbers: object) -> None:
        """Keep numbers for ``results/<preset>/<name>.json``.

        Raises:
            ValueError: a name has another value already.
        """
        for name, value in numbers.items():
            value = value.item() if isinstance(value, np.generic) else value
            if name in self.numbers and repr(self.numbers[name]) != repr(value):
                raise ValueError(f"{name} = {self.numbers[name]!r} was there before; give {value!r} another name")
            self.numbers[name] = value

    def figure(self, figure: Figure, name: str, caption: str, alt: str) -> None:
        """Show a figure as SVG.

        Args:
            figure: of matplotlib; it is closed.
            name: of the anchor, unique in the book.
            caption: says what the figure shows; may hold links in Markdown.
            alt: what is seen, for those who cannot see it.
        """
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", facecolor="white", dpi=150, metadata={"Date": None})
        plt.close(figure)
        # Hundredths of a point are enough for a path, and make files a third smaller.
        start = buffer.getvalue().index("<svg")
        paths = re.compile(r' d="[^"]+"')
        svg = paths.sub(lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), buffer.getvalue()[start:])
        data = base64.b64encode(svg.encode()).decode()
        image = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        self._show("Figure", name, f'<div class="polca-scroll">{image}</div>', caption)

    def hover(self, figure: go.Figure, summary: str) -> None:
        """Show a figure to point at, folded; plotly.js is loaded when it is opened. ``summary`` says what it shows."""
        figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font_color="#808890")
        figure.update_layout(template="none", margin={"t": 10, "r": 10}, hoverlabel_align="left", dragmode=False)
        data, source = (html.escape(text) for text in (figure.to_json(), json.dumps(plotly_source())))
        script = files("polca_lib.report").joinpath("explorer_page.js").read_text("utf-8")
        display(
            HTML(
                f'<details class="polca hover" data-figure="{data}" data-source="{source}"><summary>{summary}</summary>'
                f'<div class="polca-scroll"></div></details>\n<script>(() => {{\n{script}{_HOVER}}})();</script>'
            )
        )

    def table(
        self,
        frame: pd.DataFrame,
        name: str,
        caption: str,
        headers: Mapping[str, str] | None = None,
        formats: Mapping[str, str] | None = None,
        fold: bool | None = None,
    ) -> None:
        """Show a table with a link to its CSV.

        Args:
            frame: the levels of a named index come first, as columns.
            name: of the anchor, unique in the book, and of the CSV file.
            caption: says what the table shows.
            headers: what stands above each column, with its unit; other columns are left out. All, if not given.
            formats: of numbers by column; integers and three significant digits if not given.
            fold: show the table on a click only; whether it is long, if not given.
        """
        rows = frame.reset_index() if frame.index.names != [None] else frame
        headers = headers or {column: str(column) for column in rows}
        rows = rows[list(headers)]
        cells = {column: _cells(rows[column], (formats or {}).get(column)) for column in headers}
        sides = {column: ' class="number"' if _is_number(rows[column]) else "" for column in headers}
        head = "".join(f'<th scope="col"{sides[column]}>{_inline(text)}</th>' for column, text in headers.items())
        label = {column: f' data-label="{html.escape(text)}"' for column, text in headers.items()}
        body = "\n".join(
            "<tr>" + "".join(f"<td{sides[c]}{label[c]}>{cells[c][row]}</td>" for c in headers) + "</tr>"
            for row in range(len(rows))
        )
        kind = "polca cards" if len(headers) > WIDE else "polca"
        table = f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
        data = base64.b64encode(rows.to_csv(index=False).encode()).decode()
        link = f' <a class="csv" download="{name}.csv" href="data:text/csv;base64,{data}">CSV</a>'
        fold = len(rows) >= LONG if fold is None else fold
        content = f'<div class="polca-scroll">{table}</div>'
        if rows.empty:
            content, link, fold = "<p>There is no row.</p>", "", False
        self._show("Table", name, content, caption, link, len(rows) if fold else None)

    def _show(self, kind: str, name: str, content: str, caption: str, more: str = "", rows: int | None = None) -> None:
        """Show a figure or a table with its number and caption; fold one whose number of ``rows`` is given."""
        self._counts[kind] += 1
        text = f"<strong>{kind} {self._counts[kind]}.</strong> {_inline(caption)}{more}"
        if rows is not None:
            text = f"{text} ({rows} rows)"
            content = f"<details><summary>{text}</summary>{content}</details>"
        elif kind == "Figure":
            content = f"{content}<figcaption>{text}</figcaption>"
        else:
            content = f"<figcaption>{text}</figcaption>{content}"
        display(HTML(f'<figure class="polca" id="{name}">{content}</figure>'))

    def provenance(self, made_by: pd.DataFrame, studies: Iterable[object] = ()) -> None:
        """End the page with what made it, folded; write its numbers to ``results/<preset>/<name>.json``.

        Args:
            made_by: from :meth:`polca_lib.analysis.analysis.Analysis.provenance`.
            studies: :class:`~polca_paper.saved_study.SavedStudy` that the page shows.
        """
        parts = {"This page": made_by["value"]}
        parts |= {f"Study {study.name}": pd.Series(study.provenance["stages"]) for study in studies}
        body = "".join(
            f"<h4>{title}</h4><table>{''.join(f'<tr><th>{k}</th><td>{v}</td></tr>' for k, v in part.items())}</table>"
            for title, part in parts.items()
        )
        check = (
            "To check the page, run <code>make runs</code>, then "
            f"<code>pytest --nbval notebooks/{self.name}.ipynb</code>. "
            "On one machine all numbers agree. On another, last digits and small clusters may differ."
        )
        summary = "<summary>What made this page, and how to check it</summary>"
        display(HTML(f'<details class="polca provenance">{summary}<p>{check}</p>{body}</details>'))
        tables.save_results(self.preset, self.name, self.numbers, made_by)


class _Missing:
    """A number that there is none of, in prose."""

    def __format__(self, spec: str) -> str:
        return "none"


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float | np.floating) and not np.isfinite(value))


def _is_number(column: pd.Series) -> bool:
    values = [value for value in column if not _is_missing(value)]
    return bool(values) and all(
        isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in values
    )


def _cells(column: pd.Series, spec: str | None) -> list[str]:
    """HTML of each cell; the floats of a column that holds whole numbers alone are shown as integers."""
    whole = _is_number(column) and all(_is_missing(v) or float(v).is_integer() for v in column)
    return [_cell(value, spec or (",.0f" if whole else None)) for value in column]


def _cell(value: object, spec: str | None) -> str:
    if _is_missing(value) or value == "":
        return NOTHING
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | float | np.number):
        text = number(value) if spec is None else format(value, spec)
        text = text.lstrip("-") if not re.search("[1-9]", text) else text  # no minus before a zero
        return text.replace("-", "\N{MINUS SIGN}")
    text = _inline(str(value))
    text = f'<span class="short">{text}</span>' if len(str(value)) < 13 else text
    colour = VERDICTS.get(str(value))
    return f'<span class="verdict" style="border-left:0.35em solid {colour}">{text}</span>' if colour else text


def number(value: float) -> str:
    """Three significant digits without an exponent where that is short, with one where it is not."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}"
    digits = 3 if value == 0 else max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{digits}f}"


def _inline(text: str) -> str:
    """HTML of a text with links and code as in Markdown, and nothing else."""
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', html.escape(text, quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
