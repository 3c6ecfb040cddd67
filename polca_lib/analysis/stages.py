"""POLCA of one training run, stage by stage: any PyTorch model, checkpoints from anywhere, one folder of results.

    checkpoints -> basis -> projections -> projected loss -> clusters -> findings -> page

Each stage is computed when it is first asked for and kept in the folder, under the hash of what it depends on. Changing
a setting computes only what depends on it. Work that was stopped, or killed, resumes where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
import xarray as xr
from upath import UPath

from polca_lib.analysis.engine import carry_out
from polca_lib.analysis.plan import Plan, plan
from polca_lib.analysis.projections import project_runs
from polca_lib.analysis.settings import AnalysisSettings
from polca_lib.analysis.status import FILES
from polca_lib.derivatives.token_loss import Batch, Loss, TokenLoss, n_examples, split_examples, to_device
from polca_lib.method.basis import compute_basis, load_basis
from polca_lib.method.breakthroughs import hidden_threshold
from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.decomposition import projected_loss
from polca_lib.method.settings import BasisKind, BasisSettings, ClusteringSettings
from polca_lib.report.findings import Findings
from polca_lib.report.page import write_report
from polca_lib.storage.artefacts import Artefact, ArtefactMismatch, DamagedFile, provenance
from polca_lib.storage.checkpoints import Checkpoints, ChecksummedCheckpoints
from polca_lib.storage.hashing import hash_batch, hash_json, hash_table
from polca_lib.storage.pieces import PieceStore

# Columns of a token table that results already have.
_RESERVED = {"step", "token", "vector", "birth_step", "eigenvalue", "residual", "products"}


class Analysis:
    """POLCA of one training run.

    Args:
        folder: of results; a path, or a URL that fsspec knows.
        checkpoints: of the run, see :mod:`polca_lib.storage.folders` and :mod:`polca_lib.storage.huggingface`.
        validation: examples whose tokens are decomposed.
        hessian: sample of the training data, of whose mean loss the Hessian is; only a basis of the Hessian needs it.
        tokens: one row per token that ``validation`` gives a loss for, in that order. Columns may be anything; they
            become coordinates. With ``text``, ``example`` and ``position`` the report shows contexts.
        hessian_loss: loss whose Hessian is taken with ``basis.targets = "all"``, if it is not the analysed one.
        settings: see :class:`polca_lib.analysis.settings.AnalysisSettings`; or single ones by keyword, as in
            ``basis={"n_vectors": 8}, seed=1``.
        code: folders of modules that the model or the loss need and that workers can't import otherwise.
        verify: read every stored byte when a stage is opened, and compute damaged pieces again, as ``polca run`` does.
            Otherwise damage is found when the piece is read.

    Raises:
        ValueError: the model or its loss can't be used (see
            :meth:`polca_lib.derivatives.token_loss.TokenLoss.check`), the token table does not fit, or a setting is not
            allowed.
    """

    settings: AnalysisSettings
    folder: Path

    def __init__(
        self,
        folder: str | Path,
        checkpoints: Checkpoints,
        validation: Batch,
        *,
        hessian: Batch | None = None,
        tokens: pd.DataFrame | None = None,
        hessian_loss: Loss | None = None,
        settings: AnalysisSettings | None = None,
        code: Sequence[str] = (),
        verify: bool = False,
        **single: Any,
    ):
        self.folder = UPath(folder)
        self.settings = settings or AnalysisSettings.model_validate(single)
        if self.settings.basis.targets == "all" and hessian_loss is None:
            raise ValueError(
                "basis.targets = 'all' needs a hessian_loss, a loss of all tokens; allowed without: 'answer'"
            )
        self.checkpoints = ChecksummedCheckpoints(checkpoints, self.folder / "checkpoints")
        self.validation, self.hessian, self.hessian_loss = validation, hessian, hessian_loss
        self._given, self._code, self.verify = tokens, tuple(code), verify
        _ = self.steps  # refuse steps that have no checkpoint here and now
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)

    def on_basis(
        self, kind: BasisKind, *, curvature: bool = False, curvature_examples: int | None = None, **basis: Any
    ) -> Self:
        """The same analysis on another basis; :func:`project_together` projects several in one pass.

        Args:
            kind: of the basis.
            curvature, curvature_examples: of the projections on it.
            basis: other settings of the basis that differ.
        """
        values = self.settings.model_dump()
        values["basis"] |= {"kind": kind, **basis}
        values["projection"] |= {"curvature": curvature, "curvature_examples": curvature_examples}
        if not curvature and values["clustering"]["order"] in ("second", "exact"):
            values["clustering"]["order"] = "trapezoid"  # which those approximate, and which needs no curvature
        return self.with_settings(type(self.settings).model_validate(values))

    def with_settings(self, settings: AnalysisSettings) -> Self:
        """The same analysis with other settings of basis, projection and clustering."""
        other = object.__new__(type(self))
        shared = (
            "folder",
            "checkpoints",
            "validation",
            "hessian",
            "hessian_loss",
            "_given",
            "_code",
            "verify",
            "tokens",
        )
        other.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        other.settings = settings
        return other

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are used, in training order."""
        return self.settings.chosen(self.checkpoints.steps)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per token that is decomposed."""
        loss, theta = self.checkpoints.token_loss, self.checkpoints.theta(self.steps[0])
        loss.check(theta, to_device(next(split_examples(self.validation, 3)), theta.device))
        with torch.no_grad():
            per_example = len(loss(theta, to_device(next(split_examples(self.validation, 1)), theta.device)))
        examples, given = n_examples(self.validation), self._given
        if given is None:
            return pd.DataFrame({"example": np.repeat(np.arange(examples), per_example)})
        if len(given) != per_example * examples:
            raise ValueError(
                f"tokens has {len(given)} rows; allowed: {per_example * examples}, for each of "
                f"{examples} examples gives {per_example} losses"
            )
        if taken := _RESERVED & set(given):
            raise ValueError(f"tokens has a column {min(taken)!r}, a name that results use; call it something else")
        return given.reset_index(drop=True)

    @cached_property
    def basis(self) -> xr.Dataset:
        """The basis, see :func:`polca_lib.method.basis.compute_basis`."""
        artefact = self._basis
        if self.stored("basis") is not None:
            return load_basis(artefact.path / FILES["basis"])
        other_loss = self.settings.basis.targets == "all"
        with artefact.at_work():
            return compute_basis(
                artefact.path / FILES["basis"],
                self._basis_settings,
                self.checkpoints,
                None if self.hessian is None else to_device(self.hessian, self.checkpoints.device),
                steps=self._births,
                seed=self.settings.seed,
                memory=self.settings.memory,
                hessian_loss=TokenLoss(self.checkpoints.token_loss.model, self.hessian_loss) if other_loss else None,
            )

    @cached_property
    def projections(self) -> xr.Dataset:
        """Losses and derivatives along the basis, see :func:`polca_lib.analysis.projections.project_runs`."""
        return project_together([self])[0]

    @cached_property
    def clustering(self) -> ClusteringSettings:
        """Settings of the clustering, none left open."""
        return self.settings.clustering.resolved(self.projections.sizes["token"], self.steps)

    @cached_property
    def curves(self) -> xr.DataArray:
        """Projected loss L_b(x, t), Eq. 10: (step, token, vector), in nats."""
        return projected_loss(self.projections, self.clustering.order)

    @cached_property
    def labels(self) -> xr.DataArray:
        """Cluster of each token along each vector, see :func:`polca_lib.method.clustering.cluster_tokens`."""
        artefact, projections = self._clusters, self.projections
        path = artefact.path / FILES["clusters"]
        if (stored := self.stored("clusters")) is not None:
            return stored["cluster"].load()
        template = xr.Dataset(coords={name: c for name, c in projections.coords.items() if "step" not in c.dims})
        with artefact.at_work():
            store = PieceStore(path, template, {"cluster": (("vector", "token"), "int64")}, dim="vector")
            store.repair_pieces()
            carry_out(
                _Clustering(path, projections, self.clustering),
                store.missing,
                total=store.pieces,
                description="clusters",
                unit="vector",
            )
            return PieceStore.load(path)["cluster"].load()

    @cached_property
    def hidden_after(self) -> int | None:
        """Step after which the mean loss has gone flat and breakthroughs are hidden; none if it never falls."""
        try:
            return hidden_threshold(self.projections["loss"], self.clustering)
        except ValueError:
            return None

    @cached_property
    def findings(self) -> Findings:
        """All that was found, in tables."""
        return Findings(self.projections, self.curves, self.labels, self.clustering, self.hidden_after)

    @property
    def breakthroughs(self) -> pd.DataFrame:
        """One row per cluster, see :attr:`polca_lib.report.findings.Findings.clusters`."""
        return self.findings.clusters

    def report(self, path: str | Path = "report.html", title: str = "POLCA") -> Path:
        """Write a page that shows all of it, see :func:`polca_lib.report.page.write_report`."""
        return write_report(UPath(path), self.findings, title=title, provenance=self.provenance())

    def plan(
        self, *, checkpoints: int | None = None, workers: int = 1, operations_per_second: float | None = None
    ) -> Plan:
        """What this analysis will take, see :func:`polca_lib.analysis.plan.plan`.

        Args:
            checkpoints: how many to count with; those there are if not given.
            workers: that share the projections.
            operations_per_second: of a worker; measured on this device if not given.
        """
        return plan(
            self.checkpoints.token_loss,
            self.validation,
            checkpoints=checkpoints or len(self.steps),
            basis=self._basis_settings,
            projection=self.settings.projection,
            hessian_batch=self.hessian,
            device=self.checkpoints.device,
            memory=self.settings.memory,
            workers=workers,
            operations_per_second=operations_per_second,
        )

    def provenance(self) -> pd.DataFrame:
        """What made the results: model, checkpoints, seed, device; commit, time and versions of each stage made."""
        loss = self.checkpoints.token_loss
        rows: dict[str, object] = {
            "model": f"{type(loss.model).__name__}, {loss.n_parameters:,} parameters",
            "checkpoints": f"{len(self.steps)}, steps {self.steps[0]} to {self.steps[-1]}",
            "basis": f"{self.settings.basis.kind}, {self._basis_settings.n_vectors} vectors",
            "seed": self.settings.seed,
            "device": self.checkpoints.device,
            "torch threads": torch.get_num_threads(),
        }
        return provenance(rows, self._opened("basis", "projection", "clusters"))

    def _opened(self, *stages: str) -> dict[str, Artefact]:
        """Artefacts of the stages that were asked for so far."""
        return {stage: self.__dict__[f"_{stage}"] for stage in stages if f"_{stage}" in self.__dict__}

    # Each stage is keyed by what its results depend on, and by nothing else.

    @property
    def _run_key(self) -> object:
        """What analyses that are projected together share."""
        return (*(self.checkpoints.identity(step) for step in self.steps), hash_batch(self.validation))

    @property
    def _basis_settings(self) -> BasisSettings:
        return self.settings.basis.resolved(self.checkpoints.steps)

    @property
    def _births(self) -> list[int]:
        """Basis checkpoints: with ``basis.every`` any that there is, else one of those that are used."""
        basis = self.settings.basis
        return basis.births(self.checkpoints.steps if basis.every is not None else self.steps)

    @cached_property
    def _basis(self) -> Artefact:
        births = self._births
        read = sorted({self.steps[0], self.steps[-1], *births})
        settings = {
            "basis": self._basis_settings.stated("targets", "solver", exclude=("steps", "every")),
            "births": births,
            "seed": self.settings.seed,
            "model": _model_key(self.checkpoints.token_loss),
            "checkpoints": {str(step): self.checkpoints.identity(step) for step in read},
            "hessian": None if self.hessian is None else hash_batch(self.hessian),
        }
        return Artefact.of_stage(self.folder, "basis", settings, {})

    @cached_property
    def _projection(self) -> Artefact:
        # A table that was given is hashed as it is, so that results open without the model.
        tokens = self.tokens if self._given is None else self._given.reset_index(drop=True)
        settings = {
            "projection": self.settings.projection.stated(),
            "checkpoints": {str(step): self.checkpoints.identity(step) for step in self.steps},
            "validation": hash_batch(self.validation),
            "tokens": hash_table(tokens),
        }
        return Artefact.of_stage(self.folder, "projection", settings, {"basis": self._basis.key})

    @cached_property
    def _clusters(self) -> Artefact:
        settings = self.clustering.stated(exclude=("breakthrough_window", "hidden_after"))
        return Artefact.of_stage(self.folder, "clusters", settings, {"projection": self._projection.key})

    def stored(self, stage: str) -> xr.Dataset | None:
        """What is kept of a stage, if all of it is there; nothing is computed.

        Args:
            stage: ``basis``, ``projection`` or ``clusters``.
        """
        artefact: Artefact = getattr(self, f"_{stage}")
        path = artefact.path / FILES[stage]
        if self.verify:
            with contextlib.suppress(FileNotFoundError, DamagedFile):  # then computing the stage repairs it
                if (store := PieceStore.open(path)).damaged():
                    with artefact.at_work():
                        store.repair_pieces()
        return PieceStore.load(path)

    def _check_loss_is_the_same(self) -> None:
        """The code of a loss has no hash; but what it gave at the first checkpoint is known, once that is stored."""
        path = self._projection.path / FILES["projection"]
        try:
            stored = PieceStore.open(path)
        except (FileNotFoundError, DamagedFile):  # what is damaged is repaired, or refused, further on
            return
        if not stored.done()[stored.parts - 1] or not stored.missing():
            return
        kept = stored.dataset()["loss"].isel(step=0).values
        theta, few = self.checkpoints.theta(self.steps[0]), next(split_examples(self.validation, 3))
        with torch.no_grad():
            now = self.checkpoints.token_loss(theta, to_device(few, theta.device)).cpu().numpy()
        if not np.allclose(now, kept[: len(now)], rtol=1e-3, atol=1e-5):
            raise ArtefactMismatch(
                f"the model or its loss gives {now[0]:.4f} for the first token of "
                f"{self.checkpoints.name(self.steps[0])}, but {kept[0]:.4f} when {path} was begun; use another folder, "
                "or delete this one to recompute it"
            )


def project_together(analyses: Sequence[Analysis]) -> list[xr.Dataset]:
    """Projections of one training run on several bases, at the cost of one pass through the model for all.

    Those that measure the curvature of all tokens have a pass each.

    Args:
        analyses: that differ in basis, projection and clustering alone, see :meth:`Analysis.on_basis`.

    Raises:
        ValueError: they are not of the same checkpoints, examples and steps, or their settings do not go together
            (see :func:`polca_lib.analysis.projections.project_runs`).
    """
    first = analyses[0]
    for other in analyses[1:]:
        for what, theirs, ours in (("run", other._run_key, first._run_key), ("steps", other.steps, first.steps)):
            if theirs != ours:
                raise ValueError(
                    f"{what} = {theirs} of an analysis differs from {ours} of the first: analyses that are projected "
                    "together may differ in basis, projection and clustering alone; project them one by one"
                )
    missing = [one for one in analyses if one.stored("projection") is None]
    alone = [one for one in missing if one.settings.projection.curvature_of_all]
    together = [one for one in missing if one not in alone]
    for group in filter(None, [*([one] for one in alone), together]):
        bases, tokens = [one.basis for one in group], first.tokens
        with contextlib.ExitStack() as stack:
            # Acquire locks in sorted order to avoid deadlock.
            for one in sorted(group, key=lambda one: str(one._projection.path)):
                stack.enter_context(one._projection.at_work())
            for one in group:
                one._check_loss_is_the_same()
            project_runs(
                [one._projection.path / FILES["projection"] for one in group],
                first.checkpoints,
                first.steps,
                to_device(first.validation, first.checkpoints.device),
                tokens,
                bases,
                [one.settings.projection for one in group],
                first.settings.memory,
                first._code,
            )
    return [one.stored("projection") for one in analyses]


@dataclass(frozen=True)
class _Clustering:
    """Cluster the tokens along one vector."""

    path: Path
    projections: xr.Dataset
    settings: ClusteringSettings

    def __call__(self, index: int) -> None:
        curves = projected_loss(self.projections.isel(vector=[index]), self.settings.order)
        labels = cluster_tokens(curves.isel(vector=0), self.settings)
        PieceStore.open(self.path).write(index, cluster=labels.values)


def _model_key(loss: TokenLoss) -> str:
    shapes = {name: list(parameter.shape) for name, parameter in loss.parameters.items()}
    return hash_json([type(loss.model).__name__, str(loss.dtype), list(shapes), shapes])
