"""Could it be chance? A permutation null for homogeneity, tokens held out, agreement with skills, a grid of settings.

The paper reports the largest homogeneity over all clusters of all vectors, without any of these.
"""

from __future__ import annotations

from collections.abc import Iterable

import hdbscan
import joblib
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from sklearn.metrics import adjusted_rand_score

from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, candidates, cluster_tokens, fit_hdbscan
from polca_lib.method.settings import ClusteringSettings
from polca_paper.homogeneity import homogeneity_table, most_homogeneous

OVER = 0.9
"""Homogeneity that a cluster must pass to be called a carry cluster; the paper's three best do."""


def permutation_null(
    labels: xr.DataArray,
    draws: int = 1000,
    seed: int = 0,
    *,
    within: tuple[str, ...] = ("place",),
    positive: str = "carry",
    places: tuple[str, ...] = ("10s", "100s"),
) -> xr.Dataset:
    """The largest homogeneity over all clusters of all vectors, when carries are shuffled among like tokens.

    Clusters stay as they are. Labels change places only among tokens with the same values of ``within``, so that
    a cluster earns nothing by telling these values apart: with ``("place",)`` a cluster of one place has the share of
    carries that the place has. In the 1000s place the digit is the carry; ``("place", "digit")`` also takes that out.

    Args:
        labels: (token,) or (vector, token), from :func:`polca_lib.method.clustering.cluster_tokens`, with coordinates.
        draws: number of permutations.
        seed: of the permutations.
        within: coordinates that a token keeps.
        positive, places: as in :func:`polca_paper.homogeneity.homogeneity_table`.

    Returns:
        By ``rule`` (v1: any cluster; v3: over 85% of its carries in ``places``): ``maximum`` (rule, draw), 0 if no
        cluster counts; ``observed`` (rule); ``p`` (rule), the share of draws, the real labels included, whose maximum
        is no smaller; ``vectors_over`` (rule) and ``vectors_over_null`` (rule, draw): vectors with a cluster over
        ``OVER``.
    """
    each = by_vector(labels)
    members, owner = _members(each)
    value = each[positive].values.astype(bool)
    strata = pd.Series(list(zip(*(each[name].values for name in within), strict=True)))
    rng = np.random.default_rng(seed)
    shuffled = np.empty((draws, len(value)), np.float32)
    for tokens in strata.groupby(strata).indices.values():
        shuffled[:, tokens] = rng.permuted(np.tile(value[tokens], (draws, 1)), axis=1)
    inside = np.isin(each["place"].values, places)
    n_vectors = each.sizes["vector"]
    found = {
        name: _homogeneities(values, members, inside)
        for name, values in (("observed", value[None].astype(np.float32)), ("null", shuffled))
    }
    result = {}
    for rule in ("v1", "v3"):
        best = {name: np.where(counts | (rule == "v1"), share, 0) for name, (share, counts) in found.items()}
        maxima = {name: share.max(axis=1, initial=0) for name, share in best.items()}
        over = {name: _vectors_over(share, owner, n_vectors) for name, share in best.items()}
        result[rule] = {
            "maximum": ("draw", maxima["null"]),
            "observed": maxima["observed"][0],
            "p": (1 + (maxima["null"] >= maxima["observed"][0]).sum()) / (1 + draws),
            "vectors_over": over["observed"][0],
            "vectors_over_null": ("draw", over["null"]),
        }
    rules = pd.Index(list(result), name="rule")
    both = xr.concat([xr.Dataset(values) for values in result.values()], dim=rules)
    return both.assign_attrs(within=", ".join(within), draws=draws, seed=seed)


def _members(labels: xr.DataArray) -> tuple[Float[np.ndarray, "cluster token"], np.ndarray]:
    """Which tokens are in each cluster of each vector, and the index of its vector."""
    rows, owner = [], []
    for index, label in enumerate(labels.values):
        for number in range(1, label.max(initial=0) + 1):
            rows.append(label == number)
            owner.append(index)
    members = np.array(rows, np.float32).reshape(len(rows), labels.sizes["token"])
    return members, np.array(owner, int)


def _homogeneities(
    values: Float[np.ndarray, "draw token"],
    members: Float[np.ndarray, "cluster token"],
    inside: Bool[np.ndarray, " token"],
) -> tuple[Float[np.ndarray, "draw cluster"], Bool[np.ndarray, "draw cluster"]]:
    """Share of positive tokens in each cluster, and whether v3 counts the cluster."""
    hits = values @ members.T
    hits_inside = (values * inside) @ members.T
    return hits / np.maximum(members.sum(axis=1), 1), hits_inside > 0.85 * hits


def _vectors_over(share: Float[np.ndarray, "draw cluster"], owner: np.ndarray, n_vectors: int) -> np.ndarray:
    over = np.zeros((len(share), n_vectors), bool)
    for column, vector in enumerate(owner):
        over[:, vector] |= share[:, column] > OVER
    return over.sum(axis=1)


def rand_indices(labels: xr.DataArray, by: Iterable[str] = ("place", "carry", "skill")) -> pd.DataFrame:
    """Adjusted Rand index of the clusters of each vector with the values of coordinates, over clustered tokens.

    One: the clusters are the values; zero: as alike as chance would have it. NaN with fewer than two clusters.
    """
    rows = {}
    for label in by_vector(labels):
        own = label[label.values >= 1]
        several = len(np.unique(own)) > 1
        rows[int(label["vector"])] = {
            name: adjusted_rand_score(own[name].values.astype(str), own.values) if several else np.nan for name in by
        }
    return pd.DataFrame(rows).T.rename_axis("vector")


