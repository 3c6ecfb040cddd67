"""Result tables, beside the paper's numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, composition, is_decreasing
from polca_lib.method.settings import ClusteringSettings
from polca_lib.tasks.arithmetic import SKILLS
from polca_lib.tasks.settings import RunSettings
from polca_paper.fit import TABLED, printed_numbers
from polca_paper.homogeneity import base_rate, cluster_breakthroughs, most_homogeneous
from polca_paper.saved_study import ROOT

CLUSTER_HEADERS = {
    "vector": "direction",
    "cluster": "cluster",
    "tokens": "tokens",
    "homogeneity": "carry share",
    "recall": "recall",
    "f1": "F1",
    "in_places": "carries in 10s, 100s",
    "counts_v3": "counts (v3)",
    "breakthrough": "drop starts (step)",
    "hidden": "hidden",
    "late": "tokens so late",
}
"""Columns of :func:`polca_paper.homogeneity.cluster_breakthroughs`, in a reader's words."""

CLUSTER_FORMATS = dict.fromkeys(("homogeneity", "recall", "f1", "in_places"), ".2f")
CLUSTER_FORMATS |= {"breakthrough": ",.0f", "late": ".0%"}


def loss_quantiles(loss: xr.DataArray, kinds: Sequence[str] = ("skill", "place")) -> pd.DataFrame:
    """Quartiles and mean of the loss over the tokens of each skill and of each place (Figures 7 and 8).

    Args:
        loss: (step, token).
        kinds: coordinates of ``loss`` that say what a token is.

    Returns:
        Rows ``by`` (one of ``kinds``), ``value``, ``step``, with ``low``, ``median``, ``high`` and ``mean``, in nats.
    """
    parts = []
    for by in kinds:
        for value in np.unique(loss[by].values):
            curves = loss[:, loss[by].values == value]
            low, median, high = curves.quantile([0.25, 0.5, 0.75], dim="token").values
            row = {"low": low, "median": median, "high": high, "mean": curves.mean("token").values}
            parts.append(pd.DataFrame({"by": by, "value": value, "step": loss["step"].values, **row}))
    return pd.concat(parts, ignore_index=True)


def strategy_row(labels: xr.DataArray, table: pd.DataFrame) -> pd.Series:
    """One row of the strategy comparison (Table 3): the three most homogeneous clusters and the hidden share.

    Args:
        labels: (token,) or (vector, token).
        table: its clusters, from :func:`polca_paper.homogeneity.cluster_breakthroughs`.

    Returns:
        ``homogeneity_v1_1`` ... ``f1_v3_3``: measures of the three best clusters, by v1's and by v3's rule (see
        :func:`polca_paper.homogeneity.most_homogeneous`); NaN where there are fewer. ``base_rate``: share of carry
        tokens among all that were not dropped. ``hidden``: share of clusters with a hidden breakthrough. ``late``: of
        tokens along them, mean over clusters. ``clusters``, and ``vectors`` that have tokens left. ``dropped`` before
        HDBSCAN and ``outliers`` of it: tokens, mean over those vectors.
    """
    row = {}
    for rule in ("v1", "v3"):
        best = most_homogeneous(table, rule=rule)
        for measure in ("homogeneity", "recall", "f1"):
            row |= {f"{measure}_{rule}_{i + 1}": best[measure].get(i, np.nan) for i in range(3)}
    each = by_vector(labels)
    kept = (each != DROPPED).any("token")
    row |= {"base_rate": base_rate(labels), "hidden": table["hidden"].mean() if len(table) else np.nan}
    row["late"] = table["late"].mean()
    row |= {"clusters": len(table), "vectors": int(kept.sum())}
    for name, label in (("dropped", DROPPED), ("outliers", OUTLIER)):
        row[name] = float((each == label).sum("token").where(kept).mean())
    return pd.Series(row, dtype=float)


