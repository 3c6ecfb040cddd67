"""Cluster a run by every combination of the choices that the paper leaves open.

The projections are read once, a vector at a time. What the clusters are made of is kept. Every number that the paper
prints is arithmetic on that: see ``polca_paper.fit``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from polca_lib.method import clustering, decomposition
from polca_lib.method.breakthroughs import breakthrough_step
from polca_lib.method.settings import ClusteringSettings
from polca_lib.storage.artefacts import write_atomically
from polca_lib.tasks.arithmetic import PLACES
from polca_paper.fit import CHOICES, CLUSTERED, FEWER, VECTORLESS
from polca_paper.homogeneity import CARRY_PLACES, IN_PLACES
from polca_paper.significance import available_readings, cadence, trajectories

_FEWEST = 5  # checkpoints of a curve that is clustered
_COUNTED = ("tokens", "carries", "inside", "thousands", "start", *PLACES)


class Curves(NamedTuple):
    """Curves of one vector as they are clustered."""

    values: Float[np.ndarray, "token step"]
    keep: Bool[np.ndarray, " token"]
    starts: Float[np.ndarray, " token"]  # step at which the sharpest drop starts


def rescale(values: Float[np.ndarray, "token step"], scaling: str) -> Float[np.ndarray, "token step"]:
    """Curves by a scaling of ``CHOICES``.

    ``length`` divides a curve by the square root of sum_t f(t)^2; ``each step`` gives the curves mean 0 and standard
    deviation 1 over tokens at each step. The others are those of :func:`polca_lib.method.clustering.scale`.
    """
    if scaling == "length":
        return values / _nonzero(np.linalg.norm(values, axis=1, keepdims=True))
    if scaling == "each step":
        return (values - values.mean(axis=0)) / _nonzero(values.std(axis=0))
    return clustering.scale(values, scaling)


def _nonzero(size: np.ndarray) -> np.ndarray:
    return np.where(size > 0, size, 1.0)


class Source(NamedTuple):
    """What curves are made of: projections on a basis, and which quantity along it."""

    name: str  # as in data/paper/printed.csv
    basis: str
    projections: xr.Dataset
    orders: tuple[str, ...]  # of POLCA; one empty name for what has none

    def vectors(self) -> list[int]:
        """Numbers of the vectors; 0 for a quantity without a direction."""
        return [0] if self.name in VECTORLESS else self.projections["vector"].values.tolist()


def sources(projections: Mapping[str, xr.Dataset]) -> list[Source]:
    """Every kind of trajectory that the paper prints numbers about, as far as there are projections for it."""
    found = []
    if (hessian := projections.get("hessian")) is not None:
        found = [Source("POLCA", "hessian", hessian, _orders(hessian))]
        found += [Source(name, "hessian", hessian, ("",)) for name in (*VECTORLESS, "Fisher")]
    for name, kind in (("random", "random"), ("shuffled", "shuffled"), ("LCA", "parameters")):
        if kind in projections:
            orders = ("first",) if name == "LCA" else _orders(projections[kind])
            found.append(Source(name, kind, projections[kind], orders))
    return found


def _orders(projections: xr.Dataset) -> tuple[str, ...]:
    return tuple(order for order in CHOICES["order"] if order in available_readings(projections))


def cluster_every_way(
    projections: Mapping[str, xr.Dataset], settings: ClusteringSettings, folders: Mapping[str, Path], n_jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cluster every kind of trajectory by every combination of the choices.

    Args:
        projections: by basis; some may have fewer checkpoints.
        settings: of the clustering, for what the choices leave alone.
        folders: by basis, each of these projections and settings alone: results of vectors that lie there are not
            computed again.
        n_jobs: processes.

    Returns:
        One row per cluster: ``CLUSTERED``, ``vector``, ``cluster``, and of its tokens ``tokens``, ``carries``,
        ``inside`` (carries in ``CARRY_PLACES``), ``thousands`` (carries in the 1000s), ``start`` (mean step at which
        the sharpest drop starts), and how many are of each place. And one row per source, order, variant and vector:
        tokens ``kept``.
    """
    finest = min(map(cadence, projections.values()))
    jobs = [(source, vector) for source in sources(projections) for vector in source.vectors()]
    files = [folders[source.basis] / f"{source.name.replace(' ', '-')}-{vector}" for source, vector in jobs]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    joblib.Parallel(n_jobs=n_jobs)(
        joblib.delayed(_cluster_vector)(_at(source, vector), vector, finest, settings, file)
        for (source, vector), file in zip(jobs, files, strict=True)
        if not file.with_suffix(".kept.csv").exists()
    )
    parts = {
        suffix: [pd.read_csv(file.with_suffix(suffix), keep_default_na=False) for file in files]
        for suffix in (".clusters.csv", ".kept.csv")
    }
    clusters, kept = (pd.concat(tables, ignore_index=True) for tables in parts.values())
    return clusters, kept


