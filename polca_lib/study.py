"""Everything the book says about one addition run, as compact tables that are kept: one folder a study.

    python -m polca_lib.study --preset paper --seed 0

Each table is a CSV file, written as soon as it is there, so that a study that is stopped goes on where it was.
``provenance.json`` says what made them. Pages read these files, wherever they are built.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import joblib
import numpy as np
import pandas as pd
import torch
import xarray as xr

from polca_lib import decomposition, interventions, significance, specification, tables
from polca_lib.artefacts import software, write_atomically
from polca_lib.basis import read_vectors
from polca_lib.breakthroughs import cluster_breakthroughs, hidden_threshold
from polca_lib.clustering import cluster_tokens, summarise_clusters
from polca_lib.config import PRESETS, RunConfig, Scaling
from polca_lib.curvature import HessianOperator, top_eigenpairs
from polca_lib.pipeline import ROOT, Run, project_together
from polca_lib.projection import project
from polca_lib.tasks import arithmetic

BASES = ("hessian", "shuffled", "final", "trajectory", "random")
"""Bases that are compared. LCA's single parameters are a strategy of their own."""

_PAPER_TERM = {"steps": 10, "vectors": 5, "examples": 100}  # of v3's Appendix C: 400 tokens
_FINITE_EXAMPLES = 100  # whose losses are computed after moving along each vector alone
_CAUSAL_EXAMPLES = 400


def folder(name: str | None = None) -> Path:
    """Where studies are kept, ``data/addition`` of the checkout or ``POLCA_STUDIES``; or one of them."""
    place = Path(os.environ.get("POLCA_STUDIES") or ROOT / "data" / "addition")
    return place / name if name else place


