"""How well clusters find constructions that are known, as those of the grammar are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier

from polca_lib.method.clustering import DROPPED, by_vector
from polca_paper.labeling import check_length
from polca_paper.significance import rand_indices

FOLDS = 5
"""Of cross-validation by groups."""

_COLUMNS = {
    "vector": int, "cluster": int, "construction": object, "tokens": int, "hits": int,
    "homogeneity": float, "recall": float, "f1": float, "recall_all": float, "f1_all": float,
    "base_rate": float, "lift": float,
}  # fmt: skip


def construction_table(labels: xr.DataArray, construction: Sequence[str]) -> pd.DataFrame:
    """How purely and how completely each cluster is made of each known construction.

    Args:
        labels: (token,) or (vector, token).
        construction: of each token.

    Returns:
        A row per cluster and construction, also where they share nothing: ``vector``, ``cluster``, ``construction``,
        ``tokens`` of the cluster, ``hits`` of them of this construction, ``homogeneity`` (their share), ``recall``
        (share of the construction's tokens in all clusters of this vector that lie in this one), ``f1``,
        ``recall_all`` and ``f1_all`` (the same of all tokens of the construction, also those dropped or set aside: a
        vector that keeps little can't do well), ``base_rate`` (the construction's share of the vector's kept tokens),
        ``lift`` (homogeneity by base rate; NaN if none is kept).

    Raises:
        ValueError: constructions that are not one per token.
    """
    check_length(labels, construction, "construction")
    names, codes, every = np.unique(np.asarray(construction, str), return_inverse=True, return_counts=True)
    parts = []
    for vector in by_vector(labels):
        label = vector.values
        clustered, kept = label >= 1, label != DROPPED
        hits = np.zeros((label.max(initial=0) if clustered.any() else 0, len(names)), int)  # (cluster, construction)
        np.add.at(hits, (label[clustered] - 1, codes[clustered]), 1)
        base_rate = np.bincount(codes[kept], minlength=len(names)) / max(kept.sum(), 1)
        tokens, total = hits.sum(axis=1, keepdims=True), np.maximum(hits.sum(axis=0), 1)
        columns = {
            "vector": int(vector["vector"]),
            "cluster": 1 + np.arange(len(hits))[:, None],
            "construction": names,
            "tokens": tokens,
            "hits": hits,
            "homogeneity": hits / tokens,
            "recall": hits / total,
            # 2 / (1 / homogeneity + 1 / recall), and 0 without hits.
            "f1": 2 * hits / (tokens + total),
            "recall_all": hits / every,
            "f1_all": 2 * hits / (tokens + every),
            "base_rate": base_rate,
            "lift": hits / tokens / np.where(base_rate > 0, base_rate, np.nan),
        }
        parts.append(pd.DataFrame({name: np.broadcast_to(v, hits.shape).ravel() for name, v in columns.items()}))
    return pd.concat(parts, ignore_index=True).astype(_COLUMNS)


def best_clusters(table: pd.DataFrame) -> pd.DataFrame:
    """The cluster that finds each construction best, over all vectors.

    Args:
        table: from :func:`construction_table`.

    Returns:
        One row per construction: that of the cluster with the largest F1, of equal ones the more homogeneous; with
        ``purest_`` before their names, vector, cluster, tokens, homogeneity and recall of the most homogeneous cluster,
        of equal ones the larger; and ``best_f1_all``, the largest ``f1_all`` of any. ``hits`` are 0 if no cluster has a
        token of the construction.
    """
    best, purest = (
        table.sort_values(list(by), ascending=False, kind="stable").drop_duplicates("construction")
        for by in (("f1", "homogeneity"), ("homogeneity", "tokens"))
    )
    columns = ["vector", "cluster", "tokens", "homogeneity", "recall"]
    purest = purest.set_index("construction")[columns].add_prefix("purest_")
    largest = table.groupby("construction")["f1_all"].max().rename("best_f1_all")
    best = best.join(largest, on="construction").join(purest, on="construction")
    return best.sort_values("construction").reset_index(drop=True)


def adjusted_rand(labels: xr.DataArray, construction: Sequence[str]) -> pd.DataFrame:
    """Agreement of the clusters of each vector with known constructions, over clustered tokens.

    Args:
        labels: (token,) or (vector, token).
        construction: of each token.

    Returns:
        One row per vector: ``vector``, ``clusters``, ``tokens`` in these, ``adjusted_rand`` and
        ``adjusted_mutual_information``: 1 if they are the same, 0 if agreement is as by chance, NaN with fewer than two
        clusters.

    Raises:
        ValueError: constructions that are not one per token.
    """
    check_length(labels, construction, "construction")
    each = by_vector(labels).assign_coords(construction=("token", np.asarray(construction, str)))
    rand, rows = rand_indices(each, ["construction"])["construction"], []
    for vector in each:
        clustered = vector[vector.values >= 1]
        clusters = len(np.unique(clustered))
        row = {"vector": int(vector["vector"]), "clusters": clusters, "tokens": clustered.size}
        row["adjusted_rand"] = rand[row["vector"]]
        shared = (clustered["construction"].values, clustered.values)
        row["adjusted_mutual_information"] = adjusted_mutual_info_score(*shared) if clusters > 1 else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def ambiguous(key: Sequence[object], construction: Sequence[str], group: Sequence[int]) -> Bool[np.ndarray, " token"]:
    """Tokens whose key, such as their text, occurs in several constructions, and in at least a group for each fold."""
    table = pd.DataFrame({"key": key, "construction": construction, "group": group})
    numbers = table.groupby("key")[["construction", "group"]].transform("nunique")
    return ((numbers["construction"] > 1) & (numbers["group"] >= FOLDS)).to_numpy()


def knn_recall(
    trajectories: xr.DataArray,
    construction: Sequence[str],
    group: Sequence[int],
    *,
    among: Sequence[object] | None = None,
    neighbours: int = 15,
) -> pd.Series:
    """How well the construction of a token can be told from the tokens whose trajectories are nearest to its own.

    This asks whether the curves hold the construction at all, whatever a clustering makes of them. The nearest
    neighbours, by Euclidean distance among tokens of other groups, vote. No token is dropped. Several vectors are each
    divided by their root mean square, so that all count alike.

    A gradient tells which token is the target, and that alone tells much of the construction. With ``among`` only like
    tokens vote, and only the :func:`ambiguous` are asked: what is told then is not the token.

    Args:
        trajectories: (step, token) or (step, token, vector).
        construction: of each token.
        group: of each token, such as its window; tokens of the same group do not vote.
        among: of each token, what those that vote must share with it, such as its text.
        neighbours: number of tokens that vote.

    Returns:
        Recall by construction, the share of its tokens that are told rightly; and, under ``mean``, the mean over
        constructions (balanced accuracy; chance is one by their number). NaN if no token is asked.
    """
    construction, group = np.asarray(construction, str), np.asarray(group)
    values = by_vector(trajectories).transpose("token", "vector", "step").values.astype(np.float32)
    size = np.sqrt((values**2).mean(axis=(0, 2), keepdims=True))
    points = (values / np.where(size > 0, size, 1)).reshape(len(values), -1)
    told = np.full(len(construction), "", dtype=object)
    asked = np.ones(len(construction), bool) if among is None else ambiguous(among, construction, group)
    key = np.zeros(len(construction), int) if among is None else pd.factorize(np.asarray(among))[0]
    for value in np.unique(key[asked]):
        like = np.flatnonzero(asked & (key == value))
        for train, test in _folds(group[like]):
            voters = KNeighborsClassifier(min(neighbours, len(train)))
            voters.fit(points[like[train]], construction[like[train]])
            told[like[test]] = voters.predict(points[like[test]])
    return _recall(told[asked], construction[asked])


def majority_recall(key: Sequence[object], construction: Sequence[str], group: Sequence[int]) -> pd.Series:
    """As :func:`knn_recall`, by a vote of the tokens of other groups that share a key, such as their text.

    A token whose key occurs in no other group is told wrongly.
    """
    table = pd.DataFrame({"key": key, "construction": np.asarray(construction, str)})
    told = np.full(len(table), "", dtype=object)
    for train, test in _folds(np.asarray(group)):
        most = table.iloc[train].groupby("key")["construction"].agg(lambda votes: votes.value_counts().idxmax())
        told[test] = table["key"].iloc[test].map(most).fillna("").to_numpy()
    return _recall(told, table["construction"].to_numpy())


def _folds(group: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Who votes and who is asked, in groups apart; no folds without two groups."""
    folds = min(FOLDS, len(np.unique(group)))
    return GroupKFold(folds).split(group, groups=group) if folds > 1 else ()


def _recall(told: np.ndarray, construction: np.ndarray) -> pd.Series:
    right = pd.Series(told == construction).groupby(construction).mean()
    return pd.concat([right, pd.Series({"mean": right.mean()})])
