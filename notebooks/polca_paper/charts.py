"""Figures of what studies keep: completeness, chance, choices, interventions, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from polca_lib.report.palette import OKABE_ITO, cluster_colour
from polca_lib.tasks.arithmetic import SKILLS
from polca_paper.figures import kind_colours
from polca_paper.specification import MEASURED, beyond_chance

ORDER_COLOURS = dict(zip(("first", "second", "exact", "trapezoid"), OKABE_ITO, strict=False))
VERDICT_COLOURS = {
    "reproduced": OKABE_ITO[2],
    "stronger here": OKABE_ITO[0],
    "partly": OKABE_ITO[4],
    "not reproduced": OKABE_ITO[1],
    "not run": "#D0D0D0",
}


def completeness_means(curves: pd.DataFrame) -> Figure:
    """Mean loss change that the sum over vectors claims, by order, beside the true one and that inside the basis.

    Args:
        curves: table ``completeness_curves`` of a study.
    """
    figure, (whole, near) = plt.subplots(1, 2, figsize=(10, 3.6))
    for axes in (whole, near):
        axes.plot(curves["step"], curves["true"], color="black", linewidth=2.5, label="true change")
        axes.plot(curves["step"], curves["inside"], color="0.55", linewidth=2.5, label="delivered inside the basis")
        for order in (name for name in ORDER_COLOURS if name in curves):
            axes.plot(curves["step"], curves[order], color=ORDER_COLOURS[order], label=order)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xlabel("training step")
    span = abs(curves[[name for name in ("inside", "trapezoid") if name in curves]]).to_numpy().max()
    near.set(ylim=(-3 * span, 3 * span), title="Around zero")
    whole.set(ylabel="change since step 0 (nats)", title="Mean over tokens")
    whole.legend()
    return figure


def by_cadence(table: pd.DataFrame) -> Figure:
    """Share of the true loss change that the sum over vectors claims, by cadence, for each order and study.

    Args:
        table: rows with ``study``, ``order``, ``cadence`` and ``share``.
    """
    studies = list(dict.fromkeys(table["study"]))
    figure, panels = plt.subplots(1, len(studies), figsize=(4.2 * len(studies), 3.2), squeeze=False)
    for study, axes in zip(studies, panels[0], strict=True):
        for order, own in table[table["study"] == study].groupby("order", sort=False):
            axes.plot(own["cadence"], own["share"], "o-", color=ORDER_COLOURS[order], label=order, markersize=4)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(xscale="log", xlabel="steps between checkpoints", title=study, yscale="symlog")
        ticks = sorted(table.loc[table["study"] == study, "cadence"].unique())
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    panels[0, 0].set_ylabel("claimed / true change")
    panels[0, -1].legend(bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def against_truth(along: pd.DataFrame) -> Figure:
    """What each order claims along each vector beside what moving along it alone delivers.

    Args:
        along: table ``along`` of a study.
    """
    own = along[along["vector"] > 0]
    orders = list(dict.fromkeys(own["order"]))
    figure, axes = plt.subplots(figsize=(9, 3.4))
    width = 0.8 / (len(orders) + 1)
    first = own[own["order"] == orders[0]]
    axes.bar(first["vector"] - 0.4, first["delivered"], width, color="0.3", label="delivered", align="edge")
    for index, order in enumerate(orders, start=1):
        part = own[own["order"] == order]
        offset = index * width - 0.4
        axes.bar(part["vector"] + offset, part["claimed"], width, color=ORDER_COLOURS[order], label=order, align="edge")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="vector", ylabel="loss change over training (nats)", yscale="symlog")
    axes.set_yscale("symlog", linthresh=max(1e-3, float(abs(first["delivered"]).median())))
    axes.set_xticks(first["vector"])
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def null_intervals(table: pd.DataFrame) -> Figure:
    """The largest homogeneity of each kind of trajectory, beside what shuffled carries give.

    Args:
        table: rows of table ``null`` of one rule and one ``within``.
    """
    names = table["order"] + ", " + table["scaling"]
    place = np.arange(len(table))
    figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(table) + 1))
    axes.hlines(place, table["null_05"], table["null_95"], color="0.6", linewidth=6, label="shuffled, 5 to 95%")
    axes.plot(table["null_median"], place, "|", color="black", markersize=10, label="shuffled, median")
    axes.plot(table["base_rate"], place, "|", color=OKABE_ITO[1], markersize=10, label="all tokens kept")
    beyond = (table["p"] <= 0.05) & (table["observed"] > table["base_rate"])
    for chosen, face, label in (
        (beyond, OKABE_ITO[0], "real, over base rate, p ≤ 0.05"),
        (~beyond, "white", "real"),
    ):
        axes.plot(table["observed"][chosen], place[chosen], "o", color=OKABE_ITO[0], mfc=face, label=label)
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.set(xlim=(-0.02, 1.03), xlabel="largest share of carry tokens in a cluster")
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def grid_maps(grid: pd.DataFrame, rule: str = "v3") -> Figure:
    """Heat maps of the largest homogeneity over ``min_cluster_size`` and ``min_samples``.

    Args:
        grid: table ``grid`` of a study.
        rule: v1 or v3. Where no cluster counts the field is empty.
    """
    keys = list(dict.fromkeys(zip(grid["scaling"], grid["order"], strict=True)))
    columns = len(dict.fromkeys(order for _, order in keys))
    rows = -(-len(keys) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3.3 * columns, 2.7 * rows), squeeze=False, sharex=True)
    for (scaling, order), axes in zip(sorted(keys), panels.flat, strict=False):
        own = grid[(grid["scaling"] == scaling) & (grid["order"] == order)]
        values = own.pivot(index="min_samples_divisor", columns="min_cluster_size", values=rule)
        sns.heatmap(
            values, ax=axes, vmin=0, vmax=1, annot=True, fmt=".2f", cmap="crest", cbar=False, annot_kws={"size": 7}
        )
        axes.set(title=f"{order}, {scaling}", ylabel="min_samples = tokens / ", xlabel="min_cluster_size")
    return figure


def specification_plot(curve: pd.DataFrame, rule: str = "v3") -> Figure:
    """All specifications sorted by the largest homogeneity, with their choices marked beneath.

    Args:
        curve: table ``specification`` of a study.
        rule: v1 or v3.
    """
    own = curve[curve["rule"] == rule].sort_values("homogeneity", kind="stable").reset_index(drop=True)
    choices = [n for n in own if n not in (*MEASURED, "rule", "study") and own[n].nunique() > 1]
    values = [(choice, value) for choice in choices for value in dict.fromkeys(curve[choice])]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 3 + 0.2 * len(values)), sharex=True, height_ratios=[3, 0.2 * len(values)]
    )
    x = np.arange(len(own))
    top.plot(x, own["null_95"], ".", color="0.75", markersize=2, label="95% of shuffled")
    beyond = beyond_chance(own)
    for chosen, colour, label in (
        (~beyond, OKABE_ITO[5], "real"),
        (beyond, OKABE_ITO[0], "real, beyond chance"),
    ):
        top.plot(x[chosen], own["homogeneity"][chosen], ".", color=colour, markersize=4, label=label)
    top.axhline(0.9, color="black", linewidth=0.7, linestyle=":")
    top.set(ylabel="largest homogeneity", ylim=(-0.02, 1.03))
    top.legend(loc="upper left", fontsize=8)
    for height, (choice, value) in enumerate(values):
        where = x[(own[choice] == value).to_numpy()]
        colour = OKABE_ITO[choices.index(choice) % len(OKABE_ITO)]
        bottom.plot(where, np.full(len(where), height), "|", color=colour, markersize=6, markeredgewidth=0.6)
    bottom.set_yticks(range(len(values)), [f"{choice}: {value}" for choice, value in values], fontsize=8)
    bottom.set(xlabel="specification, sorted", ylim=(len(values) - 0.5, -0.5))
    return figure


def undone(causal: pd.DataFrame) -> Figure:
    """Loss change by skill when the movement along each vector is taken back, beside random directions.

    Args:
        causal: table ``causal`` of a study.
    """
    skills = [skill for skill in SKILLS if skill in causal]
    parts = {
        "taken back along the vector": causal[causal["kind"] == "own"],
        "along a random direction, same length": causal[causal["kind"] == "random"],
    }
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 0.25 * len(parts["taken back along the vector"]) + 1.6), sharey=True
    )
    for (title, own), axes in zip(parts.items(), panels, strict=True):
        values = own.set_index("vector")[skills]
        shown = np.sign(values) * np.log10(1 + abs(values) / 1e-3)
        sns.heatmap(
            shown, ax=axes, cmap="vlag", center=0, vmin=-3.5, vmax=3.5, annot=values, fmt=".2g", cbar=False,
            annot_kws={"size": 7},
        )  # fmt: skip
        axes.set(title=title, ylabel="vector" if axes is panels[0] else "")
        axes.tick_params(axis="y", rotation=0)
    return figure


def selectivity(clusters: pd.DataFrame) -> Figure:
    """Loss change of a cluster's tokens against that of like ones outside, when its vector's movement is taken back.

    Args:
        clusters: table ``causal_clusters`` of a study.
    """
    figure, axes = plt.subplots(figsize=(6, 4))
    kinds = {
        "carry (over 0.9 of its tokens, v3)": clusters["counts_v3"] & (clusters["homogeneity"] > 0.9),
        "one place (over 0.9)": clusters["place_share"] > 0.9,
    }
    rest = ~np.logical_or.reduce(list(kinds.values()))
    for (label, chosen), colour in zip({**kinds, "other": rest}.items(), OKABE_ITO, strict=False):
        own = clusters[chosen]
        axes.plot(own["like"], own["inside"], "o", color=colour, markersize=4, alpha=0.7, label=f"{label}: {len(own)}")
    limit = max(1e-3, float(abs(clusters[["inside", "like"]]).to_numpy().max()))
    axes.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.7)
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xlabel="change of tokens of the same places (nats)", ylabel="change of the cluster's tokens (nats)")
    axes.legend(title="clusters", fontsize=8)
    return figure


def verdict_counts(verdicts: pd.DataFrame) -> Figure:
    """How many claims there are of each verdict, by section of the paper."""
    counts = verdicts.groupby(["section", "verdict"], sort=False).size().unstack(fill_value=0)
    counts = counts.reindex(columns=[name for name in VERDICT_COLOURS if name in counts])
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(counts) + 1))
    left = np.zeros(len(counts))
    for name in counts:
        axes.barh(range(len(counts)), counts[name], left=left, color=VERDICT_COLOURS[name], label=name)
        left += counts[name].to_numpy()
    axes.set_yticks(range(len(counts)), counts.index)
    axes.invert_yaxis()
    axes.set_xlabel("claims")
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def loss_by_kind(quantiles: pd.DataFrame, by: str) -> Figure:
    """Mean exact loss of each kind of token, each in a panel of its own beside that of all.

    Args:
        quantiles: from :func:`polca_paper.tables.loss_quantiles`.
        by: construction or tag.
    """
    own = quantiles[quantiles["by"] == by]
    kinds = sorted(own["value"].unique())
    colours = kind_colours(kinds)
    columns = 5
    figure, panels = plt.subplots(
        -(-len(kinds) // columns), columns, figsize=(10, 1.7 * -(-len(kinds) // columns)), sharex=True, sharey=True
    )
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for other in kinds:
            line = own[own["value"] == other]
            axes.plot(line["step"], line["mean"], color="0.88", linewidth=0.8)
        line = own[own["value"] == kind]
        axes.fill_between(line["step"], line["low"], line["high"], color=colours[kind], alpha=0.2, linewidth=0)
        axes.plot(line["step"], line["mean"], color=colours[kind])
        axes.set_title(kind, fontsize=9)
    for axes in list(panels.flat)[len(kinds) :]:
        axes.axis("off")
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("loss (nats)", fontsize=9)
    return figure


def simple_labels(counts: pd.DataFrame, paper: Mapping[str, float]) -> Figure:
    """Vectors kept, and those with a simply labelled cluster, by kind of trajectory, beside chance and the paper.

    Args:
        counts: table ``counts`` of a study of text.
        paper: the paper's numbers: ``vectors``, and of these ``kept`` and ``simple_label``.
    """
    own = counts[counts["vectors"] > 1].reset_index(drop=True)
    place = np.arange(len(own))
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(own) + 1.2))
    axes.barh(place, own["kept"], color="#E4E4E4", height=0.75, linewidth=0, label="mean falls")
    axes.barh(place, own["clustered"], color=OKABE_ITO[5], height=0.5, linewidth=0, label="has a cluster")
    axes.barh(place, own["simple_label"], color=OKABE_ITO[0], height=0.25, linewidth=0, label="has a simple label")
    axes.plot(own["simple_by_chance"], place, "|", color="black", markersize=13, label="simple by chance")
    for name, style in (("kept", "-"), ("simple_label", ":")):
        text = f"paper: {name.split('_')[0]} ({paper[name]} of {paper['vectors']})"
        share = paper[name] / paper["vectors"]
        axes.axvline(share * own["vectors"].max(), color=OKABE_ITO[1], linestyle=style, linewidth=1.2, label=text)
    axes.set_yticks(place, own["kind"])
    axes.invert_yaxis()
    axes.set(xlabel="vectors", xlim=(0, own["vectors"].max() * 1.02))
    axes.legend(bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
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
    sns.heatmap(
        values, ax=axes, vmin=0, vmax=1, annot=True, fmt=".2f", cmap="crest", annot_kws={"size": 7},
        cbar_kws={"label": label},
    )  # fmt: skip
    axes.set(xlabel="", ylabel="")
    axes.tick_params(axis="x", rotation=90)
    return figure


def label_table(clusters: pd.DataFrame, contexts: pd.DataFrame, n: int = 3) -> HTML:
    """Label and nearest contexts of each cluster of one vector, the target token marked (Figures 6, 10 and 12).

    Args:
        clusters: rows of table ``labels`` of one vector and kind.
        contexts: rows of table ``contexts`` of the same.
        n: contexts to show.
    """
    rows = []
    for row in clusters.sort_values("cluster").itertuples():
        own = contexts[contexts["cluster"] == row.cluster].sort_values("rank").head(n)
        lines = "".join(f"<div>{_context(one)}</div>" for one in own.to_dict("records"))
        label = (
            f"{escape(str(row.label))}<br><small>{'simple' if row.simple else 'not simple'}, n = {row.tokens}</small>"
        )
        dot = f'<span style="color:{cluster_colour(row.cluster)}">●</span>'
        rows.append(f"<tr><td>{dot}&nbsp;{row.cluster}</td><td>{label}</td><td>{lines}</td></tr>")
    head = "<thead><tr><th>cluster</th><th>label</th><th>contexts nearest the medoid</th></tr></thead>"
    return HTML(f'<table class="contexts tex2jax_ignore mathjax_ignore">{head}<tbody>{"".join(rows)}</tbody></table>')


def _context(row: dict[str, object]) -> str:
    before, target, after = (
        "" if isinstance(row[part], float) else escape(str(row[part])).replace("\n", "⏎")
        for part in ("before", "target", "after")
    )
    title = row.get("title")
    source = f" <small>[{escape(str(title))}]</small>" if isinstance(title, str) and title else ""
    return f"<bdi>{before}<mark>{target}</mark>{after}</bdi>{source}"


def annotated_text(texts: Sequence[str], kinds: Sequence[str], plain: str = "clause") -> HTML:
    """A text whose every token has the colour of its kind, with a legend; tokens of kind ``plain`` have none.

    Args:
        texts, kinds: of each token.
        plain: the kind that is not coloured.
    """
    shown = [kind for kind in dict.fromkeys(kinds) if kind != plain]
    colours = {kind: to_hex(colour) for kind, colour in kind_colours(shown).items()}

    def span(text: str, kind: str) -> str:
        inner = escape(text).replace("\n", "⏎<br>")
        return f'<span class="kind" style="border-color:{colours[kind]}">{inner}</span>' if kind in colours else inner

    body = "".join(span(text, kind) for text, kind in zip(texts, kinds, strict=True))
    legend = " ".join(span(kind, kind) for kind in shown)
    return HTML(f'<div class="annotated tex2jax_ignore mathjax_ignore"><p>{legend}</p><div>{body}</div></div>')