class Study:
    """One run, its ablations, and the tables made of them.

    Args:
        run: on the Hessian basis.
        name: of the study; preset and seed if not given.
        bases: that are compared.
        ablation_curvature: examples on which curvature along the other bases is measured; 0 for none.
        variants: also run the specification curve on Hessian bases of the largest eigenvalues in magnitude, and of the
            loss of all digits; each needs a basis and projections of its own.
    """

    def __init__(
        self,
        run: Run,
        name: str | None = None,
        bases: tuple[str, ...] = BASES,
        ablation_curvature: int = 16,
        variants: bool = True,
    ):
        self.run, self.bases, self.variants = run, bases, variants
        self.name = name or f"{run.config.preset}-{run.config.seed}"
        self.path = folder(self.name)
        self._ablation_curvature = ablation_curvature

    @property
    def tables(self) -> dict[str, Callable[[], pd.DataFrame]]:
        """What each table is made by."""
        return {
            "losses": self.losses,
            "strategies": self.strategies,
            "purest": self.purest,
            "bases": self.compared_bases,
            "vectors": self.vectors,
            "agreement": self.agreement,
            "closure": self.closure,
            "closure_curves": self.closure_curves,
            "second_order_term": self.second_order_term,
            "along": self.along,
            "null": self.null,
            "rand": self.rand,
            "halves": self.halves,
            "grid": self.grid,
            "causal": self.causal,
            "causal_clusters": self.causal_clusters,
            "hessian_sample": self.hessian_sample,
            "specification": self.specification_curve,
        }

    def complete(self, names: list[str] | None = None) -> None:
        """Make what is missing of the tables and of the clusters' curves.

        Raises:
            ValueError: the folder holds a study of other settings.
        """
        self._claim()
        for name in names or list(self.tables):
            file = self.path / f"{name}.csv"
            if not file.exists():
                start = time.perf_counter()
                table = self.tables[name]()
                write_atomically(file, table.to_csv(index=False, float_format="%.6g").encode())
                self._record(f"{name}: wall time", f"{time.perf_counter() - start:.0f} s")
                print(f"{self.name}: {name}, {len(table)} rows, {time.perf_counter() - start:.0f} s", flush=True)
        if not (self.path / "clusters.zarr.zip").exists():
            store_summary(self.path / "clusters.zarr.zip", self.clusters())

    # What the tables are made of.

    def on_basis(self, kind: str) -> Run:
        """The run on another basis."""
        if kind == self.run.config.basis.kind:
            return self.run
        measured = kind != "parameters" and self._ablation_curvature > 0
        return self.run.on_basis(
            kind, curvature=measured, curvature_examples=self._ablation_curvature if measured else None
        )

    @cached_property
    def projections(self) -> dict[str, xr.Dataset]:
        """By basis, those of single parameters included."""
        others = [kind for kind in (*self.bases, "parameters") if kind != self.run.config.basis.kind]
        found = project_together([self.on_basis(kind) for kind in others])
        return {self.run.config.basis.kind: self.main, **dict(zip(others, found, strict=True))}

    @cached_property
    def main(self) -> xr.Dataset:
        """Projections on the run's own basis."""
        return self.run.projections.load()

    @cached_property
    def curves(self) -> dict[str, xr.DataArray]:
        """Projected loss on the run's own basis, by order."""
        orders = [order for order in specification.available_orders(self.main) if order != specification.SUMMED]
        return {order: decomposition.projected_loss(self.main, order) for order in orders}

    @cached_property
    def hidden_after(self) -> int:
        """Tau, in steps."""
        return hidden_threshold(self.main["loss"], self.run.config.clustering)

    @cached_property
    def batch(self) -> torch.Tensor:
        """The validation examples."""
        return arithmetic.encode(self.run.samples.validation).to(self.run.config.device)

    def settings(self, scaling: str) -> Any:
        """Of the clustering, with another scaling."""
        return self.run.config.clustering.model_copy(update={"scaling": scaling})

    @cached_property
    def labels(self) -> dict[tuple[str, str], xr.DataArray]:
        """Clusters on the run's own basis, by order and scaling."""
        with joblib.Parallel(n_jobs=-1) as parallel:
            keys = [(order, scaling) for order in self.curves for scaling in get_args(Scaling)]
            jobs = (joblib.delayed(cluster_tokens)(self.curves[o], self.settings(s)) for o, s in keys)
            return dict(zip(keys, parallel(jobs), strict=True))

    # The tables.

    def losses(self) -> pd.DataFrame:
        """Quartiles of the exact loss by skill and place, and the mean (Figures 7 and 8)."""
        loss, rows = self.main["loss"], []
        for by in ("skill", "place"):
            for value in np.unique(loss[by].values):
                own = loss[:, loss[by].values == value]
                low, median, high = own.quantile([0.25, 0.5, 0.75], dim="token").values
                part = {"low": low, "median": median, "high": high, "mean": own.mean("token").values}
                rows.append(pd.DataFrame({"by": by, "value": value, "step": loss["step"].values, **part}))
        return pd.concat(rows)

    @cached_property
    def _compared(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        levels = {"exact loss": self.main["loss"]}
        levels |= {f"POLCA {order}": curves for order, curves in self.curves.items()}
        levels["LCA"] = decomposition.projected_loss(self.projections["parameters"], "first")
        rates = {
            "change in loss": decomposition.loss_change(self.main),
            "Fisher": decomposition.fisher(self.main),
        }
        return tables.compare_strategies(levels, rates, self.run.config.clustering, self.hidden_after)

    def strategies(self) -> pd.DataFrame:
        """Every kind of trajectory with every scaling (Table 3)."""
        return self._compared[0].reset_index()

    def purest(self) -> pd.DataFrame:
        """What the purest clusters are made of."""
        return self._compared[1].reset_index()

    def compared_bases(self) -> pd.DataFrame:
        """Every basis, order and scaling (Table 4), with movement, closure and tokens dropped."""
        rows = []
        for kind in self.bases:
            projections = self.projections[kind]
            orders = [o for o in specification.available_orders(projections) if o != specification.SUMMED]
            share = float(decomposition.movement_share(projections).mean())
            for order in orders:
                curves = decomposition.projected_loss(projections, order)
                closed = decomposition.closure(projections, order)
                for scaling in ("raw", "unit"):
                    labels, clusters = cluster_breakthroughs(curves, self.settings(scaling), self.hidden_after)
                    null = significance.permutation_null(labels, 1000, self.run.config.seed)
                    row = {"basis": kind, "order": order, "scaling": scaling, "movement_share": share}
                    row |= {name: closed.attrs[name] for name in ("share", "share_inside", "correlation_inside")}
                    row |= {f"p_{rule}": float(null["p"].sel(rule=rule)) for rule in ("v1", "v3")}
                    row |= {f"vectors_over_{rule}": int(null["vectors_over"].sel(rule=rule)) for rule in ("v1", "v3")}
                    row["reversals"] = float(decomposition.reversals(projections).median())
                    rows.append({**row, **tables.strategy_row(labels, clusters)})
        return pd.DataFrame(rows)

    def vectors(self) -> pd.DataFrame:
        """One row per vector, order and scaling: birth, curvature, whether it falls, its clusters."""
        rows = []
        for (order, scaling), labels in self.labels.items():
            own = tables.vector_table(
                self.main, self.curves[order], labels, significance.homogeneity_table(labels)
            ).reset_index()
            own["reversals"] = decomposition.reversals(self.main).values
            rows.append(own.assign(order=order, scaling=scaling))
        return pd.concat(rows)

    def agreement(self) -> pd.DataFrame:
        """First order against the others (Table 5), at several cadences."""
        rows = []
        for factor in self._factors:
            projections = decomposition.coarsen(self.main, factor)
            first = decomposition.projected_loss(projections, "first")
            for order in specification.available_orders(projections):
                if order != "first":
                    other = specification.trajectories(projections, order)
                    fit = decomposition.compare_trajectories(first, other)
                    rows.append({"order": order, "cadence": self._cadence(projections), **fit})
        return pd.DataFrame(rows)

    @property
    def _factors(self) -> tuple[int, ...]:
        intervals = self.main.sizes["step"] - 1
        return tuple(factor for factor in (1, 2, 5, 10) if intervals % factor == 0)

    @staticmethod
    def _cadence(projections: xr.Dataset) -> int:
        return int(projections["step"][1] - projections["step"][0])

    def closure(self) -> pd.DataFrame:
        """How much of the loss change the sums over vectors account for, by basis, order and cadence."""
        rows = []
        for kind, projections in self.projections.items():
            movement = float(decomposition.movement_share(projections).mean())
            for factor in self._factors:
                coarse = decomposition.coarsen(projections, factor)
                # What the movement inside the basis delivers was computed at the finest cadence alone.
                coarse = coarse if "inside_loss" in coarse else coarse.assign(inside_loss=coarse["loss"])
                for order in specification.available_orders(coarse):
                    if order == specification.SUMMED:
                        continue
                    row = {"basis": kind, "order": order, "cadence": self._cadence(coarse), "movement_share": movement}
                    own = decomposition.closure(coarse, order).attrs
                    if factor > 1:
                        own = {name: value for name, value in own.items() if "inside" not in name}
                    rows.append({**row, **own})
        return pd.DataFrame(rows)

    def closure_curves(self) -> pd.DataFrame:
        """Mean over tokens of the claimed, true and delivered loss change at each step, on the run's own basis."""
        closed = {order: decomposition.closure(self.main, order) for order in self.curves}
        true = next(iter(closed.values()))
        means = {"step": true["step"].values}
        means |= {name: true[name].mean("token").values for name in ("true", "inside")}
        return pd.DataFrame({**means, **{order: own["claimed"].mean("token").values for order, own in closed.items()}})

    def second_order_term(self) -> pd.DataFrame:
        """The paper's second-order term against the true one (v3, Appendix C), and against the trapezoid's.

        400 tokens, the first 10 checkpoints and 5 vectors, as in the paper, if there are as many.
        """
        own = _PAPER_TERM
        batch = self.batch[: own["examples"]]
        tokens = slice(0, 4 * len(batch))
        checkpoints, vectors = self.run.checkpoints, read_vectors(self.run.basis, 0, own["vectors"])
        vectors = vectors.to(self.run.config.device)
        some = self.main.isel(step=slice(0, own["steps"] + 1), vector=slice(0, own["vectors"]))
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

    def along(self) -> pd.DataFrame:
        """POLCA against the true loss change of moving along each vector alone, by order and vector.

        ``share``: of the sum of POLCA over the sum of true changes; ``slope`` and ``correlation`` over intervals and
        tokens; ``error``: root mean square of the difference over that of the true changes. Vector 0 stands for all.
        """
        path = self.run.folder / f"along-{self.run._projection.path.name}.zarr"
        steps = self.run.config.training.checkpoint_steps
        examples = self.batch[:_FINITE_EXAMPLES]
        true = interventions.move_along(path, self.run.checkpoints, steps, examples, self.run.basis).values
        rows = []
        for order in self.curves:
            value = decomposition.polca(self.main, order).values[:, : true.shape[1]]
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

    def null(self) -> pd.DataFrame:
        """Permutation null of the largest homogeneity, for every order and scaling, and for the exact loss."""
        found = {**self.labels}
        for scaling in get_args(Scaling):
            found["exact loss", scaling] = cluster_tokens(self.main["loss"], self.settings(scaling))
        rows = []
        for (order, scaling), labels in found.items():
            for within in (("place",), ("place", "digit")):
                null = significance.permutation_null(labels, 1000, self.run.config.seed, within=within)
                for rule in null["rule"].values:
                    own = null.sel(rule=rule)
                    low, middle, high = np.quantile(own["maximum"], [0.05, 0.5, 0.95])
                    row = {"order": order, "scaling": scaling, "within": ", ".join(within), "rule": rule}
                    row |= {"observed": float(own["observed"]), "p": float(own["p"])}
                    row |= {"null_05": low, "null_median": middle, "null_95": high}
                    row |= {"vectors_over": int(own["vectors_over"])}
                    rows.append({**row, "vectors_over_null_95": np.quantile(own["vectors_over_null"], 0.95)})
        return pd.DataFrame(rows)

    def rand(self) -> pd.DataFrame:
        """Adjusted Rand indices by order, scaling and vector."""
        parts = [
            significance.rand_indices(labels).reset_index().assign(order=order, scaling=scaling)
            for (order, scaling), labels in self.labels.items()
        ]
        return pd.concat(parts)

    def halves(self) -> pd.DataFrame:
        """Clusters of one half of the examples, checked on the other."""
        parts = [
            significance.check_on_other_half(curves, self.settings(scaling), self.run.config.seed).assign(
                order=order, scaling=scaling
            )
            for order, curves in self.curves.items()
            for scaling in ("raw", "unit")
        ]
        return pd.concat(parts)

    def grid(self) -> pd.DataFrame:
        """The largest homogeneity over ``min_cluster_size`` and ``min_samples``."""
        own = self.run.config.clustering.min_cluster_size
        sizes = sorted({max(2, round(own * factor)) for factor in (1 / 3, 1 / 2, 2 / 3, 1, 4 / 3, 2)})
        jobs = {
            (order, scaling): joblib.delayed(significance.settings_grid)(
                curves, self.settings(scaling), sizes, (5, 10, 15, 30, 60)
            )
            for order, curves in self.curves.items()
            for scaling in ("raw", "unit")
        }
        found = joblib.Parallel(n_jobs=-1)(jobs.values())
        parts = [grid.assign(order=o, scaling=s) for (o, s), grid in zip(jobs, found, strict=True)]
        return pd.concat(parts)

    @cached_property
    def _undone(self) -> dict[str, np.ndarray]:
        """Loss change per token when movement is taken back: own, random, and other vectors by the same length."""
        checkpoints = self.run.checkpoints
        start, end = checkpoints.theta(0), checkpoints.theta(self.run.config.training.steps)
        vectors = read_vectors(self.run.basis, device=checkpoints.device, dtype=start.dtype)
        loss, batch = checkpoints.token_loss, self.batch[:_CAUSAL_EXAMPLES]
        own, lengths = interventions.undo_movement(loss, start, end, batch, vectors)
        seed, d = self.run.config.seed, start.numel()
        others = interventions.random_directions(len(vectors), d, seed, like=start, orthogonal_to=vectors)
        random, _ = interventions.undo_movement(loss, start, end, batch, others, lengths)
        signs = torch.sign(lengths)
        same = [
            interventions.undo_movement(loss, start, end, batch, vectors, signs * length.abs())[0].cpu()
            for length in lengths
        ]
        inside = vectors.T @ lengths
        whole = interventions.losses_at(loss, end - inside, batch) - interventions.losses_at(loss, end, batch)
        only = interventions.losses_at(loss, start + inside, batch) - interventions.losses_at(loss, start, batch)
        return {
            "own": own.cpu().numpy(),
            "random": random.cpu().numpy(),
            "same": torch.stack(same).numpy(),  # (whose length, along which vector, token)
            "whole": whole.cpu().numpy(),
            "only": only.cpu().numpy(),
            "lengths": lengths.cpu().numpy(),
            "distance": np.array([(end - start).double().norm().item()]),
        }

    def causal(self) -> pd.DataFrame:
        """Mean loss change by skill when movement along a direction is taken back at the end of training.

        ``kind``: own (vectors of the basis); random (directions of the same length orthogonal to it); whole (the whole
        basis at once) and only (all movement but that in the basis, from the start; against the loss there).
        """
        undone, tokens = self._undone, self.run.tokens
        skill = tokens["skill"].values[: undone["own"].shape[1]]
        rows = []
        for kind in ("own", "random", "whole", "only"):
            for index, change in enumerate(np.atleast_2d(undone[kind])):
                length = undone["lengths"][index] if kind in ("own", "random") else np.linalg.norm(undone["lengths"])
                row = {"kind": kind, "vector": index + 1, "length": length, "distance": undone["distance"][0]}
                row |= {name: change[skill == name].mean() for name in arithmetic.SKILLS if (skill == name).any()}
                rows.append({**row, "mean": change.mean(), "rms": np.sqrt(np.mean(change**2))})
        return pd.DataFrame(rows)

    def causal_clusters(self) -> pd.DataFrame:
        """Does taking back a vector's movement hurt just the tokens of its clusters?

        For each cluster: mean loss change of its tokens and of all others when its own vector's movement is taken back
        (``inside``, ``outside``); the mean over the other vectors, by the same length, of the change inside
        (``others``); the change by a random direction (``random``); and the rank of its own vector among all by the
        difference inside minus outside, at the same length (1: it hurts this cluster most selectively).
        """
        undone, rows = self._undone, []
        n = undone["own"].shape[1]
        for (order, scaling), labels in self.labels.items():
            if scaling == "zscore":
                continue
            table = significance.homogeneity_table(labels)
            for row in table.itertuples():
                index = row.vector - 1
                inside = (labels.sel(vector=row.vector).values == row.cluster)[:n]
                if not inside.any() or inside.all():
                    continue
                same = undone["same"][index]
                selective = same[:, inside].mean(axis=1) - same[:, ~inside].mean(axis=1)
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
                        "place_share": self._place_share(labels, row.vector, row.cluster),
                        "length": undone["lengths"][index],
                        "inside": undone["own"][index, inside].mean(),
                        "outside": undone["own"][index, ~inside].mean(),
                        "others": others.mean() if len(others) else np.nan,
                        "random": undone["random"][index, inside].mean(),
                        "rank": 1 + int((selective > selective[index]).sum()),
                        "of": len(selective),
                    }
                )
        return pd.DataFrame(rows)

    @staticmethod
    def _place_share(labels: xr.DataArray, vector: int, cluster: int) -> float:
        inside = labels["place"].values[labels.sel(vector=vector).values == cluster]
        return float(np.unique(inside, return_counts=True)[1].max() / len(inside))

    def hessian_sample(self) -> pd.DataFrame:
        """The top eigenvector at a few checkpoints from samples of several sizes, against the largest of them."""
        run = self.run
        checkpoints, settings = run.checkpoints, run.config.basis
        largest = max(run.config.data.hessian_examples, PRESETS["paper"]["data"]["hessian_examples"] // 2)
        config = run.config.model_copy(
            update={"data": run.config.data.model_copy(update={"hessian_examples": 2 * largest})}
        )
        batch = arithmetic.encode(Run(config, run.folder).samples.hessian).to(run.config.device)
        samples = {"reference": batch[largest:]}
        samples |= {
            n: batch[:n] for n in sorted({largest // 25, largest // 5, run.config.data.hessian_examples, largest})
        }
        steps = [run.config.basis_steps[i] for i in np.linspace(0, len(run.config.basis_steps) - 1, 3).astype(int)]
        rows = []
        for step in dict.fromkeys(steps):
            theta = checkpoints.theta(step)
            found = {}
            for name, sample in samples.items():
                generator = torch.Generator().manual_seed(run.config.seed)
                start = torch.randn(theta.numel(), generator=generator).to(theta)
                operator = HessianOperator(checkpoints.token_loss, theta, sample, run.config.memory)
                found[name] = top_eigenpairs(
                    operator, start, 1, tolerance=settings.tolerance, max_products=settings.max_products
                )
            reference = found.pop("reference")
            for n, pairs in found.items():
                cosine = abs(torch.dot(pairs.vectors[0].double(), reference.vectors[0].double())).item()
                row = {"step": step, "examples": n, "reference_examples": len(samples["reference"])}
                row |= {"cosine": cosine, "eigenvalue": pairs.values[0].item(), "products": pairs.products}
                rows.append({**row, "reference_eigenvalue": reference.values[0].item()})
        return pd.DataFrame(rows)

    def specification_curve(self) -> pd.DataFrame:
        """Every combination of the choices that the paper leaves open."""
        choices = [("largest", "answer")]
        if self.variants:
            choices += [("magnitude", "answer"), ("largest", "all"), ("magnitude", "all")]
        found = {}
        for which, targets in choices:
            settings = self.run.config.model_dump()
            settings["basis"] |= {"which": which, "targets": targets}
            own = Run(RunConfig.model_validate(settings), self.run.folder)
            found[which, targets] = self.main if len(found) == 0 else own.projections.load()
        factors = tuple(factor for factor in (1, 5) if (self.main.sizes["step"] - 1) % factor == 0)
        return specification.specification_curve(
            found, ("which", "targets"), self.run.config.clustering, factors=factors
        )

    def clusters(self) -> xr.Dataset:
        """Medoids, quartiles and composition of all clusters, by order and scaling, and of the exact loss."""
        parts = {}
        for (order, scaling), labels in self.labels.items():
            if scaling != "zscore":
                parts[f"{order}, {scaling}"] = summarise_clusters(
                    self.curves[order], self.main["loss"], labels, scaling
                ).drop_vars(["birth_step", "eigenvalue", "residual", "products"])
        loss = self.main["loss"]
        labels = cluster_tokens(loss, self.settings("raw"))
        exact = summarise_clusters(loss, loss, labels)
        whole = xr.concat(
            parts.values(), dim=pd.Index(list(parts), name="kind"), join="outer", fill_value={"tokens": 0}
        )
        whole = xr.merge(
            [
                whole,
                exact.isel(vector=0, drop=True)
                .rename({n: f"exact_{n}" for n in exact.data_vars})
                .rename(cluster="exact_cluster"),
            ]
        )
        whole["birth_step"] = ("vector", self.main["birth_step"].values)
        whole.attrs["hidden_after"] = self.hidden_after
        return whole.map(lambda values: values.astype(np.float16) if values.dtype == np.float32 else values)

    # What made it.

    def _claim(self) -> None:
        file = self.path / "provenance.json"
        settings = json.loads(json.dumps(self.run.config.model_dump(mode="json")))
        if file.exists():
            theirs = json.loads(file.read_text())["settings"]
            if theirs != settings:
                raise ValueError(
                    f"{self.path} holds a study of other settings; delete the folder to make it anew, or give this one "
                    "another --name"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"settings": settings, "bases": list(self.bases), "stages": {}, "software": software()}
        write_atomically(file, json.dumps(record, indent=1).encode() + b"\n")

    def _record(self, name: str, value: str) -> None:
        file = self.path / "provenance.json"
        record = json.loads(file.read_text())
        record["stages"] |= self.run.provenance()["value"].to_dict() | {name: value}
        write_atomically(file, json.dumps(record, indent=1).encode() + b"\n")


def store_summary(file: Path, summary: xr.Dataset) -> None:
    """Keep a small dataset as one file."""
    summary.to_zarr(str(file), mode="w", zarr_format=2, consolidated=False)


def main() -> None:
    """Run a study: the pipeline on all bases, then every table; or finish one that was stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the run")
    parser.add_argument("--name", help="of the study; preset and seed if not given")
    parser.add_argument("--bases", default=",".join(BASES), help="bases that are compared")
    parser.add_argument("--ablation-curvature", type=int, default=16, help="examples for the curvature of other bases")
    parser.add_argument("--no-variants", action="store_true", help="specification curve on one Hessian basis alone")
    parser.add_argument("--tables", help="only these, by name")
    arguments = parser.parse_args()
    overrides = {}
    for assignment in arguments.set:
        name, _, value = assignment.partition("=")
        try:
            overrides[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            overrides[name] = value
    try:
        run = Run.from_preset(arguments.preset, seed=arguments.seed, device=arguments.device, **overrides)
        bases = tuple(arguments.bases.split(","))
        study = Study(run, arguments.name, bases, arguments.ablation_curvature, not arguments.no_variants)
        study.complete(arguments.tables.split(",") if arguments.tables else None)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
