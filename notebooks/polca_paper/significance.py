"""Could it be chance, or a choice? Null, held-out tokens, agreement with skills, other settings, all open choices.

The paper reports the largest homogeneity over all clusters of all vectors, without any of these. It also leaves choices
open. The specification curve runs every combination of them and picks none for its result: it asks how much the largest
homogeneity depends on choices that the paper does not report, and on which of them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import hdbscan
import joblib
import numpy as np
import pandas as pd
import xarray as xr
from sklearn.metrics import adjusted_rand_score

from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, candidates, cluster_tokens, fit_hdbscan
from polca_lib.method.decomposition import available_orders, coarsen, projected_loss
from polca_lib.method.settings import ClusteringSettings
from polca_paper.fit import SUMMED, TABLED
from polca_paper.homogeneity import CARRY_PLACES, IN_PLACES, base_rate, homogeneity_table, most_homogeneous

OVER = 0.9
"""Homogeneity that a cluster must pass to be called a carry cluster; the paper's three best do."""

CLUSTERING: dict[str, Sequence[Any]] = {
    "scaling": TABLED,
    "falls_by": ("final", "trend"),
    "min_samples_from": ("kept", "all"),
    "selection": ("eom", "leaf"),
}
"""Choices of the clustering, with their values."""

MEASURED = ("homogeneity", "base_rate", "null_median", "null_95", "p", "p_digit", "vectors_over")
"""Columns of a specification curve that are results; all others are choices."""


def permutation_null(
    labels: xr.DataArray, draws: int = 1000, seed: int = 0, *, within: tuple[str, ...] = ("place",)
) -> xr.Dataset:
    """The largest homogeneity over all clusters of all vectors when carries are shuffled among like tokens.

    Clusters stay as they are. Carries are shuffled among tokens with the same values of ``within``, so that a cluster
    gains nothing by telling these values apart. With ``("place",)`` a cluster of a single place has the share of
    carries of that place. In the 1000s place the digit is the carry; ``("place", "digit")`` takes that out, too.

    Args:
        labels: (token,) or (vector, token), with coordinates ``carry``, ``place`` and those in ``within``.
        draws: number of permutations.
        seed: of the permutations.
        within: coordinates that a token keeps.

    Returns:
        By ``rule`` (v1 or v3, see :func:`polca_paper.homogeneity.most_homogeneous`): ``maximum`` (rule, draw), 0 if no
        cluster counts; ``observed`` (rule); ``p`` (rule), the share of draws, the real carries included, whose maximum
        is at least the observed one; ``vectors_over`` (rule) and ``vectors_over_null`` (rule, draw): number of vectors
        with a cluster over ``OVER``.
    """
    each = by_vector(labels)
    members = [(row, each.values[row] == n) for row in range(len(each)) for n in range(1, each.values[row].max() + 1)]
    owner = np.array([row for row, _ in members], int)
    members = np.array([inside for _, inside in members], np.float32).reshape(-1, each.sizes["token"]).T
    carry = each["carry"].values.astype(bool)
    groups = pd.Series(list(zip(*(each[name].values for name in within), strict=True)))
    rng = np.random.default_rng(seed)
    carries = np.empty((draws + 1, len(carry)), np.float32)
    carries[0] = carry  # the first row is the real one
    for tokens in groups.groupby(groups).indices.values():
        carries[1:, tokens] = rng.permuted(np.tile(carry[tokens], (draws, 1)), axis=1)
    hits = carries @ members
    counts_v3 = (carries * np.isin(each["place"].values, CARRY_PLACES)) @ members > IN_PLACES * hits
    share = hits / np.maximum(members.sum(axis=0), 1)
    rules = {}
    for rule, counted in (("v1", share), ("v3", np.where(counts_v3, share, 0))):
        largest = counted.max(axis=1, initial=0)
        over = np.array([len(np.unique(owner[clusters])) for clusters in counted > OVER])
        rules[rule] = xr.Dataset(
            {
                "maximum": ("draw", largest[1:]),
                "observed": largest[0],
                "p": (largest >= largest[0]).mean(),
                "vectors_over": over[0],
                "vectors_over_null": ("draw", over[1:]),
            }
        )
    return xr.concat(rules.values(), dim=pd.Index(list(rules), name="rule")).assign_attrs(within=", ".join(within))


def rand_indices(labels: xr.DataArray, by: Iterable[str] = ("place", "carry", "skill")) -> pd.DataFrame:
    """Adjusted Rand index of the clusters of each vector with the values of coordinates, over clustered tokens.

    One: the clusters are the values. Zero: agreement is as by chance. NaN: the vector has fewer than two clusters.
    """
    rows = {}
    for label in by_vector(labels):
        clustered = label[label.values >= 1]
        several = len(np.unique(clustered)) > 1
        rows[int(label["vector"])] = {
            name: adjusted_rand_score(clustered[name].values.astype(str), clustered.values) if several else np.nan
            for name in by
        }
    return pd.DataFrame(rows).T.rename_axis("vector")


