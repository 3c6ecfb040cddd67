"""The tables that the pages on English say their say with: labels of clusters, simple ones, known constructions.

Each is a function of a :class:`polca_paper.language_study.LanguageStudy`, for a run of task ``grammar`` or
``wikipedia``.
"""

from __future__ import annotations

from collections.abc import Callable

import joblib
import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method import breakthroughs
from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, cluster_tokens, is_decreasing, summarise_clusters
from polca_lib.report.contexts import NEAREST, nearest
from polca_lib.report.explorer import Explorer
from polca_lib.tasks.language import CONTEXT
from polca_paper import labeling, tables
from polca_paper.constructions import (
    adjusted_rand,
    ambiguous,
    best_clusters,
    construction_table,
    knn_recall,
    majority_recall,
)
from polca_paper.evidence import agreement, completeness, completeness_curves
from polca_paper.language_study import LanguageStudy

SHOWN = ("POLCA second, raw", "POLCA first, unit", "exact loss, raw")
"""Kinds of trajectory whose clusters are kept with curves and contexts."""

GRID_KINDS = ("exact loss, raw", "POLCA second, raw", "POLCA first, unit")
"""Kinds for which other settings of HDBSCAN are tried."""

COMPARED = (
    "exact loss, raw",
    "exact loss, unit",
    "change in loss, raw",
    "change in loss, zscore",
    *(f"POLCA {order}, {scaling}" for order in ("first", "second") for scaling in ("raw", "unit")),
    *(f"POLCA {order} on random, {scaling}" for order in ("first", "second") for scaling in ("raw", "unit")),
)
"""Kinds that pages set side by side."""


def losses(study: LanguageStudy) -> pd.DataFrame:
    """Quartiles and means of the exact loss by part of speech and, where it is known, by construction."""
    return tables.loss_quantiles(study.main["loss"], list(dict.fromkeys(["tag", study.by])))


def labels(study: LanguageStudy) -> pd.DataFrame:
    """One row per cluster of every kind of trajectory: its label, whether that is simple, and how much it says."""
    return study.labelled


def counts(study: LanguageStudy) -> pd.DataFrame:
    """How many vectors are kept and have a simple label, by kind of trajectory, beside chance (v3: 26 and 22 of 30).

    Returns:
        ``vectors``; ``kept``: those whose mean falls; ``clustered``: those with a cluster; ``simple_label``: those with
        a cluster whose label is simple (see :func:`polca_paper.labeling.label_clusters`); ``simple_by_chance``: mean of
        the same over clusters of the same sizes drawn at random, and ``simple_p`` the share of draws with at least as
        many; ``simple_words``: those with a simple label of more than PAD; ``simple_all``, ``simple_all_by_chance``: by
        the stricter reading; ``clusters``, ``simple_clusters``; ``tokens``; ``dropped_mean``, ``outliers_mean``: over
        vectors kept; ``hidden``: share of clusters with a hidden breakthrough.
    """
    rows = []
    for name, kind in study.kinds.items():
        each = by_vector(kind.labels)
        kept = (each != DROPPED).any("token").values
        own = study.labelled[study.labelled["kind"] == name]
        chance = labeling.simple_by_chance(kind.labels, study.tags, seed=study.run.settings.seed)
        mean = by_vector(kind.curves.mean("token"))
        rows.append(
            {
                "kind": name,
                "basis": kind.basis,
                "trajectory": kind.trajectory,
                "scaling": kind.scaling,
                "vectors": each.sizes["vector"],
                "kept": int(is_decreasing(mean, study.run.settings.clustering.falls_by).sum())
                if kind.only_falling
                else each.sizes["vector"],
                "clustered": own["vector"].nunique(),
                "simple_label": own.loc[own["simple"], "vector"].nunique(),
                "simple_by_chance": chance["simple"],
                "simple_p": chance["simple_p"],
                "simple_words": own.loc[own["simple_words"], "vector"].nunique(),
                "simple_words_by_chance": chance["simple_words"],
                "simple_words_p": chance["simple_words_p"],
                "simple_all": own.loc[own["simple_all"], "vector"].nunique(),
                "simple_all_by_chance": chance["simple_all"],
                "clusters": len(own),
                "simple_clusters": int(own["simple"].sum()),
                "tokens": each.sizes["token"],
                "dropped_mean": float((each == DROPPED).sum("token").values[kept].mean()) if kept.any() else np.nan,
                "outliers_mean": float((each == OUTLIER).sum("token").values[kept].mean()) if kept.any() else np.nan,
                "hidden": own["hidden"].astype(float).mean(),
            }
        )
    return pd.DataFrame(rows)


