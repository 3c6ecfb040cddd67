"""Readings of the paper, and how well each fits the numbers that the paper prints.

A reading is a full set of the choices that the paper leaves open. All of this is arithmetic on kept tables of studies.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from polca_paper.saved_study import PAPER, SavedStudy

SUMMED = "second, summed"
"""Second order with a mean Hessian against summed gradients, as one reading of the paper's Eq. 6 has it."""

CHOICES: dict[str, tuple[str, ...]] = {
    "order": ("first", "second", SUMMED, "trapezoid"),
    "scaling": ("raw", "unit", "zscore", "maximum", "length", "each step"),
    "min_samples": ("kept/15", "kept/30", "kept/60", "kept/100", "all/15", "all/30", "all/60", "all/100", "size"),
    "selection": ("eom", "leaf"),
    "variant": ("plain", "per interval", "trend", "every fifth", "early"),
    "baselines": ("scaled", "loss raw", "rates"),
    "rule": ("v1", "v3"),
}
"""What a reading chooses, with the values.

- ``order`` of POLCA; ``scaling`` of the curves (see :func:`rescale`).
- ``min_samples`` of HDBSCAN, as a share of the tokens that are kept or of all, or ``min_cluster_size``; ``selection``.
- ``variant``: in plain readings curves are cumulated, tokens are kept if they end below their start, and every
  checkpoint is used. Each other variant changes one of these: the changes *per interval* are clustered; tokens are kept
  by the *trend* of their curve; only *every fifth* checkpoint is used; only those of the first two fifths of training
  (*early*), which the paper's figures show.
- ``baselines``: exact loss, change in loss L(t) - L(0) and summed Fisher information are scaled as POLCA's curves are;
  or so, but the exact loss raw; or all raw, and the latter two per interval.
- ``rule``: v1 counts every cluster, v3 only those with over 85% of their carries in the 10s and 100s places.
"""

FEWER = ("kept/15", "kept/60", "size")
"""Values of ``min_samples`` in readings that are not plain. Their order is the first."""

CLUSTERED = ("source", "order", "scaling", "min_samples", "selection", "variant")
"""What identifies a clustering. Readings that differ in other choices alone share it."""

VECTORLESS = ("exact loss", "change in loss")
"""Kinds of curves that have no direction."""

PLAIN_TEXT = {
    "order": SUMMED, "scaling": "raw", "min_samples": "kept/15", "selection": "eom", "variant": "plain",
    "baselines": "rates", "rule": "v3",
}  # fmt: skip
"""The reading that takes the paper's text most literally. Its printed cosine of the two orders says which second."""

TABLED = ("raw", "unit", "zscore")
"""Scalings in tables of studies that do not go through all readings."""

WORST = 3
"""Tolerances beyond which a number is simply missed."""


def printed_numbers() -> pd.DataFrame:
    """Every number that the paper prints about addition, a row each.

    ``low`` and ``high`` are the printed number, or the range that the text allows; ``tolerance`` is in its unit, or in
    decades where ``scale`` is log10. ``half``: A is Table 3 of the first version, B everything else; F1 follows
    from homogeneity and recall, and is in neither.
    """
    return pd.read_csv(PAPER / "printed.csv")


def all_readings() -> pd.DataFrame:
    """Every reading, a row each, with the names of ``CHOICES`` as columns."""
    table = pd.DataFrame(itertools.product(*CHOICES.values()), columns=list(CHOICES))
    plain = table["variant"] == "plain"
    allowed = plain | (table["min_samples"].isin(FEWER) & (table["order"] == "first"))
    # A change per interval has no final value to be scaled by.
    allowed &= (table["variant"] != "per interval") | (table["scaling"] != "unit")
    return table[allowed].reset_index(drop=True)


