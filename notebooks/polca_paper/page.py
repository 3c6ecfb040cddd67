"""One page of the book: figures, tables, and prose with computed numbers.

All of it is output of cells, as HTML or Markdown. So a notebook reads the same in the book, in Jupyter and on Colab, and
what a page says is what its cells computed.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from polca_paper import figures, tables

NOTHING = "–"
"""What stands where there is no number."""

LONG = 16  # rows; a longer table is folded
WIDE = 4  # columns; a wider table becomes a list of cards on a phone

_VERDICTS = {
    "reproduced": "#009E73",
    "stronger here": "#0072B2",
    "partly": "#E69F00",
    "not reproduced": "#D55E00",
    "not run": "#808080",
    "does not apply": "#808080",
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
        """Show Markdown; each ``{name:format}`` is replaced by a number, and "none" stands for one that is missing."""
        self.save(**numbers)
        values = {name: _Missing() if _is_missing(value) else value for name, value in numbers.items()}
        display(Markdown(template.format(**values) if numbers else template))

    def in_short(self, template: str, **numbers: object) -> None:
        """Show the box that a page begins with: its result in two to four sentences. See :meth:`text`."""
        self.text("> **In short.** " + " ".join(template.split()), **numbers)

    def save(self, **numbers: object) -> None:
        """Keep numbers for ``results/<preset>/<name>.json``.

        Raises:
            ValueError: a name has another value already.
        """
        for name, value in numbers.items():
            if name in self.numbers and repr(self.numbers[name]) != repr(value):
                raise ValueError(f"{name} = {self.numbers[name]!r} is on this page already; give {value!r} another name")
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
        figure.savefig(buffer, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close(figure)
        # Hundredths of a point are enough, and make files a third smaller.
        svg = re.sub(r"(\.\d\d)\d+", r"\1", buffer.getvalue().partition("<svg")[2])
        data = base64.b64encode(("<svg" + svg).encode()).decode()
        image = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        self._show("Figure", name, f'<div class="polca-scroll">{image}</div>', caption)

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
        headers = headers or {str(column): str(column) for column in rows}
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
        self._show("Table", name, f'<div class="polca-scroll">{table}</div>', caption, link, len(rows) if fold else None)

    def _show(self, kind: str, name: str, content: str, caption: str, more: str = "", rows: int | None = None) -> None:
        """Show a figure or a table with its number and caption, the caption of a table first; fold one with ``rows``."""
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

    def provenance(self, made_by: pd.DataFrame, studies: Iterable[object] = ()) -> Path:
        """End the page: what made it, folded, and its numbers in ``results/<preset>/<name>.json``.

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
            f"To check the page: <code>pytest --nbval notebooks/{self.name}.ipynb</code>, after <code>make runs</code>. "
            "On one machine all numbers agree. Elsewhere last digits and small clusters may differ."
        )
        summary = "<summary>What made this page, and how to check it</summary>"
        display(HTML(f'<details class="polca provenance">{summary}<p>{check}</p>{body}</details>'))
        return tables.save_results(self.preset, self.name, self.numbers, made_by)


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
        return number(value) if spec is None else format(value, spec).replace("-", "−", 1)
    text = _inline(str(value))
    colour = _VERDICTS.get(str(value))
    return f'<span class="verdict" style="border-left:0.35em solid {colour}">{text}</span>' if colour else text


def number(value: float) -> str:
    """Three significant digits without an exponent where that is short, with one where it is not."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}".replace("-", "−")
    digits = 3 if value == 0 else max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{digits}f}".replace("-", "−")


def _inline(text: str) -> str:
    """HTML of a text with links and code as in Markdown, and nothing else."""
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', html.escape(text, quote=False))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
