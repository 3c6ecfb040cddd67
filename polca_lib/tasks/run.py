"""The stages of a run, from a configuration to projections: each is one folder, made when first asked for.

    data -> training -> basis -> projections

A stage's folder is named by the hash of the settings it depends on and of the stages before it. Changing a
setting therefore computes anew just what depends on it and leaves the rest, old results included, in place.

Run ``python -m polca_lib.tasks.run --preset laptop`` to compute all stages with progress bars.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
import xarray as xr

from polca_lib.storage.artefacts import Artefact, provenance
from polca_lib.method.basis import compute_basis, load_basis
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.method.settings import BasisKind
from polca_lib.tasks.settings import PRESET_NAMES, RunConfig, TaskName, parse_assignments
from polca_lib.analysis.projections import project_runs
from polca_lib.tasks.models import build_model
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks.arithmetic import Addition
from polca_lib.tasks.language import Grammar, Wikipedia
from polca_lib.tasks.task import Task
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.tasks.training import train

ROOT = Path(__file__).parents[1]


class Run:
    """One run of a task.

    Args:
        config: its settings.
        folder: where its stages lie; ``data/runs`` of the checkout, or ``POLCA_RUNS``, if not given.
    """

    def __init__(self, config: RunConfig, folder: Path | None = None):
        self.config = config
        self.folder = Path(folder or os.environ.get("POLCA_RUNS") or ROOT / "data" / "runs")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Run:
        """A run by preset and single settings; see :meth:`polca_lib.tasks.settings.RunConfig.from_preset`."""
        return cls(RunConfig.from_preset(preset, **overrides))

    def on_basis(self, kind: BasisKind, *, curvature: bool, curvature_examples: int | None = None) -> Run:
        """The same training run on another basis, with or without curvature along its vectors, of all or of some."""
        settings = self.config.model_dump()
        settings["basis"]["kind"] = kind
        settings["projection"] |= {"curvature": curvature, "curvature_examples": curvature_examples}
        return Run(RunConfig.model_validate(settings), self.folder)

    @cached_property
    def task(self) -> Task:
        """Its data; a corpus is prepared if need be."""
        if self.config.task == "wikipedia":
            return Wikipedia(self.config, self.folder)
        return {"addition": Addition, "grammar": Grammar}[self.config.task](self.config)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per validation token."""
        return self.task.tokens

    @cached_property
    def checkpoints(self) -> CheckpointFolder:
        """Checkpoints of the run; trains it if it is not yet trained."""
        artefact, config, task = self._training, self.config, self.task
        model = build_model(config.model, config.seed, config.device)
        folder = CheckpointFolder(artefact.path, TokenLoss(model, task.loss), config.device)
        with artefact.at_work():
            train(
                model,
                task.loss,
                lambda step: task.batch(step).to(config.device),
                config.training,
                folder,
                groups=task.groups,
            )
        return folder

    @cached_property
    def basis(self) -> xr.Dataset:
        """The basis, see :func:`polca_lib.method.basis.compute_basis`."""
        path = self._basis.path / "basis.zarr"
        if (stored := load_basis(path)) is not None:
            return stored
        checkpoints = self.checkpoints
        with self._basis.at_work():
            batch = self.task.hessian.to(self.config.device)
            if self.config.basis.targets == "all":
                everything = TokenLoss(checkpoints.token_loss.model, self.task.loss_of_all)
                checkpoints = CheckpointFolder(checkpoints.path, everything, self.config.device)
            return compute_basis(
                path,
                self.config.basis,
                checkpoints,
                batch,
                steps=self.config.basis_steps,
                seed=self.config.seed,
                memory=self.config.memory,
            )

    @cached_property
    def projections(self) -> xr.Dataset:
        """Losses and derivatives along the basis, see :func:`polca_lib.analysis.projections.project_run`."""
        if (stored := self._stored_projections()) is not None:
            return stored
        return project_together([self])[0]

    def _stored_projections(self) -> xr.Dataset | None:
        return PieceStore.load(self._projection.path / "projections.zarr")

    @property
    def keys(self) -> dict[str, str]:
        """Name of the folder of each stage."""
        stages = {"training": self._training, "basis": self._basis, "projection": self._projection}
        return {stage: artefact.path.name for stage, artefact in stages.items()}

    # Each stage is keyed by what its results depend on, and by nothing else.

    @cached_property
    def _training(self) -> Artefact:
        config = self.config.model_dump(mode="json")
        del config["training"]["state_every"]
        settings = {name: config[name] for name in ("task", "seed", "device", "model", "training")}
        return Artefact.of_stage(self.folder, "training", {**settings, **self.task.identity}, {})

    @cached_property
    def _basis(self) -> Artefact:
        config = self.config.model_dump(mode="json")
        settings = {
            "basis": {**config["basis"], "n_vectors": self.config.n_vectors},
            "hessian_examples": config["data"]["hessian_examples"],
        }
        return Artefact.of_stage(self.folder, "basis", settings, {"training": self._training.key})

    @cached_property
    def _projection(self) -> Artefact:
        config = self.config.model_dump(mode="json")
        settings = {
            "projection": config["projection"],
            "validation_examples": config["data"]["validation_examples"],
        }
        return Artefact.of_stage(self.folder, "projection", settings, {"basis": self._basis.key})

    def provenance(self) -> pd.DataFrame:
        """What made the results: preset, seed, device, and commit, time and versions of each stage computed."""
        config = self.config
        rows = {
            "task": config.task,
            "preset": config.preset,
            "seed": config.seed,
            "device": config.device,
            "torch threads": torch.get_num_threads(),
        }
        stages = {"training": "_training", "basis": "_basis", "projection": "_projection"}
        done = {stage: self.__dict__[name] for stage, name in stages.items() if name in self.__dict__}
        return provenance(rows, done)


