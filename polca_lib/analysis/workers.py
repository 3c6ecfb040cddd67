"""Project a whole run: a grid of (checkpoint, block of vectors) tasks that workers share."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from polca_lib.analysis.engine import EngineFailure, carry_out
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.memory import rounded_budget, rows_that_fit
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import Strategy, choose, faster_precision, relative_difference
from polca_lib.derivatives.token_loss import Batch, n_examples, split_examples, to_device
from polca_lib.method.vectors import inner_products, read_vectors
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.columns import as_coordinates, token_table
from polca_lib.storage.pieces import PieceStore
from polca_lib.storage.witness import Witness


def project_runs(
    paths: Sequence[Path],
    checkpoints: Checkpoints,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    bases: Sequence[xr.Dataset],
    settings: Sequence[ProjectionSettings],
    memory: int | None = None,
    folders: Sequence[str] = (),
) -> list[xr.Dataset]:
    """<grad L(x; theta_t), b> and b^T H(x; theta_t) b for all checkpoints t, tokens x and vectors b.

    Computes what is not stored yet, with :func:`polca_lib.analysis.engine.carry_out`. One pass through the model serves
    the vectors of all bases if they fit into memory. Workers on one kind of processor write the same bytes.

    Args:
        paths: Zarr folder of the projections on each basis.
        steps: steps to project, in training order.
        batch: examples whose tokens are decomposed.
        tokens: one row per token of ``batch``; each column becomes a coordinate, see
            :mod:`polca_lib.storage.columns`.
        bases: results of :func:`polca_lib.method.basis.compute_basis`.
        settings: settings for each basis. Several bases need one ``mode``, one ``precision`` and no curvature of all
            tokens.
        memory: bytes for each worker; half of the free memory of the device if not given. Vectors that need more than
            half of it are processed in blocks. A resumed run keeps its first value.
        folders: folders with modules that the model or the loss need, see :class:`polca_lib.analysis.engine.Portable`.

    Returns:
        For each basis a dataset with attributes ``memory`` (bytes) and ``threads`` of each worker, with ``precision``
        if ``auto`` chose it, and variables:

        - ``loss`` (step, token), in nats;
        - ``gradient`` and ``curvature`` (step, token, vector): first and second derivatives of the loss along b. With
          ``settings.curvature_examples``, ``curvature`` is (step, sample, vector): tokens of the first examples;
        - ``movement`` (step, vector): <theta_{t+1} - theta_t, b>; NaN at the last step, like the next two;
        - ``distance`` (step): norm of theta_{t+1} - theta_t;
        - ``inside_loss`` (step, token): loss at theta_t + B^T B (theta_{t+1} - theta_t), with ``settings.inside_loss``;
        - ``product_error`` (step, vector): of ``gradient``, root mean square over its own; of products in bfloat16, see
          :class:`polca_lib.derivatives.projection.Projected`, and of ``settings.storage`` in float16.

    Raises:
        ValueError: these settings, or results begun with them in other precisions, can't be used together.
        NonFiniteProjection: a checkpoint gives NaN, infinity or more than float16 holds; finished pieces stay.
        EngineFailure: a worker computes another loss than this process.
    """
    modes = {(each.mode, each.precision) for each in settings}
    curvature_of_all = any(each.curvature_of_all for each in settings)
    if len(modes) > 1 or (curvature_of_all and len(bases) > 1):
        raise ValueError(
            f"{len(bases)} bases can't be projected together with (projection.mode, projection.precision) = "
            f"{sorted(modes)}{' and the curvature of all tokens' if curvature_of_all else ''}; allowed: one mode and "
            "one precision, and curvature on a sample (projection.curvature_examples) or none"
        )
    # Cut the vectors into blocks if they do not all fit into half of the memory.
    budget = rounded_budget(checkpoints.device) if memory is None else memory
    vector_bytes = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
    total = sum(basis.sizes["vector"] for basis in bases)
    block = rows_that_fit(total, vector_bytes, budget // 2)
    cut = None if block == total else ("vector", block)
    job = ProjectionJob(paths, checkpoints, steps, batch, bases, settings, budget, torch.get_num_threads())
    if automatic := settings[0].precision == "auto":
        job = replace(job, precision=faster_precision(torch.device(checkpoints.device)))
    stores = [job.open_store(index, tokens, cut) for index, _ in enumerate(zip(paths, bases, settings, strict=True))]
    for store in stores:
        store.repair_pieces()
    # Resume with the memory and threads that the stores began with, so that all pieces round alike.
    job, together = replace(job, **{name: stores[0].attrs[name] for name in ("memory", "threads")}), _together(stores)
    if automatic:
        begun = {store.attrs["precision"] for store in stores}
        if len(begun) > 1:
            raise ValueError(f"{len(bases)} bases were begun in {sorted(begun)}, as 'auto' chose; project them in turn")
        settings = [each.model_copy(update={"precision": stores[0].attrs["precision"]}) for each in settings]
        job = replace(job, settings=settings)
    if _missing(stores):
        witness = Witness.of(checkpoints.token_loss, checkpoints.theta(steps[0]), batch, steps[0])
        job = replace(job, witness=witness)
    try:
        carry_out(
            job,
            lambda: _missing(stores),
            total=len(steps) * (1 if together else sum(store.parts for store in stores)),
            description="projections",
            unit="checkpoint" if together else "piece",
            folders=folders,
        )
    finally:
        forget()
    return [store.dataset() for store in stores]


def _together(stores: Sequence[PieceStore]) -> bool:
    """Whether one pass through the model serves all bases, because none is cut into blocks."""
    return all(store.parts == 1 for store in stores)


def _missing(stores: Sequence[PieceStore]) -> list[ProjectionTask]:
    """Tasks whose pieces the stores lack, by checkpoint."""
    tasks = [
        ProjectionTask(piece // store.parts, (basis_index,), piece % store.parts)
        for basis_index, store in enumerate(stores)
        for piece in store.missing()
    ]
    if _together(stores):
        all_bases = tuple(range(len(stores)))
        tasks = {ProjectionTask(task.index, all_bases, 0) for task in tasks}
    return sorted(tasks)


_DERIVATIVES, _LARGEST = ("gradient", "curvature"), torch.finfo(torch.float16).max


class NonFiniteProjection(RuntimeError):
    """A checkpoint gives losses or derivatives that are NaN or infinite."""


class ProjectionTask(NamedTuple):
    """One unit of work: one part of one checkpoint, for one basis or for several bases together."""

    index: int  # of the step
    bases: tuple[int, ...]  # indices
    part: int


@dataclass(frozen=True)
class ProjectionJob:
    """Carries out any task of a projection, also in another process."""

    paths: Sequence[Path]
    checkpoints: Checkpoints
    steps: Sequence[int]
    batch: Batch
    bases: Sequence[xr.Dataset]
    settings: Sequence[ProjectionSettings]
    memory: int
    threads: int
    precision: str | None = None  # that "auto" stands for
    witness: Witness | None = None  # of the loss in the process that hands out the tasks
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def open_store(self, index: int, tokens: pd.DataFrame, cut: tuple[str, int] | None) -> PieceStore:
        """The store of one basis, started if missing."""
        settings, sizes = self.settings[index], {}
        dims = {"loss": ("step", "token"), "gradient": ("step", "token", "vector")}
        dims |= {"movement": ("step", "vector"), "distance": ("step",), "product_error": ("step", "vector")}
        if settings.inside_loss:
            dims["inside_loss"] = ("step", "token")
        if settings.curvature_of_all:
            dims["curvature"] = ("step", "token", "vector")
        elif settings.curvature:
            dims["curvature"] = ("step", "sample", "vector")
            sample = to_device(next(split_examples(self.batch, settings.curvature_examples)), self.checkpoints.device)
            with torch.no_grad():
                sizes["sample"] = len(self.checkpoints.token_loss(self.checkpoints.theta(self.steps[0]), sample))
                if not sizes["sample"]:
                    raise ValueError(
                        f"the first {settings.curvature_examples} examples have no target, so that there is no "
                        "curvature of a sample; raise projection.curvature_examples"
                    )
        coords: dict[str, Any] = {"step": self.steps, "token": np.arange(len(tokens)), **as_coordinates(tokens)}
        coords |= {name: values for name, values in self.bases[index].coords.items() if values.dims == ("vector",)}
        chosen = {} if self.precision is None else {"precision": self.precision}
        template = xr.Dataset(coords=coords, attrs={"memory": self.memory, "threads": self.threads, **chosen})
        variables = {
            name: (names, settings.storage if name in _DERIVATIVES else "float32") for name, names in dims.items()
        }
        return PieceStore(self.paths[index], template, variables, "step", sizes, cut)

    def __call__(self, task: ProjectionTask) -> None:
        if self.key not in _SESSIONS:
            forget()  # the session of another job only takes memory
            _SESSIONS[self.key] = _Session(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # the number of threads changes the order of sums, and so their rounding
        try:
            _SESSIONS[self.key].carry_out(task)
        finally:
            torch.set_num_threads(threads)


class _Session:
    """The state of a process between tasks: the last checkpoints, the last vectors and the strategies."""

    def __init__(self, job: ProjectionJob):
        self._job = job
        self._stores = [PieceStore.open(path) for path in job.paths]
        self._batch = to_device(job.batch, job.checkpoints.device)
        self._thetas: dict[int, Tensor] = {}
        self._vectors: tuple[tuple[tuple[int, ...], int], Tensor] | None = None
        self._strategies: dict[tuple[int, int, int], Strategy] = {}
        # Refuse to work with a model or a loss that changed on its way to this worker.
        step, loss = job.steps[0], job.checkpoints.token_loss
        witness = job.witness and Witness.of(loss, self._theta(step), self._batch, step)
        if job.witness and (problem := job.witness.difference(witness)):
            raise EngineFailure(
                f"a worker computes {problem} of {job.checkpoints.name(step)}: the model or the loss is another one "
                "there. It may use a global variable, a file or the environment, or other versions are installed; hand "
                'everything in through the model or the loss, or use engine = "in-process"'
            )

    def carry_out(self, task: ProjectionTask) -> None:
        """Compute, check and write the pieces of a task."""
        job, step = self._job, self._job.steps[task.index]
        theta, change = self._theta(step), None
        if task.index + 1 < len(job.steps):
            change = self._theta(job.steps[task.index + 1]) - theta
        # A cut store has one part for each block of vectors, and a last part for what has no vector.
        parts = self._stores[task.bases[0]].parts
        pieces: list[dict[str, Tensor]] = [{} for _ in task.bases]
        if parts == 1 or task.part < parts - 1:
            self._differentiate(task, theta, change, pieces)
        if parts == 1 or task.part == parts - 1:
            self._move(task, theta, change, pieces)
        for basis_index, piece in zip(task.bases, pieces, strict=True):
            for name, value in piece.items():
                if not torch.isfinite(value).all():
                    raise NonFiniteProjection(self._blame(task, name, ~torch.isfinite(value)))
                halved = name in _DERIVATIVES and job.settings[basis_index].storage == "float16"
                if halved and (largest := abs(value).max()) > _LARGEST:
                    raise NonFiniteProjection(
                        f"{job.checkpoints.name(step)} gives values of {name} up to {largest:.4g}, but float16 holds "
                        f"{_LARGEST:g} at most; finished projections are kept. Use projection.storage = 'float32'"
                    )
            # A task for several bases may include pieces that are already done.
            store = self._stores[basis_index]
            number = task.index * store.parts + task.part
            if not store.is_done(number):
                store.write(number, **{name: value.detach().cpu().numpy() for name, value in piece.items()})

    def _blame(self, task: ProjectionTask, name: str, odd: Bool[Tensor, ...]) -> str:
        """Say which values of a variable are not finite, since which step, and what to check."""
        job, advice = self._job, "Check the checkpoint, or leave it out (setting steps)"
        where = f"{job.checkpoints.name(job.steps[task.index])} gives values of {name} that are not finite"
        rows = odd.flatten(1).any(1) if odd.ndim > 1 else odd
        if name in ("loss", "inside_loss", "gradient", "curvature"):
            # Name the first such token as the token table does, and the first step at which its loss is not finite.
            index, table = int(rows.nonzero()[0]), token_table(self._stores[task.bases[0]].dataset())
            columns = [column for column in ("example", "position", "text") if column in table]
            token = ", ".join([f"token {index}", *(f"{name} {table[name].tolist()[index]!r}" for name in columns)])
            losses = ((step, self._losses(task, self._theta(step, keep=False))[index]) for step in job.steps)
            since = next((step for step, loss in losses if not loss.isfinite()), None)
            where += f" for {int(rows.sum()):,} of {len(rows):,} tokens, such as {token}"
            where += "" if since is None else f", whose loss is not finite since step {since}"
            if not rows.all():
                advice = "The other tokens are finite: check these data (a row masked as a whole?), or leave them out"
        return f"{where}; finished projections are kept. {advice}"

    def _differentiate(
        self, task: ProjectionTask, theta: Tensor, change: Tensor | None, pieces: list[dict[str, Tensor]]
    ) -> None:
        """Add derivatives and movement along the vectors of the task."""
        token_loss, settings = self._job.checkpoints.token_loss, [self._job.settings[index] for index in task.bases]
        vectors, is_cut = self._read(task), self._stores[task.bases[0]].parts > 1
        # Differentiate along the vectors of all bases in one pass. Curvature of all tokens comes from the same pass.
        curvature_of_all = settings[0].curvature_of_all
        strategy = self._strategy(self._batch, vectors, settings[0], 2 if curvature_of_all else 1)
        result = project(token_loss, theta, self._batch, vectors, curvature=curvature_of_all, strategy=strategy)
        movement = None if change is None else inner_products(vectors, change[None])[:, 0].to(theta)
        for each, rows, piece in zip(settings, self._rows(task), pieces, strict=True):
            piece["gradient"] = result.gradient[:, rows]
            stored = piece["gradient"].to(getattr(torch, each.storage)).to(piece["gradient"])
            error = math.hypot(result.error, relative_difference(stored, piece["gradient"]))
            piece["product_error"] = torch.full((rows.stop - rows.start,), error)
            if not is_cut:
                piece["loss"] = result.loss
            if movement is not None:
                piece["movement"] = movement[rows]
            if curvature_of_all:
                piece["curvature"] = result.curvature
            elif each.curvature:
                sample = next(split_examples(self._batch, each.curvature_examples))
                strategy = self._strategy(sample, vectors[rows], each, 2)
                second = project(token_loss, theta, sample, vectors[rows], curvature=True, strategy=strategy)
                piece["curvature"] = second.curvature

    def _move(
        self, task: ProjectionTask, theta: Tensor, change: Tensor | None, pieces: list[dict[str, Tensor]]
    ) -> None:
        """Add the loss at theta_t, and the loss at theta_t + B^T B (theta_{t+1} - theta_t)."""
        for position, (basis_index, piece) in enumerate(zip(task.bases, pieces, strict=True)):
            if "loss" not in piece:
                piece["loss"] = self._losses(task, theta)
            if change is None:
                continue
            piece["distance"] = change.double().norm()
            if not self._job.settings[basis_index].inside_loss:
                continue
            # Sum the projections of the movement block by block.
            point = theta.clone()
            for part in range(len(self._stores[basis_index].blocks)):
                block = task._replace(part=part)
                vectors = self._read(block)[self._rows(block)[position]]
                point += vectors.T @ inner_products(vectors, change[None])[:, 0].to(theta)
            piece["inside_loss"] = self._losses(task, point)

    @torch.no_grad()
    def _losses(self, task: ProjectionTask, theta: Tensor) -> Float[Tensor, " token"]:
        """Losses of all tokens, in batches of the same size as the derivatives."""
        settings, first = self._job.settings[task.bases[0]], task._replace(part=0)
        order = 2 if settings.curvature_of_all else 1
        strategy = self._strategies.get((self._rows(first)[-1].stop, order, n_examples(self._batch)))
        strategy = strategy or self._strategy(self._batch, self._read(first), settings, order)
        batches = split_examples(self._batch, strategy.pass_examples)
        return torch.cat([self._job.checkpoints.token_loss(theta, batch) for batch in batches])

    def _strategy(self, batch: Batch, vectors: Tensor, settings: ProjectionSettings, order: int) -> Strategy:
        """The way to differentiate; chosen at the first checkpoint, whatever the order of tasks."""
        key, token_loss = (len(vectors), order, n_examples(batch)), self._job.checkpoints.token_loss
        if key not in self._strategies:
            theta = self._theta(self._job.steps[0], keep=False)
            # The vectors of all bases stay in memory, also while those of one are differentiated along.
            memory = max(1, self._job.memory - self._vectors[1].nbytes)
            keywords = settings.differentiation(order)
            self._strategies[key] = choose(token_loss, theta, batch, vectors, **keywords, memory=memory)
        return self._strategies[key]

    def _read(self, task: ProjectionTask) -> Float[Tensor, "vector d"]:
        """The vectors of a task, for all its bases one after another."""
        key, checkpoints = (task.bases, task.part), self._job.checkpoints
        if self._vectors is None or self._vectors[0] != key:
            self._vectors, parts = None, []  # free the memory before reading
            for basis in [self._job.bases[index] for index in task.bases]:
                start, stop, _ = self._stores[task.bases[0]].blocks[task.part].indices(basis.sizes["vector"])
                dtype = checkpoints.token_loss.dtype
                parts.append(read_vectors(basis, start, stop, device=checkpoints.device, dtype=dtype))
            self._vectors = key, torch.cat(parts) if len(parts) > 1 else parts[0]
        return self._vectors[1]

    def _rows(self, task: ProjectionTask) -> list[slice]:
        """Rows of the vectors of a task that belong to each of its bases."""
        block = self._stores[task.bases[0]].blocks[task.part]
        sizes = [len(range(self._job.bases[index].sizes["vector"])[block]) for index in task.bases]
        return [slice(start, stop) for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0))]

    def _theta(self, step: int, *, keep: bool = True) -> Float[Tensor, " d"]:
        """The weights at ``step``, if they are finite; keeps the last two."""
        if (theta := self._thetas.get(step)) is None:
            theta = self._job.checkpoints.theta(step)
            if not torch.isfinite(theta).all():
                name = self._job.checkpoints.name(step)
                raise NonFiniteProjection(f"{name} holds weights that are not finite; leave it out (setting steps)")
        if keep:
            self._thetas.pop(step, None)
            self._thetas[step] = theta
            while len(self._thetas) > 2:
                del self._thetas[next(iter(self._thetas))]
        return theta


_SESSIONS: dict[str, _Session] = {}
"""The session of this process, by the key of its job; one at a time."""


def forget() -> None:
    """Free what this process keeps for its next task."""
    _SESSIONS.clear()