def contexts(study: LanguageStudy) -> pd.DataFrame:
    """The tokens nearest the medoid of each cluster, in context, of the kinds in ``SHOWN``."""
    parts = []
    about = study.task.sources
    for name in SHOWN:
        kind = study.kinds[name]
        near = nearest(kind.curves, kind.labels, kind.scaling)
        found = labeling.contexts(near, study.task.texts, study.run.tokens)
        if about is not None:
            found = found.assign(**about.iloc[study.run.tokens["example"].to_numpy()[found["token"]]].to_dict("list"))
        parts.append(found.assign(kind=name))
    return pd.concat(parts, ignore_index=True)


def mirrored(study: LanguageStudy) -> pd.DataFrame:
    """Pairs of clusters of one vector that move against each other, of every kind of projected loss."""
    parts = []
    for name, kind in study.kinds.items():
        if kind.basis:
            summary = summarise_clusters(kind.curves, study.main["loss"], kind.labels, kind.scaling, study.by)
            parts.append(breakthroughs.mirrored(summary["median"]).assign(kind=name))
    return pd.concat(parts, ignore_index=True)


def constructions(study: LanguageStudy) -> pd.DataFrame:
    """The best cluster for each known construction (or part of speech), by kind of trajectory."""
    what = study.main[study.by].values
    parts = [
        best_clusters(construction_table(kind.labels, what)).assign(kind=name) for name, kind in study.kinds.items()
    ]
    return pd.concat(parts, ignore_index=True)


def rand(study: LanguageStudy) -> pd.DataFrame:
    """Agreement of the clusters of each vector with known constructions (or parts of speech)."""
    what = study.main[study.by].values
    parts = [adjusted_rand(kind.labels, what).assign(kind=name) for name, kind in study.kinds.items()]
    return pd.concat(parts, ignore_index=True)


def grid(study: LanguageStudy) -> pd.DataFrame:
    """What ``min_samples`` does: clusters, and how well they find what is known, by its share of the kept tokens.

    Rows ``kind`` and ``min_samples_divisor``: ``clustered`` vectors, ``clusters``; means over constructions (or parts
    of speech) but padding of the largest ``f1_all`` of a cluster and of the largest homogeneity, ``purest``.
    """
    what, rows = study.main[study.by].values, []
    for name in GRID_KINDS:
        kind = study.kinds[name]
        for divisor in (15, 60, 240):
            settings = study.clustering(kind.scaling).model_copy(update={"min_samples_divisor": divisor})
            each = by_vector(kind.labels)["vector"].values
            jobs = (joblib.delayed(cluster_tokens)(by_vector(kind.curves).sel(vector=[v]), settings) for v in each)
            labels = xr.concat(joblib.Parallel(n_jobs=-1)(jobs), dim="vector", coords="different", compat="equals")
            best = best_clusters(construction_table(labels, what)).set_index("construction")
            best = best.drop(index=["padding", "PAD"], errors="ignore")
            rows.append(
                {
                    "kind": name,
                    "min_samples_divisor": divisor,
                    "clustered": int((labels >= 1).any("token").sum()),
                    "clusters": int(labels.max("token").clip(0).sum()),
                    "f1_all": best["best_f1_all"].mean() if len(best) else 0.0,
                    "purest": best["purest_homogeneity"].mean() if len(best) else 0.0,
                }
            )
    return pd.DataFrame(rows)


def neighbours(study: LanguageStudy) -> pd.DataFrame:
    """How well known constructions (or parts of speech) can be told from nearest trajectories, without any clustering.

    Rows ``kind``, ``construction``, ``recall``, and ``recall_like``, where only tokens of the same text vote and only
    such are asked that have more than one construction, see :func:`polca_paper.constructions.knn_recall`; of
    projected losses all vectors are taken together. Beside the kinds of trajectory stand ``token``, for which tokens of
    the same text vote, whatever their curves, and ``token and the one before``; the same tokens are asked of all.
    Groups are articles, or windows.
    """
    what, tokens = study.main[study.by].values, study.run.tokens
    group = tokens["example"].to_numpy()
    if (sources := study.task.sources) is not None:
        group = pd.factorize(sources["title"])[0][group]
    text = tokens["text"].to_numpy()
    pair = study.task.texts[:, CONTEXT - 1 : -1].ravel() + "|" + text
    asked = ambiguous(text, what, group)
    told = {
        name: (majority_recall(key, what, group), majority_recall(key[asked], what[asked], group[asked]))
        for name, key in (("token", text), ("token and the one before", pair))
    }
    for name, kind in study.kinds.items():
        if kind.scaling == "raw":
            curves = kind.curves - kind.curves.isel(step=0, drop=True) if kind.only_falling else kind.curves
            told[name] = tuple(knn_recall(curves, what, group, among=among) for among in (None, text))
    tables = [
        pd.concat(both, axis=1, keys=["recall", "recall_like"])
        .rename_axis("construction")
        .reset_index()
        .assign(kind=name)
        for name, both in told.items()
    ]
    return pd.concat(tables, ignore_index=True)


