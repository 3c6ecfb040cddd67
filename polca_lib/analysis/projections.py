"""Projections of a whole run: a grid of (checkpoint, block of vectors) tasks, which workers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.analysis.settings import ProjectionConfig
from polca_lib.analysis.engine import carry_out
from polca_lib.derivatives.memory import rows_that_fit, settled_budget
from polca_lib.storage.pieces import PieceStore
from polca_lib.derivatives.token_loss import Batch, split_examples, to_device
from polca_lib.analysis.worker import Task, Work, forget

_LONGEST = 1000  # characters of a text in the token table: all of a column take as much room as its longest


def project_run(
    path: Path,
    checkpoints: Checkpoints,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    basis: xr.Dataset,
    settings: ProjectionConfig,
    memory: int | None = None,
    folders: Sequence[str] = (),
) -> xr.Dataset:
    """Project every checkpoint of a run on a basis; goes on with what is not yet stored.

    The work is a grid of (checkpoint, block of vectors) tasks, carried out by :func:`polca_lib.analysis.engine.carry_out`: in
    process, or by the engine that was set. Whoever does a task, its bytes are the same, on one kind of processor.

    Args:
        path: Zarr folder.
        checkpoints: of the run.
        steps: their steps, in order.
        batch: the examples whose tokens are decomposed.
        tokens: one row per token of ``batch``; each column becomes a coordinate.
        basis: as :func:`polca_lib.method.basis.compute_basis` returns it.
        settings: whether to store b^T H(x) b too, and how to differentiate.
        memory: bytes each worker may take, vectors included; half of what the device has free now if not given. If not
            all vectors fit into half of it, they are worked on in blocks. A run that goes on keeps what it began with.
        folders: that hold modules which the model or the loss need, see :class:`polca_lib.analysis.engine.Portable`.

    Returns:
        Dataset with ``loss`` (step, token) in nats; ``gradient`` and ``curvature`` (step, token, vector): first and
        second derivative of the token's loss along the vector; ``movement`` (step, vector): the movement
        theta_{t+1} - theta_t to the next checkpoint, along b; ``distance`` (step): its length; ``inside_loss``
        (step, token): loss at theta_t + B^T B (theta_{t+1} - theta_t), after the part of the movement that lies in the
        basis, left out without ``settings.inside_loss``. The last three are NaN at the last step. ``product_error``
        (step, vector): see :class:`polca_lib.derivatives.projection.Projected`, of the block of the vector. With
        ``settings.curvature_examples``, ``curvature`` is (step, sample, vector), of the tokens of the first examples.
        Attributes ``memory`` (bytes) and ``threads`` (of torch) that each worker had.

    Raises:
        NonFiniteProjection: names the checkpoint; what was stored before stays.
    """
    return project_runs([path], checkpoints, steps, batch, tokens, [basis], [settings], memory, folders)[0]


def project_runs(
    paths: Sequence[Path],
    checkpoints: Checkpoints,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    bases: Sequence[xr.Dataset],
    settings: Sequence[ProjectionConfig],
    memory: int | None = None,
    folders: Sequence[str] = (),
) -> list[xr.Dataset]:
    """:func:`project_run` for several bases of one run at once.

    What a pass through the model costs is paid once for all vectors, if all fit into memory. The rest is as if they
    were done one by one.

    Args:
        paths, bases, settings: of each basis. ``mode`` and ``precision`` must be the same for all, and none may ask for
            the curvature of all tokens, if there are several.
        checkpoints, steps, batch, tokens, memory, folders: see :func:`project_run`.

    Raises:
        ValueError: the settings do not go together.
    """
    together = {(each.mode, each.precision) for each in settings}
    whole = any(each.curvature_of_all for each in settings)
    if len(together) > 1 or (whole and len(bases) > 1):
        raise ValueError(
            f"{len(bases)} bases can't be projected together with (projection.mode, projection.precision) = "
            f"{sorted(together)}{' and the curvature of all tokens' if whole else ''}; allowed: one mode and one "
            "precision, and curvature on a sample (projection.curvature_examples) or none"
        )
    budget = settled_budget(checkpoints.device) if memory is None else memory
    one = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
    total = sum(basis.sizes["vector"] for basis in bases)
    fitting = rows_that_fit(total, one, budget // 2)
    about = {"memory": budget, "threads": torch.get_num_threads()}
    stores = [
        _store(path, checkpoints, steps, batch, tokens, basis, own, about, None if fitting == total else fitting)
        for path, basis, own in zip(paths, bases, settings, strict=True)
    ]
    for store in stores:
        store.heal()
    work = Work(
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
    settings: ProjectionConfig,
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


def _missing(stores: Sequence[PieceStore]) -> list[Task]:
    """Tasks that the stores lack, by checkpoint."""
    lacking = [[divmod(piece, store.parts) for piece in store.missing()] for store in stores]
    if _side_by_side(stores):
        indices = sorted({index for pieces in lacking for index, _ in pieces})
        return [Task(index, tuple(range(len(stores))), 0) for index in indices]
    return sorted(Task(index, (which,), part) for which, pieces in enumerate(lacking) for index, part in pieces)


def _storable(column: pd.Series) -> np.ndarray:
    """Values with a dtype that Zarr knows: numbers and booleans as they are, all else as text, which is cut."""
    numeric = pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    return column.to_numpy() if numeric else np.array([str(value)[:_LONGEST] for value in column])
