"""A run of the paper's tasks: an analysis that first trains the model. Stored results open without checkpoints."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from polca_lib.analysis.analysis import Analysis
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
        settings: see :meth:`polca_lib.tasks.settings.RunSettings.from_preset`.
        folder: folder of the stages; by default ``POLCA_RUNS``, or else ``data/runs`` in the checkout.
        verify: see :class:`polca_lib.analysis.analysis.Analysis`.
    """

    settings: RunSettings

    def __init__(self, settings: RunSettings, folder: Path | None = None, *, verify: bool = False):
        self.settings = settings
        self.folder = Path(folder or os.environ.get("POLCA_RUNS") or ROOT / "data" / "runs")
        self.verify, self._code = verify, ()
        self._witnesses, self._compared = {}, {}
        if settings.threads:
            torch.set_num_threads(settings.threads)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Run:
        """A run with the settings of :meth:`polca_lib.tasks.settings.RunSettings.from_preset`."""
        return cls(RunSettings.from_preset(preset, **overrides))

    def with_settings(self, settings: RunSettings) -> Run:
        """The same training run with other settings of basis, projection and clustering."""
        run = Run(settings, self.folder, verify=self.verify)
        shared = ("task", "checkpoints", "validation", "hessian", "tokens", "_training")
        shared += ("_code", "_witnesses", "_compared")
        run.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        return run

    @cached_property
    def task(self) -> Task:
        """Data of the run. The task ``wikipedia`` prepares its corpus at the first access."""
        if self.settings.task == "wikipedia":
            return Wikipedia(self.settings, self.folder)
        return {"addition": Addition, "grammar": Grammar}[self.settings.task](self.settings)

    @cached_property
    def checkpoints(self) -> TrainedCheckpoints:
        """Checkpoints of the run. Reading the first one trains the model."""
        return TrainedCheckpoints(self._training, self.task, self.settings)

    @cached_property
    def validation(self) -> Batch:
        """Examples whose tokens are decomposed."""
        return self.task.validation

    @cached_property
    def hessian(self) -> Batch:
        """Sample from the training distribution. The Hessian is that of its mean loss."""
        return self.task.hessian

    @property
    def hessian_loss(self) -> Loss:
        """Loss of all tokens, including those the model is not trained on."""
        return self.task.loss_of_all

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per validation token."""
        return self.task.tokens

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the projected checkpoints, in training order."""
        return self.settings.chosen(self.settings.training.checkpoint_steps)

    @property
    def _ends(self) -> tuple[int, int]:
        """First and last step of the training, because the basis does not depend on the projected steps."""
        steps = self.settings.training.checkpoint_steps
        return steps[0], steps[-1]

    @property
    def keys(self) -> dict[str, str]:
        """Name of the folder of each stage."""
        return {stage: getattr(self, f"_{stage}").path.name for stage in ("training", "basis", "projection")}

    def provenance(self) -> pd.DataFrame:
        """Task, preset, seed and device; commit and time of each opened stage; versions of the software."""
        rows = {name: getattr(self.settings, name) for name in ("task", "preset", "seed", "device")}
        rows |= {"torch threads": torch.get_num_threads(), **self._basis_provenance}
        return provenance(rows, self._opened("training", "basis", "projection", "clusters"))

    # The key of a stage contains the settings of the training, not the checkpoints, so it is known before training.

    @cached_property
    def _training(self) -> Artefact:
        config = self.settings.model_dump(mode="json", include={"task", "seed", "device", "model"})
        config["training"] = self.settings.training.key
        if language := self.settings.language.stated("predict_pad"):
            config["language"] = language
        return Artefact.of_stage(self.folder, "training", {**config, **self.task.identity}, {})

    @cached_property
    def _basis(self) -> Artefact:
        basis = self.settings.basis.resolved(self.settings.training.checkpoint_steps).stated("steps", "solver")
        config = {"basis": basis, "hessian_examples": self.settings.data.hessian_examples}
        return self._open_basis(config, {"training": self._training.key})

    @cached_property
    def _projection(self) -> Artefact:
        examples = self.settings.data.validation_examples
        config: dict[str, Any] = {
            "projection": self.settings.projection.stated("storage"),
            "validation_examples": examples,
        }
        if self.settings.steps is not None:
            config["steps"] = self.steps
        return Artefact.of_stage(self.folder, "projection", config, {"basis": self._basis.key})

    @property
    def _run_key(self) -> object:
        return self._training.path.name, self.settings.data.model_dump()