def check_on_other_half(trajectories: xr.DataArray, settings: ClusteringSettings, seed: int = 0) -> pd.DataFrame:
    """Fit clusters on the tokens of one half of the examples, and see what they hold of the other half.

    Examples are split at random. HDBSCAN is fitted on one half, with half of ``min_cluster_size``; tokens of the other
    half, filtered in the same way, are put into its clusters by ``hdbscan.approximate_predict``, which leaves those
    that fit none as outliers.

    Args:
        trajectories: (step, token) or (step, token, vector), with coordinates ``example``, ``carry`` and ``place``.
        settings: of the clustering.
        seed: of the split.

    Returns:
        A row per cluster: ``vector``, ``cluster``, and of either half (``fitted``, ``held_out``) ``tokens``,
        ``homogeneity``, and ``base_rate``, the share of carries among all tokens kept; ``counts_v3_fitted``;
        ``agreement``: adjusted Rand index, per vector, of the predicted clusters with those that HDBSCAN finds on the
        other half itself, over tokens that are in one in both. Clusters that no token held out fits have a row, too.
    """
    examples = np.unique(trajectories["example"].values)
    chosen = np.random.default_rng(seed).permutation(examples)[: len(examples) // 2]
    first = np.isin(trajectories["example"].values, chosen)
    settings = settings.model_copy(update={"min_cluster_size": max(2, settings.min_cluster_size // 2)})
    rows = []
    for own in by_vector(trajectories):
        halves = {"fitted": own[:, first], "held_out": own[:, ~first]}
        # Whether a vector is looked at is settled by the tokens that the clusters are fitted on.
        ready = {name: candidates(half, settings, judge_vector=name == "fitted") for name, half in halves.items()}
        _, values, least = ready["fitted"]
        if len(values) <= max(settings.min_cluster_size, least):
            continue
        model = fit_hdbscan(values, settings, least, prediction_data=True)
        if model.labels_.max() < 0:
            continue
        _, values, least = ready["held_out"]
        predicted = hdbscan.approximate_predict(model, values)[0] if len(values) else np.zeros(0, int)
        agreement = np.nan
        if len(values) > max(settings.min_cluster_size, least):
            itself = fit_hdbscan(values, settings, least).labels_
            both = (predicted >= 0) & (itself >= 0)
            agreement = adjusted_rand_score(itself[both], predicted[both]) if both.sum() > 1 else np.nan
        tables = {}
        for name, found in (("fitted", model.labels_), ("held_out", predicted)):
            labels = xr.full_like(halves[name].isel(step=0, drop=True), DROPPED, dtype=int)
            labels[ready[name][0]] = np.where(found >= 0, found + 1, OUTLIER)
            base = float(labels["carry"].astype(float).where(labels != DROPPED).mean())
            tables[name] = homogeneity_table(labels).set_index("cluster").assign(base_rate=base)
        for number, row in tables["fitted"].iterrows():
            entry = {"vector": int(own["vector"]), "cluster": number, "agreement": agreement}
            # A cluster that no token held out fits has no row there, or one of zero tokens.
            other = tables["held_out"].reindex([number]).iloc[0]
            for name, of in (("fitted", row), ("held_out", other)):
                entry |= {f"{column}_{name}": of[column] for column in ("homogeneity", "base_rate")}
            entry |= {"tokens_fitted": row["tokens"], "counts_v3_fitted": row["counts_v3"]}
            rows.append({**entry, "tokens_held_out": np.nan_to_num(other["tokens"])})
    columns = ["vector", "cluster", "agreement", "counts_v3_fitted"]
    columns += [f"{c}_{half}" for half in ("fitted", "held_out") for c in ("tokens", "homogeneity", "base_rate")]
    return pd.DataFrame(rows, columns=columns)


def settings_grid(
    trajectories: xr.DataArray,
    settings: ClusteringSettings,
    sizes: Iterable[int],
    divisors: Iterable[int],
    cache: joblib.Memory | None = None,
) -> pd.DataFrame:
    """The largest homogeneity for each ``min_cluster_size`` and ``min_samples`` = tokens / divisor.

    Returns:
        Rows with ``min_cluster_size``, ``min_samples_divisor``, ``v1`` and ``v3`` (NaN where no cluster counts),
        ``clusters``, and ``vectors_over``: vectors with a cluster over ``OVER`` by v3's rule.
    """
    rows = []
    for divisor in divisors:
        for size in sizes:
            update = {"min_cluster_size": size, "min_samples_divisor": divisor}
            table = homogeneity_table(cluster_tokens(trajectories, settings.model_copy(update=update), cache=cache))
            best = {rule: most_homogeneous(table, 1, rule=rule)["homogeneity"].max() for rule in ("v1", "v3")}
            counted = table[table["counts_v3"].astype(bool)]
            over = counted.loc[counted["homogeneity"] > OVER, "vector"].nunique()
            rows.append({**update, **best, "clusters": len(table), "vectors_over": over})
    return pd.DataFrame(rows)
