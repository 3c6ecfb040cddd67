"""<grad L(x; theta), b> and b^T H(x; theta) b for all tokens x and vectors b, at every checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from polca_lib.artefacts import PieceStore
from polca_lib.basis import inner_products, read_vectors
from polca_lib.checkpoints import CheckpointFolder
from polca_lib.config import ProjectionConfig
from polca_lib.memory import default_budget
from polca_lib.strategy import Mode, Precision, Strategy, choose, differentiate, relative_difference
from polca_lib.token_loss import Batch, TokenLoss, n_examples, split_examples

_SAMPLE = 4, 8  # examples, and vectors, on which the error of products in bfloat16 is measured


class Projected(NamedTuple):
    """Losses and directional derivatives at one point, in nats per unit of length in weight space."""

    loss: Float[Tensor, " token"]
    gradient: Float[Tensor, "token vector"]
    curvature: Float[Tensor, "token vector"] | None
    error: float  # of gradient, root mean square over that of gradient, on a sample; 0 in full precision


class NonFiniteProjection(RuntimeError):
    """A checkpoint gives losses or derivatives that are NaN or infinite."""


def project(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    curvature: bool = False,
    mode: Mode = "auto",
    precision: Precision = "float32",
    memory: int | None = None,
    strategy: Strategy | None = None,
) -> Projected:
    """Derivatives of each token's loss along each vector.

    In forward mode a pass along b yields <grad L(x), b> for all tokens x at once, and b^T H(x) b with it. In reverse
    mode the gradient of each token is formed piece by piece and multiplied with the vectors, or the vectors are taken
    to the activations first, whichever is less; that is cheaper when few positions are targets. Of gradients with
    respect to weights that multiply data nothing but tiles is ever held.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows, of unit length if the results are to be per unit of length.
        curvature: also second derivatives, in forward mode.
        mode: ``auto`` takes the one with fewer operations, see :func:`polca_lib.strategy.choose`.
        precision: ``float32`` multiplies in the dtype of the model. With ``bfloat16``, reverse mode rounds the
            operands of its products with the vectors, and of its backward passes, to 8 bits; sums stay in float32
            but for one rounding a piece. Forward mode, and hence curvature, is never rounded.
        memory: bytes to take beyond the arguments; half of what the device has free if not given.
        strategy: as ``choose`` returned it for the same model, vectors of the same number and settings; chosen here
            if not given.

    Raises:
        ValueError: shapes do not fit, a setting is not allowed, or memory is too small.
    """
    if vectors.ndim != 2 or vectors.shape[1] != token_loss.n_parameters:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)}; allowed: (any, {token_loss.n_parameters}), "
            "one direction in parameter space a row"
        )
    order = 2 if curvature else 1
    strategy = strategy or choose(
        token_loss, theta, batch, vectors, order=order, mode=mode, precision=precision, memory=memory
    )
    if strategy.order != order:
        raise ValueError(f"strategy was chosen for order = {strategy.order}; curvature = {curvature} needs {order}")
    loss, (gradient, *second) = differentiate(strategy, token_loss, theta, batch, vectors)
    error = 0.0
    if strategy.precision == "bfloat16":
        examples, every = next(split_examples(batch, _SAMPLE[0])), math.ceil(len(vectors) / _SAMPLE[1])
        exact = differentiate(strategy.in_full(), token_loss, theta, examples, vectors[::every])[1][0]
        error = relative_difference(gradient[: len(exact), ::every], exact)
    return Projected(loss, gradient, second[0] if curvature else None, error)


def project_run(
    path: Path,
    checkpoints: CheckpointFolder,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    basis: xr.Dataset,
    settings: ProjectionConfig,
    memory: int | None = None,
) -> xr.Dataset:
    """Project every checkpoint of a run on a basis; resumes at the first checkpoint not yet stored.

    Args:
        path: Zarr folder.
        checkpoints: of the run.
        steps: their steps, in order.
        batch: the examples whose tokens are decomposed.
        tokens: one row per token of ``batch``; each column becomes a coordinate.
        basis: as :func:`polca_lib.basis.compute_basis` returns it.
        settings: whether to store b^T H(x) b too, and how to differentiate.
        memory: bytes to take, vectors included; half of what the device has free if not given. As many vectors as
            fit into half of it stay in memory; if not all do, they are read block by block at each checkpoint.

    Returns:
        Dataset with ``loss`` (step, token) in nats; ``gradient`` and ``curvature`` (step, token, vector): first and
        second derivative of the token's loss along the vector; ``movement`` (step, vector): the movement
        theta_{t+1} - theta_t to the next checkpoint, along b; ``distance`` (step): its length; ``inside_loss``
        (step, token): loss at theta_t + B^T B (theta_{t+1} - theta_t), after the part of the movement that lies in the
        basis. The last three are NaN at the last step. ``product_error`` (step): see :class:`Projected`. With
        ``settings.curvature_examples``, ``curvature`` is (step, sample, vector), of the tokens of the first examples.

    Raises:
        NonFiniteProjection: names the step; what was stored before stays.
    """
    return project_runs([path], checkpoints, steps, batch, tokens, [basis], [settings], memory)[0]


def project_runs(
    paths: Sequence[Path],
    checkpoints: CheckpointFolder,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    bases: Sequence[xr.Dataset],
    settings: Sequence[ProjectionConfig],
    memory: int | None = None,
) -> list[xr.Dataset]:
    """:func:`project_run` for several bases of one run at once.

    What a pass through the model costs is paid once for all vectors. The rest is as if they were done one by one.

    Args:
        paths, bases, settings: of each basis. ``mode`` and ``precision`` must be the same for all, and none may ask for
            the curvature of all tokens, if there are several.
        checkpoints, steps, batch, tokens, memory: see :func:`project_run`.

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
    losses_per_example = len(tokens) // n_examples(batch)
    stores = []
    for path, basis, own in zip(paths, bases, settings, strict=True):
        variables = {
            "loss": (("step", "token"), "float32"),
            "gradient": (("step", "token", "vector"), "float32"),
            "movement": (("step", "vector"), "float32"),
            "distance": (("step",), "float32"),
            "inside_loss": (("step", "token"), "float32"),
            "product_error": (("step",), "float32"),
        }
        if own.curvature:
            of = "token" if own.curvature_examples is None else "sample"
            variables["curvature"] = (("step", of, "vector"), "float32")
        template = xr.Dataset(
            coords={
                "step": steps,
                "token": np.arange(len(tokens)),
                **{name: ("token", _storable(column)) for name, column in tokens.items()},
                **{name: values for name, values in basis.coords.items() if values.dims == ("vector",)},
            }
        )
        sizes = {"sample": losses_per_example * (own.curvature_examples or 0)}
        stores.append(PieceStore(path, template, variables, dim="step", sizes=sizes))
    lacking = [set(store.missing()) for store in stores]
    if missing := sorted(set.union(*lacking)):
        blocks = _Blocks(bases, checkpoints, memory)
        following = dict(itertools.pairwise(steps))
        bar = tqdm(missing, total=len(steps), initial=len(steps) - len(missing), desc="projections", unit="checkpoint")
        for index in bar:
            step = steps[index]
            theta = _finite_theta(checkpoints, step)
            change = _finite_theta(checkpoints, following[step]) - theta if step in following else None
            pieces = _project_checkpoint(checkpoints.token_loss, theta, change, batch, blocks, settings)
            if not all(np.isfinite(value).all() for piece in pieces for value in piece.values()):
                raise NonFiniteProjection(
                    f"{checkpoints.file(step)} gives a loss or derivative that is not finite; projections of "
                    "other steps are kept. Look at the checkpoint, or end the run before it"
                )
            for store, lacks, piece in zip(stores, lacking, pieces, strict=True):
                if index in lacks:
                    store.write(index, **piece)
    return [store.dataset() for store in stores]


