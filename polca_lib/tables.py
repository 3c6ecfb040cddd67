"""Result tables, beside the paper's numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.breakthroughs import cluster_breakthroughs
from polca_lib.clustering import DROPPED, composition, falls, most_homogeneous
from polca_lib.config import ClusteringConfig, RunConfig, Scaling
from polca_lib.tasks.arithmetic import SKILLS

PAPER = Path(__file__).parents[1] / "data" / "paper"


def strategy_row(labels: xr.DataArray, table: pd.DataFrame) -> pd.Series:
    """One row of the strategy comparison (Table 3): the three most homogeneous clusters and the hidden share.

    Args:
        labels: (token,) or (vector, token).
        table: its clusters, from :func:`polca_lib.breakthroughs.cluster_breakthroughs`.

    Returns:
        ``homogeneity_1`` ... ``f1_3`` (v1's rule; NaN where there are fewer clusters), ``homogeneity_v3`` (best by v3's
        rule), ``hidden`` (share of clusters with a hidden breakthrough; NaN without clusters), ``clusters``,
        ``vectors`` (that have tokens left), ``dropped`` (tokens dropped before HDBSCAN, mean over those vectors).
    """
    best, best_v3 = most_homogeneous(table), most_homogeneous(table, 1, rule="v3")
    row = {
        f"{measure}_{i + 1}": best[measure].get(i, np.nan)
        for measure in ("homogeneity", "recall", "f1")
        for i in range(3)
    }
    by_vector = labels if "vector" in labels.dims else labels.expand_dims("vector")
    kept = (by_vector != DROPPED).any("token")
    dropped = (by_vector == DROPPED).sum("token").where(kept)
    row["homogeneity_v3"] = best_v3["homogeneity"].get(0, np.nan)
    row["hidden"] = table["hidden"].mean() if len(table) else np.nan
    row["clusters"] = len(table)
    row["vectors"] = int(kept.sum())
    row["dropped"] = float(dropped.mean()) if kept.any() else np.nan
    return pd.Series(row, dtype=float)


def compare_strategies(
    levels: Mapping[str, xr.DataArray], rates: Mapping[str, xr.DataArray], config: ClusteringConfig, hidden_after: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cluster every kind of trajectory with every scaling (Table 3, and the scaling that the paper leaves open).

    Args:
        levels: trajectories whose fall means learning, by name: losses and projected losses.
        rates: the others, by name, for which nothing is dropped before HDBSCAN.
        config: of the clustering; its scaling is not used.
        hidden_after: tau, in steps.

    Returns:
        :func:`strategy_row` by scaling and name; and the number of tokens of each skill in the purest cluster.
    """
    rows, purest = {}, {}
    for scaling in get_args(Scaling):
        settings = config.model_copy(update={"scaling": scaling})
        for name, curves in {**levels, **rates}.items():
            labels, table = cluster_breakthroughs(curves, settings, hidden_after, only_falling=name in levels)
            rows[scaling, name] = strategy_row(labels, table)
            for best in most_homogeneous(table, 1).itertuples():
                own = labels.sel(vector=best.vector) if best.vector else labels
                purest[scaling, name] = composition(own).loc[best.cluster]
    index = ["scaling", "trajectory"]
    made_of = pd.DataFrame(purest).T.reindex(columns=list(SKILLS)).fillna(0).astype(int)
    return pd.DataFrame(rows).T.rename_axis(index), made_of.rename_axis(index)


def vector_table(basis: xr.Dataset, projected: xr.DataArray, labels: xr.DataArray, table: pd.DataFrame) -> pd.DataFrame:
    """One row per basis vector: birth, curvature, whether its mean projected loss falls, and its clusters."""
    rows = (
        basis[["birth_step", "eigenvalue", "residual", "products"]]
        .drop_vars("parameter", errors="ignore")
        .to_dataframe()
    )
    mean = projected.mean("token")
    rows["projected_loss"] = mean.isel(step=-1).values
    rows["falls"] = falls(mean).values
    rows["dropped"] = (labels == DROPPED).sum("token").values
    clusters = table.groupby("vector")
    rows["clusters"] = clusters.size().reindex(rows.index, fill_value=0)
    rows["homogeneity"] = clusters["homogeneity"].max().reindex(rows.index)
    return rows


def settings_table(config: RunConfig) -> pd.DataFrame:
    """Every setting of a run beside that of the preset ``paper``, a row each."""
    paper = RunConfig.from_preset("paper")
    rows = {
        f"{section}.{name}": {"this run": value, "paper": getattr(getattr(paper, section), name)}
        for section in ("data", "model", "training", "basis", "clustering")
        for name, value in getattr(config, section)
    }
    return pd.DataFrame(rows).T.astype(str)


def paper_strategies() -> pd.DataFrame:
    """What the paper prints for each strategy (its Table 3 in v1 and v3), by name."""
    return pd.read_csv(PAPER / "strategies.csv", index_col="strategy")


def beside_paper(
    ours: pd.DataFrame, columns: tuple[str, ...] = ("homogeneity_1", "recall_1", "f1_1", "hidden")
) -> pd.DataFrame:
    """Our numbers and the paper's in alternating columns; rows as in ``ours``, NaN where the paper has none."""
    paper = paper_strategies().reindex(ours.index)
    pairs = {(column, who): frame[column] for column in columns for who, frame in (("ours", ours), ("paper", paper))}
    return pd.DataFrame(pairs)


def save_results(preset: str, notebook: str, numbers: Mapping[str, object], provenance: pd.DataFrame) -> Path:
    """Write every number a notebook shows to ``results/<preset>/<notebook>.json``, which the book's prose reads.

    Args:
        preset, notebook: names; the folder is ``POLCA_RESULTS`` if set, else ``results`` of the checkout.
        numbers: numbers, texts, series and tables by name; tables become records.
        provenance: of the run, from :meth:`polca_lib.pipeline.Run.provenance`.

    Returns:
        Path of the file.
    """
    folder = Path(os.environ.get("POLCA_RESULTS") or PAPER.parents[1] / "results") / preset
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: _plain(value) for name, value in numbers.items()}
    file = folder / f"{notebook}.json"
    file.write_text(json.dumps({**plain, "provenance": provenance["value"].to_dict()}, indent=1) + "\n")
    return file


def _plain(value: object) -> object:
    if isinstance(value, pd.DataFrame):
        return json.loads(value.reset_index().to_json(orient="records", double_precision=6))
    if isinstance(value, pd.Series):
        return json.loads(value.to_json(double_precision=6))
    return value.item() if isinstance(value, np.generic) else value
