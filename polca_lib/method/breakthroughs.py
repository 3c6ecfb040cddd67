"""When a trajectory starts its drop, whether the loss curve hides it (v3 Eq. 9-10), and which clusters mirror it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.clustering import DROPPED, by_vector
from polca_lib.method.settings import ClusteringSettings, check_window

_MIRRORED = {"vector": int, "one": int, "other": int, "correlation": float, "share": float, "ratio": float}


def flat_after(loss: xr.DataArray, drop: float = 7 / 8) -> int:
    """First step at which a mean loss curve has made ``drop`` of its total fall.

    The paper sets tau = 1000 by hand. There its curve has fallen from 2.3 to about 0.3 nats, by seven eighths.

    Args:
        loss: (step,) with real steps.
        drop: share of the fall from the first value to the lowest.

    Raises:
        ValueError: the curve never falls.
    """
    first, lowest = loss.isel(step=0), loss.min()
    if not lowest < first:
        raise ValueError("the mean loss never falls below its first value: no step hides anything; set hidden_after")
    reached = loss <= first - drop * (first - lowest)
    return int(loss["step"][reached.values][0])


def hidden_threshold(loss: xr.DataArray, settings: ClusteringSettings) -> int:
    """Tau of v3's Eq. 10, in steps: as configured, or where the mean of ``loss`` (step, token) has gone flat."""
    return flat_after(loss.mean("token")) if settings.hidden_after is None else settings.hidden_after


def breakthrough_step(trajectories: xr.DataArray, window: int) -> xr.DataArray:
    """argmin_t [f(t + D) - f(t)] - [f(t) - f(t - D)]: step at which each trajectory starts its sharpest drop.

    v3's Eq. 9 prints the argmax. For a falling curve the argmax is where a drop *ends*; the argmin is where it starts.
    Between checkpoints the curve is interpolated linearly, so steps need no constant cadence.

    Args:
        trajectories: (step, ...).
        window: D, in steps; at a constant cadence a multiple of it.

    Raises:
        ValueError: D is not a multiple of the cadence, or so long that no step has D on both sides.
    """
    steps = trajectories["step"].values
    check_window(window, steps)
    inner = (steps - window >= steps[0]) & (steps + window <= steps[-1])
    values = trajectories.transpose("step", ...).astype(np.result_type(trajectories.dtype, np.float32))
    middle = values.isel(step=inner)
    after, before = (_between(values, middle["step"].values + shift, middle) for shift in (window, -window))
    return (after - 2 * middle + before).idxmin("step")


def _between(values: xr.DataArray, steps: np.ndarray, like: xr.DataArray) -> xr.DataArray:
    """Values at ``steps`` by linear interpolation, with the coordinates of ``like``."""
    known = values["step"].values
    right = np.clip(np.searchsorted(known, steps), 1, len(known) - 1)
    weight = ((steps - known[right - 1]) / (known[right] - known[right - 1])).astype(values.dtype)
    weight = weight.reshape(-1, *[1] * (values.ndim - 1))
    before, after = values.values[right - 1], values.values[right]
    # Exactly the value of a checkpoint where there is one.
    return like.copy(data=np.where(weight == 1, after, before + weight * (after - before)).astype(values.dtype))


def mark_hidden(
    table: pd.DataFrame, labels: xr.DataArray, trajectories: xr.DataArray, window: int, hidden_after: int
) -> pd.DataFrame:
    """Add to each cluster its mean breakthrough step and whether the loss curve hides it (v3 Eq. 10).

    Args:
        table: rows with ``vector`` and ``cluster``.
        labels: (token,) or (vector, token).
        trajectories: what was clustered, (step, token) or (step, token, vector).
        window: D, in steps.
        hidden_after: tau, in steps: the mean exact loss is flat after it.

    Returns:
        ``table`` with ``breakthrough`` (mean step over the cluster's tokens), ``hidden``, and ``late``: share of all
        tokens kept along the vector that drop so late, as any do along one that moves late.
    """
    steps, labels = by_vector(breakthrough_step(trajectories, window)), by_vector(labels)
    rows = []
    for row in table.itertuples():
        own, label = steps.sel(vector=row.vector).values, labels.sel(vector=row.vector).values
        rows.append((own[label == row.cluster].mean(), (own[label != DROPPED] > hidden_after).mean()))
    means, late = np.array(rows, float).reshape(-1, 2).T
    return table.assign(breakthrough=means, hidden=means > hidden_after, late=late)


def mirrored(curves: xr.DataArray, *, threshold: float = -0.5, at_least: float = 0.1, window: int = 1) -> pd.DataFrame:
    """cos(Delta f, Delta g) <= ``threshold``: pairs of clusters of a vector that "mirror each other's movement".

    The cosine of the increments does not remove their mean: a straight fall mirrors a straight rise. Independent noise
    of k increments has a cosine of about 1/sqrt(k). Increments over several steps leave fewer independent ones.
    Clusters of one vector share the movement of the weights along it, so their gradients have opposite signs.

    Args:
        curves: median curve of each cluster, (vector, cluster, step); NaN where a vector has fewer clusters.
        threshold: largest cosine that counts.
        at_least: smallest ratio of total variations that counts; it excludes noise.
        window: recorded steps of an increment.

    Returns:
        A row per pair: ``vector``, clusters ``one`` and ``other``, ``correlation`` (the cosine), ``share`` of the total
        variation that a curve makes while the other moves the other way (mean of both), ``ratio`` of the smaller total
        variation to the larger.

    Raises:
        ValueError: a setting out of range.
    """
    if not -1 <= threshold < 0:
        raise ValueError(f"threshold = {threshold}; allowed: from -1 to below 0, for curves that move against another")
    if not 0 < at_least <= 1:
        raise ValueError(f"at_least = {at_least}; allowed: above 0, up to 1")
    if not 1 <= window < curves.sizes["step"]:
        raise ValueError(f"window = {window}; allowed: 1 to {curves.sizes['step'] - 1}, for there must be an increment")
    rows, values = [], by_vector(curves).transpose("vector", "cluster", "step").values.astype(np.float64)
    increments = values[..., window:] - values[..., :-window]
    for vector, steps in zip(by_vector(curves)["vector"].values, increments, strict=True):
        moving = [i for i, step in enumerate(steps) if np.abs(step).sum() > 0]  # False of NaN
        for i, j in combinations(moving, 2):
            pair_steps = steps[[i, j]]
            sizes = np.abs(pair_steps)
            total = sizes.sum(axis=1)
            correlation = steps[i] @ steps[j] / np.linalg.norm(pair_steps, axis=1).prod()
            ratio = total.min() / total.max()
            if correlation <= threshold and ratio >= at_least:
                share = (sizes[:, steps[i] * steps[j] < 0].sum(axis=1) / total).mean()
                pair = curves["cluster"].values[[i, j]].tolist()
                rows.append((vector, *pair, correlation, share, ratio))
    return pd.DataFrame(rows, columns=list(_MIRRORED)).astype(_MIRRORED)


def named_mirrors(clusters: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """For each row of ``clusters`` the clusters that mirror it, such as "2, 4".

    Args:
        clusters: with ``vector`` and ``cluster``.
        pairs: from :func:`mirrored`.
    """
    against: dict[tuple[int, int], set[int]] = {}
    for vector, left, right in zip(pairs["vector"], pairs["one"], pairs["other"], strict=True):
        against.setdefault((vector, left), set()).add(right)
        against.setdefault((vector, right), set()).add(left)
    keys = zip(clusters["vector"], clusters["cluster"], strict=True)
    return [", ".join(map(str, sorted(against.get(key, ())))) for key in keys]
