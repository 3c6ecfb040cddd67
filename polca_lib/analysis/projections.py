"""Projections of a whole run: a grid of (checkpoint, block of vectors) tasks, which workers share."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from polca_lib.analysis.engine import carry_out
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.memory import rounded_budget, rows_that_fit
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import Strategy, choose
from polca_lib.derivatives.token_loss import Batch, split_examples, to_device
from polca_lib.method.vectors import inner_products, read_vectors
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.pieces import PieceStore

_LONGEST = 1000  # characters of a text in the token table: all of a column take as much room as its longest


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
    """Project every checkpoint of a run on one or several bases; computes what is not yet stored.

    The work is a grid of (checkpoint, block of vectors) tasks, see :func:`polca_lib.analysis.engine.carry_out`. Its
    bytes do not depend on who carries out a task, on one kind of processor. A pass through the model serves the vectors
    of all bases at once, if all fit into memory.

    Args:
        paths: Zarr folder of each basis.
        checkpoints: of the run.
        steps: those to project, in training order.
        batch: the examples whose tokens are decomposed.
        tokens: one row per token of ``batch``; each column becomes a coordinate.
        bases: as :func:`polca_lib.method.basis.compute_basis` returns them.
        settings: of the projections on each basis. ``mode`` and ``precision`` must be the same for all, and none may
            ask for the curvature of all tokens, if there are several.
        memory: bytes each worker may take, vectors included; half of what the device has free now if not given. If not
            all vectors fit into half of it, they are worked on in blocks. A run that resumes keeps what it began with.
        folders: that hold modules which the model or the loss need, see :class:`polca_lib.analysis.engine.Portable`.

    Returns:
        For each basis a dataset with ``loss`` (step, token) in nats; ``gradient`` and ``curvature``
        (step, token, vector): first and second derivative of the token's loss along the vector; ``movement``
        (step, vector): <theta_{t+1} - theta_t, b>; ``distance`` (step): its length; ``inside_loss`` (step, token): loss
        at theta_t + B^T B (theta_{t+1} - theta_t), if ``settings.inside_loss`` asks for it. The last three are NaN at
        the last step. ``product_error`` (step, vector): see :class:`polca_lib.derivatives.projection.Projected`. With
        ``settings.curvature_examples``, ``curvature`` is (step, sample, vector), of the tokens of the first examples.
        Attributes ``memory`` (bytes) and ``threads`` (of torch) that each worker had.

    Raises:
        ValueError: the settings do not go together.
        NonFiniteProjection: names the checkpoint; what was stored before stays.
    """
    together = {(each.mode, each.precision) for each in settings}
    whole = any(each.curvature_of_all for each in settings)
    if len(together) > 1 or (whole and len(bases) > 1):
        raise ValueError(
            f"{len(bases)} bases can't be projected together with (projection.mode, projection.precision) = "
            f"{sorted(together)}{' and the curvature of all tokens' if whole else ''}; allowed: one mode and one "
            "precision, and curvature on a sample (projection.curvature_examples) or none"
        )
    budget = rounded_budget(checkpoints.device) if memory is None else memory
    one = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
    total = sum(basis.sizes["vector"] for basis in bases)
    fitting = rows_that_fit(total, one, budget // 2)
    about = {"memory": budget, "threads": torch.get_num_threads()}
    stores = [
        _store(path, checkpoints, steps, batch, tokens, basis, own, about, None if fitting == total else fitting)
        for path, basis, own in zip(paths, bases, settings, strict=True)
    ]
    for store in stores:
        store.repair_pieces()
    work = ProjectionJob(
        paths, checkpoints, steps, batch, bases, settings, stores[0].attrs["memory"], stores[0].attrs["threads"]
    )
    try:
        carry_out(
            work,
            lambda: _missing(stores),
            total=len(steps) * (1 if _side_by_side(stores) else sum(store.parts for store in stores)),
            description="projections",
            unit="checkpoint" if _side_by_side(stores) else "piece",
            folders=folders,
        )
    finally:
        forget()
    return [store.dataset() for store in stores]


def _store(
    path: Path,
    checkpoints: Checkpoints,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    basis: xr.Dataset,
    settings: ProjectionSettings,
    about: Mapping[str, int],
    block: int | None,
) -> PieceStore:
    variables = {
        "loss": (("step", "token"), "float32"),
        "gradient": (("step", "token", "vector"), "float32"),
        "movement": (("step", "vector"), "float32"),
        "distance": (("step",), "float32"),
        "product_error": (("step", "vector"), "float32"),
    }
    if settings.inside_loss:
        variables["inside_loss"] = (("step", "token"), "float32")
    sizes = {}
    if settings.curvature:
        of = "token" if settings.curvature_examples is None else "sample"
        variables["curvature"] = (("step", of, "vector"), "float32")
    if settings.curvature and settings.curvature_examples is not None:
        sample = to_device(next(split_examples(batch, settings.curvature_examples)), checkpoints.device)
        with torch.no_grad():
            sizes["sample"] = len(checkpoints.token_loss(checkpoints.theta(steps[0]), sample))
    template = xr.Dataset(
        coords={
            "step": steps,
            "token": np.arange(len(tokens)),
            **{name: ("token", _storable(column)) for name, column in tokens.items()},
            **{name: values for name, values in basis.coords.items() if values.dims == ("vector",)},
        },
        attrs=dict(about),
    )
    return PieceStore(path, template, variables, "step", sizes, None if block is None else ("vector", block))


def _side_by_side(stores: Sequence[PieceStore]) -> bool:
    """Whether the vectors of all bases go through the model at once: none is cut into blocks."""
    return all(store.parts == 1 for store in stores)


def _missing(stores: Sequence[PieceStore]) -> list[ProjectionTask]:
    """Tasks that the stores lack, by checkpoint."""
    lacking = [[divmod(piece, store.parts) for piece in store.missing()] for store in stores]
    if _side_by_side(stores):
        indices = sorted({index for pieces in lacking for index, _ in pieces})
        return [ProjectionTask(index, tuple(range(len(stores))), 0) for index in indices]
    return sorted(
        ProjectionTask(index, (which,), part) for which, pieces in enumerate(lacking) for index, part in pieces
    )


def _storable(column: pd.Series) -> np.ndarray:
    """Values with a dtype that Zarr knows: numbers and booleans as they are, all else as text, which is cut."""
    numeric = pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    return column.to_numpy() if numeric else np.array([str(value)[:_LONGEST] for value in column])


class NonFiniteProjection(RuntimeError):
    """A checkpoint gives losses or derivatives that are NaN or infinite."""


class ProjectionTask(NamedTuple):
    """What is done in one go: a part of the pieces of one checkpoint, of one basis or of several side by side."""

    index: int  # along the steps
    bases: tuple[int, ...]
    part: int


@dataclass(frozen=True)
class ProjectionJob:
    """All that is needed to carry out any task of a projection, also in another process."""

    paths: Sequence[Path]
    checkpoints: Checkpoints
    steps: Sequence[int]
    batch: Batch
    bases: Sequence[xr.Dataset]
    settings: Sequence[ProjectionSettings]
    memory: int
    threads: int
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __call__(self, task: ProjectionTask) -> None:
        if self.key not in _SESSIONS:
            forget()  # what is kept of another work only takes room
            _SESSIONS[self.key] = _Session(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # or sums would round in another order
        try:
            _SESSIONS[self.key].carry_out(task)
        finally:
            torch.set_num_threads(threads)


class _Session:
    """A process at work on tasks, one after another: it keeps what the next will need again."""

    def __init__(self, work: ProjectionJob):
        self._work = work
        self._stores = [PieceStore.open(path) for path in work.paths]
        self._batch = to_device(work.batch, work.checkpoints.device)
        self._thetas: dict[int, Tensor] = {}
        self._vectors: tuple[tuple[tuple[int, ...], int], Tensor] | None = None
        self._strategies: dict[tuple[int, int], Strategy] = {}

    def carry_out(self, task: ProjectionTask) -> None:
        work, step = self._work, self._work.steps[task.index]
        theta, change = self._theta(step), None
        if task.index + 1 < len(work.steps):
            change = self._theta(work.steps[task.index + 1]) - theta
        parts = self._stores[task.bases[0]].parts
        pieces: list[dict[str, Tensor]] = [{} for _ in task.bases]
        if parts == 1 or task.part < parts - 1:
            self._differentiate(task, theta, change, pieces)
        if parts == 1 or task.part == parts - 1:
            self._move(task, theta, change, pieces)
        for which, piece in zip(task.bases, pieces, strict=True):
            if not all(torch.isfinite(value).all() for value in piece.values()):
                raise NonFiniteProjection(
                    f"{work.checkpoints.name(step)} gives a loss or derivative that is not finite; projections of "
                    "other steps are kept. Look at the checkpoint, or end the run before it"
                )
            store = self._stores[which]
            number = task.index * store.parts + task.part
            if not store.is_done(number):  # side by side with one that is not
                store.write(number, **{name: value.detach().cpu().numpy() for name, value in piece.items()})

    def _differentiate(
        self, task: ProjectionTask, theta: Tensor, change: Tensor | None, pieces: list[dict[str, Tensor]]
    ) -> None:
        """Derivatives and movement along the vectors of the task."""
        work, token_loss = self._work, self._work.checkpoints.token_loss
        vectors, settings = self._read(task), [work.settings[which] for which in task.bases]
        whole = settings[0].curvature_of_all
        strategy = self._strategy(self._batch, vectors, settings[0], 2 if whole else 1)
        found = project(token_loss, theta, self._batch, vectors, curvature=whole, strategy=strategy)
        moved = None if change is None else inner_products(vectors, change[None])[:, 0].to(theta)
        for own, rows, piece in zip(settings, self._rows(task), pieces, strict=True):
            piece["loss"] = found.loss
            piece["gradient"] = found.gradient[:, rows]
            piece["product_error"] = torch.full((rows.stop - rows.start,), found.error)
            if moved is not None:
                piece["movement"] = moved[rows]
            if whole:
                piece["curvature"] = found.curvature
            elif own.curvature:
                sample = next(split_examples(self._batch, own.curvature_examples))
                second = self._strategy(sample, vectors[rows], own, 2)
                some = project(token_loss, theta, sample, vectors[rows], curvature=True, strategy=second)
                piece["curvature"] = some.curvature
        if self._stores[task.bases[0]].parts > 1:
            del pieces[0]["loss"]  # it is of another piece

    def _move(
        self, task: ProjectionTask, theta: Tensor, change: Tensor | None, pieces: list[dict[str, Tensor]]
    ) -> None:
        """Losses where the checkpoint is, and after the part of the movement that lies in each basis."""
        work = self._work
        for which, piece in zip(task.bases, pieces, strict=True):
            store = self._stores[which]
            if "loss" not in piece:
                piece["loss"] = self._losses(task, theta)
            if change is None:
                continue
            piece["distance"] = change.double().norm()
            if not work.settings[which].inside_loss:
                continue
            point = theta.clone()
            for part in range(len(store.blocks)):
                block = task._replace(part=part)
                vectors = self._read(block)[self._rows(block)[task.bases.index(which)]]
                point += vectors.T @ inner_products(vectors, change[None])[:, 0].to(theta)
            piece["inside_loss"] = self._losses(task, point)

    @torch.no_grad()
    def _losses(self, task: ProjectionTask, theta: Tensor) -> Float[Tensor, " token"]:
        """Losses of all tokens, as many examples at a time as where they are differentiated."""
        settings, loss = self._work.settings[task.bases[0]], self._work.checkpoints.token_loss
        first = task._replace(part=0)
        place = self._rows(first)[-1].stop, 2 if settings.curvature_of_all else 1
        if place not in self._strategies:
            self._strategy(self._batch, self._read(first), settings, place[1])
        size = self._strategies[place].pass_examples
        return torch.cat([loss(theta, part) for part in split_examples(self._batch, size)])

    def _strategy(self, batch: Batch, vectors: Tensor, settings: ProjectionSettings, order: int) -> Strategy:
        """How to differentiate: chosen at the first checkpoint, so that it is the same whatever is done first."""
        if (len(vectors), order) not in self._strategies:
            checkpoints = self._work.checkpoints
            held = len(vectors) * checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
            self._strategies[len(vectors), order] = choose(
                checkpoints.token_loss,
                self._theta(self._work.steps[0], keep=False),
                batch,
                vectors,
                order=order,
                mode=settings.mode if order == 1 else "forward",
                precision=settings.precision if order == 1 else "float32",
                memory=max(1, self._work.memory - held),
            )
        return self._strategies[len(vectors), order]

    def _read(self, task: ProjectionTask) -> Float[Tensor, "vector d"]:
        """The vectors of a task, of all its bases."""
        if self._vectors is None or self._vectors[0] != (task.bases, task.part):
            self._vectors = None
            checkpoints = self._work.checkpoints
            place = {"device": checkpoints.device, "dtype": checkpoints.token_loss.dtype}
            bases = [self._work.bases[which] for which in task.bases]
            ranges = [range(basis.sizes["vector"])[self._stores[task.bases[0]].blocks[task.part]] for basis in bases]
            read = [read_vectors(b, r.start, r.stop, **place) for b, r in zip(bases, ranges, strict=True)]
            self._vectors = (task.bases, task.part), torch.cat(read) if len(read) > 1 else read[0]
        return self._vectors[1]

    def _rows(self, task: ProjectionTask) -> list[slice]:
        """Which of the vectors of a task are of each of its bases."""
        block = self._stores[task.bases[0]].blocks[task.part]
        sizes = [len(range(self._work.bases[which].sizes["vector"])[block]) for which in task.bases]
        return [slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]

    def _theta(self, step: int, *, keep: bool = True) -> Float[Tensor, " d"]:
        """The weights at ``step``, checked here because they also enter the movement of the step before."""
        if (theta := self._thetas.get(step)) is None:
            checkpoints = self._work.checkpoints
            theta = checkpoints.theta(step)
            if not torch.isfinite(theta).all():
                raise NonFiniteProjection(
                    f"{checkpoints.name(step)} holds weights that are not finite; end the run before it"
                )
        if keep:
            self._thetas.pop(step, None)
            self._thetas[step] = theta
            while len(self._thetas) > 2:
                del self._thetas[next(iter(self._thetas))]
        return theta


_SESSIONS: dict[str, _Session] = {}
"""What this process is at work on; one at a time."""


def forget() -> None:
    """Let go of what this process keeps for the next task."""
    _SESSIONS.clear()
