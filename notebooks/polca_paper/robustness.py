"""Tables that ask how far the evidence carries: chance, choice, sample and cause. Each is a function of a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import joblib
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose
from polca_lib.method.clustering import OUTLIER, cluster_tokens
from polca_lib.method.eigenpairs import top_eigenpairs
from polca_lib.method.settings import HESSIAN_KINDS, Scaling
from polca_lib.method.vectors import read_vectors
from polca_lib.tasks import arithmetic
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings
from polca_paper import significance
from polca_paper.homogeneity import base_rate, homogeneity_table
from polca_paper.study import Study


def null(study: Study) -> pd.DataFrame:
    """Permutation null of the largest homogeneity, for every order and scaling, and for the exact loss."""
    exact = {
        ("exact loss", scaling): cluster_tokens(study.main["loss"], study.clustering(scaling))
        for scaling in get_args(Scaling)
    }
    rows = []
    for (order, scaling), labels in {**study.labels, **exact}.items():
        for within in (("place",), ("place", "digit")):
            shuffled = significance.permutation_null(labels, 1000, study.run.settings.seed, within=within)
            for rule in ("v1", "v3"):
                ruled = shuffled.sel(rule=rule)
                low, median, high = np.quantile(ruled["maximum"], [0.05, 0.5, 0.95])
                row = {"order": order, "scaling": scaling, "within": ", ".join(within), "rule": rule}
                row |= {"observed": float(ruled["observed"]), "base_rate": base_rate(labels), "p": float(ruled["p"])}
                row |= {"null_05": low, "null_median": median, "null_95": high}
                row |= {"vectors_over": int(ruled["vectors_over"])}
                rows.append({**row, "vectors_over_null_95": np.quantile(ruled["vectors_over_null"], 0.95)})
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
    return _by_order_and_scaling(study, significance.check_on_other_half, study.run.settings.seed)


def grid(study: Study) -> pd.DataFrame:
    """The largest homogeneity over ``min_cluster_size`` and ``min_samples``, for all orders and two scalings."""
    size = study.run.settings.clustering.min_cluster_size
    sizes = sorted({max(2, round(size * factor)) for factor in (1 / 3, 1 / 2, 2 / 3, 1, 4 / 3, 2)})
    return _by_order_and_scaling(study, significance.settings_grid, sizes, (5, 10, 15, 30, 60))


def _by_order_and_scaling(study: Study, table: Callable[..., pd.DataFrame], *arguments: Any) -> pd.DataFrame:
    """Tables of the curves of each order, by two scalings and that of the settings, one below the other."""
    scalings = dict.fromkeys(("raw", "unit", study.run.settings.clustering.scaling))
    keys = [(order, scaling) for order in study.curves for scaling in scalings]
    jobs = (joblib.delayed(table)(study.curves[o], study.clustering(s), *arguments) for o, s in keys)
    parts = zip(keys, joblib.Parallel(n_jobs=-1)(jobs), strict=True)
    return pd.concat([part.assign(order=order, scaling=scaling) for (order, scaling), part in parts])


def causal(study: Study) -> pd.DataFrame:
    """Mean loss change by skill when movement along a direction is taken back at the end of training.

    ``kind`` is a key of :attr:`polca_paper.study.Study.undone`: own, random, whole or only. For each place with
    carries, ``auc`` says how well the change of a single token tells whether it takes a carry: the chance that a token
    with a carry is hurt more than one without (one half is chance, zero and one are perfect). ``p`` is the share of
    shuffles of the carries among tokens of the same place and digit in which the mean changes with and without a carry
    differ as much. Both do not depend on the size of the changes, so that random directions can be compared.
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
    """p of the difference between the mean changes with and without a carry; carries are shuffled within digits."""
    rng = np.random.default_rng(0)
    shuffled = np.tile(carry, (draws + 1, 1))  # the first row is the real one
    for value in np.unique(digit):
        tokens = digit == value
        shuffled[1:, tokens] = rng.permuted(shuffled[1:, tokens], axis=1)
    sums = shuffled @ change  # of the changes with a carry
    difference = abs(sums / carry.sum() - (change.sum() - sums) / (~carry).sum())
    return float((difference >= difference[0] * (1 - 1e-9)).mean())


