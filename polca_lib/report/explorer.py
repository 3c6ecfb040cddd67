"""The explorer: choose a basis vector, see what its clusters do, and read their tokens in context.

An interactive view that needs no server. It stands in a notebook, in a page of the book, or in a file of its own; its
behaviour is in ``explorer.js`` and ``explorer_page.js``, its look in ``explorer.css``.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from polca_lib.report.palette import OKABE_ITO, ON_DARK, cluster_colour

PLOTLY_FILE = "plotly.min.js"
"""Name under which a built book keeps plotly.js in its ``_static`` folder."""

CURVES = ("medoid", "low", "high", "loss")
MEASURES = ("inside", "outside", "precision", "recall")


class Explorer:
    """Clusters of every vector: projected loss, exact loss and contexts, to click through.

    Args:
        summary: from :func:`polca_lib.method.clustering.summarise_clusters`: ``medoid``, ``low``, ``high`` and
            ``loss``, each
            (vector, cluster, step) in nats, NaN where a vector has fewer clusters; coordinates ``vector``, ``cluster``,
            ``step`` and, if known, ``birth_step`` (vector). Vector 0 stands for the exact loss, without a vector. It
            may also have ``nearest`` (vector, cluster, rank, step): curves of the tokens nearest the medoid.
        clusters: one row per cluster: ``vector``, ``cluster``, ``tokens`` (how many), ``label``, ``simple`` (whether
            the label is; none if labels are of another kind), and if known ``mirrors`` (which clusters move the other
            way, such as "2, 4") and any of ``inside``, ``outside``, ``precision``, ``recall``.
        contexts: one row per context: ``vector``, ``cluster``, ``rank`` (from 1, nearest the medoid first), ``before``,
            ``target``, ``after``, and if known ``title``, ``url``, ``attribution``. All text is shown as it is.
        title: shown above.
        note: shown below the title.
        hidden_after: tau, in steps, marked in the plots.

    Raises:
        ValueError: a column, variable or coordinate is missing; a cluster stands in one table and not in another.
    """

    def __init__(
        self,
        summary: xr.Dataset,
        clusters: pd.DataFrame,
        contexts: pd.DataFrame,
        *,
        title: str,
        note: str = "",
        hidden_after: int | None = None,
    ) -> None:
        _check(summary, clusters, contexts)
        self.title = title
        last = int(clusters["cluster"].max()) if len(clusters) else 0
        measures = [name for name in MEASURES if name in clusters]
        self._data = {
            "title": title,
            "note": note,
            "hiddenAfter": None if hidden_after is None else int(hidden_after),
            "steps": summary["step"].values.tolist(),
            "measures": measures,
            "vectors": _vectors(summary, clusters, contexts, measures),
            "palette": {
                "light": [cluster_colour(number) for number in range(1, last + 1)],
                "dark": [ON_DARK[OKABE_ITO.index(cluster_colour(number))] for number in range(1, last + 1)],
            },
            "plotly": _plotly_source(),
        }

    def _repr_html_(self) -> str:
        """A fragment for notebooks and pages; plotly.js is loaded once per page, from ``_static`` or plotly's CDN."""
        # Text in a script element ends at "</script", wherever that stands: so no "<" is left in the data.
        data = json.dumps(self._data, separators=(",", ":"), allow_nan=False)
        for sign in "<>&":
            data = data.replace(sign, f"\\u{ord(sign):04x}")
        # The two classes keep MathJax from typesetting what looks like a formula in a context.
        return (
            f"<style>{_part('explorer.css')}</style>\n"
            '<div class="polca-explorer tex2jax_ignore mathjax_ignore">'
            "<p>The explorer of clusters needs JavaScript; in a notebook, trust it and run this cell.</p>"
            f'<script type="application/json">{data}</script></div>\n'
            f"<script>(() => {{\n'use strict';\n{_part('explorer_page.js')}{_part('explorer.js')}}})();</script>"
        )

    def to_html(self) -> str:
        """A document that needs nothing else, about 5 MB: plotly.js is inside."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{html.escape(self.title)}</title>\n<script>{get_plotlyjs()}</script>\n</head>\n"
            f'<body class="polca-page">\n{self._repr_html_()}\n</body>\n</html>\n'
        )

    def write(self, path: Path) -> Path:
        """Write :meth:`to_html` to ``path``, and return it."""
        path.write_text(self.to_html(), encoding="utf-8")
        return path


def _vectors(
    summary: xr.Dataset, clusters: pd.DataFrame, contexts: pd.DataFrame, measures: list[str]
) -> list[dict[str, Any]]:
    """What the explorer shows of each vector, one after another."""
    texts = {key: own.sort_values("rank") for key, own in contexts.groupby(["vector", "cluster"])}
    found = []
    for vector in summary["vector"].values.tolist():
        own = clusters[clusters["vector"] == vector].sort_values("cluster")
        birth = summary["birth_step"].sel(vector=vector).item() if "birth_step" in summary else None
        shown = []
        for row in own.to_dict("records"):
            one = summary.sel(vector=vector, cluster=row["cluster"])
            nearest = one["nearest"].transpose("rank", "step") if "nearest" in one else ()
            shown.append(
                {
                    "cluster": int(row["cluster"]),
                    "tokens": int(row["tokens"]),
                    "label": _text(row["label"]),
                    "simple": None if pd.isna(row["simple"]) else bool(row["simple"]),
                    "mirrors": _text(row.get("mirrors")),
                    "measures": _rounded(row[name] for name in measures),
                    **{name: _rounded(one[name].values.tolist()) for name in CURVES},
                    "nearest": [
                        {"rank": int(curve["rank"]), "values": _rounded(curve.values.tolist())}
                        for curve in nearest
                        if curve.notnull().any()
                    ],
                    "contexts": _contexts(texts.get((vector, row["cluster"]))),
                }
            )
        found.append({"vector": int(vector), "birth": _rounded([birth], 15)[0], "clusters": shown})
    return found


def _contexts(rows: pd.DataFrame | None) -> list[dict[str, Any]]:
    names = ("before", "target", "after", "title", "url", "attribution")
    records = [] if rows is None else rows.to_dict("records")
    return [{"rank": int(row["rank"])} | {n: t for n in names if (t := _text(row.get(n)))} for row in records]


def _text(value: object) -> str:
    """``value`` as text, none where pandas has a gap."""
    return "" if value is None or pd.isna(value) else str(value)


def _rounded(values: Iterable[float | None], digits: int = 4) -> list[float | None]:
    """To ``digits`` significant digits; what is not finite is a gap."""
    numbers = (math.nan if value is None or pd.isna(value) else float(value) for value in values)
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in numbers]


def _check(summary: xr.Dataset, clusters: pd.DataFrame, contexts: pd.DataFrame) -> None:
    """Raise a ValueError that says what is missing, and where."""
    for name in CURVES + ("nearest",) * ("nearest" in summary):
        dims = ("vector", "cluster", *(("rank",) if name == "nearest" else ()), "step")
        if name not in summary:
            raise ValueError(f"summary has no variable {name!r}; it needs {', '.join(CURVES)}: see summarise_clusters")
        if set(summary[name].dims) != set(dims):
            raise ValueError(f"summary[{name!r}] has dimensions {summary[name].dims}; allowed: {dims}")
        if gaps := [dim for dim in dims if dim not in summary.coords]:
            raise ValueError(f"summary has no coordinate {gaps[0]!r}: assign one along each of {dims}")
    needed = {
        "clusters": (clusters, ("vector", "cluster", "tokens", "label", "simple")),
        "contexts": (contexts, ("vector", "cluster", "rank", "before", "target", "after")),
    }
    for name, (table, columns) in needed.items():
        if gaps := [column for column in columns if column not in table]:
            raise ValueError(f"{name} has no column {', '.join(gaps)}; it needs {', '.join(columns)}")
    curves = summary["medoid"].notnull().any("step").stack(key=("vector", "cluster"))
    drawn = set(curves["key"].values[curves.values].tolist())
    named = list(zip(clusters["vector"], clusters["cluster"], strict=True))
    read = set(zip(contexts["vector"], contexts["cluster"], strict=True))
    for keys, problem in (
        ({key for key in named if named.count(key) > 1}, "has more than one row in clusters: keep one"),
        (drawn - set(named), "has curves in summary, but no row in clusters: add one"),
        (set(named) - drawn, "has a row in clusters, but no curve in summary: make both from the same labels"),
        (read - set(named), "has contexts, but no row in clusters: make both from the same labels"),
    ):
        if keys:
            vector, cluster = min(keys)
            raise ValueError(f"vector {vector}, cluster {cluster} {problem} ({len(keys)} such)")


@cache
def _part(name: str) -> str:
    return (files("polca_lib.report") / name).read_text(encoding="utf-8")


@cache
def _plotly_source() -> dict[str, str]:
    """Where the fragment finds plotly.js: its name in ``_static``, its address elsewhere, and what it must hash to."""
    digest = base64.b64encode(hashlib.sha256(get_plotlyjs().encode()).digest()).decode()
    return {
        "file": PLOTLY_FILE,
        "url": f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js",
        "integrity": f"sha256-{digest}",
    }