def numbers(readings: pd.DataFrame, studies: Iterable[SavedStudy]) -> pd.DataFrame:
    """What each reading gives for each printed number: readings in rows, numbers in columns.

    NaN: not run, because no study has the projections. Infinite: run, but there is no cluster to measure.

    Args:
        readings: from :func:`all_readings`.
        studies: of one training run, with table ``clusterings``; a kind of curve is taken from the first that has it,
            what compares orders from the first.
    """
    studies = list(studies)
    measured = _measured(studies)
    has = {key[:2] for key in measured.index}
    columns = {}
    for row in printed_numbers().itertuples():
        if row.group == "second order":
            columns[row.number] = _second_order(readings, studies, row.measure)
            continue
        name = row.measure if np.isnan(row.rank) else f"{row.measure} {row.rank:.0f}"
        keys = _clustering_of(readings, row.source)
        values = measured[name].reindex(pd.MultiIndex.from_frame(keys)).to_numpy()
        run = np.array([pair in has for pair in zip(keys["source"], keys["order"], strict=True)])
        measured_or_missed = np.where(np.isnan(values), 0 if name == "clusters" else np.inf, values)
        columns[row.number] = np.where(run, measured_or_missed, np.nan)
    return pd.DataFrame(columns, index=readings.index)


def clustering_of(reading: Mapping[str, str], studies: Iterable[SavedStudy], source: str) -> pd.Series | None:
    """The row of table ``clusterings`` that a reading means for a kind of curve; none if it was not run."""
    measured = _measured(studies)
    key = tuple(_clustering_of(pd.DataFrame([reading]), source).iloc[0])
    if key[:2] not in {row[:2] for row in measured.index}:
        return None
    return measured.loc[key] if key in measured.index else pd.Series({"clusters": 0}).reindex(measured.columns)


def _measured(studies: Iterable[SavedStudy]) -> pd.DataFrame:
    """Tables ``clusterings`` of several studies as one. An order of a kind of curve is from the first that has it.

    Where none has clusters of ``SUMMED``, those of first order stand for them.
    """
    tables = [study.table("clusterings") for study in studies if study.has("clusterings")]
    measured = pd.concat(tables, ignore_index=True).fillna({"order": ""})
    owner = measured.groupby(["source", "order"])["study"].transform("first")
    measured = measured[measured["study"] == owner]
    # Its second-order term is divided by the number of tokens, so its clusters are those of first order.
    stands = (measured["order"] == "first") & (measured["variant"] == "plain")
    stands &= ~measured["source"].isin(measured.loc[measured["order"] == SUMMED, "source"])
    return pd.concat([measured, measured[stands].assign(order=SUMMED)]).set_index([*CLUSTERED, "rule"])


def _clustering_of(readings: pd.DataFrame, source: str) -> pd.DataFrame:
    """Key of the clustering that each reading means for a kind of curve."""
    keys = readings[[*CLUSTERED[1:], "rule"]].copy()
    keys.insert(0, "source", "POLCA" if source == "POLCA first" else source)
    if source in ("POLCA first", "LCA"):
        keys["order"] = "first"
    if source in (*VECTORLESS, "Fisher"):
        keys["order"] = ""
        rates = readings["baselines"] == "rates"
        raw = rates | ((readings["baselines"] == "loss raw") & (source == "exact loss"))
        keys.loc[raw, "scaling"] = "raw"
        if source == "exact loss":  # it is a level, and has no change per interval
            keys.loc[keys["variant"] == "per interval", "variant"] = "plain"
        else:
            keys.loc[rates, "variant"] = "per interval"
    return keys


def _second_order(readings: pd.DataFrame, studies: Iterable[SavedStudy], measure: str) -> np.ndarray:
    """Table 5, or the error of the second-order term. First order has neither."""
    by_order: dict[str, float] = {}
    name = "second_order_term" if measure == "RMSE" else "agreement"
    study = next((study for study in studies if study.has(name)), None)
    if study is not None and measure == "RMSE":
        by_order = study.table(name).set_index("term")["rmse"].to_dict()
    elif study is not None:
        table = study.table(name)
        table = table[table["cadence"] == table["cadence"].min()].set_index("order")
        by_order = (1 - table["cosine"] if measure == "1 - cosine" else table["l2"]).to_dict()
    return readings["order"].map({**by_order, "first": np.inf}).to_numpy(float)


def errors(ours: pd.DataFrame, printed: pd.DataFrame) -> Float[np.ndarray, "reading number"]:
    """How far each number is from the printed one: min(abs(ours - printed) / tolerance, ``WORST``)^2 / ``WORST``^2.

    0 is the printed number itself, 1 is missed by three tolerances or more. NaN is not run.
    """
    log = (printed["scale"] == "log10").to_numpy()
    with np.errstate(divide="ignore"):
        values, low, high = (
            np.where(log, np.log10(part, where=log, out=np.zeros(part.shape)), part)
            for part in (ours[printed["number"]].to_numpy(), *printed[["low", "high"]].to_numpy().T)
        )
    beyond = np.maximum(np.maximum(low - values, values - high), 0)
    beyond[np.isinf(values)] = np.inf
    return np.minimum(beyond / printed["tolerance"].to_numpy(), WORST) ** 2 / WORST**2


