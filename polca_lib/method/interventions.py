"""Loss changes when weights move along single directions: the truth that POLCA estimates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.token_loss import Batch, TokenLoss, split_examples
from polca_lib.method.vectors import inner_products, read_vectors
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.pieces import PieceStore
from polca_lib.storage.progress import progress

_EXAMPLES = 128  # in one pass
_STREAM = 1  # a random stream apart from those of the random basis and of the start vectors of Lanczos


@torch.no_grad()
def losses_at(token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, " token"]:
    """L(x; theta) for all tokens of ``batch``, in passes of a few examples."""
    return torch.cat([token_loss(theta, part) for part in split_examples(batch, _EXAMPLES)])


def move_along(
    path: Path, checkpoints: Checkpoints, steps: Sequence[int], batch: Batch, basis: xr.Dataset
) -> xr.DataArray:
    """L(x; theta_t + b b^T (theta_{t+1} - theta_t)) - L(x; theta_t): the true loss change of moving along b alone.

    POLCA(x, b, t) estimates this by derivatives; here it is a finite difference. Work that was stopped resumes.

    Args:
        path: Zarr folder.
        checkpoints: of the run.
        steps: of the checkpoints, in training order; consecutive steps bound an interval.
        batch: examples.
        basis: as :func:`polca_lib.method.basis.compute_basis` returns it; all of it is held in memory.

    Returns:
        (step, token, vector), in nats; ``step`` is the start of the interval.
    """
    vectors = read_vectors(basis, device=checkpoints.device, dtype=checkpoints.token_loss.dtype)
    tokens = len(losses_at(checkpoints.token_loss, checkpoints.theta(steps[0]), batch))
    template = xr.Dataset(coords={"step": list(steps[:-1]), "vector": basis["vector"].values})
    variables = {"change": (("step", "token", "vector"), "float32")}
    store = PieceStore(path, template, variables, dim="step", sizes={"token": tokens})
    intervals = list(itertools.pairwise(steps))
    for index in progress(store.missing(), desc="finite differences", unit="interval"):
        start, end = (checkpoints.theta(step) for step in intervals[index])
        movement = inner_products(vectors, (end - start)[None])[:, 0].to(start)
        before = losses_at(checkpoints.token_loss, start, batch)
        after = [
            losses_at(checkpoints.token_loss, start + moved * vector, batch)
            for moved, vector in zip(movement, vectors, strict=True)
        ]
        store.write(index, change=(torch.stack(after, dim=1) - before[:, None]).cpu().numpy())
    return store.dataset()["change"].load()


def ablate_movement(
    token_loss: TokenLoss,
    start: Float[Tensor, " d"],
    end: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    lengths: Float[Tensor, " vector"] | None = None,
) -> tuple[Float[Tensor, "vector token"], Float[Tensor, " vector"]]:
    """L(x; end - b b^T (end - start)) - L(x; end): loss change when the movement along each b is taken back.

    It is positive where the model does worse without having moved along b.

    Args:
        token_loss: the loss.
        start, end: parameters, shape (d,).
        batch: examples.
        vectors: unit directions b in rows.
        lengths: signed lengths to take back instead of b^T (end - start).

    Returns:
        The changes, in nats, and b^T (end - start), or ``lengths``.
    """
    if lengths is None:
        lengths = inner_products(vectors, (end - start)[None])[:, 0].to(end)
    trained = losses_at(token_loss, end, batch)
    changes = [
        losses_at(token_loss, end - length * vector, batch) - trained
        for length, vector in zip(lengths, vectors, strict=True)
    ]
    return torch.stack(changes), lengths


def random_directions(
    n: int, d: int, seed: int, *, like: Float[Tensor, " d"], orthogonal_to: Float[Tensor, "vector d"] | None = None
) -> Float[Tensor, "n d"]:
    """Random unit vectors, uniform on the sphere that is orthogonal to the orthonormal ``orthogonal_to``."""
    rows = np.stack(
        [np.random.default_rng([seed, index, _STREAM]).standard_normal(d, dtype=np.float32) for index in range(n)]
    )
    vectors = torch.from_numpy(rows).to(like)
    if orthogonal_to is not None:
        vectors -= inner_products(vectors, orthogonal_to).to(like) @ orthogonal_to
    return vectors / vectors.norm(dim=1, keepdim=True)
