"""<grad L(x; theta), b> and b^T H(x; theta) b for all tokens x and vectors b, at every checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
from polca_lib.token_loss import Batch, TokenLoss, split_examples

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
        basis. The last three are NaN at the last step. ``product_error`` (step): see :class:`Projected`.

    Raises:
        NonFiniteProjection: names the step; what was stored before stays.
    """
    variables = {
        "loss": (("step", "token"), "float32"),
        "gradient": (("step", "token", "vector"), "float32"),
        "movement": (("step", "vector"), "float32"),
        "distance": (("step",), "float32"),
        "inside_loss": (("step", "token"), "float32"),
        "product_error": (("step",), "float32"),
    }
    if settings.curvature:
        variables["curvature"] = variables["gradient"]
    template = xr.Dataset(
        coords={
            "step": steps,
            "token": np.arange(len(tokens)),
            **{name: ("token", _storable(column)) for name, column in tokens.items()},
            **{name: values for name, values in basis.coords.items() if values.dims == ("vector",)},
        }
    )
    store = PieceStore(path, template, variables, dim="step")
    if missing := store.missing():
        blocks = _Blocks(basis, checkpoints, memory)
        following = dict(itertools.pairwise(steps))
        bar = tqdm(missing, total=len(steps), initial=len(steps) - len(missing), desc="projections", unit="checkpoint")
        for index in bar:
            step = steps[index]
            theta = _finite_theta(checkpoints, step)
            change = _finite_theta(checkpoints, following[step]) - theta if step in following else None
            piece = _project_checkpoint(checkpoints.token_loss, theta, change, batch, blocks, settings)
            if not all(np.isfinite(value).all() for value in piece.values()):
                raise NonFiniteProjection(
                    f"{checkpoints.file(step)} gives a loss or derivative that is not finite; projections of "
                    "other steps are kept. Look at the checkpoint, or end the run before it"
                )
            store.write(index, **piece)
    return store.dataset()


class _Blocks:
    """The vectors of a basis, in blocks that fit into memory, each with the strategy chosen for it."""

    def __init__(self, basis: xr.Dataset, checkpoints: CheckpointFolder, memory: int | None):
        self._basis, self._checkpoints = basis, checkpoints
        budget = default_budget(checkpoints.device) if memory is None else memory
        one = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
        self._size = max(1, min(basis.sizes["vector"], budget // 2 // one))
        self.memory = max(1, budget - self._size * one)  # for all else
        self._only: Tensor | None = None
        self._strategies: dict[int, Strategy] = {}

    def __iter__(self) -> Iterator[Float[Tensor, "vector d"]]:
        total = self._basis.sizes["vector"]
        for start in range(0, total, self._size):
            if self._only is None:
                block = read_vectors(
                    self._basis,
                    start,
                    min(start + self._size, total),
                    device=self._checkpoints.device,
                    dtype=self._checkpoints.token_loss.dtype,
                )
                self._only = block if self._size == total else None
            yield self._only if self._only is not None else block

    def strategy(self, theta: Tensor, batch: Batch, vectors: Tensor, settings: ProjectionConfig) -> Strategy:
        if len(vectors) not in self._strategies:
            self._strategies[len(vectors)] = choose(
                self._checkpoints.token_loss,
                theta,
                batch,
                vectors,
                order=2 if settings.curvature else 1,
                mode=settings.mode,
                precision=settings.precision,
                memory=self.memory,
            )
        return self._strategies[len(vectors)]


def _project_checkpoint(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    change: Float[Tensor, " d"] | None,
    batch: Batch,
    blocks: _Blocks,
    settings: ProjectionConfig,
) -> dict[str, np.ndarray]:
    found, movement, inside = [], [], theta.clone()
    for vectors in blocks:
        strategy = blocks.strategy(theta, batch, vectors, settings)
        found.append(project(token_loss, theta, batch, vectors, curvature=settings.curvature, strategy=strategy))
        if change is not None:
            movement.append(inner_products(vectors, change[None])[:, 0].to(theta))
            inside += vectors.T @ movement[-1]
    piece = {
        "loss": found[0].loss,
        "gradient": torch.cat([block.gradient for block in found], dim=1),
        "product_error": torch.tensor(max(block.error for block in found)),
    }
    if settings.curvature:
        piece["curvature"] = torch.cat([block.curvature for block in found], dim=1)
    if change is not None:
        losses = [token_loss(inside, part) for part in split_examples(batch, strategy.pass_examples)]
        piece |= {"movement": torch.cat(movement), "distance": change.double().norm(), "inside_loss": torch.cat(losses)}
    return {name: value.detach().cpu().numpy() for name, value in piece.items()}


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
