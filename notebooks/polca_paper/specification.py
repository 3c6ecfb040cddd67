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

from polca_lib.method.clustering import DROPPED, cluster_tokens
from polca_lib.method.decomposition import available_orders, coarsen, projected_loss
from polca_lib.method.settings import ClusteringSettings, Scaling
from polca_paper.significance import OVER, permutation_null

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


def available_readings(projections: xr.Dataset) -> list[str]:
    """Orders that the curvature at hand allows, ``SUMMED`` beside ``second``."""
    return [
        reading
        for order in available_orders(projections)
        for reading in ((order, SUMMED) if order == "second" else (order,))
    ]


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
        projections: of each combination of choices that needs projections of its own, by their values.
        names: of those choices.
        settings: of the clustering; what is in ``CLUSTERING`` is varied.
        factors: of the cadence: every checkpoint, every fifth, ...
        draws: of the permutation null of each specification.
        n_jobs: processes.

    Returns:
        A row per specification and ``rule``: its choices (``names``, ``cadence``, ``order``, those of ``CLUSTERING``),
        ``homogeneity`` (0 where no cluster counts), ``base_rate`` (the share of carries among all tokens that are not
        dropped), ``null_median`` and ``null_95`` of the homogeneity when carries are shuffled
        within place, ``p``, ``p_digit`` (shuffled among tokens of the same place and digit), and ``vectors_over``.
    """
    jobs = [
        (values, coarsen(dataset, factor), order)
        for values, dataset in projections.items()
        for factor in factors
        for order in available_readings(dataset)
    ]
    done = joblib.Parallel(n_jobs=n_jobs, verbose=5)(
        joblib.delayed(_specifications)(dataset, order, settings, draws) for _, dataset, order in jobs
    )
    rows = []
    for (values, dataset, order), found in zip(jobs, done, strict=True):
        cadence = int(dataset["step"][1] - dataset["step"][0])
        fixed = {**dict(zip(names, values, strict=True)), "cadence": cadence, "order": order}
        rows += [{**fixed, **row} for row in found]
    return pd.DataFrame(rows)


def _specifications(
    projections: xr.Dataset, order: str, settings: ClusteringSettings, draws: int
) -> list[dict[str, Any]]:
    curves, rows = trajectories(projections, order), []
    with tempfile.TemporaryDirectory() as folder:
        cache = joblib.Memory(folder, verbose=0)
        for values in itertools.product(*CLUSTERING.values()):
            choices = dict(zip(CLUSTERING, values, strict=True))
            labels = cluster_tokens(curves, settings.model_copy(update=choices), cache=cache)
            null = permutation_null(labels, draws)
            stricter = permutation_null(labels, draws, within=("place", "digit"))["p"]
            base = float(labels["carry"].astype(float).where(labels != DROPPED).mean())
            for rule in null["rule"].values:
                own = null.sel(rule=rule)
                low, high = np.quantile(own["maximum"], [0.5, 0.95])
                row = {"rule": rule, "homogeneity": float(own["observed"]), "base_rate": base}
                row |= {"null_median": low, "null_95": high}
                row |= {"p": float(own["p"]), "p_digit": float(stricter.sel(rule=rule))}
                rows.append({**choices, **row, "vectors_over": int(own["vectors_over"])})
    return rows


MEASURED = ("homogeneity", "base_rate", "null_median", "null_95", "p", "p_digit", "vectors_over")
"""Columns of a specification curve that are no choices."""


def beyond_chance(curve: pd.DataFrame) -> pd.Series:
    """Specifications with a carry cluster: purer than the base rate, and both p at most 0.05.

    Neither is enough alone. v3's rule counts few clusters of shuffled labels, so that any that it counts has a low p
    when carries are shuffled within places; and a cluster may be over the base rate for its digits.
    """
    return (curve["homogeneity"] > curve["base_rate"]) & (curve[["p", "p_digit"]].max(axis=1) <= 0.05)


def deciding_choices(curve: pd.DataFrame) -> pd.DataFrame:
    """How much each choice decides, all else equal.

    Values of a choice are compared over those combinations of all other choices that exist for each of its values.

    Returns:
        Rows (choice, value) with ``mean`` homogeneity, ``over`` (share of specifications over ``OVER``), ``beyond``
        (see :func:`beyond_chance`) and ``specifications`` compared; ``spread`` is the difference between the highest
        and lowest mean of the choice.
    """
    choices = [name for name in curve if name not in MEASURED]
    marked = curve.assign(over=curve["homogeneity"] > OVER, beyond=beyond_chance(curve))
    rows = {}
    for choice in choices:
        others = [name for name in choices if name != choice]
        matched = marked.groupby(others)[choice].transform("nunique") == curve[choice].nunique()
        groups = marked[matched].groupby(choice)
        found = groups[["homogeneity", "over", "beyond"]].mean()
        for value, own in found.iterrows():
            spread = found["homogeneity"].max() - found["homogeneity"].min()
            row = {"mean": own["homogeneity"], "over": own["over"], "beyond": own["beyond"]}
            rows[choice, str(value)] = {**row, "specifications": groups.size()[value], "spread": spread}
    return pd.DataFrame(rows).T.rename_axis(["choice", "value"]).sort_values("spread", ascending=False, kind="stable")
