"""Style, colours, and the figures that several pages show.

Each function returns a matplotlib figure. Clusters and orders have the colours of Okabe and Ito, places those of Paul
Tol: colour-blind readers can tell both apart, and no colour stands for two things. A carry is the full colour of its
place, no carry the pale one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polca_lib.report.palette import OKABE_ITO, cluster_colour
from polca_lib.tasks.arithmetic import PLACES, SKILLS

PLACE_COLOURS = dict(zip(PLACES, ("#332288", "#882255", "#999933", "#808080"), strict=True))
ORDER_COLOURS = dict(zip(("first", "second", "exact", "trapezoid"), OKABE_ITO, strict=False))
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
            "svg.hashsalt": "polca",  # the same figure gives the same file
        }
    )


def kind_colours(kinds: Iterable[str]) -> dict[str, object]:
    """Colour of each kind of token, in the order in which they are shown: skills of addition, or any other names."""
    names = sorted(kinds)
    if set(names) <= set(SKILLS):
        return SKILL_COLOURS
    return dict(zip(names, sns.husl_palette(len(names), s=0.65), strict=True))


def label_ends(axes: Axes, ends: Iterable[tuple[object, object, str, object]]) -> None:
    """Write the name of each curve beside its last point, instead of a legend; labels keep apart.

    Args:
        axes: whose limits are final.
        ends: x values, y values, label and colour of each curve.
    """
    axes.get_xlim(), axes.get_ylim()  # limits are computed when they are asked for
    to_axes = axes.transScale + axes.transLimits
    height_in_points = axes.bbox.height / axes.figure.dpi * 72
    points = [(np.asarray(x)[-1], np.asarray(y)[-1], label, colour) for x, y, label, colour in ends]
    # From the lowest, move each label up until it is a line of text above the one below.
    heights = [to_axes.transform((x, y))[1] * height_in_points for x, y, _, _ in points]
    last = -np.inf
    for at in np.argsort(heights, kind="stable"):
        x, y, label, colour = points[at]
        last = max(heights[at], last + 11)
        options = {"textcoords": "offset points", "color": colour, "va": "center", "fontsize": 9}
        axes.annotate(label, (x, y), (5, last - heights[at]), annotation_clip=False, **options)


def loss_by_place(quantiles: pd.DataFrame) -> Figure:
    """Figure 7: median and quartiles of the exact loss for each place of the answer.

    Args:
        quantiles: from :func:`polca_paper.tables.loss_quantiles`.
    """
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    ends = [(*_band(axes, quantiles, "place", place, PLACE_COLOURS[place]), place) for place in PLACES]
    axes.set(xlabel="training step", ylabel="loss (nats)")
    label_ends(axes, [(x, y, f"{place} place", PLACE_COLOURS[place]) for x, y, place in ends])
    return figure


def loss_by_skill(quantiles: pd.DataFrame) -> Figure:
    """Figure 8: median and quartiles of the exact loss for each place, with and without a carry into it.

    Args:
        quantiles: from :func:`polca_paper.tables.loss_quantiles`.
    """
    figure, panels = plt.subplots(1, 4, figsize=(8.6, 2.5), sharey=True)
    for place, axes in zip(PLACES, panels, strict=True):
        for skill in (s for s in SKILLS if s.split(",")[0] == place):
            style = "--" if "no carry" in skill else "-"
            _band(axes, quantiles, "skill", skill, PLACE_COLOURS[place], style)
            axes.plot([], [], color=PLACE_COLOURS[place], linestyle=style, label=skill.partition(", ")[2] or "no carry")
        axes.set(xlabel="training step", title=f"{place} place")
        axes.legend()
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("loss (nats)")
    return figure


def exact_loss_clusters(summary: xr.Dataset) -> Figure:
    """Figure 3: clusters of the exact loss curves, and what they are made of.

    Args:
        summary: of clusters without vectors, from :func:`polca_lib.method.clustering.summarise_clusters`.
    """
    clusters = summary.isel(vector=0)
    figure, (curves, parts) = plt.subplots(1, 2, figsize=(8.6, 2.8))
    if _numbers(clusters["tokens"]):
        _cluster_curves(curves, clusters)
        curves.set(ylabel="loss (nats)", title="Exact loss")
        draw_composition(parts, clusters["tokens"])
    else:
        _say_empty([curves, parts], "no cluster")
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
    # A row whose vector has no cluster is a line of text.
    heights = [1 if _numbers(summary.sel(vector=vector)["tokens"]) else 0.1 for vector in vectors] or [0.2]
    ratios = {"width_ratios": [1, 1, 0.8], "height_ratios": heights}
    figure, grid = plt.subplots(len(heights), 3, figsize=(8.6, 2.4 * sum(heights)), squeeze=False, **ratios)
    if not vectors:
        _say_empty(grid[0], "no direction has a cluster")
    for row, vector in zip(grid, vectors, strict=False):
        clusters = summary.sel(vector=vector)
        if not _numbers(clusters["tokens"]):
            _say_empty(row, f"direction {vector}: no cluster")
            continue
        for axes in row[:2]:
            axes.axvline(float(clusters["birth_step"]), color="black", linestyle=":", linewidth=1)
            axes.axvline(hidden_after, color="0.6", linewidth=1)
            axes.locator_params(axis="x", nbins=4)
            axes.set_xlabel("training step")
        # Projected loss of the clusters, then the exact loss of the same tokens.
        for number in _numbers(clusters["tokens"]):
            row[1].plot(clusters["step"], clusters["loss"].sel(cluster=number), color=cluster_colour(number))
        _cluster_curves(row[0], clusters)
        exact = vector == 0  # stands for the exact loss itself
        row[0].set(ylabel="loss (nats)" if exact else "projected loss (nats)")
        row[0].set_title("Exact loss" if exact else f"Direction {vector}")
        row[1].set(ylabel="loss (nats)", title="their exact loss")
        draw_composition(row[2], clusters["tokens"])
    return figure


def draw_composition(axes: Axes, tokens: xr.DataArray) -> None:
    """Stacked bars: share of each kind of token in each cluster of one vector; ``tokens`` (cluster, kind) counts."""
    axes.set_title("composition")
    numbers = _numbers(tokens)
    if not numbers:
        _say_empty([axes], "no cluster")
        return
    counts = tokens.sel(cluster=numbers).to_pandas()
    colours = kind_colours(counts.columns)
    counts = counts[[kind for kind in colours if kind in counts and counts[kind].any()]]
    shares = counts.div(counts.sum(axis=1), axis=0)
    left = np.zeros(len(shares))
    for kind in shares:
        axes.barh(shares.index, shares[kind], left=left, color=colours[kind], label=kind, edgecolor="white")
        left += shares[kind].to_numpy()
    axes.set(xlim=(0, 1), xlabel="share of tokens")
    sizes = {number: f"cluster {number}\n{counts.loc[number].sum():,} tokens" for number in shares.index}
    axes.set_yticks(shares.index, list(sizes.values()))
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
    figure, panels = plt.subplots(rows, columns, figsize=(8.6, 1.5 * rows), sharex=True, sharey=True)
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
    axes: Axes, quantiles: pd.DataFrame, by: str, value: str, colour: object, style: str = "-"
) -> tuple[pd.Series, pd.Series]:
    """Median and quartiles over the tokens of one kind; gives steps and medians."""
    line = quantiles[(quantiles["by"] == by) & (quantiles["value"] == value)]
    axes.plot(line["step"], line["median"], color=colour, linestyle=style)
    axes.fill_between(line["step"], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)
    return line["step"], line["median"]


def _numbers(tokens: xr.DataArray) -> list[int]:
    """Clusters that have tokens, of ``tokens`` (cluster, kind)."""
    return tokens["cluster"].values[tokens.sum(tokens.dims[-1]).values > 0].tolist()


def _cluster_curves(axes: Axes, clusters: xr.Dataset) -> None:
    """Medoid and quartiles of each cluster of one vector."""
    ends = []
    for number in _numbers(clusters["tokens"]):
        cluster, colour = clusters.sel(cluster=number), cluster_colour(number)
        axes.fill_between(cluster["step"], cluster["low"], cluster["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(cluster["step"], cluster["medoid"], color=colour)
        ends.append((cluster["step"], cluster["medoid"], f"{number}", colour))
    axes.set_xlabel("training step")
    label_ends(axes, ends)


def _say_empty(row: Sequence[Axes], text: str) -> None:
    """Write why there is nothing to see, in the first panel of a row, and leave out the others."""
    for axes in row:
        axes.axis("off")
    row[0].text(0, 0.5, text, va="center", transform=row[0].transAxes)