def distance(
    errors: Float[np.ndarray, "reading number"], printed: pd.DataFrame, half: str = "AB"
) -> Float[np.ndarray, " reading"]:
    """Mean error over the groups of printed numbers, of the mean error over the numbers of a group that were run.

    A group is a row of the paper's tables, or the hidden fractions, the counts of clusters, ...: each counts the same.
    """
    chosen = printed["half"].isin(list(half)).to_numpy()
    groups = [np.flatnonzero(chosen & (printed["group"] == group).to_numpy()) for group in printed["group"].unique()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a group of which nothing was run
        return np.nanmean([np.nanmean(errors[:, group], axis=1) for group in groups if len(group)], axis=0)


def score(readings: pd.DataFrame, ours: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """Distance of each reading from the printed numbers: from all, and from each half.

    Returns:
        ``readings`` with ``distance``, ``distance_A`` and ``distance_B``, ``rank_A`` and ``rank_B`` (1 is the closest;
        equal ones share a rank), ``within`` (how many numbers are within their tolerance) and ``run`` (how many there
        are); closest first. A reading of which less was run than of others has no distance, and stands last.
    """
    error = errors(ours, printed)
    counted = error[:, printed["half"].isin(["A", "B"]).to_numpy()]
    table = readings.assign(within=(counted <= 1 / WORST**2).sum(axis=1), run=np.isfinite(counted).sum(axis=1))
    # What compares the orders is not asked of all of them.
    curves = np.isfinite(error[:, ~printed["group"].isin(["second order"]).to_numpy()]).sum(axis=1)
    whole = curves == curves.max()
    for name, half in (("distance", "AB"), ("distance_A", "A"), ("distance_B", "B")):
        table[name] = np.where(whole, distance(error, printed, half), np.nan)
    table["rank_A"], table["rank_B"] = (table[f"distance_{half}"].rank(method="min") for half in "AB")
    return table.sort_values("distance", kind="stable")


def cross_check(scored: pd.DataFrame) -> pd.DataFrame:
    """Choose the reading on one half of the printed numbers, and see where it stands on the other.

    Returns:
        For each half that chooses: ``chosen``, its row in the readings; the number of ``ties``; ``there``, its distance
        from the numbers of the other half; ``best`` and ``median`` distance of any reading from these; ``beaten_by``,
        the share of readings that are closer to them.
    """
    rows = []
    for half, other in ("AB", "BA"):
        chosen = scored[f"distance_{half}"] == scored[f"distance_{half}"].min()
        there = scored[f"distance_{other}"]
        mean = there[chosen].mean()
        row = {"chosen_on": half, "chosen": there[chosen].index[0], "ties": int(chosen.sum()), "there": mean}
        rows.append({**row, "best": there.min(), "median": there.median(), "beaten_by": (there < mean).mean()})
    return pd.DataFrame(rows)


def without_each_group(readings: pd.DataFrame, ours: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """The closest reading when one group of printed numbers is left out: how much the choice hangs on any of them."""
    rows = []
    for group in printed.loc[printed["half"] != "follows", "group"].unique():
        rest = printed[printed["group"] != group]
        distances = distance(errors(ours, rest), rest)
        best = int(np.argmin(distances))
        rows.append({"without": group, **readings.iloc[best], "distance": distances[best]})
    return pd.DataFrame(rows)


def shuffled_printed(ours: pd.DataFrame, printed: pd.DataFrame, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Distance of the closest reading from printed numbers that were shuffled: what choosing among many readings gives.

    Numbers change places with numbers of the same kind (homogeneities with homogeneities, and so on) between all kinds
    of curves.

    Returns:
        (draw,).
    """
    rng, closest = np.random.default_rng(seed), []
    kinds = list(printed[printed["half"] != "follows"].groupby("measure").indices.values())
    for _ in range(draws):
        order = np.arange(len(printed))
        for kind in kinds:
            order[kind] = rng.permutation(kind)
        moved = printed.copy()
        moved[["low", "high"]] = printed[["low", "high"]].to_numpy()[order]
        closest.append(distance(errors(ours, moved), moved).min())
    return np.array(closest)
