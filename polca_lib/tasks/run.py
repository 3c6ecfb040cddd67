"""A run of the paper's tasks: an analysis that trains first.

    data -> training -> basis -> projections -> ...

Results that are there open without training, and without checkpoints.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from polca_lib.analysis.stages import Analysis
from polca_lib.derivatives.token_loss import Batch, Loss
from polca_lib.storage.artefacts import Artefact, provenance
from polca_lib.tasks.arithmetic import Addition
from polca_lib.tasks.language import Grammar, Wikipedia
from polca_lib.tasks.settings import RunSettings
from polca_lib.tasks.task import Task
from polca_lib.tasks.training import TrainedCheckpoints

ROOT = Path(__file__).parents[2]


class Run(Analysis):
    """One run of a task of the paper.

    Args:
        settings: all of them, see :meth:`polca_lib.tasks.settings.RunSettings.from_preset`.
        folder: where its stages lie; ``data/runs`` of the checkout, or ``POLCA_RUNS``, if not given.
    """

    settings: RunSettings

    def __init__(self, settings: RunSettings, folder: Path | None = None):
        self.settings = settings
        self.folder = Path(folder or os.environ.get("POLCA_RUNS") or ROOT / "data" / "runs")
        self.verify, self._code = False, ()
        if settings.threads:
            torch.set_num_threads(settings.threads)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Run:
        """A run by preset and single settings; see :meth:`polca_lib.tasks.settings.RunSettings.from_preset`."""
        return cls(RunSettings.from_preset(preset, **overrides))

    def with_settings(self, settings: RunSettings) -> Run:
        """The same training run with other settings of basis, projection and clustering."""
        other = Run(settings, self.folder)
        shared = ("task", "checkpoints", "validation", "hessian", "tokens", "_training")
        other.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        return other

    @cached_property
    def task(self) -> Task:
        """Its data; a corpus is prepared if need be."""
        if self.settings.task == "wikipedia":
            return Wikipedia(self.settings, self.folder)
        return {"addition": Addition, "grammar": Grammar}[self.settings.task](self.settings)

    @cached_property
    def checkpoints(self) -> TrainedCheckpoints:
        """Checkpoints of the run, which is trained when weights are first asked for."""
        return TrainedCheckpoints(self._training, self.task, self.settings)

    @cached_property
    def validation(self) -> Batch:
        """Examples whose tokens are decomposed."""
        return self.task.validation

    @cached_property
    def hessian(self) -> Batch:
        """Sample of the training distribution, of whose mean loss the Hessian is."""
        return self.task.hessian

    @property
    def hessian_loss(self) -> Loss:
        """The loss of all tokens, also those that the model is not trained on."""
        return self.task.loss_of_all

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per validation token."""
        return self.task.tokens

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are projected, in training order."""
        return self.settings.chosen(self.settings.training.checkpoint_steps)

    @property
    def keys(self) -> dict[str, str]:
        """Name of the folder of each stage."""
        stages = {"training": self._training, "basis": self._basis, "projection": self._projection}
        return {stage: artefact.path.name for stage, artefact in stages.items()}

    def provenance(self) -> pd.DataFrame:
        """What made the results: preset, seed, device, and commit, time and versions of each stage computed."""
        rows = {name: getattr(self.settings, name) for name in ("task", "preset", "seed", "device")}
        rows["torch threads"] = torch.get_num_threads()
        return provenance(rows, self._opened("training", "basis", "projection", "clusters"))

    # Settings stand for the checkpoints that they train: a stage is named before anything is trained.

    @cached_property
    def _training(self) -> Artefact:
        settings = self.settings.model_dump(mode="json", include={"task", "seed", "device", "model"})
        settings["training"] = self.settings.training.stated(exclude=["state_every"])
        return Artefact.of_stage(self.folder, "training", {**settings, **self.task.identity}, {})

    @cached_property
    def _basis(self) -> Artefact:
        basis = self.settings.basis.stated("steps", "solver")
        settings = {
            "basis": {**basis, "n_vectors": self.settings.n_vectors},
            "hessian_examples": self.settings.data.hessian_examples,
        }
        return Artefact.of_stage(self.folder, "basis", settings, {"training": self._training.key})

    @cached_property
    def _projection(self) -> Artefact:
        settings: dict[str, object] = {
            "projection": self.settings.projection.stated(),
            "validation_examples": self.settings.data.validation_examples,
        }
        if self.settings.steps is not None:
            settings["steps"] = self.steps
        return Artefact.of_stage(self.folder, "projection", settings, {"basis": self._basis.key})

    @property
    def _run_key(self) -> object:
        return self._training.path.name, self.settings.data.model_dump()
