"""Tables that ask how far the evidence carries: chance, choice, sample and cause; each a function of a study."""

from __future__ import annotations

import tempfile
from typing import get_args

import joblib
import numpy as np
import pandas as pd
import torch
import xarray as xr
from sklearn.metrics import roc_auc_score

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose
from polca_lib.method.clustering import DROPPED, OUTLIER, cluster_tokens
from polca_lib.method.eigenpairs import top_eigenpairs
from polca_lib.method.settings import HESSIAN_KINDS, ClusteringSettings, Scaling
from polca_lib.method.vectors import read_vectors
from polca_lib.tasks import arithmetic
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings
from polca_paper import significance, specification
from polca_paper.study import Study

PAPER_TERM = {"steps": 10, "vectors": 5, "examples": 100}  # of v3's Appendix C: 400 tokens


def null(study: Study) -> pd.DataFrame:
    """Permutation null of the largest homogeneity, for every order and scaling, and for the exact loss."""
    found = {**study.labels}
    for scaling in get_args(Scaling):
        found["exact loss", scaling] = cluster_tokens(study.main["loss"], study.clustering(scaling))
    rows = []
    for (order, scaling), labels in found.items():
        base = float(labels["carry"].astype(float).where(labels != DROPPED).mean())
        for within in (("place",), ("place", "digit")):
            null = significance.permutation_null(labels, 1000, study.run.settings.seed, within=within)
            for rule in null["rule"].values:
                own = null.sel(rule=rule)
                low, middle, high = np.quantile(own["maximum"], [0.05, 0.5, 0.95])
                row = {"order": order, "scaling": scaling, "within": ", ".join(within), "rule": rule}
                row |= {"observed": float(own["observed"]), "base_rate": base, "p": float(own["p"])}
                row |= {"null_05": low, "null_median": middle, "null_95": high}
                row |= {"vectors_over": int(own["vectors_over"])}
                rows.append({**row, "vectors_over_null_95": np.quantile(own["vectors_over_null"], 0.95)})
    return pd.DataFrame(rows)


def rand(study: Study) -> pd.DataFrame:
    """Adjusted Rand indices by order, scaling and vector."""
    parts = [
        significance.rand_indices(labels).reset_index().assign(order=order, scaling=scaling)
        for (order, scaling), labels in study.labels.items()
    ]
    return pd.concat(parts)


def halves(study: Study) -> pd.DataFrame:
    """Clusters of one half of the examples, checked on the other."""
    keys = [(order, scaling) for order in study.curves for scaling in ("raw", "unit")]
    check, seed = joblib.delayed(significance.check_on_other_half), study.run.settings.seed
    found = joblib.Parallel(n_jobs=-1)(check(study.curves[o], study.clustering(s), seed) for o, s in keys)
    return pd.concat([part.assign(order=o, scaling=s) for (o, s), part in zip(keys, found, strict=True)])


def grid(study: Study) -> pd.DataFrame:
    """The largest homogeneity over ``min_cluster_size`` and ``min_samples``, for all orders and two scalings."""
    own = study.run.settings.clustering.min_cluster_size
    sizes = sorted({max(2, round(own * factor)) for factor in (1 / 3, 1 / 2, 2 / 3, 1, 4 / 3, 2)})
    keys = [(order, scaling) for order in study.curves for scaling in ("raw", "unit")]
    jobs = (joblib.delayed(_grid)(study.curves[order], study.clustering(scaling), sizes) for order, scaling in keys)
    found = joblib.Parallel(n_jobs=-1)(jobs)
    return pd.concat([part.assign(order=o, scaling=s) for (o, s), part in zip(keys, found, strict=True)])


def _grid(curves: xr.DataArray, settings: ClusteringSettings, sizes: list[int]) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as place:
        cache = joblib.Memory(place, verbose=0)
        return significance.settings_grid(curves, settings, sizes, (5, 10, 15, 30, 60), cache)


def causal(study: Study) -> pd.DataFrame:
    """Mean loss change by skill when movement along a direction is taken back at the end of training.

    ``kind``: own (vectors of the basis); random (directions of the same length orthogonal to it); whole (the whole
    basis at once) and only (no movement but that in the basis, from the start; against the loss there). For each place
    with carries, ``auc`` is how well the change of a single token tells whether it takes a carry: the chance that a
    token with a carry is hurt more than one without (one half is chance, zero and one are perfect); and ``p`` the share
    of shuffles of the carries among tokens of the same place and digit for which the mean changes with and without a
    carry differ as much. Both are free of the size of the changes, so that random directions can be compared.
    """
    undone = study.undone
    tokens = study.run.tokens[: undone["own"].shape[1]]
    skill, place, carry, digit = (tokens[name].to_numpy() for name in ("skill", "place", "carry", "digit"))
    rows = []
    for kind in ("own", "random", "whole", "only"):
        for index, change in enumerate(np.atleast_2d(undone[kind])):
            length = undone["lengths"][index] if kind in ("own", "random") else np.linalg.norm(undone["lengths"])
            row = {"kind": kind, "vector": index + 1, "length": length, "distance": undone["distance"][0]}
            row |= {name: change[skill == name].mean() for name in arithmetic.SKILLS if (skill == name).any()}
            for name in arithmetic.PLACES[:3]:
                inside = place == name
                both = 0 < carry[inside].mean() < 1
                row[f"auc, {name}"] = roc_auc_score(carry[inside], change[inside]) if both else np.nan
                row[f"p, {name}"] = _p_of_difference(change[inside], carry[inside], digit[inside]) if both else np.nan
            rows.append({**row, "mean": change.mean(), "rms": np.sqrt(np.mean(change**2))})
    return pd.DataFrame(rows)


