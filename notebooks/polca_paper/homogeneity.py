"""How purely clusters consist of carries (Tables 3 and 4 of the paper), and when they break through."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.breakthroughs import mark_hidden
from polca_lib.method.clustering import DROPPED, by_vector, cluster_tokens
from polca_lib.method.settings import ClusteringSettings

CARRY_PLACES, IN_PLACES = ("10s", "100s"), 0.85
"""v3 counts a cluster only if over this share of its carries lies in these places; v1 counts every cluster."""


def homogeneity_table(labels: xr.DataArray) -> pd.DataFrame:
    """How purely each cluster consists of carry tokens.

    Args:
        labels: (token,) or (vector, token), with coordinates ``carry`` and ``place``.

    Returns:
        One row per cluster: ``vector`` (0 if there is none), ``cluster``, ``tokens``, ``homogeneity`` (share of its
        tokens that carry), ``recall`` (share of the carry tokens in all clusters of this vector that lie in this one;
        outliers and dropped tokens do not count), ``f1``, ``in_places`` (share of its carry tokens in
        ``CARRY_PLACES``), ``counts_v3`` (whether v3 counts the cluster).
    """
    labels = by_vector(labels)
    carry = labels["carry"].values.astype(bool)
    tokens = pd.DataFrame({"tokens": 1, "hits": carry, "inside": carry & np.isin(labels["place"].values, CARRY_PLACES)})
    parts = []
    for label in labels:
        numbers = pd.RangeIndex(1, label.values.max(initial=0) + 1)
        counts = tokens.groupby(label.values).sum().reindex(numbers, fill_value=0)
        hits, carries = counts["hits"], counts["hits"].sum()
        table = {
            "vector": int(label["vector"]),
            "cluster": numbers,
            "tokens": counts["tokens"],
            "homogeneity": hits / counts["tokens"],
            "recall": hits / max(carries, 1),
            "f1": 2 * hits / (counts["tokens"] + carries).clip(lower=1),
            "in_places": counts["inside"] / hits.clip(lower=1),
        }
        parts.append(pd.DataFrame(table, numbers))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(counts_v3=table["in_places"] > IN_PLACES)


def base_rate(labels: xr.DataArray) -> float:
    """Share of carries among all tokens that were not dropped, over all vectors."""
    return float(labels["carry"].astype(float).where(labels != DROPPED).mean())


def most_homogeneous(table: pd.DataFrame, n: int = 3, *, rule: str = "v1") -> pd.DataFrame:
    """The ``n`` clusters of highest homogeneity, at most one per vector.

    Args:
        table: from :func:`homogeneity_table`.
        n: number of clusters.
        rule: ``v1`` counts every cluster, ``v3`` only those with ``counts_v3``.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in ("v1", "v3"):
        raise ValueError(f"rule = {rule!r} is unknown; allowed: v1, v3")
    counted = table if rule == "v1" else table[table["counts_v3"]]
    best = counted.sort_values(["homogeneity", "tokens"], ascending=False, kind="stable")
    return best.drop_duplicates("vector").head(n).reset_index(drop=True)


def cluster_breakthroughs(
    trajectories: xr.DataArray, settings: ClusteringSettings, hidden_after: int, *, only_falling: bool = True
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Cluster trajectories, and describe each cluster.

    Args:
        trajectories: (step, token) or (step, token, vector), with the token table's coordinates.
        settings: of the clustering.
        hidden_after: tau, in steps.
        only_falling: see :func:`polca_lib.method.clustering.cluster_tokens`.

    Returns:
        The labels, and one row per cluster with the columns of :func:`homogeneity_table` and of
        :func:`polca_lib.method.breakthroughs.mark_hidden`.
    """
    labels = cluster_tokens(trajectories, settings, only_falling=only_falling)
    table = homogeneity_table(labels)
    return labels, mark_hidden(table, labels, trajectories, settings.breakthrough_window, hidden_after)