def project_together(runs: Sequence[Run]) -> list[xr.Dataset]:
    """Projections of one training run on several bases, at the cost of one pass through the model for all.

    Those that measure the curvature of all tokens have a pass each.

    Args:
        runs: that differ in ``basis`` and ``projection`` alone, see :func:`polca_lib.analysis.projections.project_runs`.

    Raises:
        ValueError: they are not of one training run and one validation sample.
    """
    first = runs[0]
    for run in runs[1:]:
        for name, own, other in (
            ("training", run.keys["training"], first.keys["training"]),
            ("data", run.config.data, first.config.data),
        ):
            if own != other:
                raise ValueError(
                    f"{name} = {own} of a run differs from {other} of the first: runs that are projected together may "
                    "differ in basis and projection alone; project them one by one"
                )
    missing = [run for run in runs if run._stored_projections() is None]
    alone = [run for run in missing if run.config.projection.curvature_of_all]
    for group in filter(None, [*([run] for run in alone), [run for run in missing if run not in alone]]):
        bases = [run.basis for run in group]
        with contextlib.ExitStack() as stack:
            # Each is told the time of all; in one order, or two processes might wait for each other.
            for run in sorted(group, key=lambda run: run._projection.path):
                stack.enter_context(run._projection.at_work())
            project_runs(
                [run._projection.path / "projections.zarr" for run in group],
                first.checkpoints,
                first.config.training.checkpoint_steps,
                first.task.validation.to(first.config.device),
                first.tokens,
                bases,
                [run.config.projection for run in group],
                first.config.memory,
            )
    return [run._stored_projections() for run in runs]


def main() -> None:
    """Compute all stages of a run, on its own basis and on those named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--task", choices=get_args(TaskName), default="addition")
    parser.add_argument("--preset", choices=PRESET_NAMES, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the run")
    parser.add_argument("--beside", default="", metavar="KINDS", help="other bases, such as random,parameters")
    arguments = parser.parse_args()
    own = {"task": arguments.task, "seed": arguments.seed, "device": arguments.device}
    try:
        run = Run.from_preset(arguments.preset, **{**own, **parse_assignments(arguments.set)})
        own = run.config.projection
        measured = own.curvature and not own.curvature_of_all  # curvature of all tokens costs a pass of its own
        beside = [
            run.on_basis(kind, curvature=measured, curvature_examples=own.curvature_examples if measured else None)
            for kind in arguments.beside.split(",")
            if kind
        ]
        project_together([run, *beside])
    except ValueError as error:
        parser.error(str(error))
    print(run.provenance().to_string(header=False))


if __name__ == "__main__":
    main()
