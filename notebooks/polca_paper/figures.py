"""Style, colours, and the figures that several pages show.

Each function returns a matplotlib figure. Colours are those of Okabe and Ito, which stay apart for colour-blind
readers; a carry is the full colour of its place, no carry the pale one.
"""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polca_lib.report.palette import OKABE_ITO, cluster_colour
from polca_lib.tasks.arithmetic import PLACES, SKILLS

PLACE_COLOURS = dict(zip(PLACES, OKABE_ITO, strict=False))
SKILL_COLOURS = {
    skill: PLACE_COLOURS[place] if "no carry" not in skill else sns.light_palette(PLACE_COLOURS[place], 10)[3]
    for skill in SKILLS
    for place in [skill.split(",")[0]]
}


def use_style() -> None:
    """Set the style of all figures of the book."""
    sns.set_theme(context="notebook", style="ticks", palette=OKABE_ITO, font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )


def kind_colours(kinds: Iterable[str]) -> dict[str, object]:
    """Colour of each kind of token, in the order in which they are shown: skills of addition, or any other names."""
    names = sorted(kinds)
    if set(names) <= set(SKILLS):
        return SKILL_COLOURS
    return dict(zip(names, sns.husl_palette(len(names), s=0.65), strict=True))


def loss_by_place(quantiles: pd.DataFrame) -> Figure:
    """Figure 7: median and quartiles of the exact loss for each place of the answer.

    Args:
        quantiles: from :func:`polca_paper.tables.loss_quantiles`.
    """
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    for place in PLACES:
        _band(axes, quantiles, "place", place, PLACE_COLOURS[place], place)
    axes.set(xlabel="training step", ylabel="loss (nats)")
    axes.legend(title="place")
    return figure


def loss_by_skill(quantiles: pd.DataFrame) -> Figure:
    """Figure 8: median and quartiles of the exact loss for each place, with and without a carry into it."""
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True)
    for place, axes in zip(PLACES, panels, strict=True):
        for skill in (s for s in SKILLS if s.split(",")[0] == place):
            label = skill.partition(", ")[2] or "never a carry"
            style = "--" if "no carry" in skill else "-"
            _band(axes, quantiles, "skill", skill, SKILL_COLOURS[skill], label, style)
        axes.set(xlabel="training step", title=place)
        axes.legend()
    panels[0].set_ylabel("loss (nats)")
    return figure


def exact_loss_clusters(summary: xr.Dataset) -> Figure:
    """Figure 3: clusters of the exact loss curves, and what they are made of.

    Args:
        summary: of clusters without vectors, from :func:`polca_lib.method.clustering.summarise_clusters`.
    """
    clusters = summary.isel(vector=0)
    figure, (curves, parts) = plt.subplots(1, 2, figsize=(9, 3.4))
    _cluster_curves(curves, clusters)
    curves.set(ylabel="loss (nats)", title="Exact loss")
    draw_composition(parts, clusters["tokens"])
    return figure


def polca_clusters(summary: xr.Dataset, vectors: Iterable[int], hidden_after: int) -> Figure:
    """Figures 4 and 9: clusters of the projected loss along each of ``vectors``, one row each.

    Left: medoid and quartiles of the projected loss. Middle: median exact loss of the same tokens. Right: their
    composition. The dotted line marks the step at which the vector was found, the grey one ``hidden_after``.

    Args:
        summary: from :func:`polca_lib.method.clustering.summarise_clusters`.
        vectors: to show.
        hidden_after: tau, in steps.

    Raises:
        ValueError: a vector that is not in the basis.
    """
    if not isinstance(vectors, Iterable):
        raise ValueError(f"vectors = {vectors!r}; allowed: a list, such as [{vectors}]")
    vectors = list(vectors)
    if unknown := set(vectors) - set(summary["vector"].values.tolist()):
        raise ValueError(f"vectors = {sorted(unknown)} are not in the basis; allowed: 1 to {summary.sizes['vector']}")
    if not vectors:
        figure, axes = plt.subplots(figsize=(6, 1.5))
        axes.axis("off")
        _say_empty(axes, "no vector to show")
        return figure
    figure, grid = plt.subplots(len(vectors), 3, figsize=(10, 2.9 * len(vectors)), squeeze=False)
    for row, vector in zip(grid, vectors, strict=True):
        clusters = summary.sel(vector=vector)
        _cluster_curves(row[0], clusters)
        for number in _numbers(clusters["tokens"]):
            row[1].plot(clusters["step"], clusters["loss"].sel(cluster=number), color=cluster_colour(number))
        for axes in row[:2]:
            axes.axvline(float(clusters["birth_step"]), color="black", linestyle=":", linewidth=1)
            axes.axvline(hidden_after, color="0.6", linewidth=1)
            axes.set_xlabel("training step")
        row[0].set(ylabel="projected loss (nats)", title=f"Vector {vector}: projected loss")
        if vector == 0:  # of the exact loss itself
            row[0].set(ylabel="loss (nats)", title="Exact loss: medoid, quartiles")
        row[1].set(ylabel="loss (nats)", title="exact loss, same tokens")
        draw_composition(row[2], clusters["tokens"])
    return figure