def _at(source: Source, vector: int) -> Source:
    """The source along one vector alone, in memory."""
    chosen = source.projections.isel(vector=[0]) if vector == 0 else source.projections.sel(vector=[vector])
    return source._replace(projections=chosen.load())


def _cluster_vector(source: Source, vector: int, finest: int, settings: ClusteringSettings, file: Path) -> None:
    """Cluster the curves of one vector by every combination, and write what the clusters are made of."""
    settings = settings.resolved(source.projections.sizes["token"], source.projections["step"].values)
    clusters, kept = [], []
    for order, variant in itertools.product(source.orders, CHOICES["variant"]):
        if variant != "plain" and order not in ("first", ""):
            continue
        if (curves := _curves(source, order, variant, finest, settings)) is None:
            continue
        level, keep, starts = curves
        kept.append({"source": source.name, "order": order, "variant": variant, "vector": vector, "kept": keep.sum()})
        if keep.sum() < settings.min_cluster_size:
            continue
        sizes = _min_samples(variant, source, len(keep), int(keep.sum()), settings)
        level = np.diff(level, axis=1) if variant == "per interval" else level
        carry, place = (source.projections[name].values[keep] for name in ("carry", "place"))
        inside, thousands = carry & np.isin(place, CARRY_PLACES), carry & (place == "1000s")
        at_places = [place == name for name in PLACES]
        values = (np.ones(len(carry)), carry, inside, thousands, starts, *at_places)
        counted = dict(zip(_COUNTED, values, strict=True))
        for scaling in CHOICES["scaling"]:
            if variant == "per interval" and scaling == "unit":
                continue
            labels = clustering.hdbscan_labels(rescale(level, scaling), settings.min_cluster_size, sizes.values())
            for (name, size), selection in itertools.product(sizes.items(), CHOICES["selection"]):
                bins = labels[size, selection] + 1  # the first is that of outliers
                sums = {column: np.bincount(bins, values)[1:] for column, values in counted.items()}
                key = (source.name, order, scaling, name, selection, variant, vector)
                clusters += [(*key, number, *row) for number, row in enumerate(zip(*sums.values(), strict=True), 1)]
    table = pd.DataFrame(clusters, columns=[*CLUSTERED, "vector", "cluster", *_COUNTED])
    table["start"] /= table["tokens"]
    # The second file says that both are whole.
    for suffix, rows in ((".clusters.csv", table), (".kept.csv", pd.DataFrame(kept))):
        write_atomically(file.with_suffix(suffix), rows.to_csv(index=False, float_format="%.6g").encode())


