"""How well clusters find constructions that are known, as those of the grammar are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.stats import norm
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier

from polca_lib.method import clustering
from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, is_decreasing
from polca_lib.method.settings import ClusteringSettings, Scaling
from polca_lib.report.findings import members
from polca_paper.labeling import check_length

FOLDS = 5
"""Of cross-validation by groups."""

DIVISORS = (15, 30, 60, 120)
"""Of the kept tokens, for ``min_samples``: the paper's first."""

BEYOND = 0.01
"""p at which a cluster tells more than chance; low, because a reading is asked about many constructions."""


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


def best_found(
    labels: xr.DataArray,
    known: pd.DataFrame,
    group: Sequence[object] | None = None,
    *,
    draws: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """The cluster that finds each known set of tokens best, by F1 over all tokens, and what chance gives.

    With n tokens in the cluster, m in the set and h in both, F1 = 2 h / (n + m). The null keeps clusters, dropped
    tokens and ``group``: it permutes which tokens of the same group are in the sets. Its F1 is the largest over all
    clusters, too, so that many clusters or vectors give no advantage.

    Args:
        labels: (token,) or (vector, token).
        known: a row per token, a column of truth values per set; sets may overlap.
        group: of each token. With its text, a cluster gains nothing by telling texts apart. One group if not given.
        draws: number of permutations.
        seed: of these.

    Returns:
        A row per set, ``name``: ``vector``, ``cluster`` and ``tokens`` (0 without any cluster), ``known`` (m), ``hits``
        (h), ``precision`` (h / n), ``recall`` (h / m), ``f1``, ``lift`` (precision by the share of the set among the
        kept tokens of the vector), ``null`` (mean F1 by chance), ``p``, and ``free``: the share of the set's tokens
        whose group also has tokens outside it. Where it is 0 the group decides, and p is 1.

    Raises:
        ValueError: sets or groups that are not one per token.
    """
    check_length(labels, known, "known")
    group = np.zeros(len(known), int) if group is None else pd.factorize(np.asarray(group))[0]
    check_length(labels, group, "group")
    each, found = by_vector(labels), list(members(labels))
    sets = known.to_numpy(np.float32)
    inside = np.array([tokens for *_, tokens in found], np.float32).reshape(-1, len(known))
    size, total = inside.sum(axis=1), sets.sum(axis=0)

    def f1(values: np.ndarray) -> np.ndarray:
        return 2 * (values.T @ inside.T) / np.maximum(size + total[:, None], 1)  # (set, cluster)

    scores = f1(sets)
    observed = scores.max(axis=1, initial=0)
    best = np.where(observed > 0, scores.argmax(axis=1) if found else -1, -1)
    orders = _permutations(group, draws, seed)
    null = np.array([f1(sets[order]).max(axis=1) for order in orders]) if found else np.zeros((draws, len(total)))
    share = pd.DataFrame(sets).groupby(group).transform("mean").to_numpy()
    rows = []
    for i, (name, chosen) in enumerate(zip(known.columns, best, strict=True)):
        vector, cluster, tokens = found[chosen] if chosen >= 0 else (0, 0, np.zeros(len(known), bool))
        kept = each.sel(vector=vector).values != DROPPED if chosen >= 0 else tokens
        member, n = sets[:, i] > 0, tokens.sum()
        hits, base = int(member[tokens].sum()), member[kept].mean() if kept.any() else 0
        rows.append(
            {
                "name": name,
                "vector": vector,
                "cluster": cluster,
                "tokens": int(n),
                "known": int(member.sum()),
                "hits": hits,
                "precision": hits / n if n else np.nan,
                "recall": hits / member.sum() if member.any() else np.nan,
                "f1": observed[i],
                "lift": hits / n / base if n and base else np.nan,
                "null": null[:, i].mean(),
                "p": (1 + (null[:, i] >= observed[i] - 1e-6).sum()) / (1 + draws),
                "free": (share[member, i] < 1).mean() if member.any() else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _permutations(group: Int[np.ndarray, " token"], draws: int, seed: int) -> Iterator[Int[np.ndarray, " token"]]:
    """Orders of the tokens that exchange them within their groups alone."""
    rng, places = np.random.default_rng(seed), np.argsort(group, kind="stable")
    for _ in range(draws):
        order = np.empty(len(group), int)
        order[places] = np.argsort(group + rng.random(len(group)))
        yield order


def cluster_readings(
    curves: xr.DataArray, settings: ClusteringSettings, scaling: Scaling, *, only_falling: bool = True
) -> dict[tuple[str, int], xr.DataArray]:
    """Cluster along each vector, and all vectors jointly, with ``min_samples`` by each of ``DIVISORS``.

    Jointly, a token's curves along all vectors whose mean falls stand side by side, each scaled by itself; tokens are
    kept whose sum of these curves falls.

    Returns:
        Labels by way (``per vector``, ``joint``; the latter for several vectors alone) and divisor.
    """
    settings = settings.resolved(curves.sizes["token"], curves["step"].values).model_copy(update={"scaling": scaling})
    each, size = by_vector(curves), settings.min_cluster_size
    blank = xr.full_like(each.isel(step=0, drop=True), DROPPED, dtype=int)
    ways = {"per vector": blank}
    jobs = [("per vector", i, *clustering.candidates(each[i], settings, only_falling)[:2]) for i in range(len(each))]
    if len(each) > 1:
        ways["joint"] = blank[:1].assign_coords(vector=[0])
        falling = each[is_decreasing(each.mean("token"), settings.falls_by).values]
        if len(falling):
            keep = clustering.candidates(falling.sum("vector"), settings, only_falling)[0]
            parts = [
                clustering.scale(v.transpose("token", "step").values[keep].astype(float), scaling) for v in falling
            ]
            jobs.append(("joint", 0, keep, np.concatenate(parts, axis=1)))
    labels = {key: ways[key[0]].copy() for key in itertools.product(ways, DIVISORS)}
    for way, row, keep, values in jobs:
        least = {divisor: max(1, int(keep.sum()) // divisor) for divisor in DIVISORS}
        found = {}
        if len(values) >= max(size, max(least.values()) + 1):
            found = clustering.hdbscan_labels(values, size, least.values(), [settings.selection])
        for divisor, samples in least.items():
            numbers = found.get((samples, settings.selection), np.full(int(keep.sum()), -1))
            labels[way, divisor].values[row, keep] = np.where(numbers >= 0, numbers + 1, OUTLIER)
    return labels


def excess_hits(
    labels: xr.DataArray, known: pd.DataFrame, group: Sequence[object]
) -> tuple[list[tuple[int, int]], Float[np.ndarray, "set cluster"], Float[np.ndarray, "set cluster"]]:
    """How many more tokens of a set a cluster has than ``group`` explains, in standard deviations.

    Given its groups, a cluster draws its tokens at random: of a group of N tokens, K in the set, it takes n. The hits
    are hypergeometric, with mean sum n K / N and variance sum n (N - n) / (N - 1) K / N (1 - K / N) over groups. Tokens
    of a group that is all of one kind add nothing to the variance.

    Returns:
        Vector and number of each cluster; z = (hits - mean) / standard deviation, 0 where nothing is free; and the
        excess hits as a share of the cluster.
    """
    found = list(members(labels))
    inside = pd.DataFrame(np.array([tokens for *_, tokens in found], float).reshape(-1, len(known)).T)
    codes = pd.factorize(np.asarray(group))[0]
    size = np.bincount(codes)[:, None].astype(float)
    taken, share = (table.groupby(codes).sum().to_numpy(float) for table in (inside, known.astype(float)))
    share = share / size
    mean = share.T @ taken
    variance = (share * (1 - share)).T @ (taken * (size - taken) / np.maximum(size - 1, 1))
    excess = known.to_numpy(float).T @ inside.to_numpy() - mean
    z = np.divide(excess, np.sqrt(variance), out=np.zeros_like(excess), where=variance > 1e-9)
    return [(vector, cluster) for vector, cluster, _ in found], z, excess / np.maximum(inside.sum().to_numpy(), 1)


def judge_reading(
    labels: xr.DataArray, known: pd.DataFrame, group: Sequence[object], first: Bool[np.ndarray, " token"]
) -> dict[str, object]:
    """How many known sets the clusters find beyond ``group``, on one half of the tokens and on the other.

    On the first half the cluster with the largest z of :func:`excess_hits` is chosen for each set; its p counts all
    clusters (Bonferroni). On the other half the cluster chosen before is judged alone, so that no choice is made on the
    tokens that judge it.

    Args:
        labels: (token,) or (vector, token).
        known: a row per token, a column of truth values per set.
        group: what is to be surpassed, such as the token with the one before it.
        first: whether a token is of the first half.

    Returns:
        ``clustered`` vectors, ``clusters``; of the first half (``chosen``) and the other (``held_out``): ``beyond``,
        the number of sets found with p at most ``BEYOND``, and ``excess``, the mean over sets of the excess share of
        the chosen cluster; ``found``, the names of those found on the held-out half.
    """
    group, each = pd.factorize(np.asarray(group))[0], by_vector(labels)
    row: dict[str, object] = {"clustered": int((each >= 1).any("token").sum())}
    # Clusters with a token in both halves, so that both know the same ones.
    halves = [
        (pairs, z, excess)
        for pairs, z, excess in (excess_hits(each[:, h], known[h], group[h]) for h in (first, ~first))
    ]
    shared = [pair for pair in halves[0][0] if pair in set(halves[1][0])]
    row["clusters"] = len({*halves[0][0], *halves[1][0]})
    (z, excess), (z_out, excess_out) = (
        [values[:, [pairs.index(pair) for pair in shared]] for values in rest] for pairs, *rest in halves
    )
    if not shared:
        return {
            **row,
            **dict.fromkeys(("chosen_beyond", "chosen_excess", "held_out_beyond", "held_out_excess"), 0),
            "found": "",
        }
    sets, best = np.arange(len(z)), z.argmax(axis=1)
    beyond = norm.sf(z[sets, best]) * len(shared) <= BEYOND
    beyond_out = norm.sf(z_out[sets, best]) <= BEYOND
    row |= {"chosen_beyond": int(beyond.sum()), "chosen_excess": float(excess[sets, best].mean())}
    row |= {
        "held_out_beyond": int((beyond & beyond_out).sum()),
        "held_out_excess": float(excess_out[sets, best].mean()),
    }
    return {**row, "found": ", ".join(known.columns[beyond & beyond_out])}


def planted(known: pd.DataFrame, *, purity: float, recall: float, seed: int = 0) -> xr.DataArray:
    """Labels of made-up clusters, one per known set, each along a vector of its own: what a finding is held against.

    Args:
        known: a row per token, a column of truth values per set.
        purity: share of a cluster that is of its set; the rest are random other tokens.
        recall: share of the set that is in the cluster.
        seed: of the draw.
    """
    rng, labels = np.random.default_rng(seed), np.full((known.shape[1], len(known)), OUTLIER)
    for row, name in enumerate(known):
        own, others = (rng.permutation(np.flatnonzero(known[name] == truth)) for truth in (True, False))
        own = own[: max(1, round(recall * len(own)))]
        labels[row, [*own, *others[: round(len(own) * (1 - purity) / purity)]]] = 1
    return xr.DataArray(labels, dims=("vector", "token"), coords={"vector": 1 + np.arange(len(labels))})


def best_readings(choices: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Readings by how many constructions they find on the halves that choose, best first; means over studies.

    Args:
        choices: table ``choices`` of one or several studies.
        by: columns that name a reading.

    Returns:
        A row per reading with the means of its counts and excesses, and with ``held_out_least``, the fewest of any
        study. Ties go to the reading that finds more beyond the token alone, then to the larger excess, both on the
        half that chooses. The columns of the held-out half take no part in the order.
    """
    order = ["chosen_beyond", "token_chosen", "chosen_excess"]
    means = [*order, "held_out_beyond", "token_beyond", "held_out_excess", "clustered", "clusters"]
    groups = choices.groupby(list(by), dropna=False)
    table = groups[means].mean().assign(held_out_least=groups["held_out_beyond"].min())
    return table.sort_values(order, ascending=False, kind="stable").reset_index()
