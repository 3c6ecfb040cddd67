"""The explorer: an interactive view of the clusters of each basis vector and of their tokens in context.

It needs no server, and works in a notebook, in a page of the book, or as a separate file. Its behaviour is in
``explorer.js`` and ``explorer_page.js``, its style in ``explorer.css``.
"""

import base64
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from polca_lib.report.palette import OKABE_ITO, ON_DARK, cluster_colour

PLOTLY_FILE = "plotly.min.js"
"""Name of plotly.js in the ``_static`` folder of a built book."""

CURVES = ("medoid", "low", "high", "loss")
MEASURES = ("inside", "outside", "precision", "recall")
_TEXTS = ("before", "target", "after", "title", "url", "attribution")
_MOST = 8  # kinds of tokens in a composition
_PARTS = ("explorer.css", "explorer_page.js", "explorer.js")


def plotly_source() -> dict[str, str]:
    """Where ``loadPlotly`` of ``explorer_page.js`` finds plotly.js: a file of the book, or an address and its hash."""
    digest = base64.b64encode(hashlib.sha256(get_plotlyjs().encode()).digest()).decode()
    url = f"https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"
    return {"file": PLOTLY_FILE, "url": url, "integrity": f"sha256-{digest}"}


class Explorer:
    """Interactive view of the projected loss, exact loss and contexts of the clusters of each vector.

    Args:
        summary: from :func:`polca_lib.method.clustering.summarise_clusters`: ``medoid``, ``low``, ``high`` and
            ``loss``, each (vector, cluster, step) in nats, NaN where a vector has fewer clusters; vector 0 is the exact
            loss. Optional: ``nearest`` (vector, cluster, rank, step), curves of the tokens nearest the medoid, and the
            coordinate ``birth_step`` (vector); ``tokens`` (vector, cluster, kind), how many of each kind a cluster has.
        clusters: one row per cluster: ``vector``, ``cluster``, ``tokens`` (how many), ``label``, ``simple`` (whether
            the label is; NaN for other kinds of labels). Optional: ``mirrors`` (clusters that move the other way, such
            as "2, 4"), ``about`` (more text, which the search reads, too), ``padding`` (whether the cluster is of PAD:
            hidden until asked for), ``inside``, ``outside``, ``precision``, ``recall``.
        contexts: one row per context: ``vector``, ``cluster``, ``rank`` (1 is nearest the medoid), ``before``,
            ``target``, ``after``. Optional: ``title``, ``url``, ``attribution``. Text is never read as HTML.
        title, note: text above the explorer.
        hidden_after: tau, in steps, marked in the plots.

    Raises:
        ValueError: a column, variable or coordinate is missing, or the tables do not have the same clusters.
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
        measures = [name for name in MEASURES if name in clusters]
        last = int(clusters["cluster"].max()) if len(clusters) else 0
        colours = [cluster_colour(number) for number in range(1, last + 1)]
        vectors = _vectors(summary, clusters, contexts, measures)
        self._data = {
            "title": title,
            "note": note,
            "start": max(range(len(vectors)), key=lambda i: (_richness(vectors[i]), -i), default=0),
            "hiddenAfter": None if hidden_after is None else int(hidden_after),
            "steps": summary["step"].values.tolist(),
            "measures": measures,
            "vectors": vectors,
            "palette": {"light": colours, "dark": [ON_DARK[OKABE_ITO.index(colour)] for colour in colours]},
            "plotly": plotly_source(),
        }

    def _repr_html_(self) -> str:
        """HTML for notebooks and pages; it loads plotly.js once per page, from ``_static`` or plotly's CDN."""
        # Escape "<", because a script element ends at the first "</script", even inside a string.
        data = json.dumps(self._data, separators=(",", ":"), allow_nan=False)
        for sign in "<>&":
            data = data.replace(sign, f"\\u{ord(sign):04x}")
        style, page, script = (files("polca_lib.report").joinpath(name).read_text("utf-8") for name in _PARTS)
        # The classes tell MathJax not to typeset formulas in contexts.
        return (
            f"<style>{style}</style>\n"
            '<div class="polca-explorer tex2jax_ignore mathjax_ignore">'
            "<p>The explorer of clusters needs JavaScript; in a notebook, trust it and run this cell.</p>"
            f'<script type="application/json">{data}</script></div>\n'
            f"<script>(() => {{\n'use strict';\n{page}{script}}})();</script>"
        )

    def to_html(self) -> str:
        """HTML document that contains plotly.js, about 5 MB."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
            f"<title>{html.escape(self.title)}</title>\n<script>{get_plotlyjs()}</script>\n</head>\n"
            f'<body class="polca-page">\n{self._repr_html_()}\n</body>\n</html>\n'
        )

    def write(self, path: Path) -> Path:
        """Write :meth:`to_html` to ``path``, and return ``path``."""
        path.write_text(self.to_html(), encoding="utf-8")
        return path


def _vectors(summary: xr.Dataset, clusters: pd.DataFrame, contexts: pd.DataFrame, measures: list[str]) -> list[dict]:
    """Data of each vector and its clusters, as JSON values."""
    # Collect ranks and non-empty texts of the contexts of each cluster.
    texts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in contexts.sort_values("rank", kind="stable").to_dict("records"):
        context = {"rank": int(row["rank"])} | {name: text for name in _TEXTS if (text := _text(row.get(name)))}
        texts.setdefault((row["vector"], row["cluster"]), []).append(context)

    def cluster_data(row: dict[str, Any]) -> dict[str, Any]:
        curves = summary.sel(vector=row["vector"], cluster=row["cluster"])
        nearest = curves["nearest"].transpose("rank", "step").dropna("rank", how="all") if "nearest" in curves else ()
        return {
            "cluster": int(row["cluster"]),
            "tokens": int(row["tokens"]),
            "label": _text(row["label"]),
            "simple": None if pd.isna(row["simple"]) else bool(row["simple"]),
            "mirrors": _text(row.get("mirrors")),
            "about": _text(row.get("about")),
            "padding": row.get("padding") is True,
            "composition": _composition(curves),
            "measures": _rounded(row[name] for name in measures),
            **{name: _rounded(curves[name].values) for name in CURVES},
            "nearest": [{"rank": int(curve["rank"]), "values": _rounded(curve.values)} for curve in nearest],
            "contexts": texts.get((row["vector"], row["cluster"]), []),
        }

    vectors = []
    for vector in summary["vector"].values.tolist():
        rows = clusters[clusters["vector"] == vector].sort_values("cluster").to_dict("records")
        birth = summary["birth_step"].sel(vector=vector).item() if "birth_step" in summary else None
        vectors.append({"vector": vector, "birth": _rounded([birth], 15)[0], "clusters": [*map(cluster_data, rows)]})
    return vectors


def _richness(vector: dict[str, Any]) -> tuple[int, int]:
    """How much there is to see along a vector: clusters whose label says something, and all; those of PAD apart."""
    shown = [cluster for cluster in vector["clusters"] if not cluster["padding"]]
    return sum(cluster["simple"] is not False for cluster in shown), len(shown)


def _composition(cluster: xr.Dataset) -> list[tuple[str, int]]:
    """The most frequent kinds of tokens of a cluster, and how many it has of each."""
    if "tokens" not in cluster or cluster["tokens"].size < 2:
        return []
    counts = cluster["tokens"].to_series().sort_values(ascending=False, kind="stable").head(_MOST)
    return [(str(kind), int(count)) for kind, count in counts.items() if count]


def _text(value: object) -> str:
    """Convert a value to text; missing values become empty."""
    return "" if pd.isna(value) else str(value)


def _rounded(values: Iterable[float | None], digits: int = 4) -> list[float | None]:
    """Round to ``digits`` significant digits; missing and non-finite values become None."""
    numbers = (math.nan if pd.isna(value) else float(value) for value in values)
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in numbers]


def _check(summary: xr.Dataset, clusters: pd.DataFrame, contexts: pd.DataFrame) -> None:
    """Raise a ValueError if a variable, coordinate, column or cluster is missing."""
    # Check the dimensions and coordinates of the curves.
    curves = dict.fromkeys(CURVES, ("vector", "cluster", "step"))
    if "nearest" in summary:
        curves["nearest"] = ("vector", "cluster", "rank", "step")
    for name, dims in curves.items():
        if name not in summary:
            raise ValueError(f"summary has no variable {name!r}; it needs {', '.join(CURVES)}: see summarise_clusters")
        if set(summary[name].dims) != set(dims):
            raise ValueError(f"summary[{name!r}] has dimensions {summary[name].dims}; allowed: {dims}")
        if gaps := [dim for dim in dims if dim not in summary.coords]:
            raise ValueError(f"summary has no coordinate {gaps[0]!r}: assign one along each of {dims}")
    # Check the columns of the tables.
    for name, table, columns in (
        ("clusters", clusters, ("vector", "cluster", "tokens", "label", "simple")),
        ("contexts", contexts, ("vector", "cluster", "rank", "before", "target", "after")),
    ):
        if gaps := [column for column in columns if column not in table]:
            raise ValueError(f"{name} has no column {', '.join(gaps)}; it needs {', '.join(columns)}")
    # Check that all three have the same clusters.
    exists = summary["medoid"].notnull().any("step").stack(key=("vector", "cluster"))
    drawn = set(exists["key"].values[exists.values].tolist())
    rows = list(zip(clusters["vector"], clusters["cluster"], strict=True))
    named, texts = set(rows), set(zip(contexts["vector"], contexts["cluster"], strict=True))
    for keys, problem in (
        ({key for key, count in Counter(rows).items() if count > 1}, "has more than one row in clusters: keep one"),
        (drawn - named, "has curves in summary, but no row in clusters: add one"),
        (named - drawn, "has a row in clusters, but no curve in summary: make both from the same labels"),
        (texts - named, "has contexts, but no row in clusters: make both from the same labels"),
    ):
        if keys:
            vector, cluster = min(keys)
            raise ValueError(f"vector {vector}, cluster {cluster} {problem} ({len(keys)} such)")