def vectors(study: LanguageStudy) -> pd.DataFrame:
    """One row per vector of the run's own basis and kind of trajectory: birth, eigenvalue, fall, clusters, labels."""
    rows = []
    for name, kind in study.kinds.items():
        if kind.basis != study.run.settings.basis.kind:
            continue
        table = study.main[["birth_step", "eigenvalue", "residual", "products"]].to_dataframe()
        mean = kind.curves.mean("token")
        table["projected_loss"] = mean.isel(step=-1).values
        table["falls"] = is_decreasing(mean, study.run.settings.clustering.falls_by).values
        table["dropped"] = (kind.labels == DROPPED).sum("token").values
        own = study.labelled[study.labelled["kind"] == name].groupby("vector")
        table["clusters"] = own.size().reindex(table.index, fill_value=0)
        table["simple"] = own["simple"].sum().reindex(table.index, fill_value=0)
        rows.append(table.reset_index().assign(kind=name))
    return pd.concat(rows, ignore_index=True)


def cluster_summary(study: LanguageStudy) -> xr.Dataset:
    """Medoids, quartiles and composition of the clusters of the kinds in ``SHOWN``, and curves nearest the medoids."""
    parts = {}
    for name in SHOWN:
        kind = study.kinds[name]
        curves = by_vector(kind.curves)
        summary = summarise_clusters(kind.curves, study.main["loss"], kind.labels, kind.scaling, study.by)
        near = nearest(kind.curves, kind.labels, kind.scaling)
        single = np.full((*summary["medoid"].shape[:2], NEAREST, summary.sizes["step"]), np.nan, np.float32)
        place = {vector: row for row, vector in enumerate(summary["vector"].values)}
        for one in near.itertuples():
            own = curves.sel(vector=one.vector).isel(token=one.token)
            single[place[one.vector], one.cluster - 1, one.rank - 1] = own.values
        summary = summary.assign_coords(rank=np.arange(1, NEAREST + 1))
        summary["nearest"] = (("vector", "cluster", "rank", "step"), single)
        parts[name] = summary.drop_vars(["eigenvalue", "residual", "products", "birth_step"], errors="ignore")
    whole = xr.concat(parts.values(), dim=pd.Index(list(parts), name="kind"), join="outer", fill_value={"tokens": 0})
    births = study.main["birth_step"].to_series().reindex(whole["vector"].values)
    whole["birth_step"] = ("vector", births.to_numpy(float))
    whole.attrs["hidden_after"] = study.hidden_after
    return whole.map(lambda values: values.astype(np.float16) if values.dtype == np.float32 else values)


def explorer_of(
    summary: xr.Dataset,
    clusters: pd.DataFrame,
    contexts: pd.DataFrame,
    pairs: pd.DataFrame,
    kind: str,
    *,
    title: str,
    note: str = "",
) -> Explorer:
    """The explorer of one kind of trajectory of a study, at hand or kept.

    Args:
        summary: from :func:`cluster_summary`.
        clusters, contexts, pairs: tables ``labels``, ``contexts`` and ``mirrored``.
        kind: one of ``SHOWN``.
        title, note: shown above.

    Raises:
        ValueError: a kind whose curves are not kept.
    """
    if kind not in SHOWN:
        raise ValueError(f"kind = {kind!r} has no curves kept; allowed: {', '.join(SHOWN)}")
    own = {name: table[table["kind"] == kind] for name, table in (("c", clusters), ("t", contexts), ("p", pairs))}
    vectors = sorted(own["c"]["vector"].unique())
    return Explorer(
        summary.sel(kind=kind, vector=vectors),
        own["c"].assign(mirrors=breakthroughs.named_mirrors(own["c"], own["p"])),
        own["t"],
        title=title,
        note=note,
        hidden_after=summary.attrs.get("hidden_after"),
    )


TABLES: dict[str, Callable[[LanguageStudy], pd.DataFrame]] = {
    "losses": losses,
    "labels": labels,
    "counts": counts,
    "vectors": vectors,
    "contexts": contexts,
    "mirrored": mirrored,
    "constructions": constructions,
    "rand": rand,
    "neighbours": neighbours,
    "completeness": completeness,
    "completeness_curves": completeness_curves,
    "agreement": agreement,
    "grid": grid,
}
"""What is kept of a study of text, in the order in which it is made."""
