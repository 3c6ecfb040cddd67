"""The tables that the book says its say with, each a function of a :class:`polca_paper.study.Study`."""

from __future__ import annotations

from collections.abc import Callable

import joblib
import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.derivatives.projection import project
from polca_lib.method import decomposition
from polca_lib.method.clustering import cluster_tokens, summarise_clusters
from polca_lib.method.vectors import read_vectors
from polca_paper import robustness, significance, specification, tables
from polca_paper.homogeneity import cluster_breakthroughs
from polca_paper.study import Study

PAPER_TERM = {"steps": 10, "vectors": 5, "examples": 100}  # of v3's Appendix C: 400 tokens


def _factors(study: Study) -> tuple[int, ...]:
    """Multiples of the cadence that divide the run."""
    return tuple(factor for factor in (1, 2, 5, 10) if (study.main.sizes["step"] - 1) % factor == 0)


def cadence(projections: xr.Dataset) -> int:
    """Steps from one checkpoint to the next."""
    return int(projections["step"][1] - projections["step"][0])


def losses(study: Study) -> pd.DataFrame:
    """Quartiles and means of the exact loss by skill and place."""
    return tables.loss_quantiles(study.main["loss"])


def strategies(study: Study) -> pd.DataFrame:
    """Every kind of trajectory with every scaling (Table 3)."""
    return study.compared[0].reset_index()


def purest(study: Study) -> pd.DataFrame:
    """What the purest clusters are made of."""
    return study.compared[1].reset_index()


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
        projections, seed = study.projections[kind], study.run.settings.seed
        row = {"basis": kind, "order": order, "scaling": scaling}
        row["movement_share"] = float(decomposition.movement_share(projections).mean())
        row["reversals"] = float(decomposition.reversals(projections).median())
        closed = decomposition.completeness(projections, order).attrs
        row |= {name: closed[name] for name in ("share", "share_inside", "correlation_inside")}
        for name, within in (("p", ("place",)), ("p_digit", ("place", "digit"))):
            null = significance.permutation_null(labels, 1000, seed, within=within)
            row |= {f"{name}_{rule}": float(null["p"].sel(rule=rule)) for rule in ("v1", "v3")}
        row |= {f"vectors_over_{rule}": int(null["vectors_over"].sel(rule=rule)) for rule in ("v1", "v3")}
        rows.append({**row, **tables.strategy_row(labels, clusters)})
    return pd.DataFrame(rows)


def vectors(study: Study) -> pd.DataFrame:
    """One row per vector, order and scaling: birth, curvature, whether it falls, its clusters."""
    rows = []
    for (order, scaling), labels in study.labels.items():
        own = tables.vector_table(
            study.main, study.curves[order], labels, significance.homogeneity_table(labels)
        ).reset_index()
        own["reversals"] = decomposition.reversals(study.main).values
        rows.append(own.assign(order=order, scaling=scaling))
    return pd.concat(rows)


def agreement(study: Study) -> pd.DataFrame:
    """First order against the others (Table 5), at several cadences."""
    rows = []
    for factor in _factors(study):
        projections = decomposition.coarsen(study.main, factor)
        first = decomposition.projected_loss(projections, "first")
        for order in specification.available_readings(projections):
            if order != "first":
                other = specification.trajectories(projections, order)
                fit = decomposition.compare_trajectories(first, other)
                rows.append({"order": order, "cadence": cadence(projections), **fit})
    return pd.DataFrame(rows)


def completeness(study: Study) -> pd.DataFrame:
    """How much of the loss change the sums over vectors account for, by basis, order and cadence."""
    rows = []
    for kind, projections in study.projections.items():
        for factor in _factors(study):
            coarse = decomposition.coarsen(projections, factor)
            row = {"basis": kind, "cadence": cadence(coarse)}
            if "distance" in coarse:
                row["movement_share"] = float(decomposition.movement_share(coarse).mean())
            rows += [
                {**row, "order": o, **decomposition.completeness(coarse, o).attrs}
                for o in decomposition.available_orders(coarse)
            ]
    return pd.DataFrame(rows)


def completeness_curves(study: Study) -> pd.DataFrame:
    """Mean over tokens of the claimed, true and delivered loss change at each step, on the run's own basis."""
    closed = {order: decomposition.completeness(study.main, order) for order in study.curves}
    true = next(iter(closed.values()))
    means = {"step": true["step"].values}
    means |= {name: true[name].mean("token").values for name in ("true", "inside")}
    return pd.DataFrame({**means, **{order: own["claimed"].mean("token").values for order, own in closed.items()}})


