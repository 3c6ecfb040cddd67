"""A page about any run that needs nothing else: losses, closure, vectors, clusters, breakthroughs, contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.offline import get_plotlyjs

from polca_lib import labeling
from polca_lib.artefacts import write_atomically
from polca_lib.breakthroughs import mark_hidden, mirrored
from polca_lib.clustering import DROPPED, by_vector, falls, summarise_clusters
from polca_lib.config import ClusteringConfig
from polca_lib.decomposition import closure, movement_share, projected_loss
from polca_lib.explorer import Explorer
from polca_lib.figures import OKABE_ITO

_LONGEST = 80  # characters of a token that are shown
_TOP = 5  # values that say what a cluster is made of
_KINDS = 50  # values that a column may have and still say what a token is
_BEFORE, _AFTER = 16, 8  # tokens of a context

# Columns that say where a token is, or are of vectors.
_PLACES = ("token", "example", "position", "step", "vector")


def summary(
    projections: xr.Dataset, labels: xr.DataArray, clustering: ClusteringConfig, hidden_after: int | None = None
) -> dict[str, Any]:
    """What a run found, as JSON values.

    Args:
        projections: from :func:`polca_lib.projection.project_run`.
        labels: (vector, token), from :func:`polca_lib.clustering.cluster_tokens`.
        clustering: its settings; they say the order, too.
        hidden_after: tau, in steps; none if nothing can be hidden.

    Returns:
        ``tokens``, ``vectors``, ``checkpoints``, ``first_step``, ``last_step``, ``loss_start``, ``loss_end`` (nats),
        ``order``, ``scaling``, ``hidden_after``; ``claimed`` (share of the loss change that projected losses add up
        to), ``inside`` (that the movement inside the basis delivers; none if not measured), ``correlation`` (of claimed
        with true, over tokens); ``vectors_falling``, ``vectors_with_clusters``, ``clusters``, ``hidden_breakthroughs``;
        and ``breakthroughs``, a dictionary for each cluster, those hidden first.
    """
    found = closure(projections, clustering.order).attrs
    curves = projected_loss(projections, clustering.order)
    table = _clusters(projections, labels, curves, clustering, hidden_after)
    loss, steps = projections["loss"].mean("token").values, projections["step"].values
    rows = table.drop(columns=["label"]).to_dict("records")
    return {
        "tokens": projections.sizes["token"],
        "vectors": projections.sizes["vector"],
        "checkpoints": len(steps),
        "first_step": int(steps[0]),
        "last_step": int(steps[-1]),
        "loss_start": _number(loss[0]),
        "loss_end": _number(loss[-1]),
        "order": clustering.order,
        "scaling": clustering.scaling,
        "hidden_after": hidden_after,
        "claimed": _number(found["share"]),
        "inside": _number(found.get("share_inside")),
        "correlation": _number(found["correlation"]),
        "vectors_falling": int(falls(curves.mean("token"), clustering.falls_by).sum()),
        "vectors_with_clusters": int(table["vector"].nunique()),
        "clusters": len(table),
        "hidden_breakthroughs": int(table["hidden"].sum()),
        "breakthroughs": [{name: _plain(value) for name, value in row.items()} for row in rows],
    }


def write_report(
    path: Path,
    projections: xr.Dataset,
    labels: xr.DataArray,
    *,
    clustering: ClusteringConfig,
    title: str,
    provenance: pd.DataFrame,
    hidden_after: int | None = None,
) -> Path:
    """Write the page: one HTML file, about 5 MB, from which no request leaves.

    Whatever stands in the token table or the title is shown as text, never read as HTML.

    Args:
        path: of the file.
        projections, labels, clustering, hidden_after: see :func:`summary`.
        title: of the page.
        provenance: what made the results, a column ``value``.

    Returns:
        ``path``.
    """
    curves = projected_loss(projections, clustering.order)
    clusters = _clusters(projections, labels, curves, clustering, hidden_after)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("polca_lib", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=_shown(title),
        found=summary(projections, labels, clustering, hidden_after),
        provenance={_shown(name): _shown(value) for name, value in provenance["value"].items()},
        vectors=_vectors(projections, labels, curves, clustering).to_dict("records"),
        clusters=clusters.to_dict("records"),
        figures={
            "loss": _loss_figure(projections, hidden_after),
            "closure": _closure_figure(projections, clustering),
            "share": _share_figure(projections),
        },
        explorer=explorer(projections, labels, clustering, title="", hidden_after=hidden_after)._repr_html_()
        if len(clusters)
        else None,
        plotly=get_plotlyjs(),
    )
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def explorer(
    projections: xr.Dataset,
    labels: xr.DataArray,
    clustering: ClusteringConfig,
    *,
    title: str,
    note: str = "",
    hidden_after: int | None = None,
) -> Explorer:
    """The explorer of any run; without text, contexts are the other columns of the token table.

    Args:
        projections, labels, clustering, hidden_after: see :func:`summary`.
        title, note: shown above.
    """
    curves = projected_loss(projections, clustering.order)
    clusters = _clusters(projections, labels, curves, clustering, hidden_after)
    about = labels.assign_coords(_kind=("token", np.zeros(labels.sizes["token"], int)))
    shown = summarise_clusters(curves, projections["loss"], about, clustering.scaling, "_kind")
    pairs = mirrored(shown["median"])
    against: dict[tuple[int, int], list[int]] = {}
    for vector, one, other in zip(pairs["vector"], pairs["one"], pairs["other"], strict=True):
        against.setdefault((vector, one), []).append(other)
        against.setdefault((vector, other), []).append(one)
    keys = list(zip(clusters["vector"], clusters["cluster"], strict=True))
    table = clusters.assign(simple=None, mirrors=[", ".join(map(str, sorted(against.get(key, [])))) for key in keys])
    near = labeling.nearest(curves, labels, clustering.scaling)
    return Explorer(
        shown, table, _contexts(near, projections), title=_shown(title), note=_shown(note), hidden_after=hidden_after
    )


def _clusters(
    projections: xr.Dataset,
    labels: xr.DataArray,
    curves: xr.DataArray,
    clustering: ClusteringConfig,
    hidden_after: int | None,
) -> pd.DataFrame:
    """A row per cluster: vector, cluster, tokens, label, made_of, breakthrough, hidden, fall; hidden ones first."""
    columns, rows = _kinds_of(projections), []
    for one in by_vector(labels):
        kept = one.values != DROPPED
        for number in range(1, int(one.max(initial=0) if one.size else 0) + 1):
            inside = one.values == number
            fall = curves.sel(vector=one["vector"]).isel(step=-1).values[inside].mean()
            made = _made_of(columns, inside, kept)
            rows.append(
                {
                    "vector": int(one["vector"]),
                    "cluster": number,
                    "tokens": int(inside.sum()),
                    "fall": float(fall),
                    "label": made,
                    "made_of": made,
                }
            )
    table = pd.DataFrame(rows, columns=["vector", "cluster", "tokens", "fall", "label", "made_of"])
    steps = projections["step"].values
    after = int(steps[-1]) if hidden_after is None else hidden_after
    try:
        table = mark_hidden(table, labels, curves, clustering.breakthrough_window, after)
    except ValueError:  # too few checkpoints for the window
        table = table.assign(breakthrough=np.nan, hidden=False)
    table["hidden"] = table["hidden"].astype(bool)
    return table.sort_values(["hidden", "tokens"], ascending=False, kind="stable").reset_index(drop=True)


def _kinds_of(projections: xr.Dataset) -> dict[str, np.ndarray]:
    """Columns of the token table that may say what a token is: the text, and what has few values."""
    found = {}
    for name, coordinate in projections.coords.items():
        if coordinate.dims != ("token",) or name in _PLACES:
            continue
        values = np.array([_shown(value) for value in coordinate.values.tolist()], dtype=object)
        if name == "text" or len(set(values)) <= _KINDS:
            found[str(name)] = values
    return found


def _made_of(columns: Mapping[str, np.ndarray], inside: np.ndarray, kept: np.ndarray) -> str:
    """The most frequent values in a cluster: of the text, and of the column that sets it apart most."""
    told, best = {}, (0.0, "")
    for name, values in columns.items():
        shares = pd.Series(values[inside]).value_counts(normalize=True)
        base = pd.Series(values[kept]).value_counts(normalize=True)
        told[name] = ", ".join(f"{value!r} {share:.0%}" for value, share in shares.head(_TOP).items())
        apart = float((shares - base.reindex(shares.index).fillna(0)).max())
        if name != "text" and apart > best[0]:
            best = apart, name
    names = [name for name in ("text", best[1]) if name in told]
    return "; ".join(told[name] if name == "text" else f"{_shown(name)}: {told[name]}" for name in names)


def _contexts(near: pd.DataFrame, projections: xr.Dataset) -> pd.DataFrame:
    """The text around each token, of its own example; or, without text, what the table says of it."""
    coords = {n: c.values for n, c in projections.coords.items() if c.dims == ("token",)}
    if not {"text", "example"} <= coords.keys():
        names = [n for n in coords if n != "token"]
        told = [", ".join(f"{_shown(n)} {_shown(coords[n][token])}" for n in names) for token in near["token"]]
        return near.assign(before="", target=told, after="")
    places = pd.DataFrame({"example": coords["example"], "position": coords.get("position", coords["token"])})
    order = places.sort_values(["example", "position"], kind="stable").index.to_numpy()
    rank, example = np.argsort(order), places["example"].to_numpy()
    rows: dict[str, list[str]] = {"before": [], "target": [], "after": []}
    for token in near["token"]:
        at = rank[token]
        for name, start, stop in (
            ("before", at - _BEFORE, at),
            ("target", at, at + 1),
            ("after", at + 1, at + 1 + _AFTER),
        ):
            some = [i for i in order[max(0, start) : max(0, stop)] if example[i] == example[token]]
            rows[name].append("".join(_shown(coords["text"][i]) for i in some))
    return near.assign(**rows)


def _vectors(
    projections: xr.Dataset, labels: xr.DataArray, curves: xr.DataArray, clustering: ClusteringConfig
) -> pd.DataFrame:
    mean, each = curves.mean("token"), by_vector(labels)
    table = pd.DataFrame({"vector": curves["vector"].values})
    for name in ("birth_step", "eigenvalue"):
        table[name] = projections[name].values if name in projections.coords else np.nan
    table["change"] = mean.isel(step=-1).values
    table["falls"] = falls(mean, clustering.falls_by).values
    table["dropped"] = (each == DROPPED).sum("token").values
    table["clustered"] = (each >= 1).sum("token").values
    table["clusters"] = each.max("token").clip(0).values
    return table


def _loss_figure(projections: xr.Dataset, hidden_after: int | None) -> str:
    loss, steps = projections["loss"], projections["step"].values
    low, high = (loss.quantile(q, "token").values for q in (0.25, 0.75))
    figure = go.Figure()
    figure.add_scatter(x=steps, y=high, line={"width": 0}, hoverinfo="skip", showlegend=False)
    band = {"width": 0}, "rgba(0,114,178,0.25)"
    figure.add_scatter(x=steps, y=low, line=band[0], fill="tonexty", fillcolor=band[1], name="middle half of tokens")
    figure.add_scatter(x=steps, y=loss.mean("token").values, line={"color": OKABE_ITO[0]}, name="mean")
    if hidden_after is not None:
        figure.add_vline(x=hidden_after, line={"dash": "dot", "color": "gray"})
    return _html(figure, "loss, nats")


def _closure_figure(projections: xr.Dataset, clustering: ClusteringConfig) -> str:
    parts = closure(projections, clustering.order)
    names = {"true": "true loss change", "inside": "after the movement inside the basis", "claimed": "projected losses"}
    figure = go.Figure()
    for (name, told), colour in zip(names.items(), ("gray", *OKABE_ITO), strict=False):
        if name in parts:
            line = {"color": colour}
            figure.add_scatter(x=parts["step"].values, y=parts[name].mean("token").values, name=told, line=line)
    return _html(figure, "mean loss change, nats")


def _share_figure(projections: xr.Dataset) -> str:
    share, figure = movement_share(projections), go.Figure()
    figure.add_scatter(x=share["step"].values, y=share.values, line={"color": OKABE_ITO[2]}, name="inside the basis")
    figure.update_yaxes(range=[0, 1])
    return _html(figure, "share of the squared movement in the basis")


def _html(figure: go.Figure, y: str) -> str:
    figure.update_layout(
        xaxis_title="step",
        yaxis_title=y,
        height=320,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"orientation": "h", "y": 1.12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808890"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    settings = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=settings)


def _shown(value: object) -> str:
    """A value as text that can be shown: cut, and without characters that are no text."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
    clean = "".join(sign if sign in "\n\t" or (sign.isprintable() or sign.isspace()) else "\ufffd" for sign in text)
    return clean.encode("utf-8", "replace").decode()


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return _number(value) if isinstance(value, float) else value
