"""One run with its ablations: projections on all bases, clusters, movement undone, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import get_args

import joblib
import numpy as np
import pandas as pd
import torch
import xarray as xr

from polca_lib.analysis.analysis import project_together
from polca_lib.method import decomposition, interventions
from polca_lib.method.breakthroughs import hidden_threshold
from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.settings import BasisKind, ClusteringSettings, Scaling
from polca_lib.method.vectors import read_vectors
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings
from polca_paper import tables

BASES = ("hessian", "shuffled", "final", "trajectory", "random", "parameters")
"""Bases that are compared; that of single parameters stands for LCA."""

_FINITE_EXAMPLES = 64  # whose losses are computed after moving along each vector alone
_CAUSAL_EXAMPLES = 400  # whose losses are computed after movement is taken back


class Study:
    """One run and its ablations, from which :mod:`polca_paper.evidence` makes tables.

    Args:
        run: on the Hessian basis.
        bases: that are compared.
        ablation_curvature: number of examples on which curvature along the other bases is measured; 0 for none.
        variants: also run the specification curve on Hessian bases of the largest eigenvalues in magnitude, and of the
            loss of all digits; each needs a basis and projections of its own.
    """

    def __init__(self, run: Run, bases: Sequence[str] = BASES, ablation_curvature: int = 16, variants: bool = True):
        allowed = get_args(BasisKind)
        if unknown := set(bases) - set(allowed):
            raise ValueError(f"bases = {sorted(unknown)} are unknown; allowed: {', '.join(allowed)}")
        if run.settings.basis.kind not in bases:
            raise ValueError(f"bases = {', '.join(bases)} lack the run's own, {run.settings.basis.kind}; add it")
        if ablation_curvature < 0:
            raise ValueError(f"ablation_curvature = {ablation_curvature}; allowed: 0 for none, or a number of examples")
        self.run, self.bases, self.variants = run, tuple(bases), variants
        self.ablation_curvature = min(ablation_curvature, run.settings.data.validation_examples)

    @property
    def settings(self) -> dict[str, object]:
        """Everything that tables depend on."""
        run = self.run.settings.model_dump(mode="json")
        run["basis"]["tolerance"] = self.run.tolerance
        return {
            "run": run,
            "bases": sorted(self.bases),
            "ablation_curvature": self.ablation_curvature,
            "variants": self.variants,
        }

    @property
    def notes(self) -> dict[str, str]:
        """What else made the tables, beyond the settings of the run."""
        return {}

    def on_basis(self, kind: str) -> Run:
        """The run on another basis."""
        if kind == self.run.settings.basis.kind:
            return self.run
        return self.run.on_basis(kind, **self._measured(kind != "parameters"))

    def variant(self, which: str, targets: str) -> Run:
        """The run on a Hessian basis of other eigenvectors, or of the loss of other tokens."""
        settings = self.run.settings.model_dump()
        settings["basis"] |= {"which": which, "targets": targets}
        settings["projection"] |= self._measured()
        return Run(RunSettings.model_validate(settings), self.run.folder)

    def _measured(self, wanted: bool = True) -> dict[str, bool | int | None]:
        """Settings of the curvature along other bases."""
        measured = wanted and self.ablation_curvature > 0
        return {"curvature": measured, "curvature_examples": self.ablation_curvature if measured else None}

    @cached_property
    def projections(self) -> dict[str, xr.Dataset]:
        """By basis, the run's own first; made in as few passes through the model as possible."""
        kinds = sorted(self.bases, key=lambda kind: kind != self.run.settings.basis.kind)
        return dict(zip(kinds, project_together([self.on_basis(kind) for kind in kinds]), strict=True))

    @cached_property
    def main(self) -> xr.Dataset:
        """Projections on the run's own basis."""
        return self.projections[self.run.settings.basis.kind].load()

    @cached_property
    def curves(self) -> dict[str, xr.DataArray]:
        """Projected loss on the run's own basis, by order."""
        orders = decomposition.available_orders(self.main)
        return {order: decomposition.projected_loss(self.main, order) for order in orders}

    @cached_property
    def hidden_after(self) -> int:
        """Tau, in steps."""
        return hidden_threshold(self.main["loss"], self.run.settings.clustering)

    @cached_property
    def batch(self) -> torch.Tensor:
        """The validation examples."""
        return self.run.task.validation.to(self.run.settings.device)

    def clustering(self, scaling: Scaling) -> ClusteringSettings:
        """Settings of the clustering, with another scaling."""
        return self.run.settings.clustering.model_copy(update={"scaling": scaling})

    @cached_property
    def labels(self) -> dict[tuple[str, str], xr.DataArray]:
        """Clusters on the run's own basis, by order and scaling."""
        keys = [(order, scaling) for order in self.curves for scaling in get_args(Scaling)]
        jobs = (joblib.delayed(cluster_tokens)(self.curves[order], self.clustering(scaling)) for order, scaling in keys)
        return dict(zip(keys, joblib.Parallel(n_jobs=-1)(jobs), strict=True))

    @cached_property
    def compared(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every kind of trajectory with every scaling, and what the purest clusters are made of (Table 3)."""
        levels = {"exact loss": self.main["loss"]}
        levels |= {f"POLCA {order}": curves for order, curves in self.curves.items()}
        if "parameters" in self.bases:
            levels["LCA"] = decomposition.projected_loss(self.projections["parameters"], "first")
        rates = {"change in loss": decomposition.loss_change(self.main), "Fisher": decomposition.fisher(self.main)}
        return tables.compare_strategies(levels, rates, self.run.settings.clustering, self.hidden_after, -1)

    @cached_property
    def along_each(self) -> xr.DataArray:
        """True loss change (step, token, vector) of moving along each vector alone, of the first examples."""
        path = self.run.folder / f"along-{self.run.keys['projection']}.zarr"
        steps, batch = self.run.settings.training.checkpoint_steps, self.batch[:_FINITE_EXAMPLES]
        return interventions.move_along(path, self.run.checkpoints, steps, batch, self.run.basis)

    @cached_property
    def undone(self) -> dict[str, np.ndarray]:
        """Loss change per token when movement is taken back at the end of training.

        ``own`` (vector, token): the movement along each vector; ``random``: as much along random directions; ``same``
        (length, vector, token): along each vector by the length of each other; ``whole`` (token): all movement in the
        basis. ``only`` (token): the change from the start with no movement but that in the basis. ``lengths`` of the
        movement along each vector, and ``distance`` from start to end.
        """
        checkpoints, seed = self.run.checkpoints, self.run.settings.seed
        start, end = checkpoints.theta(0), checkpoints.theta(self.run.settings.training.steps)
        vectors = read_vectors(self.run.basis, device=checkpoints.device, dtype=start.dtype)
        loss, batch = checkpoints.token_loss, self.batch[:_CAUSAL_EXAMPLES]

        def change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            return interventions.losses_at(loss, after, batch) - interventions.losses_at(loss, before, batch)

        own, lengths = interventions.ablate_movement(loss, start, end, batch, vectors)
        others = interventions.random_directions(len(vectors), start.numel(), seed, like=start, orthogonal_to=vectors)
        random, _ = interventions.ablate_movement(loss, start, end, batch, others, lengths)
        as_long = [torch.sign(lengths) * length.abs() for length in lengths]
        same = [interventions.ablate_movement(loss, start, end, batch, vectors, each)[0] for each in as_long]
        inside = vectors.T @ lengths
        found = {"own": own, "random": random, "same": torch.stack(same), "lengths": lengths}
        found |= {"whole": change(end, end - inside), "only": change(start, start + inside)}
        arrays = {name: values.cpu().numpy() for name, values in found.items()}
        return {**arrays, "distance": np.array([(end - start).double().norm().item()])}