class _Blocks:
    """The vectors of all bases, in blocks that fit into memory, each with the strategy chosen for it."""

    def __init__(self, bases: Sequence[xr.Dataset], checkpoints: CheckpointFolder, memory: int | None):
        self._bases, self._checkpoints = bases, checkpoints
        budget = default_budget(checkpoints.device) if memory is None else memory
        one = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
        ends = np.cumsum([0, *(basis.sizes["vector"] for basis in bases)]).tolist()
        self.rows = [range(start, stop) for start, stop in itertools.pairwise(ends)]  # of each basis, among all
        self._total = ends[-1]
        self._size = max(1, min(self._total, budget // 2 // one))
        self.memory = max(1, budget - self._size * one)  # for all else
        self._only: Tensor | None = None
        self._strategies: dict[tuple[int, int], Strategy] = {}

    def __iter__(self) -> Iterator[tuple[range, Float[Tensor, "vector d"]]]:
        for start in range(0, self._total, self._size):
            rows = range(start, min(start + self._size, self._total))
            if self._only is None:
                block = self._read(rows)
                self._only = block if self._size == self._total else None
            yield rows, self._only if self._only is not None else block

    def _read(self, rows: range) -> Float[Tensor, "vector d"]:
        place = {"device": self._checkpoints.device, "dtype": self._checkpoints.token_loss.dtype}
        parts = []
        for basis, own in zip(self._bases, self.rows, strict=True):
            if shared := _overlap(rows, own):
                parts.append(read_vectors(basis, shared.start - own.start, shared.stop - own.start, **place))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def strategy(
        self, theta: Tensor, batch: Batch, vectors: Tensor, settings: ProjectionConfig, order: int
    ) -> Strategy:
        if (len(vectors), order) not in self._strategies:
            self._strategies[len(vectors), order] = choose(
                self._checkpoints.token_loss,
                theta,
                batch,
                vectors,
                order=order,
                mode=settings.mode if order == 1 else "forward",
                precision=settings.precision if order == 1 else "float32",
                memory=self.memory,
            )
        return self._strategies[len(vectors), order]


def _project_checkpoint(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    change: Float[Tensor, " d"] | None,
    batch: Batch,
    blocks: _Blocks,
    settings: Sequence[ProjectionConfig],
) -> list[dict[str, np.ndarray]]:
    """What is to be stored of one checkpoint, for each basis."""
    whole = settings[0].curvature_of_all
    found, movement, inside = [], [], [theta.clone() for _ in settings]
    sampled: list[list[Tensor]] = [[] for _ in settings]
    for rows, vectors in blocks:
        strategy = blocks.strategy(theta, batch, vectors, settings[0], 2 if whole else 1)
        found.append(project(token_loss, theta, batch, vectors, curvature=whole, strategy=strategy))
        if change is not None:
            movement.append(inner_products(vectors, change[None])[:, 0].to(theta))
        for index, (own, setting) in enumerate(zip(blocks.rows, settings, strict=True)):
            if not (shared := _overlap(rows, own)):
                continue
            part = slice(shared.start - rows.start, shared.stop - rows.start)
            if change is not None:
                inside[index] += vectors[part].T @ movement[-1][part]
            if setting.curvature and setting.curvature_examples is not None:
                sample = next(split_examples(batch, setting.curvature_examples))
                second = blocks.strategy(theta, sample, vectors[part], setting, 2)
                some = project(token_loss, theta, sample, vectors[part], curvature=True, strategy=second)
                sampled[index].append(some.curvature)
    gradient = torch.cat([block.gradient for block in found], dim=1)
    pieces = []
    for own, point, curvature in zip(blocks.rows, inside, sampled, strict=True):
        columns = slice(own.start, own.stop)
        piece = {
            "loss": found[0].loss,
            "gradient": gradient[:, columns],
            "product_error": torch.tensor(max(block.error for block in found)),
        }
        if whole:
            piece["curvature"] = torch.cat([block.curvature for block in found], dim=1)
        elif curvature:
            piece["curvature"] = torch.cat(curvature, dim=1)
        if change is not None:
            losses = [token_loss(point, part) for part in split_examples(batch, strategy.pass_examples)]
            piece |= {
                "movement": torch.cat(movement)[columns],
                "distance": change.double().norm(),
                "inside_loss": torch.cat(losses),
            }
        pieces.append({name: value.detach().cpu().numpy() for name, value in piece.items()})
    return pieces


def _overlap(one: range, other: range) -> range:
    """The part of ``one`` that lies in ``other``; empty if none does."""
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _finite_theta(checkpoints: CheckpointFolder, step: int) -> Float[Tensor, " d"]:
    """The weights at ``step``, checked here because they also enter the movement of the step before."""
    theta = checkpoints.theta(step)
    if not torch.isfinite(theta).all():
        raise NonFiniteProjection(f"{checkpoints.file(step)} holds weights that are not finite; end the run before it")
    return theta


def _storable(column: pd.Series) -> np.ndarray:
    """Values with a dtype that Zarr knows: numbers and booleans as they are, all else as text."""
    numeric = pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)
    return column.to_numpy() if numeric else column.to_numpy(dtype=str)
