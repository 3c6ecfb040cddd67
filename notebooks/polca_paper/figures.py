"""The figures of the addition setting, in one style.

Each function returns a matplotlib figure. Colours are those of Okabe and Ito, which stay apart for colour-blind
readers; a carry is the full colour of its place, no carry the pale one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polca_lib.report.palette import OKABE_ITO, cluster_colour
from polca_lib.tasks.arithmetic import PLACES, SKILLS, token_table

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


def sums_of_sigmoids(counts: Iterable[int] = (1, 2, 5, 20), seed: int = 0) -> Figure:
    """Figure 1: two sharp drops along two directions, and the smooth mean of many."""
    time = np.linspace(0, 1, 400)

    def drop(at: float | np.ndarray, width: float = 0.03) -> np.ndarray:
        return 1 / (1 + np.exp((time[:, None] - np.atleast_1d(at)) / width))

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    one, two = drop(0.35)[:, 0], drop(0.65, 0.06)[:, 0]
    left.plot(time, one, label="loss along $b_1$")
    left.plot(time, two, label="loss along $b_2$")
    left.plot(time, (one + two) / 2, color="black", label="their mean: the loss")
    left.set(xlabel="training time", ylabel="loss", title="Two directions")
    left.legend(loc="lower left")
    centres = np.random.default_rng(seed).uniform(0.1, 0.9, max(counts := tuple(counts)))
    for count, colour in zip(counts, sns.color_palette("crest", len(counts)), strict=True):
        right.plot(time, drop(centres[:count]).mean(axis=1), color=colour, label=f"{count}")
    right.set(xlabel="training time", title="Mean of many drops")
    right.legend(title="drops", loc="lower left")
    return figure


def addition_example(a: int = 284, b: int = 457) -> Figure:
    """Figure 2: an addition example, token by token, with the skill that each answer token needs."""
    table = token_table(np.array([[a, b]]))
    symbols = [*f"{a:03d}", "+", *f"{b:03d}", "=", *f"{a + b:04d}"]
    figure, axes = plt.subplots(figsize=(9, 2.2))
    for position, symbol in enumerate(symbols):
        skill = table.loc[table["position"] == position, "skill"]
        colour = SKILL_COLOURS[skill.item()] if len(skill) else "#EFEFEF"
        carry = bool(table.loc[table["position"] == position, "carry"].any())
        axes.add_patch(plt.Rectangle((position, 0), 0.9, 1, color=colour))
        ink = "white" if len(skill) and (carry or skill.item() == "1s") else "black"
        axes.text(position + 0.45, 0.5, symbol, ha="center", va="center", fontsize=16, color=ink, family="monospace")
        if len(skill):
            axes.text(position + 0.45, -0.15, skill.item().replace(", ", "\n"), ha="center", va="top", fontsize=9)
    axes.set(xlim=(-0.2, 12.2), ylim=(-0.75, 1.1), aspect="equal")
    axes.axis("off")
    return figure


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
    own = summary.isel(vector=0)
    figure, (curves, parts) = plt.subplots(1, 2, figsize=(9, 3.4))
    _cluster_curves(curves, own)
    curves.set(ylabel="loss (nats)", title="Exact loss")
    draw_composition(parts, own["tokens"])
    return figure


def polca_clusters(summary: xr.Dataset, vectors: Iterable[int], hidden_after: int) -> Figure:
    """Figures 4 and 9: clusters of the projected loss along each of ``vectors``, one row each.

    Left the medoid and quartiles of the projected loss, in the middle the median exact loss of the same tokens,
    right their composition. The dotted line marks the step at which the vector was found, the grey one
    ``hidden_after``.

    Args:
        summary: from :func:`polca_lib.method.clustering.summarise_clusters`.
        vectors: to show.
        hidden_after: tau, in steps.

    Raises:
        ValueError: a vector that is not in the basis.
    """
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
        own = summary.sel(vector=vector)
        _cluster_curves(row[0], own)
        for number in _numbers(own["tokens"]):
            row[1].plot(own["step"], own["loss"].sel(cluster=number), color=cluster_colour(number), label=f"{number}")
        for axes in row[:2]:
            axes.axvline(float(own["birth_step"]), color="black", linestyle=":", linewidth=1)
            axes.axvline(hidden_after, color="0.6", linewidth=1)
            axes.set_xlabel("training step")
        row[0].set(ylabel="projected loss (nats)", title=f"Vector {vector}: projected loss")
        if vector == 0:  # of the exact loss itself
            row[0].set(ylabel="loss (nats)", title="Exact loss: medoid, quartiles")
        row[1].set(ylabel="loss (nats)", title="exact loss, same tokens")
        draw_composition(row[2], own["tokens"])
    return figure


def token_curves(curves: xr.DataArray) -> Figure:
    """Projected loss of every token along one vector, coloured by place, and their mean."""
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    for place in PLACES:
        own = curves[:, curves["place"].values == place]
        lines = axes.plot(own["step"], own, color=PLACE_COLOURS[place], linewidth=0.6, alpha=0.5)
        lines[0].set_label(place)
    axes.plot(curves["step"], curves.mean("token"), color="black", label="mean")
    axes.set(xlabel="training step", ylabel="projected loss (nats)")
    for handle in axes.legend(title="place").legend_handles:
        handle.set(linewidth=2, alpha=1)
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


def basis_records(basis: xr.Dataset, tolerance: float) -> Figure:
    """Eigenvalue, relative residual and Hessian-vector products of each basis vector by the step of its birth.

    The grey line is the residual at which Lanczos stops.
    """
    figure, panels = plt.subplots(1, 3, figsize=(10, 2.8))
    labels = {"eigenvalue": "eigenvalue", "residual": "relative residual", "products": "Hessian-vector products"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        axes.plot(basis["birth_step"], basis[name], "o", markersize=4)
        axes.set(xlabel="training step of birth", ylabel=label, ylim=(min(0, float(basis[name].min())), None))
    panels[1].axhline(tolerance, color="0.6", linewidth=1)
    return figure


def completeness_curves(all_completeness: Mapping[str, xr.Dataset]) -> Figure:
    """Mean loss change that the sum over vectors claims, by order, beside the true one; and token by token.

    The panels of single tokens are cut off at the range of the true changes; each says how many tokens lie outside.
    """
    figure = plt.figure(figsize=(10, 4.2))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    mean, panels = left.subplots(), right.subplots(2, -(-len(all_completeness) // 2), sharex=True, sharey=True).flat
    true = next(iter(all_completeness.values()))["true"]
    mean.plot(true["step"], true.mean("token"), color="black", linewidth=2.5, label="true change in loss")
    last = true.isel(step=-1)
    limits = np.array([float(last.min()), float(last.max())]) + np.array([-0.5, 0.5])
    styles = ("-", "-", "--", "-")  # exact lies on second in the mean: by construction
    for (order, closed), colour, style, axes in zip(all_completeness.items(), OKABE_ITO, styles, panels, strict=False):
        mean.plot(closed["step"], closed["claimed"].mean("token"), color=colour, label=order, linestyle=style)
        claimed = closed["claimed"].isel(step=-1)
        outside = int(((claimed < limits[0]) | (claimed > limits[1])).sum())
        axes.plot(last, claimed, ".", color=colour, alpha=0.4, markersize=4)
        axes.plot(limits, limits, color="black", linewidth=1)
        axes.set(xlim=limits, ylim=limits, title=order)
        axes.text(0.03, 0.03, f"{outside} of {claimed.size} outside", transform=axes.transAxes, fontsize=8)
    inside = next(iter(all_completeness.values()))["inside"]
    mean.plot(inside["step"], inside.mean("token"), color="0.55", linewidth=2.5, label="delivered inside the basis")
    mean.axhline(0, color="black", linewidth=0.5)
    mean.set(xlabel="training step", ylabel="change since step 0 (nats)", title="Mean over tokens")
    mean.legend()
    right.supxlabel("true change of a token (nats)", fontsize=9)
    right.supylabel("claimed change (nats)", fontsize=9)
    return figure


def homogeneity_bars(rows: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Highest homogeneity by kind of trajectory, beside the paper's."""
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(rows) + 1))
    place = np.arange(len(rows))
    axes.barh(place, rows["homogeneity_v3_1"], color=OKABE_ITO[0], height=0.55, label="this run, v3's rule")
    axes.plot(rows["homogeneity_v1_1"], place, "o", color=OKABE_ITO[0], mfc="none", label="this run, any cluster")
    axes.plot(paper["homogeneity_1"].reindex(rows.index), place, "D", color=OKABE_ITO[1], label="paper (full scale)")
    axes.plot(rows["base_rate"], place, "|", color="black", markersize=14, label="all tokens kept")
    axes.set_yticks(place, rows.index)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.03), xlabel="largest share of carry tokens in a cluster")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _band(
    axes: Axes, quantiles: pd.DataFrame, by: str, value: str, colour: object, label: str, style: str = "-"
) -> None:
    """Median and quartiles over the tokens of one kind, if there are any."""
    own = quantiles[(quantiles["by"] == by) & (quantiles["value"] == value)]
    axes.plot(own["step"], own["median"], color=colour, label=label, linestyle=style)
    axes.fill_between(own["step"], own["low"], own["high"], color=colour, alpha=0.2, linewidth=0)


def _numbers(tokens: xr.DataArray) -> list[int]:
    """Clusters that there are, of ``tokens`` (cluster, kind)."""
    return tokens["cluster"].values[tokens.sum(tokens.dims[-1]).values > 0].tolist()


def _cluster_curves(axes: Axes, own: xr.Dataset) -> None:
    """Medoid and quartiles of each cluster of one vector."""
    numbers = _numbers(own["tokens"])
    for number in numbers:
        one, colour = own.sel(cluster=number), cluster_colour(number)
        axes.fill_between(own["step"], one["low"], one["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(own["step"], one["medoid"], color=colour, label=f"{number}")
    axes.set_xlabel("training step")
    if numbers:
        axes.legend(title="cluster")
    else:
        _say_empty(axes)


def _say_empty(axes: Axes, text: str = "no clusters") -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
