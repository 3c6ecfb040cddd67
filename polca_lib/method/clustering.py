"""Which tokens drop together: filters, scaling, HDBSCAN, and what a cluster is made of."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from typing import Literal

import hdbscan
import joblib
import numpy as np
import pandas as pd
import xarray as xr
from hdbscan import hdbscan_
from hdbscan._hdbscan_linkage import label as single_linkage
from jaxtyping import Bool, Float, Int
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import euclidean_distances

from polca_lib.method.settings import ClusteringSettings, Scaling

DROPPED, OUTLIER = -2, -1
"""Labels of tokens that were filtered out before HDBSCAN, and of those it calls noise. Clusters count from 1."""

_EPS = float(np.finfo(np.float32).eps)
_AT_ONCE = 8192  # tokens whose distances are held in memory: half a gigabyte


def is_decreasing(trajectories: xr.DataArray, by: Literal["final", "trend"] = "final") -> xr.DataArray:
    """Whether a trajectory falls: ends below where it began, or has a least-squares line with a negative slope."""
    if by == "trend":
        return trajectories.polyfit("step", 1)["polyfit_coefficients"].sel(degree=1, drop=True) < 0
    return trajectories.isel(step=-1, drop=True) < trajectories.isel(step=0, drop=True)


def moves(trajectories: xr.DataArray) -> xr.DataArray:
    """Whether a trajectory moves by more than float32 can tell, (token) or (token, vector).

    With eps = 2^-23, the loss L(x) of a token has a rounding error of about eps abs(L(x)), and so has each of the terms
    <grad L(x), b> s whose sum is a projected loss f. So f is known up to

        F = eps (max_t abs(L(x, t)) + sum_t abs(f(t + 1) - f(t))),

    and it moves if max_t abs(f(t) - f(0)) > F.

    Args:
        trajectories: (step, token) or (step, token, vector). Coordinate ``largest_loss`` (token) is max_t abs(L(x, t)),
            as :func:`polca_lib.method.decomposition.projected_loss` gives it; without it max_t abs(f(t)) takes its
            place, as for the exact loss.
    """
    known = "largest_loss" in trajectories.coords
    sizes = trajectories["largest_loss"] if known else abs(trajectories).max("step")
    floor = _EPS * (sizes + abs(trajectories.diff("step")).sum("step"))
    return abs(trajectories - trajectories.isel(step=0, drop=True)).max("step") > floor


def scale(trajectories: Float[np.ndarray, "token step"], scaling: Scaling) -> Float[np.ndarray, "token step"]:
    """Trajectories as HDBSCAN sees them.

    - ``raw``: unchanged. Tokens that drop by different amounts are far apart.
    - ``unit``: f(t) - f(0), divided by abs(f(T) - f(0)). Only the timing counts.
    - ``maximum``: divided by max_t abs(f(t)).
    - ``zscore``: mean 0 and standard deviation 1 over time.

    The paper does not say which it uses. Trajectories are not divided by a change below their rounding in float32,
    2^-23 max_t abs(f(t)).
    """
    if scaling == "raw":
        return trajectories
    rounding = _EPS * np.abs(trajectories).max(axis=1, keepdims=True, initial=0)
    if scaling == "unit":
        trajectories = trajectories - trajectories[:, :1]
        size = np.abs(trajectories[:, -1:])
    elif scaling == "maximum":
        size = np.abs(trajectories).max(axis=1, keepdims=True, initial=0)
    elif scaling == "zscore":
        trajectories = trajectories - trajectories.mean(axis=1, keepdims=True)
        size = trajectories.std(axis=1, keepdims=True)
    else:
        raise ValueError(f"scaling = {scaling!r} is unknown; allowed: raw, unit, maximum, zscore")
    return trajectories / np.where(size > rounding, size, 1.0)


def cluster_tokens(
    trajectories: xr.DataArray,
    settings: ClusteringSettings,
    *,
    only_falling: bool = True,
    cache: joblib.Memory | None = None,
) -> xr.DataArray:
    """Cluster the trajectories of all tokens along each vector (sections 3.3 and 4.1).

    A vector is kept if its mean trajectory falls. A token is kept if its own trajectory falls, and if it moves by more
    than F = 2^-23 (max_t abs(L(x, t)) + sum_t abs(f(t + 1) - f(t))), which float32 can't tell from no movement (see
    :func:`moves`). HDBSCAN groups the rest.

    Args:
        trajectories: (step, token) or (step, token, vector), with coordinates.
        settings: parameters of HDBSCAN and the scaling.
        only_falling: apply the two filters. Switch it off for rates, such as Fisher information or change in loss:
            their fall means nothing.
        cache: keeps HDBSCAN's trees, so that another ``min_cluster_size`` or ``selection`` reuses them.

    Returns:
        Integer labels (vector, token), or (token,): ``DROPPED``, ``OUTLIER`` or the number of the cluster, from 1 by
        falling size. All tokens of a vector that is not kept are dropped. No cluster at all is a result, too.
    """
    settings = settings.resolved(trajectories.sizes["token"], trajectories["step"].values)
    if "vector" not in trajectories.dims:
        return _cluster(trajectories, settings, only_falling, cache)
    labels = [_cluster(trajectories.sel(vector=v), settings, only_falling, cache) for v in trajectories["vector"]]
    return xr.concat(labels, dim="vector", coords="different", compat="equals")


def _cluster(
    trajectories: xr.DataArray, settings: ClusteringSettings, only_falling: bool, cache: joblib.Memory | None
) -> xr.DataArray:
    labels = xr.full_like(trajectories.isel(step=0, drop=True), DROPPED, dtype=int).rename("cluster")
    labels.attrs = {}
    # Drop what does not fall, and scale the rest.
    keep, values, min_samples = candidates(trajectories, settings, only_falling)
    labels[keep] = OUTLIER
    # HDBSCAN needs more tokens than min_samples, and as many as one cluster.
    if len(values) >= max(settings.min_cluster_size, min_samples + 1):
        size, selection = settings.min_cluster_size, settings.selection
        if cache is None:
            found = hdbscan_labels(values, size, [min_samples], [selection])[min_samples, selection]
        else:
            found = fit_hdbscan(values, settings, min_samples, memory=cache).labels_
        labels[keep] = _by_size(found)
    return labels


def candidates(
    trajectories: xr.DataArray, settings: ClusteringSettings, only_falling: bool = True, *, judge_vector: bool = True
) -> tuple[Bool[np.ndarray, " token"], Float[np.ndarray, "kept step"], int]:
    """What HDBSCAN is given of one vector: which tokens, their scaled trajectories, and ``min_samples``.

    With ``only_falling`` tokens are kept if they move and fall, and, unless ``judge_vector`` is off, if their mean
    falls.
    """
    keep = np.ones(trajectories.sizes["token"], dtype=bool)
    if only_falling:
        keep = (is_decreasing(trajectories, settings.falls_by) & moves(trajectories)).values
        if judge_vector and not is_decreasing(trajectories.mean("token"), settings.falls_by):
            keep = np.zeros_like(keep)
    values = trajectories.transpose("token", "step").values[keep].astype(np.float64)
    tokens = int(keep.sum()) if settings.min_samples_from == "kept" else keep.size
    return keep, scale(values, settings.scaling), max(1, tokens // settings.min_samples_divisor)


def hdbscan_labels(
    values: Float[np.ndarray, "token step"],
    min_cluster_size: int,
    min_samples: Iterable[int],
    selections: Iterable[str] = ("eom", "leaf"),
) -> dict[tuple[int, str], Int[np.ndarray, " token"]]:
    """Labels of HDBSCAN for each ``min_samples`` and each selection of clusters; -1 is an outlier.

    The steps are those of the package ``hdbscan``, and so are the labels. Taken apart, they compute all distances at
    once, by a matrix product, and a spanning tree once for all selections. More tokens than fit into memory at once go
    to the package as a whole.
    """
    selections, found = list(selections), {}
    if len(values) > _AT_ONCE:
        for size, selection in itertools.product(set(min_samples), selections):
            model = hdbscan.HDBSCAN(min_cluster_size, size, cluster_selection_method=selection, core_dist_n_jobs=1)
            found[size, selection] = model.fit(values).labels_
        return found
    # Distances don't depend on the mean; without it they have smaller rounding errors.
    distances = euclidean_distances(values - values.mean(axis=0))
    np.maximum(distances, distances.T, out=distances)
    np.fill_diagonal(distances, 0)
    # Core distance: to the k-th neighbour, for every k.
    neighbours = {size: min(size, len(values) - 1) for size in min_samples}
    ranks = sorted(set(neighbours.values()))
    cores = dict(zip(ranks, np.partition(distances, ranks, axis=1)[:, ranks].T, strict=True))
    for size, rank in neighbours.items():
        tree = _spanning_tree(distances, cores[rank])
        linkage = single_linkage(tree[np.argsort(tree.T[2]), :])
        for selection in selections:
            found[size, selection] = hdbscan_._tree_to_labels(values, linkage, min_cluster_size, selection)[0]
    return found


def _spanning_tree(
    distances: Float[np.ndarray, "token token"], core: Float[np.ndarray, " token"]
) -> Float[np.ndarray, "edge three"]:
    """Prim's spanning tree of the mutual reachability max(core_i, core_j, d_ij): start, end and length of each edge."""
    n = len(core)
    edges, current = np.empty((n - 1, 3)), 0
    nearest, start, outside = np.full(n, np.inf), np.zeros(n, int), np.ones(n, bool)
    for row in range(n - 1):
        # Compare every point outside with the point that was added last.
        outside[current], nearest[current] = False, np.inf
        reach = np.maximum(distances[current], core)
        np.maximum(reach, core[current], out=reach)
        closer = (reach < nearest) & outside
        np.copyto(nearest, reach, where=closer)
        np.copyto(start, current, where=closer)
        # Add the point that is nearest to the tree.
        following = int(nearest.argmin())
        edges[row] = start[following], following, nearest[following]
        current = following
    return edges