def causal_clusters(study: Study) -> pd.DataFrame:
    """Does taking back a vector's movement hurt just the tokens of its clusters?

    For each cluster, mean loss changes when the movement along its vector is taken back: of its tokens (``inside``),
    and of tokens that fell along the vector, too, but lie outside the cluster, with the same mix of places (``like``;
    NaN if a place has no such token). So neither a place that is hurt as a whole counts, nor tokens that were dropped
    because they rose. Mean change of its tokens by the same length along the other vectors (``others``), and along a
    random direction (``random``). ``rank`` of its vector among all, ``of``, by the difference of inside and like at
    the same length; 1: it hurts this cluster most selectively.
    """
    undone, rows = study.undone, []
    n = undone["own"].shape[1]
    place = study.run.tokens["place"].to_numpy()
    for (order, scaling), labels in study.labels.items():
        if scaling == "zscore":
            continue
        for cluster in homogeneity_table(labels).to_dict("records"):
            index = cluster["vector"] - 1
            label = labels.sel(vector=cluster["vector"]).values
            places = pd.Series(place[label == cluster["cluster"]])
            label = label[:n]
            inside = label == cluster["cluster"]
            if not inside.any():
                continue
            weights = _place_weights(inside, label >= OUTLIER, place[:n])
            same = undone["same"][index]
            selective = same[:, inside].mean(axis=1) - same @ weights
            others = np.delete(same[:, inside].mean(axis=1), index)
            rows.append(
                {
                    "order": order,
                    "scaling": scaling,
                    **{name: cluster[name] for name in ("vector", "cluster", "tokens", "homogeneity", "counts_v3")},
                    "place_share": places.value_counts(normalize=True).max(),
                    "length": undone["lengths"][index],
                    "inside": undone["own"][index, inside].mean(),
                    "like": undone["own"][index] @ weights,
                    "others": others.mean() if len(others) else np.nan,
                    "random": undone["random"][index, inside].mean(),
                    "rank": 1 + int((selective > selective[index]).sum()) if np.isfinite(weights[0]) else np.nan,
                    "of": len(selective),
                }
            )
    columns = ["order", "scaling", "vector", "cluster", "tokens", "homogeneity", "counts_v3", "place_share", "length"]
    return pd.DataFrame(rows, columns=[*columns, "inside", "like", "others", "random", "rank", "of"])


def _place_weights(inside: np.ndarray, kept: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Weights of kept tokens outside a cluster that give them its mix of places; NaN if a place has no such token."""
    weights = np.zeros(len(inside))
    for name in np.unique(place[inside]):
        outside = kept & ~inside & (place == name)
        if not outside.any():
            return np.full(len(inside), np.nan)
        weights[outside] = (inside & (place == name)).sum() / inside.sum() / outside.sum()
    return weights


def hessian_sample(study: Study) -> pd.DataFrame:
    """The top eigenvector at a few checkpoints from samples of several sizes, against the largest of them."""
    run, basis, steps = study.run, study.run.settings.basis, study.run.settings.basis_steps
    n = run.settings.data.hessian_examples
    largest = max(n, RunSettings.from_preset("paper").data.hessian_examples // 2)
    data = run.settings.data.model_copy(update={"hessian_examples": 2 * largest})
    batch = Run(run.settings.model_copy(update={"data": data}), run.folder).task.hessian.to(run.settings.device)
    samples = {"reference": batch[largest:]}
    samples |= {size: batch[:size] for size in sorted({largest // 25, largest // 5, n, largest})}
    rows = []
    for step in dict.fromkeys(steps[i] for i in np.linspace(0, len(steps) - 1, 3).astype(int)):
        theta, pairs = run.checkpoints.theta(step), {}
        start = torch.randn(theta.numel(), generator=torch.Generator().manual_seed(run.settings.seed)).to(theta)
        how = {"which": basis.which, "tolerance": basis.tolerance, "max_products": basis.max_products}
        for name, sample in samples.items():
            operator = HessianOperator(run.checkpoints.token_loss, theta, sample, run.settings.memory)
            pairs[name] = top_eigenpairs(operator, start, 1, **how)
        reference = pairs.pop("reference")
        for size, pair in pairs.items():
            cosine = abs(torch.dot(pair.vectors[0].double(), reference.vectors[0].double())).item()
            row = {"step": step, "examples": size, "reference_examples": len(samples["reference"])}
            row |= {"cosine": cosine, "eigenvalue": pair.values[0].item(), "products": pair.products}
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
    checkpoints, memory = study.run.checkpoints, study.run.settings.memory
    loss, batch = checkpoints.token_loss, study.run.task.hessian.to(study.run.settings.device)
    for kind in (kind for kind in study.bases if kind in HESSIAN_KINDS):
        basis = study.on_basis(kind).basis
        for row, birth in enumerate(basis["birth_step"].values):
            theta = checkpoints.theta(int(birth))
            vector = read_vectors(basis, row, row + 1, device=theta.device, dtype=theta.dtype)
            strategy = strategy or choose(loss, theta, batch, vector, order=2, memory=memory)
            projected = project(loss, theta, batch, vector, curvature=True, strategy=strategy)
            curvature = projected.curvature[:, 0].double().cpu().numpy()
            size = abs(curvature)
            entry = {"basis": kind, "vector": row + 1, "birth_step": birth, "curvature": curvature.mean()}
            entry |= {"tokens": size.sum() ** 2 / (size**2).sum() / len(size), "top": _held_by_few(size)}
            rows.append({**entry, "top_loss": _held_by_few(projected.loss.cpu().numpy())})
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
    projections = {("largest", "answer"): study.main}
    if study.variants:
        for choices in (("magnitude", "answer"), ("largest", "all"), ("magnitude", "all")):
            projections[choices] = study.variant(*choices).projections.load()
    factors = [factor for factor in (1, 5) if (study.main.sizes["step"] - 1) % factor == 0]
    names, settings = ("which", "targets"), study.run.settings.clustering
    return significance.specification_curve(projections, names, settings, factors=factors)
