"""Sphinx directive ``situations``: the table of ``book/situations.csv``, folded, a part for each kind."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Situations(SphinxDirective):
    """Two columns: the situation with its source, and what happens with its test."""

    def run(self) -> list[nodes.Node]:
        """Write the rows as Markdown, and parse it."""
        file = Path(self.env.srcdir) / "book" / "situations.csv"
        self.env.note_dependency(str(file))
        with file.open(encoding="utf-8", newline="") as rows:
            groups = itertools.groupby(list(csv.DictReader(rows)), key=lambda row: row["kind"])
        text = []
        for kind, rows_of_kind in groups:
            group = list(rows_of_kind)
            text += [
                "",
                f"::::{{dropdown}} {kind[0].upper()}{kind[1:]} ({len(group)})",
                ":::{table}",
                ":class: situations",
                "",
            ]
            text += ["| situation | what happens |", "|---|---|"]
            for row in group:
                source = f" ({row['from']})" if row["from"] else ""
                cells = f"{row['situation']}{source}", f"{row['what happens']} {row['test']}"
                text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            text += ["", ":::", "::::", ""]
        node = nodes.container()
        self.state.nested_parse(StringList(text, source=str(file)), 0, node)
        return node.children


def setup(app: Sphinx) -> dict[str, object]:
    """Register the directive."""
    app.add_directive("situations", Situations)
    return {"parallel_read_safe": True}