def _curves(source: Source, order: str, variant: str, finest: int, settings: ClusteringSettings) -> Curves | None:
    """Cumulated curves of a source along one vector, and which of its tokens are clustered; none of a short run."""
    projections, window = source.projections, settings.breakthrough_window
    steps = projections["step"].values
    if variant == "every fifth":
        coarse = 5 * finest
        factor = max(1, coarse // cadence(projections))
        if (len(steps) - 1) % factor:
            return None
        projections = decomposition.coarsen(projections, factor)
        window = -(-window // coarse) * coarse  # the next multiple of the cadence
    elif variant == "early":
        projections = projections.isel(step=steps <= steps[-1] * 2 / 5)
    if projections.sizes["step"] < _FEWEST:
        return None
    loss = projections["loss"]
    if source.name == "exact loss":
        level = loss
    elif source.name == "change in loss":
        level = loss - loss.isel(step=0, drop=True)
    elif source.name == "Fisher":
        rates = decomposition.fisher(projections).isel(step=slice(0, -1))
        level = decomposition.accumulate(rates, projections["step"])
    else:
        level = trajectories(projections, order)
    if "vector" in level.dims:
        level = level.isel(vector=0)
    update = {"falls_by": "trend" if variant == "trend" else "final", "scaling": "raw"}
    keep, values, _ = clustering.candidates(level, settings.model_copy(update=update), source.name != "Fisher")
    return Curves(values, keep, breakthrough_step(level, window).values[keep])


def _min_samples(variant: str, source: Source, tokens: int, kept: int, settings: ClusteringSettings) -> dict[str, int]:
    """``min_samples`` of HDBSCAN by its name in ``CHOICES``."""
    sizes = {}
    for name in CHOICES["min_samples"] if variant == "plain" or source.orders == ("",) else FEWER:
        base, _, divisor = name.partition("/")
        of = {"kept": kept, "all": tokens, "size": settings.min_cluster_size}[base]
        sizes[name] = max(1, of // int(divisor or 1))
    return sizes


def measure_clusterings(clusters: pd.DataFrame, kept: pd.DataFrame, tokens: int, hidden_after: int) -> pd.DataFrame:
    """What the paper prints about a kind of trajectory, for every clustering and both rules.

    Args:
        clusters, kept: from :func:`cluster_every_way`.
        tokens: how many are decomposed.
        hidden_after: tau, in steps.

    Returns:
        By ``CLUSTERED`` and ``rule``: ``homogeneity``, ``recall`` and ``f1`` of the three purest clusters, at most one
        for a vector; ``clusters``; ``hidden``, the share of them whose mean breakthrough is after tau; ``dropped``, the
        share of tokens that rise along the vectors that are clustered; ``digits``, the share of the clustered tokens of
        vector 1, or of curves without a vector, that are of the most frequent place of their cluster, if it is not the
        same place in all; ``vector 2``, its largest homogeneity; ``vector 3``, its largest share of carries in the
        1000s. A clustering without clusters has no row.
    """
    key = list(CLUSTERED)
    clustered = clusters.groupby([*key, "vector"])["carries"].transform("sum")
    share = clusters["carries"] / clusters["tokens"]
    table = clusters.assign(
        homogeneity=share,
        recall=clusters["carries"] / clustered.clip(lower=1),
        f1=2 * clusters["carries"] / (clusters["tokens"] + clustered),
        hidden=clusters["start"] > hidden_after,
        in_1000s=clusters["thousands"] / clusters["tokens"],
    )
    every = table.groupby(key).agg(clusters=("tokens", "size"), hidden=("hidden", "mean"))
    third = table[table["vector"] == 3].groupby(key)["in_1000s"].max().rename("vector 3")
    first = table[table["vector"] <= 1].assign(
        top=table[list(PLACES)].max(axis=1), place=table[list(PLACES)].idxmax(axis=1)
    )
    sums = first.groupby(key).agg(top=("top", "sum"), tokens=("tokens", "sum"), places=("place", "nunique"))
    digits = (sums["top"] / sums["tokens"]).where(sums["places"] > 1, 0).rename("digits")
    dropped = kept[kept["kept"] > 0].groupby(["source", "order", "variant"])["kept"].mean()
    parts = {}
    for rule in CHOICES["rule"]:
        counted = table if rule == "v1" else table[table["inside"] > IN_PLACES * table["carries"]]
        counted = counted.sort_values(["homogeneity", "tokens"], ascending=False, kind="stable")
        best = counted.drop_duplicates([*key, "vector"])
        best = best.assign(rank=best.groupby(key).cumcount() + 1)
        second = best[best["vector"] == 2].set_index(key)["homogeneity"].rename("vector 2")
        wide = best[best["rank"] <= 3].pivot(index=key, columns="rank", values=["homogeneity", "recall", "f1"])
        wide.columns = [f"{measure} {rank}" for measure, rank in wide.columns]
        wide = wide.reindex(columns=[f"{m} {rank}" for m in ("homogeneity", "recall", "f1") for rank in (1, 2, 3)])
        parts[rule] = every.join([wide, digits, second, third])
    measured = pd.concat(parts, names=["rule"]).reset_index()
    return measured.merge((1 - dropped / tokens).rename("dropped").reset_index(), how="left")
