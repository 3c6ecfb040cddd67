"""Sphinx role ``result``: a number in prose, read from what the notebooks wrote.

``{result}`05_polca.base_rate:.3f``` reads ``base_rate`` of ``results/<preset>/05_polca.json`` and formats it.
Deeper keys follow further dots. A key that is not there is a warning, which fails the build.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole

import polca_lib.tasks.settings  # noqa: F401  before autodoc imports it, which leaves pydantic's models half defined


class ResultRole(SphinxRole):
    """Replace ``notebook.key:format`` by the number."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Give the number, or a warning."""
        name, _, spec = self.text.partition(":")
        notebook, *keys = name.split(".")
        try:
            value = json.loads((Path(os.environ["POLCA_BOOK_RESULTS"]) / f"{notebook}.json").read_text())
            for key in keys:
                value = value[int(key)] if isinstance(value, list) else value[key]
            text = "none" if value is None else format(value, spec)
        except (KeyError, IndexError, OSError, ValueError) as error:
            return [], [self.inliner.reporter.warning(f"no result {self.text!r}: {error!r}", line=self.lineno)]
        return [nodes.Text(text)], []


def setup(app: Sphinx) -> dict[str, object]:
    """Register the role."""
    app.add_role("result", ResultRole())
    return {"parallel_read_safe": True}