def _p_of_difference(change: np.ndarray, carry: np.ndarray, digit: np.ndarray, draws: int = 1000) -> float:
    """Of the difference of the mean change with and without a carry, by shuffling carries within digits."""
    rng = np.random.default_rng(0)
    shuffled = np.tile(carry, (draws + 1, 1))
    for value in np.unique(digit):
        own = digit == value
        shuffled[1:, own] = rng.permuted(shuffled[1:, own], axis=1)
    with_carry = (shuffled @ change) / carry.sum()
    without = (change.sum() - shuffled @ change) / (~carry).sum()
    difference = abs(with_carry - without)
    return float((difference >= difference[0] * (1 - 1e-9)).mean())


_CLUSTER_COLUMNS = [
    *("order", "scaling", "vector", "cluster", "tokens", "homogeneity", "counts_v3", "place_share", "length"),
    *("inside", "like", "others", "random", "rank", "of"),
]


def causal_clusters(study: Study) -> pd.DataFrame:
    """Does taking back a vector's movement hurt just the tokens of its clusters?

    For each cluster: mean loss change of its tokens when its own vector's movement is taken back (``inside``), and of
    tokens outside it, of those that fell along the vector too, with the same mix of places (``like``): so that a place
    that is hurt as a whole counts for nothing, nor that the others were dropped because they rose. NaN if a place has
    no such token. The mean over the other vectors, by the same length, of the change inside (``others``); the change
    by a random direction (``random``); and the rank of its own vector among all by the difference of inside and like,
    at the same length (1: it hurts this cluster most selectively).
    """
    undone, rows = study.undone, []
    n = undone["own"].shape[1]
    place = study.run.tokens["place"].to_numpy()[:n]
    for (order, scaling), labels in study.labels.items():
        if scaling == "zscore":
            continue
        for row in significance.homogeneity_table(labels).itertuples():
            index = row.vector - 1
            label = labels.sel(vector=row.vector).values[:n]
            inside = label == row.cluster
            if not inside.any():
                continue
            weights = _place_weights(inside, label >= OUTLIER, place)
            same = undone["same"][index]
            selective = same[:, inside].mean(axis=1) - same @ weights
            others = np.delete(same[:, inside].mean(axis=1), index)
            rows.append(
                {
                    "order": order,
                    "scaling": scaling,
                    "vector": row.vector,
                    "cluster": row.cluster,
                    "tokens": row.tokens,
                    "homogeneity": row.homogeneity,
                    "counts_v3": row.counts_v3,
                    "place_share": _place_share(labels, row.vector, row.cluster),
                    "length": undone["lengths"][index],
                    "inside": undone["own"][index, inside].mean(),
                    "like": undone["own"][index] @ weights,
                    "others": others.mean() if len(others) else np.nan,
                    "random": undone["random"][index, inside].mean(),
                    "rank": 1 + int((selective > selective[index]).sum()) if np.isfinite(weights[0]) else np.nan,
                    "of": len(selective),
                }
            )
    return pd.DataFrame(rows, columns=_CLUSTER_COLUMNS)


