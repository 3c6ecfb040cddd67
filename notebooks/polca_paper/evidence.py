"""The tables of a study of addition, each made by a function of a :class:`polca_paper.study.Study`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import joblib
import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.derivatives.projection import project
from polca_lib.method import decomposition
from polca_lib.method.clustering import cluster_tokens, summarise_clusters
from polca_lib.method.vectors import read_vectors
from polca_lib.storage.hashing import hash_json
from polca_paper import robustness, significance, tables
from polca_paper.homogeneity import cluster_breakthroughs, homogeneity_table
from polca_paper.readings import cluster_every_way, measure_clusterings
from polca_paper.significance import cadence
from polca_paper.study import Study

PAPER_TERM = {"steps": 10, "vectors": 5, "examples": 100}  # of v3's Appendix C: 400 tokens


def _coarsened(study: Study, projections: xr.Dataset) -> list[xr.Dataset]:
    """Projections at several cadences: those multiples of the cadence that divide the run."""
    factors = [factor for factor in (1, 2, 5, 10) if (study.main.sizes["step"] - 1) % factor == 0]
    return [decomposition.coarsen(projections, factor) for factor in factors]


def compared_bases(study: Study) -> pd.DataFrame:
    """Every basis, order and scaling (Table 4), with movement, completeness and tokens dropped."""
    keys = [
        (kind, order, scaling)
        for kind in study.bases
        if kind != "parameters"
        for order in decomposition.available_orders(study.projections[kind])
        for scaling in ("raw", "unit")
    ]
    jobs = (
        joblib.delayed(cluster_breakthroughs)(
            decomposition.projected_loss(study.projections[kind], order), study.clustering(scaling), study.hidden_after
        )
        for kind, order, scaling in keys
    )
    rows = []
    for (kind, order, scaling), (labels, clusters) in zip(keys, joblib.Parallel(n_jobs=-1)(jobs), strict=True):
        projections = study.projections[kind]
        row = {"basis": kind, "order": order, "scaling": scaling}
        row["movement_share"] = float(decomposition.movement_share(projections).mean())
        row["reversals"] = float(decomposition.reversals(projections).median())
        closed = decomposition.completeness(projections, order).attrs
        row |= {name: closed[name] for name in ("share", "share_inside", "correlation_inside")}
        for name, within in (("p", ("place",)), ("p_digit", ("place", "digit"))):
            null = significance.permutation_null(labels, 1000, study.run.settings.seed, within=within)
            row |= {f"{name}_{rule}": float(null["p"].sel(rule=rule)) for rule in ("v1", "v3")}
        row |= {f"vectors_over_{rule}": int(null["vectors_over"].sel(rule=rule)) for rule in ("v1", "v3")}
        rows.append({**row, **tables.strategy_row(labels, clusters)})
    return pd.DataFrame(rows)


def vectors(study: Study) -> pd.DataFrame:
    """One row per vector, order and scaling: birth, curvature, whether it falls, its clusters."""
    reversals = decomposition.reversals(study.main).values
    parts = []
    for (order, scaling), labels in study.labels.items():
        table = tables.vector_table(study.main, study.curves[order], labels, homogeneity_table(labels)).reset_index()
        parts.append(table.assign(reversals=reversals, order=order, scaling=scaling))
    return pd.concat(parts)


def agreement(study: Study) -> pd.DataFrame:
    """First order against the others (Table 5), at several cadences."""
    rows = []
    for projections in _coarsened(study, study.main):
        first = decomposition.projected_loss(projections, "first")
        for order in significance.available_readings(projections):
            if order != "first":
                fit = decomposition.compare_trajectories(first, significance.trajectories(projections, order))
                rows.append({"order": order, "cadence": cadence(projections), **fit})
    return pd.DataFrame(rows)


def completeness(study: Study) -> pd.DataFrame:
    """How much of the loss change the sums over vectors account for, by basis, order and cadence."""
    rows = []
    for kind, projections in study.projections.items():
        for coarse in _coarsened(study, projections):
            row = {"basis": kind, "cadence": cadence(coarse)}
            if "distance" in coarse:
                row["movement_share"] = float(decomposition.movement_share(coarse).mean())
            for order in decomposition.available_orders(coarse):
                rows.append({**row, "order": order, **decomposition.completeness(coarse, order).attrs})
    return pd.DataFrame(rows)


def completeness_curves(study: Study) -> pd.DataFrame:
    """Mean over tokens of the claimed, true and delivered loss change at each step, on the run's own basis."""
    closed = {order: decomposition.completeness(study.main, order).mean("token") for order in study.curves}
    true = next(iter(closed.values()))
    curves = {name: true[name].values for name in ("step", "true", "inside")}
    return pd.DataFrame({**curves, **{order: means["claimed"].values for order, means in closed.items()}})


