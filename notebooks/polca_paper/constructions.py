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
        (share of the construction's tokens in any cluster of this vector that lie in this one, as in
        :func:`polca_paper.homogeneity.homogeneity_table`), ``f1``, ``recall_all`` and ``f1_all`` (the same of all
        tokens
        of the construction, also those dropped or set aside: a vector that keeps little can't do well), ``base_rate``
        (the construction's share of the vector's kept tokens), ``lift`` (homogeneity by base rate; NaN if none is).

    Raises:
        ValueError: constructions that are not one per token.
    """
    _check(labels, construction)
    names, codes, every = np.unique(np.asarray(construction, str), return_inverse=True, return_counts=True)
    parts = []
    for one in by_vector(labels):
        label = one.values
        clustered, kept = np.flatnonzero(label >= 1), codes[label != DROPPED]
        shape = (label.max(initial=0) if len(clustered) else 0, len(names))
        cells = (label[clustered] - 1) * len(names) + codes[clustered]
        hits = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
        base_rate = np.bincount(kept, minlength=len(names)) / max(len(kept), 1)
        tokens, total = hits.sum(axis=1, keepdims=True), np.maximum(hits.sum(axis=0), 1)
        homogeneity = hits / tokens
        columns = {
            "vector": int(one["vector"]),
            "cluster": 1 + np.arange(len(hits))[:, None],
            "construction": names,
            "tokens": tokens,
            "hits": hits,
            "homogeneity": homogeneity,
            "recall": hits / total,
            # 2 / (1 / homogeneity + 1 / recall), and 0 without hits.
            "f1": 2 * hits / (tokens + total),
            "recall_all": hits / every,
            "f1_all": 2 * hits / (tokens + every),
            "base_rate": base_rate,
            "lift": homogeneity / np.where(base_rate > 0, base_rate, np.nan),
        }
        parts.append(pd.DataFrame({name: np.broadcast_to(v, hits.shape).ravel() for name, v in columns.items()}))
    return pd.concat(parts, ignore_index=True).astype(_COLUMNS)


def best_clusters(table: pd.DataFrame) -> pd.DataFrame:
    """The cluster that finds each construction best, over all vectors.

    Args:
        table: from :func:`construction_table`.

    Returns:
        One row per construction: that of the largest F1, of equal ones the more homogeneous; and, with ``purest_``
        before their names, vector, cluster, tokens, homogeneity and recall of the most homogeneous cluster, of equal
        ones the larger; and ``best_f1_all``, the largest ``f1_all`` of any. Their ``hits`` are 0 if no cluster has a
        token of it.
    """
    best, purest = (
        table.sort_values(list(by), ascending=False, kind="stable").drop_duplicates("construction")
        for by in (("f1", "homogeneity"), ("homogeneity", "tokens"))
    )
    columns = ["vector", "cluster", "tokens", "homogeneity", "recall"]
    purest = purest.set_index("construction")[columns].add_prefix("purest_")
    largest = table.groupby("construction")["f1_all"].max().rename("best_f1_all")
    best = best.join(largest, on="construction")
    return best.join(purest, on="construction").sort_values("construction").reset_index(drop=True)


def adjusted_rand(labels: xr.DataArray, construction: Sequence[str]) -> pd.DataFrame:
    """Agreement of the clusters of each vector with known constructions, over clustered tokens.

    Args:
        labels: (token,) or (vector, token).
        construction: of each token.

    Returns:
        One row per vector: ``vector``, ``clusters``, ``tokens`` in these, ``adjusted_rand`` and
        ``adjusted_mutual_information``: 1 if they are the same, 0 as chance would have it, NaN with fewer than two
        clusters.

    Raises:
        ValueError: constructions that are not one per token.
    """
    _check(labels, construction)
    construction = np.asarray(construction, str)
    each = by_vector(labels).assign_coords(construction=("token", construction))
    rand = rand_indices(each, ["construction"])["construction"]
    rows = []
    for one in each.values:
        inside = one >= 1
        clusters = len(np.unique(one[inside]))
        shared = adjusted_mutual_info_score(construction[inside], one[inside]) if clusters > 1 else np.nan
        rows.append({"clusters": clusters, "tokens": inside.sum(), "adjusted_mutual_information": shared})
    table = pd.DataFrame(rows)
    table.insert(0, "vector", rand.index.to_numpy())
    table.insert(3, "adjusted_rand", rand.to_numpy())
    return table


def ambiguous(key: Sequence[object], construction: Sequence[str], group: Sequence[int]) -> Bool[np.ndarray, " token"]:
    """Tokens whose key, such as their text, occurs in several constructions, and in a group for each fold at least."""
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

    This asks whether the curves hold the construction at all, whatever a clustering makes of them: a vote of the
    nearest neighbours, by Euclidean distance, among tokens of other groups. No token is dropped, and with several
    vectors each is divided by its root mean square, so that all count alike.

    A gradient says which token is the target, and that alone tells much of the construction. With ``among`` only like
    tokens vote, and only the :func:`ambiguous` are asked: what is told then is not the token.

    Args:
        trajectories: (step, token) or (step, token, vector).
        construction: of each token.
        group: of each token; those of its own group do not vote, such as tokens of the same window.
        among: of each token, what those that vote must share with it, such as its text.
        neighbours: that vote.

    Returns:
        Share of the tokens of each construction that are told rightly (recall), by construction; and, under ``mean``,
        the mean over constructions (balanced accuracy): chance is one by their number. NaN if no token is asked.
    """
    construction, group = np.asarray(construction, str), np.asarray(group)
    values = by_vector(trajectories).transpose("token", "vector", "step").values.astype(np.float32)
    size = np.sqrt((values**2).mean(axis=(0, 2), keepdims=True))
    points = (values / np.where(size > 0, size, 1)).reshape(len(values), -1)
    told = np.full(len(construction), "", dtype=object)
    asked = np.ones(len(construction), bool) if among is None else ambiguous(among, construction, group)
    key = np.zeros(len(construction), int) if among is None else pd.factorize(np.asarray(among))[0]
    for value in np.unique(key[asked]):
        own = np.flatnonzero(asked & (key == value))
        for train, test in _folds(group[own]):
            voters = KNeighborsClassifier(min(neighbours, len(train)))
            told[own[test]] = voters.fit(points[own[train]], construction[own[train]]).predict(points[own[test]])
    return _recall(told[asked], construction[asked])


def majority_recall(key: Sequence[object], construction: Sequence[str], group: Sequence[int]) -> pd.Series:
    """As :func:`knn_recall`, by a vote of the tokens of other groups that share a key, such as their text.

    A token whose key occurs in no other group is told wrongly.
    """
    table = pd.DataFrame({"key": key, "construction": np.asarray(construction, str)})
    told = np.full(len(table), "", dtype=object)
    for train, test in _folds(np.asarray(group)):
        most = table.iloc[train].groupby("key")["construction"].agg(lambda own: own.value_counts().idxmax())
        told[test] = table["key"].iloc[test].map(most).fillna("").to_numpy()
    return _recall(told, table["construction"].to_numpy())


def _folds(group: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Who votes and who is asked, none of the same group; no folds without two groups."""
    folds = min(FOLDS, len(np.unique(group)))
    return GroupKFold(folds).split(group, groups=group) if folds > 1 else ()


def _recall(told: np.ndarray, construction: np.ndarray) -> pd.Series:
    right = pd.Series(told == construction).groupby(construction).mean()
    return pd.concat([right, pd.Series({"mean": right.mean()})])


def _check(labels: xr.DataArray, construction: Sequence[str]) -> None:
    if len(construction) != labels.sizes["token"]:
        raise ValueError(
            f"construction has {len(construction)} rows; allowed: {labels.sizes['token']}, one for each token of labels"
        )