def draw_composition(axes: Axes, tokens: xr.DataArray) -> None:
    """Stacked bars: share of each kind of token in each cluster of one vector; ``tokens`` (cluster, kind) counts."""
    axes.set_title("composition")
    numbers = _numbers(tokens)
    if not numbers:
        _say_empty(axes)
        return
    counts = tokens.sel(cluster=numbers).to_pandas()
    colours = kind_colours(counts.columns)
    counts = counts[[kind for kind in colours if kind in counts and counts[kind].any()]]
    shares = counts.div(counts.sum(axis=1), axis=0)
    left = np.zeros(len(shares))
    for kind in shares:
        axes.barh(shares.index, shares[kind], left=left, color=colours[kind], label=kind, edgecolor="white")
        left += shares[kind].to_numpy()
    axes.set(xlim=(0, 1), xlabel="share of tokens", ylabel="cluster")
    axes.set_yticks(shares.index, [f"{number} (n={counts.loc[number].sum()})" for number in shares.index])
    axes.invert_yaxis()
    many = len(shares.columns) > 8
    axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=7 if many else 8, ncols=2 if many else 1)


def loss_by_kind(quantiles: pd.DataFrame, by: str) -> Figure:
    """Mean and quartiles of the exact loss of each kind of token, each in a panel of its own before all other means.

    Args:
        quantiles: from :func:`polca_paper.tables.loss_quantiles`.
        by: construction or tag.
    """
    lines = dict(list(quantiles[quantiles["by"] == by].groupby("value")))
    colours, columns = kind_colours(lines), 5
    rows = -(-len(lines) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(10, 1.7 * rows), sharex=True, sharey=True)
    for axes in panels.flat[len(lines) :]:
        axes.axis("off")
    for axes, (kind, line) in zip(panels.flat, lines.items(), strict=False):
        for other in lines.values():
            axes.plot(other["step"], other["mean"], color="0.88", linewidth=0.8)
        axes.fill_between(line["step"], line["low"], line["high"], color=colours[kind], alpha=0.2, linewidth=0)
        axes.plot(line["step"], line["mean"], color=colours[kind])
        axes.set_title(kind, fontsize=9)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("loss (nats)", fontsize=9)
    return figure


def constructions_found(table: pd.DataFrame, measure: str, label: str) -> Figure:
    """How well each kind of trajectory finds each construction: the median, if there are several studies.

    Args:
        table: ``constructions`` or ``neighbours`` of studies of text.
        measure: a column of it.
        label: of the colour bar.
    """
    values = table.pivot_table(index="construction", columns="kind", values=measure, aggfunc="median", sort=False)
    figure, axes = plt.subplots(figsize=(1.2 + 0.62 * values.shape[1], 0.34 * len(values) + 1.8))
    texts = {"annot": True, "fmt": ".2f", "annot_kws": {"size": 7}, "cbar_kws": {"label": label}}
    sns.heatmap(values, ax=axes, vmin=0, vmax=1, cmap="crest", **texts)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(axis="x", rotation=90)
    return figure


def _band(
    axes: Axes, quantiles: pd.DataFrame, by: str, value: str, colour: object, label: str, style: str = "-"
) -> None:
    """Median and quartiles over the tokens of one kind, if there are any."""
    line = quantiles[(quantiles["by"] == by) & (quantiles["value"] == value)]
    axes.plot(line["step"], line["median"], color=colour, label=label, linestyle=style)
    axes.fill_between(line["step"], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)


def _numbers(tokens: xr.DataArray) -> list[int]:
    """Clusters that have tokens, of ``tokens`` (cluster, kind)."""
    return tokens["cluster"].values[tokens.sum(tokens.dims[-1]).values > 0].tolist()


def _cluster_curves(axes: Axes, clusters: xr.Dataset) -> None:
    """Medoid and quartiles of each cluster of one vector."""
    numbers = _numbers(clusters["tokens"])
    for number in numbers:
        cluster, colour = clusters.sel(cluster=number), cluster_colour(number)
        axes.fill_between(cluster["step"], cluster["low"], cluster["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(cluster["step"], cluster["medoid"], color=colour, label=f"{number}")
    axes.set_xlabel("training step")
    if numbers:
        axes.legend(title="cluster")
    else:
        _say_empty(axes)


def _say_empty(axes: Axes, text: str = "no clusters") -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