def check_on_other_half(trajectories: xr.DataArray, settings: ClusteringSettings, seed: int = 0) -> pd.DataFrame:
    """Fit clusters on the tokens of one half of the examples, and see what they hold of the other half.

    Examples are split at random. HDBSCAN is fitted on one half, with half of ``min_cluster_size``. Tokens of the other
    half are filtered in the same way, and ``hdbscan.approximate_predict`` puts them into the clusters; it leaves those
    that fit none as outliers.

    Args:
        trajectories: (step, token) or (step, token, vector), with coordinates ``example``, ``carry`` and ``place``.
        settings: of the clustering.
        seed: of the split.

    Returns:
        A row per cluster, also if no held-out token fits it: ``vector``, ``cluster``; of either half (``fitted``,
        ``held_out``) ``tokens``, ``homogeneity`` and ``base_rate``, the share of carries among all tokens kept;
        ``counts_v3_fitted``; and ``agreement``, per vector: the adjusted Rand index of the predicted clusters with
        those that HDBSCAN finds on the other half itself, over tokens that both put into a cluster.
    """
    examples = np.unique(trajectories["example"].values)
    chosen = np.random.default_rng(seed).permutation(examples)[: len(examples) // 2]
    first = np.isin(trajectories["example"].values, chosen)
    settings = settings.model_copy(update={"min_cluster_size": max(2, settings.min_cluster_size // 2)})
    columns = ["vector", "cluster", "agreement", "counts_v3_fitted"]
    columns += [f"{c}_{half}" for half in ("fitted", "held_out") for c in ("tokens", "homogeneity", "base_rate")]
    parts = [pd.DataFrame(columns=columns)]
    for curves in by_vector(trajectories):
        halves = {"fitted": curves[:, first], "held_out": curves[:, ~first]}
        # The tokens that the clusters are fitted on decide whether a vector is clustered at all.
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
            refitted = fit_hdbscan(values, settings, least).labels_
            both = (predicted >= 0) & (refitted >= 0)
            agreement = adjusted_rand_score(refitted[both], predicted[both]) if both.sum() > 1 else np.nan
        tables = {}
        for name, numbers in (("fitted", model.labels_), ("held_out", predicted)):
            labels = xr.full_like(halves[name].isel(step=0, drop=True), DROPPED, dtype=int)
            labels[ready[name][0]] = np.where(numbers >= 0, numbers + 1, OUTLIER)
            tables[name] = homogeneity_table(labels).set_index("cluster").assign(base_rate=base_rate(labels))
        table = tables["fitted"].join(tables["held_out"], lsuffix="_fitted", rsuffix="_held_out").reset_index()
        table = table.assign(vector=int(curves["vector"]), agreement=agreement)
        parts.append(table.fillna({"tokens_held_out": 0})[columns])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def settings_grid(
    trajectories: xr.DataArray, settings: ClusteringSettings, sizes: Iterable[int], divisors: Iterable[int]
) -> pd.DataFrame:
    """The largest homogeneity for each ``min_cluster_size`` and ``min_samples`` = tokens / divisor.

    Returns:
        Rows with ``min_cluster_size``, ``min_samples_divisor``, ``v1`` and ``v3`` (NaN where no cluster counts),
        ``clusters``, and ``vectors_over``: vectors with a cluster over ``OVER`` by v3's rule.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = joblib.Memory(folder, verbose=0)
        for divisor, size in itertools.product(divisors, sizes):
            update = {"min_cluster_size": size, "min_samples_divisor": divisor}
            table = homogeneity_table(cluster_tokens(trajectories, settings.model_copy(update=update), cache=cache))
            best = {rule: most_homogeneous(table, 1, rule=rule)["homogeneity"].max() for rule in ("v1", "v3")}
            over = table[table["counts_v3"] & (table["homogeneity"] > OVER)]["vector"].nunique()
            rows.append({**update, **best, "clusters": len(table), "vectors_over": over})
    return pd.DataFrame(rows)


def trajectories(projections: xr.Dataset, order: str) -> xr.DataArray:
    """Projected loss of ``order``; for ``SUMMED`` the second-order term is divided by the number of tokens."""
    if order != SUMMED:
        return projected_loss(projections, order)
    first, second = projected_loss(projections, "first"), projected_loss(projections, "second")
    return first + (second - first) / projections.sizes["token"]


def available_readings(projections: xr.Dataset) -> list[str]:
    """Orders that the curvature at hand allows, with ``SUMMED`` after ``second``."""
    orders = available_orders(projections)
    return [reading for order in orders for reading in ((order, SUMMED) if order == "second" else (order,))]


def specification_curve(
    projections: Mapping[tuple[str, ...], xr.Dataset],
    names: tuple[str, ...],
    settings: ClusteringSettings,
    *,
    factors: Iterable[int] = (1, 5),
    draws: int = 200,
    n_jobs: int = -1,
) -> pd.DataFrame:
    """The largest homogeneity under every combination of choices, and what it would be by chance.

    Args:
        projections: one dataset for each combination of those choices that need projections of their own; the key has
            the values of the choices.
        names: of those choices.
        settings: of the clustering; what is in ``CLUSTERING`` is varied.
        factors: of the cadence: every checkpoint, every fifth, ...
        draws: of the permutation null of each specification.
        n_jobs: processes.

    Returns:
        A row per specification and ``rule``: its choices (``names``, ``cadence``, ``order``, those of ``CLUSTERING``),
        ``homogeneity`` (0 where no cluster counts), ``base_rate``, ``null_median`` and ``null_95`` of the homogeneity
        when carries are shuffled within places, ``p``, ``p_digit`` (shuffled among tokens of the same place and
        digit), and ``vectors_over``.
    """
    jobs = [
        ({**dict(zip(names, values, strict=True)), "cadence": cadence(coarse), "order": order}, coarse)
        for values, dataset in projections.items()
        for coarse in (coarsen(dataset, factor) for factor in factors)
        for order in available_readings(dataset)
    ]
    results = joblib.Parallel(n_jobs=n_jobs, verbose=5)(
        joblib.delayed(_specifications)(coarse, choices["order"], settings, draws) for choices, coarse in jobs
    )
    return pd.DataFrame([{**choices, **row} for (choices, _), rows in zip(jobs, results, strict=True) for row in rows])


def cadence(projections: xr.Dataset) -> int:
    """Steps from one checkpoint to the next, (t_N - t_0) / N over N intervals; rounded where they are not even."""
    steps = projections["step"].values
    return max(1, round(float(steps[-1] - steps[0]) / (len(steps) - 1)))


def _specifications(
    projections: xr.Dataset, order: str, settings: ClusteringSettings, draws: int
) -> list[dict[str, Any]]:
    curves, rows = trajectories(projections, order), []
    with tempfile.TemporaryDirectory() as folder:
        cache = joblib.Memory(folder, verbose=0)
        for values in itertools.product(*CLUSTERING.values()):
            choices = dict(zip(CLUSTERING, values, strict=True))
            labels = cluster_tokens(curves, settings.model_copy(update=choices), cache=cache)
            null, stricter = permutation_null(labels, draws), permutation_null(labels, draws, within=("place", "digit"))
            for rule in ("v1", "v3"):
                ruled = null.sel(rule=rule)
                median, high = np.quantile(ruled["maximum"], [0.5, 0.95])
                row = {"rule": rule, "homogeneity": float(ruled["observed"]), "base_rate": base_rate(labels)}
                row |= {"null_median": median, "null_95": high, "p": float(ruled["p"])}
                row |= {"p_digit": float(stricter["p"].sel(rule=rule)), "vectors_over": int(ruled["vectors_over"])}
                rows.append({**choices, **row})
    return rows


def carry_clusters(clusters: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """Clusters that count by v3's rule, purer than all kept tokens and than 95% of shuffled maxima within digits.

    Args:
        clusters: of a causal test, with columns ``study``, ``order``, ``scaling``, ``homogeneity`` and ``counts_v3``.
        null: table ``null`` of the same studies.
    """
    shuffled = null.query("rule == 'v3' and within == 'place, digit'").set_index(["study", "order", "scaling"])
    least = shuffled[["base_rate", "null_95"]].max(axis=1).rename("least")
    joined = clusters.join(least, on=least.index.names)
    return joined[joined["counts_v3"] & (joined["homogeneity"] > joined["least"])]


def beyond_chance(curve: pd.DataFrame) -> pd.Series:
    """Specifications with a carry cluster: purer than the base rate, and both p at most 0.05.

    Neither is enough alone. v3's rule counts few clusters when carries are shuffled, so any cluster that it counts has
    a low p under shuffles within places. And a cluster may be over the base rate because of its digits.
    """
    return (curve["homogeneity"] > curve["base_rate"]) & (curve[["p", "p_digit"]].max(axis=1) <= 0.05)


def deciding_choices(curve: pd.DataFrame) -> pd.DataFrame:
    """How much each choice decides, all else equal.

    Values of a choice are compared over those combinations of all other choices that exist for each of its values.

    Returns:
        Rows (choice, value) with ``mean`` homogeneity, ``over`` (share of specifications over ``OVER``), ``beyond``
        (see :func:`beyond_chance`), the number of ``specifications`` compared, and ``spread``, the difference between
        the highest and the lowest mean of the choice.
    """
    choices = [name for name in curve if name not in MEASURED]
    marked = curve.assign(over=curve["homogeneity"] > OVER, beyond=beyond_chance(curve))
    tables = {}
    for choice in choices:
        others = [name for name in choices if name != choice]
        matched = marked.groupby(others)[choice].transform("nunique") == curve[choice].nunique()
        groups = marked[matched].groupby(choice)
        table = groups[["homogeneity", "over", "beyond"]].mean().rename(columns={"homogeneity": "mean"})
        spread = table["mean"].max() - table["mean"].min()
        tables[choice] = table.assign(specifications=groups.size(), spread=spread).rename(index=str)
    table = pd.concat(tables, names=["choice", "value"])
    return table.sort_values("spread", ascending=False, kind="stable")