def compare_strategies(
    levels: Mapping[str, xr.DataArray],
    rates: Mapping[str, xr.DataArray],
    settings: ClusteringSettings,
    hidden_after: int,
    n_jobs: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cluster every kind of trajectory with every scaling (Table 3, and the scaling that the paper leaves open).

    Args:
        levels: losses and projected losses by name: a fall means learning.
        rates: other trajectories by name. Nothing is dropped before HDBSCAN, and there is no total change to scale by.
        settings: of the clustering; its scaling is not used.
        hidden_after: tau, in steps.
        n_jobs: processes.

    Returns:
        :func:`strategy_row` by scaling and name; and the number of tokens of each skill in the purest cluster, by rule,
        scaling and name.
    """
    rows, purest = {}, {}
    curves = {**levels, **rates}
    keys = [(s, name) for s in TABLED for name in (levels if s == "unit" else curves)]
    jobs = (
        joblib.delayed(cluster_breakthroughs)(
            curves[name], settings.model_copy(update={"scaling": s}), hidden_after, only_falling=name in levels
        )
        for s, name in keys
    )
    for key, (labels, table) in zip(keys, joblib.Parallel(n_jobs=n_jobs)(jobs), strict=True):
        rows[key] = strategy_row(labels, table)
        for rule in ("v1", "v3"):
            for best in most_homogeneous(table, 1, rule=rule).itertuples():
                purest[rule, *key] = composition(by_vector(labels).sel(vector=best.vector)).loc[best.cluster]
    index = ["scaling", "trajectory"]
    made_of = pd.DataFrame(purest).T.reindex(columns=list(SKILLS)).fillna(0).astype(int)
    return pd.DataFrame(rows).T.rename_axis(index), made_of.rename_axis(["rule", *index])


def vector_table(basis: xr.Dataset, projected: xr.DataArray, labels: xr.DataArray, table: pd.DataFrame) -> pd.DataFrame:
    """One row per basis vector: birth, curvature, whether its mean projected loss falls, and its clusters."""
    rows = basis[["birth_step", "eigenvalue", "residual", "products"]].to_dataframe()
    mean = projected.mean("token")
    rows["projected_loss"] = mean.isel(step=-1).values
    rows["falls"] = is_decreasing(mean).values
    rows["dropped"] = (labels == DROPPED).sum("token").values
    clusters = table.groupby("vector")
    rows["clusters"] = clusters.size().reindex(rows.index, fill_value=0)
    rows["homogeneity"] = clusters["homogeneity"].max().reindex(rows.index)
    return rows


def spread(rows: pd.DataFrame, index: str, columns: str, values: str) -> pd.DataFrame:
    """Median and range of ``values`` over the studies in ``rows``, as text, see :func:`spread_text`."""
    groups = rows.groupby([index, columns], sort=False)[values]
    return groups.agg(spread_text).unstack(columns).fillna("")


def spread_text(values: pd.Series) -> str:
    """Median and range of the values of several studies, and how many have one if not all do. Empty if none has one."""
    numbers = values.dropna()
    if numbers.empty:
        return ""
    some = f" ({len(numbers)} of {len(values)})" if len(numbers) < len(values) else ""
    return f"{numbers.median():.3f} [{numbers.min():.3f}, {numbers.max():.3f}]{some}"


# Settings that the paper prints, and those that it prints for one task only. All others are our choices.
_PRINTED = {
    "data": ["validation_examples", "hessian_examples"],
    "model": ["n_layers", "d_model", "n_heads", "d_mlp"],
    "training": ["steps", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "betas", "checkpoint_every"],
    "basis": ["kind", "k"],
    "clustering": ["order", "min_cluster_size", "min_samples_divisor"],
}
_PRINTED_FOR = {
    "addition": ["basis.every", "clustering.breakthrough_window", "clustering.hidden_after"],
    "wikipedia": ["model.n_ctx", "model.d_vocab", "basis.n_vectors"],
}


def settings_table(settings: RunSettings) -> pd.DataFrame:
    """Every setting of a run, a row each.

    Returns:
        ``this run``; ``paper``, what the paper prints (None where it is silent); ``preset paper``, what this project
        takes at the paper's scale.
    """
    paper = RunSettings.from_preset("paper", task=settings.task)
    sections = ["data", "model", "training", "basis", "projection", "clustering"]
    sections += ["corpus"] if settings.task == "wikipedia" else []
    printed = {f"{section}.{field}" for section, fields in _PRINTED.items() for field in fields}
    printed |= {*_PRINTED_FOR.get(settings.task, ())}
    rows = {}
    for section in sections:
        for field, value in getattr(settings, section):
            name, ours, of_preset = f"{section}.{field}", value, getattr(getattr(paper, section), field)
            shown = [None if v is None else str(v) for v in (ours, of_preset)]
            rows[name] = {
                "this run": shown[0],
                "paper": shown[1] if name in printed else None,
                "preset paper": shown[1],
            }
    return pd.DataFrame(rows).T.rename_axis("setting")


def paper_strategies() -> pd.DataFrame:
    """What the paper prints for each strategy and basis (its Tables 3 and 4 in v1 and v3), by name."""
    printed = printed_numbers().replace({"source": {"POLCA": "POLCA second"}})
    measures = printed[printed["measure"].isin(["homogeneity", "recall", "f1", "hidden"])]
    columns = measures["measure"] + measures["rank"].map("_{:.0f}".format, na_action="ignore").fillna("")
    table = measures.assign(column=columns).pivot(index="source", columns="column", values="printed")
    return table.loc[measures["source"].unique(), columns.unique()]


def beside_paper(ours: pd.DataFrame) -> pd.DataFrame:
    """Our numbers and the paper's by turns, both by v3's rule: ``homogeneity``, ``homogeneity, paper`` and so on."""
    paper = paper_strategies().reindex(ours.index)
    pairs = {}
    for measure, mine, theirs in (
        *((name, f"{name}_v3_1", f"{name}_1") for name in ("homogeneity", "recall", "f1")),
        ("hidden", "hidden", "hidden"),
    ):
        pairs |= {measure: ours[mine], f"{measure}, paper": paper[theirs]}
    return pd.DataFrame(pairs)


def results_folder(preset: str) -> Path:
    """Where results of a preset go: below ``POLCA_RESULTS`` if set, else below ``results`` of the checkout."""
    folder = Path(os.environ.get("POLCA_RESULTS") or ROOT / "results") / preset
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_results(preset: str, notebook: str, numbers: Mapping[str, object], provenance: pd.DataFrame) -> Path:
    """Write every number a notebook shows to ``results/<preset>/<notebook>.json``, which the book's prose reads.

    Args:
        preset, notebook: names, see :func:`results_folder`.
        numbers: numbers, texts, series, tables and dictionaries of them by name; tables become records.
        provenance: of the run, from :meth:`polca_lib.tasks.run.Run.provenance`.

    Returns:
        Path of the file.
    """
    plain = {**_plain(dict(numbers)), "provenance": provenance["value"].to_dict()}
    file = results_folder(preset) / f"{notebook}.json"
    file.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return file


def _plain(value: object) -> object:
    if isinstance(value, pd.DataFrame):
        return json.loads(value.reset_index().to_json(orient="records", double_precision=6))
    if isinstance(value, pd.Series):
        return json.loads(value.to_json(double_precision=6))
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