def second_order_term(study: Study) -> pd.DataFrame:
    """The paper's second-order term against the true one (v3, Appendix C), and against the trapezoid's.

    As in the paper, on 400 tokens, the first 10 checkpoints and 5 vectors, if there are as many. No rows for a run that
    did not measure the mean curvature.
    """
    if "curvature" not in study.main:
        return pd.DataFrame(columns=["term", "rmse", "median_error", "rms_true", "correlation", "tokens"])
    batch = study.batch[: PAPER_TERM["examples"]]
    basis = read_vectors(study.run.basis, 0, PAPER_TERM["vectors"]).to(study.run.settings.device)
    some = study.main.isel(step=slice(0, PAPER_TERM["steps"] + 1), vector=slice(0, PAPER_TERM["vectors"]))
    loss, true = study.run.checkpoints.token_loss, []
    for step, movement in zip(some["step"].values[:-1], some["movement"].values, strict=False):
        theta = study.run.checkpoints.theta(int(step))
        curvature = project(loss, theta, batch, basis, curvature=True).curvature.cpu().numpy()
        true.append(curvature * movement**2 / 2)
    true, rows = np.stack(true), []
    first = decomposition.polca(some, "first")
    for name in ("second", "trapezoid"):
        term = (decomposition.polca(some, name) - first).values[:, : 4 * len(batch)]
        rows.append(
            {
                "term": name,
                "rmse": np.sqrt(np.mean((term - true) ** 2)),
                "median_error": np.median(abs(term - true)),
                "rms_true": np.sqrt(np.mean(true**2)),
                "correlation": np.corrcoef(term.ravel(), true.ravel())[0, 1],
                "tokens": term.shape[1],
            }
        )
    return pd.DataFrame(rows)


def along(study: Study) -> pd.DataFrame:
    """POLCA against the true loss change of moving along each vector alone, by order and vector.

    ``share``: of the sum of POLCA over the sum of true changes; ``slope`` and ``correlation`` over intervals and
    tokens; ``error``: root mean square of the difference over that of the true changes. Vector 0 stands for all.
    """
    true = study.along_each.values
    n_tokens, n_vectors = true.shape[1:]
    rows = []
    for order in study.curves:
        polca = decomposition.polca(study.main, order).values[:, :n_tokens]
        for vector in range(n_vectors + 1):
            part = slice(None) if vector == 0 else slice(vector - 1, vector)
            claimed, delivered = (values[..., part].ravel().astype(float) for values in (polca, true))
            rows.append(
                {
                    "order": order,
                    "vector": vector,
                    "share": claimed.sum() / delivered.sum(),
                    "slope": (claimed @ delivered) / (delivered @ delivered),
                    "correlation": np.corrcoef(claimed, delivered)[0, 1],
                    "error": np.sqrt(np.mean((claimed - delivered) ** 2) / np.mean(delivered**2)),
                    "claimed": claimed.sum() / n_tokens,
                    "delivered": delivered.sum() / n_tokens,
                }
            )
    return pd.DataFrame(rows)


def clusterings(study: Study) -> pd.DataFrame:
    """What the paper prints, by every combination of the choices that it leaves open (see ``polca_paper.fit``)."""
    kinds = [kind for kind in ("hessian", "random", "shuffled", "parameters") if kind in study.bases]
    settings = study.run.settings.clustering
    # Results by vector are kept in a folder for each basis, under the name of its projections and of these settings.
    name = hash_json(settings.model_dump(mode="json"))[:8]
    runs = {kind: study.on_basis(kind) for kind in kinds}
    folders = {kind: run.folder / f"clusterings-{run.keys['projection']}-{name}" for kind, run in runs.items()}
    clusters, kept = cluster_every_way({kind: study.projections[kind].load() for kind in kinds}, settings, folders)
    return measure_clusterings(clusters, kept, study.main.sizes["token"], study.hidden_after)


def cluster_summary(study: Study) -> xr.Dataset:
    """Medoids, quartiles and composition of all clusters, by order and scaling, and of the exact loss."""
    loss = study.main["loss"]
    kinds = {
        f"{order}, {scaling}": summarise_clusters(study.curves[order], loss, labels, scaling)
        for (order, scaling), labels in study.labels.items()
        if scaling != "zscore"
    }
    exact = summarise_clusters(loss, loss, cluster_tokens(loss, study.clustering("raw"))).isel(vector=0, drop=True)
    exact = exact.rename({name: f"exact_{name}" for name in (*exact.data_vars, "cluster")})
    return kept_summary(study, xr.merge([join_kinds(kinds), exact]))


def join_kinds(summaries: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Summaries of clusters by kind of trajectory, as one dataset with dimension ``kind``."""
    about = ["birth_step", "eigenvalue", "residual", "products"]
    parts = [summary.drop_vars(about, errors="ignore") for summary in summaries.values()]
    return xr.concat(parts, dim=pd.Index(list(summaries), name="kind"), join="outer", fill_value={"tokens": 0})


def kept_summary(study: Study, summary: xr.Dataset) -> xr.Dataset:
    """The summary with births of the vectors and tau, in half precision, as it is kept on disk."""
    births = study.main["birth_step"].to_series().reindex(summary["vector"].values)
    summary["birth_step"] = ("vector", births.to_numpy())
    summary = summary.map(lambda values: values.astype(np.float16) if values.dtype == np.float32 else values)
    return summary.assign_attrs(hidden_after=study.hidden_after)


TABLES: dict[str, Callable[[Study], pd.DataFrame]] = {
    "losses": lambda study: tables.loss_quantiles(study.main["loss"]),
    "strategies": lambda study: study.compared[0].reset_index(),
    "purest": lambda study: study.compared[1].reset_index(),
    "bases": compared_bases,
    "vectors": vectors,
    "agreement": agreement,
    "completeness": completeness,
    "completeness_curves": completeness_curves,
    "second_order_term": second_order_term,
    "along": along,
    "null": robustness.null,
    "rand": robustness.rand,
    "halves": robustness.halves,
    "grid": robustness.grid,
    "causal": robustness.causal,
    "causal_clusters": robustness.causal_clusters,
    "hessian_sample": robustness.hessian_sample,
    "concentration": robustness.concentration,
    "largest_parameters": robustness.largest_parameters,
    "specification": robustness.specification_curve,
    "clusterings": clusterings,
}
"""What is kept of a study, in the order in which it is made."""
