"""How purely clusters consist of carries (Tables 3 and 4 of the paper), and when they break through."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.breakthroughs import mark_hidden
from polca_lib.method.clustering import by_vector, cluster_tokens
from polca_lib.method.settings import ClusteringSettings


def homogeneity_table(
    labels: xr.DataArray, *, positive: str = "carry", places: tuple[str, ...] = ("10s", "100s")
) -> pd.DataFrame:
    """How purely each cluster consists of carry tokens (Tables 3 and 4 of the paper).

    Args:
        labels: (token,) or (vector, token), from :func:`cluster_tokens`, with coordinates ``positive`` and ``place``.
        positive: boolean coordinate of the skill.
        places: those that v3's rule asks for.

    Returns:
        One row per cluster: ``vector`` (0 if there is none), ``cluster``, ``tokens``, ``homogeneity`` (share of its
        tokens that carry), ``recall`` (share of the carry tokens in any cluster of this vector that lie in it: outliers
        and dropped tokens do not count), ``f1``, ``in_places`` (share of its carry tokens in ``places``),
        ``counts_v3`` (that share is over 0.85, which v3 asks for before it counts a cluster; v1 counts all).
    """
    rows = []
    for one in by_vector(labels):
        value, place, cluster = one[positive].values, one["place"].values, one.values
        total = int(value[cluster >= 1].sum())
        for number in range(1, cluster.max() + 1):
            inside = cluster == number
            hits = inside & value
            precision = hits.sum() / inside.sum()
            recall = hits.sum() / total if total else 0.0
            in_places = float(np.isin(place[hits], places).mean()) if hits.any() else 0.0
            rows.append(
                {
                    "vector": int(one["vector"]),
                    "cluster": number,
                    "tokens": int(inside.sum()),
                    "homogeneity": precision,
                    "recall": recall,
                    "f1": 2 * precision * recall / (precision + recall) if hits.any() else 0.0,
                    "in_places": in_places,
                    "counts_v3": in_places > 0.85,
                }
            )
    columns = ["vector", "cluster", "tokens", "homogeneity", "recall", "f1", "in_places", "counts_v3"]
    return pd.DataFrame(rows, columns=columns)


def most_homogeneous(table: pd.DataFrame, n: int = 3, *, rule: str = "v1") -> pd.DataFrame:
    """The ``n`` clusters of highest homogeneity, one per vector, by v1's rule (all count) or v3's.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in ("v1", "v3"):
        raise ValueError(f"rule = {rule!r} is unknown; allowed: v1, v3")
    counted = table if rule == "v1" else table[table["counts_v3"].astype(bool)]
    best = counted.sort_values(["homogeneity", "tokens"], ascending=False, kind="stable")
    return best.drop_duplicates("vector").head(n).reset_index(drop=True)


def cluster_breakthroughs(
    trajectories: xr.DataArray, settings: ClusteringSettings, hidden_after: int, *, only_falling: bool = True
) -> tuple[xr.DataArray, pd.DataFrame]:
    """Breakthrough clustering from trajectories to a table: cluster, tabulate, mark what is hidden.

    Args:
        trajectories: (step, token) or (step, token, vector), with the token table's coordinates.
        settings: of the clustering.
        hidden_after: tau, in steps.
        only_falling: see :func:`polca_lib.method.clustering.cluster_tokens`.

    Returns:
        Labels, as :func:`polca_lib.method.clustering.cluster_tokens` gives them, and one row per cluster, with the
        columns
        of :func:`polca_paper.homogeneity.homogeneity_table` and :func:`mark_hidden`.
    """
    labels = cluster_tokens(trajectories, settings, only_falling=only_falling)
    table = homogeneity_table(labels)
    return labels, mark_hidden(table, labels, trajectories, settings.breakthrough_window, hidden_after)
