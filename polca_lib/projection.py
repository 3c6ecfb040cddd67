"""<grad L(x; theta), b> and b^T H(x; theta) b for all tokens x and vectors b, at every checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap
from tqdm import tqdm

from polca_lib.artefacts import PieceStore
from polca_lib.basis import inner_products
from polca_lib.checkpoints import CheckpointFolder
from polca_lib.token_loss import Batch, TokenLoss, split_examples


class Projected(NamedTuple):
    """Losses and directional derivatives at one point, in nats per unit of length in weight space."""

    loss: Float[Tensor, " token"]
    gradient: Float[Tensor, "token vector"]
    curvature: Float[Tensor, "token vector"] | None


class NonFiniteProjection(RuntimeError):
    """A checkpoint gives losses or derivatives that are NaN or infinite."""


def project(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    curvature: bool = False,
    chunk_examples: int = 100,
    chunk_vectors: int = 8,
) -> Projected:
    """Derivatives of each token's loss along each vector, by forward-mode differentiation.

    One forward-mode pass along b yields <grad L(x), b> for all tokens x at once; nested in itself it yields
    b^T H(x) b too. Passes along several vectors share the primal one under ``vmap``. Nothing of the size of
    tokens x parameters is ever formed.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows, of unit length if the results are to be per unit of length.
        curvature: also second derivatives, at about four times the cost.
        chunk_examples, chunk_vectors: examples and vectors held in memory at once; results do not depend on
            them beyond rounding.

    Raises:
        ValueError: shapes do not fit.
    """
    if vectors.ndim != 2 or vectors.shape[1] != token_loss.n_parameters:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)}; allowed: (any, {token_loss.n_parameters}), "
            "one direction in parameter space a row"
        )
    losses, gradients, curvatures = [], [], []
    with torch.no_grad():
        for chunk in split_examples(batch, chunk_examples):

            def along(vector: Tensor, chunk: Batch = chunk) -> tuple[Tensor, ...]:
                def slope(at: Tensor) -> tuple[Tensor, Tensor]:
                    return jvp(lambda point: token_loss(point, chunk), (at,), (vector,))

                if not curvature:
                    return slope(theta)
                (loss, gradient), (_, second) = jvp(slope, (theta,), (vector,))
                return loss, gradient, second

            loss, *derivatives = vmap(along, out_dims=0, chunk_size=chunk_vectors)(vectors)
            losses.append(loss[0])
            gradients.append(derivatives[0].T)
            if curvature:
                curvatures.append(derivatives[1].T)
    return Projected(torch.cat(losses), torch.cat(gradients), torch.cat(curvatures) if curvature else None)


def project_run(
    path: Path,
    checkpoints: CheckpointFolder,
    steps: list[int],
    batch: Batch,
    tokens: pd.DataFrame,
    basis: xr.Dataset,
    *,
    curvature: bool,
) -> xr.Dataset:
    """Project every checkpoint of a run on a basis; resumes at the first checkpoint not yet stored.

    Args:
        path: Zarr folder.
        checkpoints: of the run.
        steps: their steps, in order.
        batch: the examples whose tokens are decomposed.
        tokens: one row per token of ``batch``; each column becomes a coordinate.
        basis: as :func:`polca_lib.basis.compute_basis` returns it.
        curvature: also store b^T H(x) b.

    Returns:
        Dataset with ``loss`` (step, token) in nats; ``gradient`` and ``curvature`` (step, token, vector): first and
        second derivative of the token's loss along the vector; ``movement`` (step, vector): the movement
        theta_{t+1} - theta_t to the next checkpoint, along b; ``distance`` (step): its length; ``inside_loss``
        (step, token): loss at theta_t + B^T B (theta_{t+1} - theta_t), after the part of the movement that lies in the
        basis. The last three are NaN at the last step.

    Raises:
        NonFiniteProjection: names the step; what was stored before stays.
    """
    variables = {
        "loss": (("step", "token"), "float32"),
        "gradient": (("step", "token", "vector"), "float32"),
        "movement": (("step", "vector"), "float32"),
        "distance": (("step",), "float32"),
        "inside_loss": (("step", "token"), "float32"),
    }
    if curvature:
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
        vectors = torch.from_numpy(basis["vectors"].values).to(checkpoints.device, checkpoints.token_loss.dtype)
        following = dict(itertools.pairwise(steps))
        bar = tqdm(missing, total=len(steps), initial=len(steps) - len(missing), desc="projections", unit="checkpoint")
        for index in bar:
            step = steps[index]
            theta = _finite_theta(checkpoints, step)
            result = project(checkpoints.token_loss, theta, batch, vectors, curvature=curvature)
            if not all(torch.isfinite(value).all() for value in result if value is not None):
                raise NonFiniteProjection(
                    f"{checkpoints.file(step)} gives a loss or derivative that is not finite; projections of "
                    "other steps are kept. Look at the checkpoint, or end the run before it"
                )
            piece = {"loss": result.loss, "gradient": result.gradient}
            if curvature:
                piece["curvature"] = result.curvature
            if step in following:
                change = _finite_theta(checkpoints, following[step]) - theta
                movement = inner_products(vectors, change[None])[:, 0].to(theta)
                inside = torch.cat(_losses(checkpoints.token_loss, theta + vectors.T @ movement, batch))
                piece |= {"movement": movement, "distance": change.double().norm(), "inside_loss": inside}
            store.write(index, **{name: value.cpu().numpy() for name, value in piece.items()})
    return store.dataset()


@torch.no_grad()
def _losses(token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, chunk: int = 256) -> list[Tensor]:
    return [token_loss(theta, part) for part in split_examples(batch, chunk)]


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