def _place_weights(inside: np.ndarray, kept: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Weights of kept tokens outside a cluster with which their places are mixed as inside; NaN if that can't be."""
    weights = np.zeros(len(inside))
    for name in np.unique(place[inside]):
        outside = kept & ~inside & (place == name)
        if not outside.any():
            return np.full(len(inside), np.nan)
        weights[outside] = (inside & (place == name)).sum() / inside.sum() / outside.sum()
    return weights


def _place_share(labels: xr.DataArray, vector: int, cluster: int) -> float:
    inside = labels["place"].values[labels.sel(vector=vector).values == cluster]
    return float(np.unique(inside, return_counts=True)[1].max() / len(inside))


def hessian_sample(study: Study) -> pd.DataFrame:
    """The top eigenvector at a few checkpoints from samples of several sizes, against the largest of them."""
    run = study.run
    checkpoints, basis = run.checkpoints, run.settings.basis
    largest = max(run.settings.data.hessian_examples, RunSettings.from_preset("paper").data.hessian_examples // 2)
    settings = run.settings.model_copy(
        update={"data": run.settings.data.model_copy(update={"hessian_examples": 2 * largest})}
    )
    batch = Run(settings, run.folder).task.hessian.to(run.settings.device)
    samples = {"reference": batch[largest:]}
    samples |= {
        n: batch[:n] for n in sorted({largest // 25, largest // 5, run.settings.data.hessian_examples, largest})
    }
    steps = [run.settings.basis_steps[i] for i in np.linspace(0, len(run.settings.basis_steps) - 1, 3).astype(int)]
    rows = []
    for step in dict.fromkeys(steps):
        theta = checkpoints.theta(step)
        found = {}
        for name, sample in samples.items():
            generator = torch.Generator().manual_seed(run.settings.seed)
            start = torch.randn(theta.numel(), generator=generator).to(theta)
            operator = HessianOperator(checkpoints.token_loss, theta, sample, run.settings.memory)
            found[name] = top_eigenpairs(
                operator,
                start,
                1,
                which=basis.which,
                tolerance=basis.tolerance,
                max_products=basis.max_products,
            )
        reference = found.pop("reference")
        for n, pairs in found.items():
            cosine = abs(torch.dot(pairs.vectors[0].double(), reference.vectors[0].double())).item()
            row = {"step": step, "examples": n, "reference_examples": len(samples["reference"])}
            row |= {"cosine": cosine, "eigenvalue": pairs.values[0].item(), "products": pairs.products}
            rows.append({**row, "reference_eigenvalue": reference.values[0].item()})
    return pd.DataFrame(rows)


def concentration(study: Study) -> pd.DataFrame:
    """On how many tokens of its own Hessian sample the curvature of an eigenvector rests, at its birth.

    For each vector b of a Hessian basis: ``curvature``, the mean of b^T H(x) b, its eigenvalue; ``tokens``, the
    participation ratio (sum c)^2 / sum c^2 of c = abs(b^T H(x) b), as a share of all tokens: one if all have the same,
    1/n if a single one has all; ``top``, the share of the sum of c that the 1% of tokens with most of it hold; and
    ``top_loss``, the same of the loss.
    """
    rows, strategy = [], None
    loss, batch = study.run.checkpoints.token_loss, study.run.task.hessian
    batch = batch.to(study.run.settings.device)
    for kind in study.bases:
        if kind not in HESSIAN_KINDS:
            continue
        basis = study.on_basis(kind).basis
        for row, birth in enumerate(basis["birth_step"].values):
            theta = study.run.checkpoints.theta(int(birth))
            vector = read_vectors(basis, row, row + 1, device=theta.device, dtype=theta.dtype)
            strategy = strategy or choose(loss, theta, batch, vector, order=2, memory=study.run.settings.memory)
            found = project(loss, theta, batch, vector, curvature=True, strategy=strategy)
            curvature = found.curvature[:, 0].double().cpu().numpy()
            size = abs(curvature)
            entry = {"basis": kind, "vector": row + 1, "birth_step": birth, "curvature": curvature.mean()}
            entry |= {"tokens": size.sum() ** 2 / (size**2).sum() / len(size), "top": _held_by_few(size)}
            rows.append({**entry, "top_loss": _held_by_few(found.loss.cpu().numpy())})
    return pd.DataFrame(rows)


def _held_by_few(values: np.ndarray, few: float = 0.01) -> float:
    """Share of the sum that the largest values hold, a hundredth of them, but one at least."""
    largest = np.sort(values)[::-1][: max(1, round(few * len(values)))]
    return float(largest.sum() / values.sum())


def largest_parameters(study: Study) -> pd.DataFrame:
    """The parameters that LCA is done on, those largest at the end of training: their tensor, first and last value."""
    if "parameters" not in study.bases:
        return pd.DataFrame(columns=["tensor", "start", "end"])
    checkpoints = study.run.checkpoints
    sizes = {name: values.numel() for name, values in checkpoints.token_loss.parameters.items()}
    axes = study.on_basis("parameters").basis["axis"].values
    owner = np.searchsorted(np.cumsum(list(sizes.values())), axes, side="right")
    start, end = (checkpoints.theta(step).cpu().numpy()[axes] for step in (0, study.run.settings.training.steps))
    return pd.DataFrame({"tensor": np.array(list(sizes))[owner], "start": start, "end": end})


def specification_curve(study: Study) -> pd.DataFrame:
    """Every combination of the choices that the paper leaves open."""
    found = {("largest", "answer"): study.main}
    if study.variants:
        for choices in (("magnitude", "answer"), ("largest", "all"), ("magnitude", "all")):
            found[choices] = study.variant(*choices).projections.load()
    factors = [factor for factor in (1, 5) if (study.main.sizes["step"] - 1) % factor == 0]
    return specification.specification_curve(
        found, ("which", "targets"), study.run.settings.clustering, factors=factors
    )