def fit_hdbscan(
    values: Float[np.ndarray, "token step"], settings: ClusteringSettings, min_samples: int, **options: object
) -> hdbscan.HDBSCAN:
    """Fit HDBSCAN to scaled trajectories; ``options`` go to ``hdbscan.HDBSCAN``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return hdbscan.HDBSCAN(
            min_cluster_size=settings.min_cluster_size,
            min_samples=min_samples,
            cluster_selection_method=settings.selection,
            core_dist_n_jobs=1,
            **options,
        ).fit(values)


def _by_size(labels: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """Number clusters from 1, largest first; ties in HDBSCAN's order."""
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    rank = {name: i + 1 for i, name in enumerate(names[np.argsort(-counts, kind="stable")])}
    return np.array([rank.get(label, OUTLIER) for label in labels])


def by_vector(values: xr.DataArray) -> xr.DataArray:
    """``values`` with dimension ``vector`` first; values without a vector get vector 0."""
    if "vector" not in values.coords:
        values = values.assign_coords(vector=0)
    return values.transpose("vector", ...) if "vector" in values.dims else values.expand_dims("vector")


def medoid(trajectories: xr.DataArray, scaling: Scaling = "raw") -> int:
    """argmin over i of sum_j norm(f_i - f_j): index of the most central trajectory, as HDBSCAN sees them."""
    values = scale(trajectories.transpose("token", "step").values.astype(np.float64), scaling)
    # In chunks: the distances of all pairs at once may not fit into memory.
    totals = pairwise_distances_chunked(values, reduce_func=lambda distances, _: distances.sum(axis=1))
    return int(np.concatenate(list(totals)).argmin())


