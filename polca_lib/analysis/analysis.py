"""POLCA of one training run, stage by stage: any PyTorch model, any checkpoints, one folder of results.

    checkpoints -> basis -> projections -> projected loss -> clusters -> findings -> page

Each stage is computed on first use and stored under the hash of what it depends on. A changed setting recomputes only
the stages that depend on it. Stopped or killed work resumes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from upath import UPath

from polca_lib.analysis.engine import carry_out
from polca_lib.analysis.plan import Plan, plan
from polca_lib.analysis.settings import AnalysisSettings
from polca_lib.analysis.status import FILES
from polca_lib.analysis.workers import project_runs
from polca_lib.derivatives.batches import as_batch
from polca_lib.derivatives.finite_differences import check_derivatives
from polca_lib.derivatives.memory import checked_device
from polca_lib.derivatives.token_loss import Batch, Loss, TokenLoss, direction, split_examples, to_device
from polca_lib.method.basis import WITHOUT_HESSIAN, compute_basis, load_basis
from polca_lib.method.breakthroughs import hidden_threshold
from polca_lib.method.checkpoint_spacing import advice
from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.decomposition import projected_loss
from polca_lib.method.settings import (
    FORMER_TOLERANCE,
    HESSIAN_KINDS,
    BasisKind,
    BasisSettings,
    ClusteringSettings,
    check_n_vectors,
)
from polca_lib.report.findings import Findings, checkpoint_spacing
from polca_lib.report.page import write_report
from polca_lib.storage.artefacts import Artefact, ArtefactMismatch, DamagedFile, provenance, write_atomically
from polca_lib.storage.checkpoints import Checkpoints, ChecksummedCheckpoints
from polca_lib.storage.columns import separate_columns
from polca_lib.storage.hashing import hash_batch, hash_json, hash_table, hash_tensors
from polca_lib.storage.pieces import PieceStore, is_begun
from polca_lib.storage.witness import Witness


class Analysis:
    """POLCA of one training run.

    Args:
        folder: folder of results: a path, or a URL that fsspec supports.
        checkpoints: checkpoints of the run, see :mod:`polca_lib.storage.checkpoint_folders` and
            :mod:`polca_lib.storage.huggingface`.
        validation: examples whose tokens are decomposed, see :func:`polca_lib.derivatives.batches.as_batch`.
        hessian: sample of the training data whose mean loss has the Hessian; only a Hessian basis needs it.
        tokens: one row per token loss of ``validation``, in the same order. Columns become coordinates, see
            :mod:`polca_lib.storage.columns`. With ``text`` the report shows contexts. ``example`` and ``position`` are
            added if missing.
        hessian_loss: loss for the Hessian with ``basis.targets = "all"``.
        settings: all settings; or single ones as keywords, such as ``basis={"n_vectors": 8}, seed=1``.
        code: folders with modules that the model or the loss need and that workers can't import otherwise.
        verify: read every stored byte when a stage is opened, and recompute damaged pieces, as ``polca run`` does.
            Otherwise damage is only found when a piece is read.

    Raises:
        ValueError: a setting is not allowed, or a step has no checkpoint.
    """

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
        self.checkpoints = ChecksummedCheckpoints(checkpoints, self.folder / "checkpoints")
        self.validation = as_batch(validation, "validation")
        self.hessian = None if hessian is None else as_batch(hessian, "hessian")
        self.hessian_loss = hessian_loss
        self._token_table, self._code, self.verify = tokens, tuple(code), verify
        self._witnesses, self._compared = {}, {}
        self._check()
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)

    def on_basis(
        self, kind: BasisKind, *, curvature: bool = False, curvature_examples: int | None = None, **basis: Any
    ) -> Self:
        """The same analysis on another basis; :func:`project_together` projects several in one pass.

        Args:
            kind: kind of the basis.
            curvature, curvature_examples: settings of its projections.
            basis: other settings of the basis to change.
        """
        values = self.settings.model_dump()
        values["basis"] |= {"kind": kind, **basis}
        values["projection"] |= {"curvature": curvature, "curvature_examples": curvature_examples}
        if not curvature and values["clustering"]["order"] in ("second", "exact"):
            values["clustering"]["order"] = "trapezoid"  # second order without curvature
        return self.with_settings(type(self.settings).model_validate(values))

    def with_settings(self, settings: AnalysisSettings) -> Self:
        """The same analysis with other settings of basis, projection and clustering."""
        # Share what does not depend on these settings, so that the token table is checked only once.
        shared = {"folder", "checkpoints", "validation", "hessian", "hessian_loss", "verify"}
        shared |= {"tokens", "_token_table", "_code", "_witnesses", "_compared", "_fixed"}
        analysis = object.__new__(type(self))
        analysis.__dict__.update({name: value for name, value in self.__dict__.items() if name in shared})
        analysis.settings = settings
        analysis._check()
        return analysis

    def _check(self) -> None:
        """Refuse what settings and steps tell: missing losses or samples, steps without a checkpoint, many vectors."""
        if self.settings.basis.targets == "all" and self.hessian_loss is None:
            raise ValueError(
                "basis.targets = 'all' needs hessian_loss, the loss of all tokens; allowed without: 'answer'"
            )
        if self.hessian is None and (kind := self.settings.basis.kind) in HESSIAN_KINDS:
            raise ValueError(
                f"basis.kind = {kind!r} needs a batch for the Hessian, Subject.hessian; allowed without: "
                f"{WITHOUT_HESSIAN}"
            )
        checked_device(str(self.checkpoints.device))
        _ = self._births
        check_n_vectors(self._basis_settings.n_vectors, self.checkpoints.token_loss.n_parameters)
        self.settings.clustering.check(self.steps)

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the checkpoints to analyse, in training order."""
        return self.settings.chosen(self.checkpoints.steps)

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per token that is decomposed.

        Raises:
            ValueError: the table does not fit, or the model or its loss can't be used (see
                :meth:`polca_lib.derivatives.token_loss.TokenLoss.check`).
        """
        table, theta = self._token_table, self.checkpoints.theta(self.steps[0])
        texts = () if table is None or "text" not in table else list(table["text"])
        batch = to_device(self.validation, theta.device)
        counts = self.checkpoints.token_loss.check(theta, batch, "validation", texts)
        if table is None:
            self._keep_counts(counts)
        return self.with_places(counts)

    def with_places(self, counts: Int[np.ndarray, " example"]) -> pd.DataFrame:
        """The token table, with example and position of each token.

        Args:
            counts: number of losses of each example.

        Raises:
            ValueError: the table has another number of rows.
        """
        table, added = self._token_table, _numbered(counts)
        if table is None:
            return added
        if len(table) != len(added):
            least, most, examples = counts.min(), counts.max(), f"{len(counts)} examples"
            each = f"each of {examples} gives" if least == most else f"{examples} give {least} to"
            raise ValueError(f"tokens has {len(table)} rows; allowed: {len(added)}, because {each} {most} losses")
        return pd.concat([added[[name for name in added if name not in table]], table.reset_index(drop=True)], axis=1)

    @cached_property
    def _counts(self) -> tuple[Path, list[int] | None]:
        """File with the number of losses of each example, so that results open without running the model."""
        loss = self.checkpoints.token_loss
        key = hash_json([hash_batch(self.validation), type(loss.model).__name__, loss.n_parameters])
        file = self.folder / "tokens" / f"{key[:16]}.json"
        return file, json.loads(file.read_text()) if file.exists() else None

    def _keep_counts(self, counts: Int[np.ndarray, " example"]) -> None:
        """Store the number of losses of each example, or compare it with what is stored."""
        file, stored = self._counts
        if stored not in (None, counts.tolist()):
            raise ArtefactMismatch(
                f"the loss gives {counts.sum()} losses for validation, but {sum(stored)} when this run began: it has "
                f"changed; use another folder, or delete {file}"
            )
        with contextlib.suppress(OSError):  # a folder that can't be written: count again at the next opening
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(counts.tolist()).encode())

    @cached_property
    def basis(self) -> xr.Dataset:
        """The basis, see :func:`polca_lib.method.basis.compute_basis`."""
        path = self._basis.path / FILES["basis"]
        self._compare_loss("basis")
        if self.stored("basis") is not None:
            return load_basis(path)
        self.check_before()
        with self._basis.at_work():
            self._compare_loss("basis", at_work=True)
            return compute_basis(
                path,
                self._basis_settings,
                self.checkpoints,
                None if self.hessian is None else to_device(self.hessian, self.checkpoints.device),
                steps=self._births,
                seed=self.settings.seed,
                memory=self.settings.memory,
                hessian_loss=None if self.settings.basis.targets == "answer" else self.hessian_token_loss,
                ends=self._ends,
            )

    def check_before(self) -> None:
        """Refuse what can be refused before anything is computed: data, derivatives, settings.

        Raises:
            ValueError: see :attr:`tokens`; second derivatives are missing or wrong; settings do not fit the tokens.
        """
        self.settings.clustering.check(self.steps, len(self.tokens))
        theta = self.checkpoints.theta(self.steps[0])
        if self.settings.projection.curvature:
            pair = to_device(next(split_examples(self.validation, 2)), theta.device)
            check_derivatives(self.checkpoints.token_loss, theta, pair, direction(theta)[None], order=2)
        if self.settings.basis.kind in HESSIAN_KINDS:
            self.hessian_token_loss.check_data(theta, to_device(self.hessian, theta.device), "hessian")
        # Look at three checkpoints, and at all if these are equal.
        middle = self.steps[len(self.steps) // 2]
        if all(torch.equal(theta, self.checkpoints.theta(step)) for step in {middle, self.steps[-1]}) and all(
            torch.equal(theta, self.checkpoints.theta(step)) for step in self.steps[1:]
        ):
            raise ValueError("all checkpoints hold the same weights: no change to explain; check how they were saved")

    @property
    def hessian_token_loss(self) -> TokenLoss:
        """The loss whose Hessian is taken."""
        token_loss = self.checkpoints.token_loss
        return TokenLoss(token_loss.model, self.hessian_loss) if self.settings.basis.targets == "all" else token_loss

    @cached_property
    def projections(self) -> xr.Dataset:
        """Losses and derivatives along the basis, see :func:`polca_lib.analysis.workers.project_runs`."""
        return project_together([self])[0]

    @cached_property
    def clustering(self) -> ClusteringSettings:
        """Settings of the clustering, with defaults that follow from the run."""
        return self.settings.clustering.resolved(self.projections.sizes["token"], self.steps)

    @cached_property
    def curves(self) -> xr.DataArray:
        """Projected loss L_b(x, t) of Eq. 10, (step, token, vector), in nats."""
        return projected_loss(self.projections, self.clustering.order)

    @cached_property
    def labels(self) -> xr.DataArray:
        """Cluster of each token along each vector, see :func:`polca_lib.method.clustering.cluster_tokens`."""
        projections, settings, path = self.projections, self.clustering, self._clusters.path / FILES["clusters"]
        if (stored := self.stored("clusters")) is not None:
            return stored["cluster"].load()

        def cluster(index: int) -> None:
            curves = projected_loss(projections.isel(vector=[index]), settings.order).isel(vector=0)
            PieceStore.open(path).write(index, cluster=cluster_tokens(curves, settings).values)

        coords = {name: values for name, values in projections.coords.items() if "step" not in values.dims}
        variables = {"cluster": (("vector", "token"), "int64")}
        with self._clusters.at_work():
            store = PieceStore(path, xr.Dataset(coords=coords), variables, dim="vector")
            store.repair_pieces()
            carry_out(cluster, store.missing, total=store.pieces, description="clusters", unit="vector")
            return PieceStore.load(path)["cluster"].load()

    @cached_property
    def hidden_after(self) -> int | None:
        """Step after which the mean loss is flat and breakthroughs are hidden, or none if the loss never falls."""
        loss, clustering = self.projections["loss"].compute(), self.clustering  # what is wrong with these is said
        with contextlib.suppress(ValueError):
            return hidden_threshold(loss, clustering)
        return None

    @cached_property
    def findings(self) -> Findings:
        """The results in tables."""
        return Findings(self.projections, self.curves, self.labels, self.clustering, self.hidden_after)

    @property
    def breakthroughs(self) -> pd.DataFrame:
        """One row per cluster, see :attr:`polca_lib.report.findings.Findings.clusters`."""
        return self.findings.clusters

    def report(self, path: str | Path = "report.html", title: str = "POLCA") -> Path:
        """Write the results as one HTML page, see :func:`polca_lib.report.page.write_report`."""
        return write_report(UPath(path), self.findings, title=title, provenance=self.provenance())

    def plan(
        self, *, checkpoints: int | None = None, workers: int = 1, operations_per_second: float | None = None
    ) -> Plan:
        """Expected cost of this analysis, see :func:`polca_lib.analysis.plan.plan`, and what stored losses tell."""
        # Without any projections, don't run the model to learn which ones these would be.
        projections = self.stored("projection") if any(self.folder.glob("projection-*")) else None
        known = {} if projections is None else {"spacing": advice(checkpoint_spacing(projections))}
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
            **known,
        )

    def provenance(self) -> pd.DataFrame:
        """Origin of the results: model, checkpoints, seed, device; commit, time and versions of each stage."""
        loss = self.checkpoints.token_loss
        rows: dict[str, object] = {
            "model": f"{type(loss.model).__name__}, {loss.n_parameters:,} parameters",
            "checkpoints": f"{len(self.steps)}, steps {self.steps[0]} to {self.steps[-1]}",
            "basis": f"{self.settings.basis.kind}, {self._basis_settings.n_vectors} vectors",
            **self._basis_provenance,
            "seed": self.settings.seed,
            "device": self.checkpoints.device,
            "torch threads": torch.get_num_threads(),
        }
        if notes := self.checkpoints.notes():
            rows["notes on checkpoints"] = "; ".join(notes)
        opened = self._opened("basis", "projection", "clusters")
        for stage, artefact in opened.items():
            rows |= {f"{stage}: loss": self._compared[key] for key in {str(artefact.path)} & self._compared.keys()}
        return provenance(rows, opened)

    @property
    def tolerance(self) -> float:
        """Relative residual at which Lanczos stops for the basis."""
        return self.settings.basis.tolerance or self._basis.config["basis"]["tolerance"]

    @property
    def _basis_provenance(self) -> dict[str, object]:
        """What the settings do not tell about the basis: its tolerance, and fewer vectors than asked for."""
        rows: dict[str, object] = {"basis: tolerance": self.tolerance} if "_basis" in self.__dict__ else {}
        basis = self.__dict__.get("basis", self.__dict__.get("projections"))
        if basis is not None and basis.sizes["vector"] < (asked := self._basis_settings.n_vectors):
            rows["basis: vectors"] = f"{basis.sizes['vector']} of {asked}"
        return rows

    def _opened(self, *stages: str) -> dict[str, Artefact]:
        """Artefacts of the stages that were used so far."""
        return {stage: self.__dict__[f"_{stage}"] for stage in stages if f"_{stage}" in self.__dict__}

    # The key of each stage holds what its results depend on, and nothing else.

    @property
    def _run_key(self) -> object:
        """Identity of the checkpoints and examples, which analyses must share to be projected together."""
        return (*(self.checkpoints.identity(step) for step in self.steps), hash_batch(self.validation))

    @property
    def _basis_settings(self) -> BasisSettings:
        """Settings of the basis, with the number of vectors and the tolerance."""
        return self.settings.basis.resolved(self.checkpoints.steps)

    @property
    def _ends(self) -> tuple[int, int]:
        """First and last step that the basis depends on."""
        return self.steps[0], self.steps[-1]

    @property
    def _births(self) -> list[int]:
        """Steps of the basis checkpoints: of all checkpoints with ``basis.every``, else of those analysed."""
        basis = self.settings.basis
        return basis.births(self.checkpoints.steps if basis.every is not None else self.steps)

    @cached_property
    def _basis(self) -> Artefact:
        births, loss = self._births, self.checkpoints.token_loss
        shapes = {name: list(parameter.shape) for name, parameter in loss.parameters.items()}
        read = sorted({self.steps[0], self.steps[-1], *births})
        settings = {
            "basis": self._basis_settings.stated("targets", "solver", exclude=("steps", "every")),
            "births": births,
            "seed": self.settings.seed,
            "model": hash_json([type(loss.model).__name__, str(loss.dtype), list(shapes), shapes]),
            "checkpoints": {str(step): self.checkpoints.identity(step) for step in read},
            "hessian": None if self.hessian is None else hash_batch(self.hessian),
        }
        return self._open_basis(settings, {}, self._fixed)

    def _open_basis(
        self, config: dict[str, Any], parents: dict[str, str], later: dict[str, str] | None = None
    ) -> Artefact:
        """The artefact of the basis; that of an earlier version, made at its default tolerance, if none is given."""
        if self.settings.basis.tolerance is None:
            former = {**config, "basis": {**config["basis"], "tolerance": FORMER_TOLERANCE}}
            if is_begun(Artefact.path_of(self.folder, "basis", former, parents) / FILES["basis"]):
                config = former
        return Artefact.of_stage(self.folder, "basis", config, parents, later)

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """Hash of frozen parameters and of buffers that a checkpoint has, if there are any; others are derived."""
        values = {name: value for name, value in self.checkpoints.token_loss.fixed.items() if not value.is_meta}
        return {"fixed": hash_tensors(values, {})} if values else {}

    @cached_property
    def _projection(self) -> Artefact:
        # Hash a given table unchecked, and counts as stored, so that results open without running the model.
        tokens = self._token_table
        if tokens is None:
            stored = self._counts[1]
            tokens = (self.tokens if stored is None else _numbered(np.array(stored)))[["example"]]
        tokens = tokens.reset_index(drop=True)
        settings = {
            "projection": self.settings.projection.stated("storage"),
            "checkpoints": {str(step): self.checkpoints.identity(step) for step in self.steps},
            "validation": hash_batch(self.validation),
            "tokens": hash_table(tokens),
        }
        return Artefact.of_stage(self.folder, "projection", settings, {"basis": self._basis.key}, self._fixed)

    @cached_property
    def _clusters(self) -> Artefact:
        settings = self.clustering.stated(exclude=("breakthrough_window", "hidden_after"))
        return Artefact.of_stage(self.folder, "clusters", settings, {"projection": self._projection.key})

    def stored(self, stage: str) -> xr.Dataset | None:
        """Stored results of a stage if they are complete, else None; computes nothing.

        Args:
            stage: ``basis``, ``projection`` or ``clusters``.
        """
        artefact: Artefact = getattr(self, f"_{stage}")
        path = artefact.path / FILES[stage]
        if self.verify:
            with contextlib.suppress(FileNotFoundError, DamagedFile):  # computing the stage repairs these
                if (store := PieceStore.open(path)).damaged():
                    with artefact.at_work():
                        store.repair_pieces()
        results = PieceStore.load(path)
        return results if results is None else separate_columns(results)

    def _compare_loss(self, stage: str, *, at_work: bool = False) -> None:
        """Refuse another loss than the one that ``basis`` or ``projection`` was begun with: code has no hash.

        Unless ``at_work``, when the stage is to be computed, nothing is downloaded or trained to compare.
        """
        if stage == "basis" and self._basis_settings.kind not in HESSIAN_KINDS:
            return  # does not depend on the loss
        folder: Path = getattr(self, f"_{stage}").path
        if self._compared.get(str(folder), "").startswith("as at"):
            return
        begun, losses = is_begun(folder / FILES[stage]), None
        stored = Witness.read(folder / "witness.json") if begun else None
        if stored is None and stage == "projection":  # of version 0.2 or earlier
            losses = self._first_losses(folder / FILES[stage])
        step, unknown = stored.step if stored else self.steps[0], stored is None and losses is None
        reason = (
            "no losses were stored that can be compared"
            if unknown and begun
            else "no model and checkpoint can be run here"
        )
        self._compared[str(folder)] = f"not compared: {reason}"
        if not (unknown and begun) and (at_work or (begun and self.checkpoints.at_hand(step))):
            # Results open without checkpoints, and where the model is too large to run.
            with contextlib.nullcontext() if at_work else contextlib.suppress(OSError, MemoryError, RuntimeError):
                witness = self._witness(stage, step)
                if unknown:
                    write_atomically(folder / "witness.json", json.dumps(witness._asdict()).encode())
                stored = stored or Witness(step, (losses or witness.losses)[: len(witness.losses)], [])
                if problem := stored.difference(witness):
                    raise ArtefactMismatch(
                        f"{folder} was begun with another loss: the model or its loss gives {problem}, at "
                        f"{self.checkpoints.name(step)}. The loss, the forward pass or a frozen weight has changed; "
                        f"use another folder of results, or delete {folder.name} to recompute it"
                    )
                self._compared[str(folder)] = f"as at the start of the stage (step {step})"

    def _witness(self, stage: str, step: int) -> Witness:
        """The witness of the loss that a stage depends on."""
        key = stage, stage == "basis" and self.settings.basis.targets, step
        if key not in self._witnesses:
            loss, batch = self.checkpoints.token_loss, self.validation
            if stage == "basis":
                loss, batch = self.hessian_token_loss, self.hessian
            self._witnesses[key] = Witness.of(loss, self.checkpoints.theta(step), batch, step)
        return self._witnesses[key]

    def _first_losses(self, path: Path) -> list[float] | None:
        """Losses that the projections at ``path`` hold of the first checkpoint, if they do."""
        try:
            store = PieceStore.open(path)
            known = self.settings.projection.precision == "float32" and store.is_done(store.parts - 1)
            return store.dataset()["loss"].isel(step=0).values.tolist() if known else None
        except (FileNotFoundError, DamagedFile):  # a later step repairs or refuses damaged files
            return None


def _numbered(counts: Int[np.ndarray, " example"]) -> pd.DataFrame:
    """Example and position within it of each token."""
    example = np.repeat(np.arange(len(counts)), counts)
    return pd.DataFrame(
        {"example": example, "position": np.arange(len(example)) - (np.cumsum(counts) - counts)[example]}
    )


def project_together(analyses: Sequence[Analysis]) -> list[xr.Dataset]:
    """Project one training run on several bases in one pass through the model.

    Analyses with the curvature of all tokens take a pass each.

    Args:
        analyses: analyses that differ only in basis, projection and clustering, see :meth:`Analysis.on_basis`.

    Raises:
        ValueError: checkpoints, examples or steps differ, or the settings can't be used together (see
            :func:`polca_lib.analysis.workers.project_runs`).
    """
    first = analyses[0]
    for index, analysis in enumerate(analyses):
        same_run, same_steps = analysis._run_key == first._run_key, analysis.steps == first.steps
        if not (same_run and same_steps):
            raise ValueError(
                f"analyses[{index}] has other {'steps' if same_run else 'checkpoints or examples'} than analyses[0]; "
                "allowed: other settings of basis, projection and clustering. Project it separately"
            )
    # Group what is missing: one pass for each analysis with the curvature of all tokens, one pass for the others.
    by_path = {str(analysis._projection.path): analysis for analysis in analyses}  # the same one may be there twice
    for analysis, stage in itertools.product(by_path.values(), ("basis", "projection")):
        analysis._compare_loss(stage)
    missing = [analysis for analysis in by_path.values() if analysis.stored("projection") is None]
    groups = [[analysis] for analysis in missing if analysis.settings.projection.curvature_of_all]
    groups.append([analysis for analysis in missing if not analysis.settings.projection.curvature_of_all])
    for group in filter(None, groups):
        # Refuse tokens and settings that do not fit before a basis is computed.
        tokens = first.tokens
        for analysis in group:
            analysis.settings.clustering.check(analysis.steps, len(tokens))
        bases = [analysis.basis for analysis in group]
        with contextlib.ExitStack() as stack:
            # Acquire locks in sorted order to avoid deadlock.
            for analysis in sorted(group, key=lambda analysis: str(analysis._projection.path)):
                stack.enter_context(analysis._projection.at_work())
            for analysis, stage in itertools.product(group, ("basis", "projection")):
                analysis._compare_loss(stage, at_work=True)
            paths = [analysis._projection.path / FILES["projection"] for analysis in group]
            settings = [analysis.settings.projection for analysis in group]
            batch, memory = to_device(first.validation, first.checkpoints.device), first.settings.memory
            project_runs(paths, first.checkpoints, first.steps, batch, tokens, bases, settings, memory, first._code)
    if equal := getattr(first.checkpoints, "duplicates", list)():
        warnings.warn(f"checkpoints hold the same weights: steps {' and steps '.join(map(str, equal))}", stacklevel=2)
    return [analysis.stored("projection") for analysis in analyses]
