"""The specification curve: the paper leaves choices open, so every combination of them is run.

No combination is picked for its result. The question is how much the largest homogeneity depends on choices that the
paper does not report, and on which of them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import joblib
import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.clustering import DROPPED, cluster_tokens
from polca_lib.config import ClusteringConfig, Scaling
from polca_lib.decomposition import coarsen, projected_loss
from polca_lib.significance import OVER, permutation_null

SUMMED = "second, summed"
"""Second order with a mean Hessian against summed gradients, as one reading of the paper's Eq. 6 has it."""

CLUSTERING: dict[str, Sequence[Any]] = {
    "scaling": get_args(Scaling),
    "falls_by": ("final", "trend"),
    "min_samples_from": ("kept", "all"),
    "selection": ("eom", "leaf"),
}
"""Choices of the clustering, and what may be chosen."""


def trajectories(projections: xr.Dataset, order: str) -> xr.DataArray:
    """Projected loss of ``order``, which may be ``SUMMED``: there the ratio r is divided by the number of tokens."""
    if order != SUMMED:
        return projected_loss(projections, order)
    first, second = projected_loss(projections, "first"), projected_loss(projections, "second")
    return first + (second - first) / projections.sizes["token"]


def available_orders(projections: xr.Dataset) -> list[str]:
    """Orders that the curvature at hand allows."""
    found = ["first", "trapezoid"]
    if "curvature" in projections:
        found += ["second", SUMMED]
        found += ["exact"] if "token" in projections["curvature"].dims else []
    return found


def specification_curve(
    projections: Mapping[tuple[str, ...], xr.Dataset],
    names: tuple[str, ...],
    config: ClusteringConfig,
    *,
    factors: Iterable[int] = (1, 5),
    draws: int = 200,
    n_jobs: int = -1,
) -> pd.DataFrame:
    """The largest homogeneity under every combination of choices, and what it would be by chance.

    Args:
        projections: of each combination of choices that needs projections of its own, by their values.
        names: of those choices.
        config: of the clustering; what is in ``CLUSTERING`` is varied.
        factors: of the cadence: every checkpoint, every fifth, ...
        draws: of the permutation null of each specification.
        n_jobs: processes.

    Returns:
        A row per specification and ``rule``: its choices (``names``, ``cadence``, ``order``, those of ``CLUSTERING``),
        ``homogeneity`` (0 where no cluster counts), ``base_rate`` (the share of carries among all tokens that are not
        dropped), ``null_median`` and ``null_95`` of the homogeneity when carries are shuffled
        within place, ``p``, and ``vectors_over``.
    """
    jobs = [
        (values, coarsen(dataset, factor), order)
        for values, dataset in projections.items()
        for factor in factors
        for order in available_orders(dataset)
    ]
    done = joblib.Parallel(n_jobs=n_jobs, verbose=5)(
        joblib.delayed(_specifications)(dataset, order, config, draws) for _, dataset, order in jobs
    )
    rows = []
    for (values, dataset, order), found in zip(jobs, done, strict=True):
        cadence = int(dataset["step"][1] - dataset["step"][0])
        fixed = {**dict(zip(names, values, strict=True)), "cadence": cadence, "order": order}
        rows += [{**fixed, **row} for row in found]
    return pd.DataFrame(rows)


def _specifications(projections: xr.Dataset, order: str, config: ClusteringConfig, draws: int) -> list[dict[str, Any]]:
    curves, rows = trajectories(projections, order), []
    with tempfile.TemporaryDirectory() as folder:
        cache = joblib.Memory(folder, verbose=0)
        for values in itertools.product(*CLUSTERING.values()):
            choices = dict(zip(CLUSTERING, values, strict=True))
            labels = cluster_tokens(curves, config.model_copy(update=choices), cache=cache)
            null = permutation_null(labels, draws)
            base = float(labels["carry"].astype(float).where(labels != DROPPED).mean())
            for rule in null["rule"].values:
                own = null.sel(rule=rule)
                low, high = np.quantile(own["maximum"], [0.5, 0.95])
                row = {"rule": rule, "homogeneity": float(own["observed"]), "base_rate": base}
                row |= {"null_median": low, "null_95": high}
                rows.append({**choices, **row, "p": float(own["p"]), "vectors_over": int(own["vectors_over"])})
    return rows


def deciding_choices(curve: pd.DataFrame) -> pd.DataFrame:
    """How much each choice decides: the mean homogeneity and the share over ``OVER`` for each of its values.

    Returns:
        Rows (choice, value) with ``mean``, ``over`` (share of specifications over ``OVER``), and ``significant``, the
        share over the base rate with p <= 0.05; ``spread`` is the difference between the highest and lowest mean of
        the choice.
    """
    measured = {"homogeneity", "base_rate", "null_median", "null_95", "p", "vectors_over"}
    rows = {}
    for choice in (name for name in curve if name not in measured):
        groups = dict(list(curve.groupby(choice)))
        means = {value: own["homogeneity"].mean() for value, own in groups.items()}
        for value, own in groups.items():
            rows[choice, str(value)] = {
                "mean": means[value],
                "over": (own["homogeneity"] > OVER).mean(),
                "significant": ((own["p"] <= 0.05) & (own["homogeneity"] > own["base_rate"])).mean(),
                "spread": max(means.values()) - min(means.values()),
            }
    return pd.DataFrame(rows).T.rename_axis(["choice", "value"]).sort_values("spread", ascending=False, kind="stable")