def composition(labels: xr.DataArray, by: str = "skill") -> pd.DataFrame:
    """Number of tokens of each value of coordinate ``by`` (columns) in each cluster (rows) of one vector."""
    inside = labels[labels >= 1]
    return pd.crosstab(pd.Series(inside.values, name="cluster"), pd.Series(inside[by].values.astype(object), name=by))


def summarise_clusters(
    curves: xr.DataArray, loss: xr.DataArray, labels: xr.DataArray, scaling: Scaling = "raw", by: str = "skill"
) -> xr.Dataset:
    """Curves and composition of each cluster, which is all that figures need.

    Args:
        curves: what was clustered, (step, token) or (step, token, vector).
        loss: exact loss, (step, token).
        labels: from :func:`cluster_tokens`.
        scaling: of the clustering, for the medoid.
        by: coordinate of ``labels`` that says what a token is.

    Returns:
        ``medoid``, ``median``, ``low`` and ``high`` (quartiles) of the curves, and ``loss`` (median exact loss of the
        same tokens), each (vector, cluster, step); ``tokens`` (vector, cluster, ``by``): how many of each kind. A
        vector with fewer clusters than the largest number has NaN and 0 there.
    """
    curves, labels = by_vector(curves), by_vector(labels)
    numbers = np.arange(1, max(1, int(labels.max())) + 1)
    kinds = np.unique(labels[by].values)
    shape = (labels.sizes["vector"], len(numbers), curves.sizes["step"])
    summary = {name: np.full(shape, np.nan, np.float32) for name in ("medoid", "median", "low", "high", "loss")}
    tokens = np.zeros((*shape[:2], len(kinds)), np.int32)
    for row, vector in enumerate(labels["vector"].values):
        label = labels.sel(vector=vector).values
        for column in range(label.max()):
            inside = label == column + 1
            members = curves.sel(vector=vector)[:, inside]
            quartiles = np.quantile(members.values, [0.25, 0.5, 0.75], axis=1)
            for name, quartile in zip(("low", "median", "high"), quartiles, strict=True):
                summary[name][row, column] = quartile
            summary["medoid"][row, column] = members.isel(token=medoid(members, scaling)).values
            summary["loss"][row, column] = np.median(loss.values[:, inside], axis=1)
            tokens[row, column] = [(labels[by].values[inside] == kind).sum() for kind in kinds]
    about = {name: values for name, values in labels.coords.items() if values.dims == ("vector",)}
    return xr.Dataset(
        {
            **{name: (("vector", "cluster", "step"), values) for name, values in summary.items()},
            "tokens": (("vector", "cluster", by), tokens),
        },
        coords={**about, "cluster": numbers, "step": curves["step"].values, by: kinds},
    )
