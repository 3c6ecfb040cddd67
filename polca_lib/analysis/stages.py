"""POLCA on a training run of your own: any PyTorch model, checkpoints from anywhere, one folder of results.

    checkpoints -> basis -> projections -> projected loss -> clusters -> report

Each stage is made when first asked for and kept in the folder, named by the hash of what it depends on: changing a
setting computes anew just what depends on it. Work that is stopped, or killed, goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch.utils import _pytree as pytree
from upath import UPath

from polca_lib.storage.artefacts import Artefact, ArtefactMismatch, DamagedFile, fingerprint, provenance
from polca_lib.method.basis import compute_basis
from polca_lib.method.breakthroughs import hidden_threshold
from polca_lib.storage.checkpoints import Checkpoints, Remembered
from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.settings import ClusteringConfig
from polca_lib.method.decomposition import projected_loss
from polca_lib.analysis.engine import carry_out
from polca_lib.report.findings import Findings
from polca_lib.analysis.projections import project_run
from polca_lib.storage.pieces import PieceStore
from polca_lib.report.page import write_report
from polca_lib.analysis.settings import AnalysisSettings
from polca_lib.analysis.status import FILES
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples, to_device


class Analysis:
    """POLCA of one training run.

    Args:
        folder: of results; a path, or a URL that fsspec knows.
        checkpoints: of the run, see :mod:`polca_lib.storage.folders` and :mod:`polca_lib.storage.huggingface`.
        validation: examples whose tokens are decomposed.
        hessian: sample of the training data, of whose mean loss the Hessian is; only a basis of the Hessian needs it.
        tokens: a row per token that ``validation`` gives a loss for, in that order: any columns, which become
            coordinates. With ``text``, ``example`` and ``position`` the report shows contexts.
        settings: see :class:`polca_lib.analysis.settings.AnalysisSettings`; or single ones by keyword, as in
            ``basis={"n_vectors": 8}, seed=1``.
        code: folders of modules that the model or the loss need and workers can't import otherwise.

    Raises:
        ValueError: the model or its loss can't be used (see :meth:`polca_lib.derivatives.token_loss.TokenLoss.check`), the token
            table does not fit, or a setting is not allowed.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoints: Checkpoints,
        validation: Batch,
        *,
        hessian: Batch | None = None,
        tokens: pd.DataFrame | None = None,
        settings: AnalysisSettings | None = None,
        code: Sequence[str] = (),
        **single: Any,
    ):
        self.folder = UPath(folder)
        self.settings = settings or AnalysisSettings.model_validate(single)
        self.steps = self.settings.chosen(checkpoints.steps)
        self.checkpoints = Remembered(checkpoints, self.folder / "checkpoints")
        self.validation, self.hessian, self._given, self._code = validation, hessian, tokens, tuple(code)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per token that is decomposed."""
        loss, first = self.checkpoints.token_loss, next(split_examples(self.validation, 1))
        theta = self.checkpoints.theta(self.steps[0])
        loss.check(theta, to_device(next(split_examples(self.validation, 3)), theta.device))
        given = self._given
        with torch.no_grad():
            own = len(loss(theta, to_device(first, theta.device)))
        if given is None:
            return pd.DataFrame({"example": np.repeat(np.arange(n_examples(self.validation)), own)})
        if len(given) != own * n_examples(self.validation):
            raise ValueError(
                f"tokens has {len(given)} rows; allowed: {own * n_examples(self.validation)}, for each of "
                f"{n_examples(self.validation)} examples gives {own} losses"
            )
        if taken := {"step", "token", "vector", "birth_step", "eigenvalue", "residual", "products"} & set(given):
            raise ValueError(f"tokens has a column {min(taken)!r}, a name that results use; call it something else")
        return given.reset_index(drop=True)

    @cached_property
    def basis(self) -> xr.Dataset:
        """The basis, see :func:`polca_lib.method.basis.compute_basis`."""
        settings = self.settings.basis
        with self._basis.at_work():
            return compute_basis(
                self._basis.path / FILES["basis"],
                settings,
                self.checkpoints,
                None if self.hessian is None else to_device(self.hessian, self.checkpoints.device),
                steps=settings.births(self.steps),
                seed=self.settings.seed,
                memory=self.settings.memory,
            )

    @cached_property
    def projections(self) -> xr.Dataset:
        """Losses and derivatives along the basis, see :func:`polca_lib.analysis.projections.project_run`."""
        basis, tokens = self.basis, self.tokens
        path = self._projection.path / FILES["projection"]
        with self._projection.at_work():
            self._check_loss_is_the_same(path)
            return project_run(
                path,
                self.checkpoints,
                self.steps,
                self.validation,
                tokens,
                basis,
                self.settings.projection,
                self.settings.memory,
                self._code,
            )

    @cached_property
    def clustering(self) -> ClusteringConfig:
        """Settings of the clustering, none left open."""
        return self.settings.clustering.resolved(len(self.tokens), self.steps)

    @cached_property
    def curves(self) -> xr.DataArray:
        """Projected loss, (step, token, vector), in nats."""
        return projected_loss(self.projections, self.clustering.order)

    @cached_property
    def labels(self) -> xr.DataArray:
        """Cluster of each token along each vector, see :func:`polca_lib.method.clustering.cluster_tokens`."""
        projections = self.projections
        path = self._clusters.path / FILES["clusters"]
        template = xr.Dataset(coords={name: c for name, c in projections.coords.items() if "step" not in c.dims})
        with self._clusters.at_work():
            store = PieceStore(path, template, {"cluster": (("vector", "token"), "int64")}, dim="vector")
            store.heal()
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

    def provenance(self) -> pd.DataFrame:
        """What made the results: model, checkpoints, seed, device; commit, time and versions of each stage made."""
        loss = self.checkpoints.token_loss
        rows: dict[str, object] = {
            "model": f"{type(loss.model).__name__}, {loss.n_parameters:,} parameters",
            "checkpoints": f"{len(self.steps)}, steps {self.steps[0]} to {self.steps[-1]}",
            "basis": f"{self.settings.basis.kind}, {self.settings.basis.n_vectors} vectors",
            "seed": self.settings.seed,
            "device": self.checkpoints.device,
            "torch threads": torch.get_num_threads(),
        }
        stages = {"basis": "_basis", "projection": "_projection", "clusters": "_clusters"}
        done = {stage: self.__dict__[name] for stage, name in stages.items() if name in self.__dict__}
        return provenance(rows, done)

    # Each stage is keyed by what its results depend on, and by nothing else.

    @cached_property
    def _basis(self) -> Artefact:
        own = self.settings.basis
        births = sorted({self.steps[0], self.steps[-1], *own.births(self.steps)})
        return Artefact.of_stage(
            self.folder,
            "basis",
            {
                "basis": own.model_dump(mode="json", exclude={"steps"}),
                "births": own.births(self.steps),
                "seed": self.settings.seed,
                "model": _model_key(self.checkpoints.token_loss),
                "checkpoints": {str(step): self.checkpoints.identity(step) for step in births},
                "hessian": None if self.hessian is None else _batch_key(self.hessian),
            },
            {},
        )

    @cached_property
    def _projection(self) -> Artefact:
        return Artefact.of_stage(
            self.folder,
            "projection",
            {
                "projection": self.settings.projection.model_dump(mode="json"),
                "checkpoints": {str(step): self.checkpoints.identity(step) for step in self.steps},
                "validation": _batch_key(self.validation),
                "tokens": hashlib.sha256(self.tokens.to_csv(index=False).encode("utf-8", "surrogatepass")).hexdigest(),
            },
            {"basis": self._basis.key},
        )

    @cached_property
    def _clusters(self) -> Artefact:
        settings = self.clustering.model_dump(mode="json", exclude={"breakthrough_window", "hidden_after"})
        return Artefact.of_stage(self.folder, "clusters", settings, {"projection": self._projection.key})

    def _check_loss_is_the_same(self, path: Path) -> None:
        """The code of a loss has no hash; but what it gave at the first checkpoint is known, once that is stored."""
        try:
            stored = PieceStore.open(path)
        except (FileNotFoundError, DamagedFile):  # what is damaged is made anew, or refused, further on
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


@dataclass(frozen=True)
class _Clustering:
    """Cluster the tokens along one vector."""

    path: Path
    projections: xr.Dataset
    settings: ClusteringConfig

    def __call__(self, index: int) -> None:
        curves = projected_loss(self.projections.isel(vector=[index]), self.settings.order)
        labels = cluster_tokens(curves.isel(vector=0), self.settings)
        PieceStore.open(self.path).write(index, cluster=labels.values)


def _batch_key(batch: Batch) -> str:
    """SHA-256 of all tensors of a batch, and how they are nested."""
    leaves, nest = pytree.tree_flatten(batch)
    digest = hashlib.sha256(str(nest).encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _model_key(loss: TokenLoss) -> str:
    shapes = {name: list(parameter.shape) for name, parameter in loss.parameters.items()}
    return fingerprint([type(loss.model).__name__, str(loss.dtype), list(shapes), shapes])