def second_order_term(study: Study) -> pd.DataFrame:
    """The paper's second-order term against the true one (v3, Appendix C), and against the trapezoid's.

    400 tokens, the first 10 checkpoints and 5 vectors, as in the paper, if there are as many. No rows for a run that
    did not measure the mean curvature.
    """
    if "curvature" not in study.main:
        return pd.DataFrame(columns=["term", "rmse", "median_error", "rms_true", "correlation", "tokens"])
    own = PAPER_TERM
    batch = study.batch[: own["examples"]]
    tokens = slice(0, 4 * len(batch))
    checkpoints, vectors = study.run.checkpoints, read_vectors(study.run.basis, 0, own["vectors"])
    vectors = vectors.to(study.run.settings.device)
    some = study.main.isel(step=slice(0, own["steps"] + 1), vector=slice(0, own["vectors"]))
    second = decomposition.polca(some, "second") - decomposition.polca(some, "first")
    trapezoid = decomposition.polca(some, "trapezoid") - decomposition.polca(some, "first")
    true = []
    for index, step in enumerate(some["step"].values[:-1]):
        theta = checkpoints.theta(int(step))
        found = project(checkpoints.token_loss, theta, batch, vectors, curvature=True).curvature.cpu().numpy()
        true.append(found * some["movement"].values[index] ** 2 / 2)
    true = np.stack(true)
    rows = []
    for name, term in (("second", second), ("trapezoid", trapezoid)):
        values = term.values[:, tokens]
        rows.append(
            {
                "term": name,
                "rmse": np.sqrt(np.mean((values - true) ** 2)),
                "median_error": np.median(abs(values - true)),
                "rms_true": np.sqrt(np.mean(true**2)),
                "correlation": np.corrcoef(values.ravel(), true.ravel())[0, 1],
                "tokens": values.shape[1],
            }
        )
    return pd.DataFrame(rows)


def along(study: Study) -> pd.DataFrame:
    """POLCA against the true loss change of moving along each vector alone, by order and vector.

    ``share``: of the sum of POLCA over the sum of true changes; ``slope`` and ``correlation`` over intervals and
    tokens; ``error``: root mean square of the difference over that of the true changes. Vector 0 stands for all.
    """
    true = study.along_each.values
    rows = []
    for order in study.curves:
        value = decomposition.polca(study.main, order).values[:, : true.shape[1]]
        for vector in range(true.shape[2] + 1):
            part = slice(None) if vector == 0 else slice(vector - 1, vector)
            ours, theirs = value[..., part].ravel().astype(float), true[..., part].ravel().astype(float)
            rows.append(
                {
                    "order": order,
                    "vector": vector,
                    "share": ours.sum() / theirs.sum(),
                    "slope": (ours @ theirs) / (theirs @ theirs),
                    "correlation": np.corrcoef(ours, theirs)[0, 1],
                    "error": np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)),
                    "claimed": ours.sum() / true.shape[1],
                    "delivered": theirs.sum() / true.shape[1],
                }
            )
    return pd.DataFrame(rows)


def cluster_summary(study: Study) -> xr.Dataset:
    """Medoids, quartiles and composition of all clusters, by order and scaling, and of the exact loss."""
    parts = {}
    for (order, scaling), labels in study.labels.items():
        if scaling != "zscore":
            parts[f"{order}, {scaling}"] = summarise_clusters(
                study.curves[order], study.main["loss"], labels, scaling
            ).drop_vars(["birth_step", "eigenvalue", "residual", "products"])
    loss = study.main["loss"]
    labels = cluster_tokens(loss, study.clustering("raw"))
    exact = summarise_clusters(loss, loss, labels)
    whole = xr.concat(parts.values(), dim=pd.Index(list(parts), name="kind"), join="outer", fill_value={"tokens": 0})
    whole = xr.merge(
        [
            whole,
            exact.isel(vector=0, drop=True)
            .rename({n: f"exact_{n}" for n in exact.data_vars})
            .rename(cluster="exact_cluster"),
        ]
    )
    whole["birth_step"] = ("vector", study.main["birth_step"].values)
    whole.attrs["hidden_after"] = study.hidden_after
    return whole.map(lambda values: values.astype(np.float16) if values.dtype == np.float32 else values)


TABLES: dict[str, Callable[[Study], pd.DataFrame]] = {
    "losses": losses,
    "strategies": strategies,
    "purest": purest,
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
}
"""What is kept of a study, in the order in which it is made."""
