"""The orthonormal basis: Algorithm 1 of the paper, and the bases it is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from polca_lib.artefacts import PieceStore
from polca_lib.checkpoints import CheckpointFolder
from polca_lib.config import RunConfig
from polca_lib.curvature import HessianOperator, top_eigenpairs
from polca_lib.token_loss import Batch

_RECORDS = ("eigenvalue", "residual", "products")


def compute_basis(path: Path, config: RunConfig, checkpoints: CheckpointFolder, hessian_batch: Batch) -> xr.Dataset:
    """Compute (or finish, or just open) the basis at ``path``.

    ``config.basis.kind`` says which:

    - ``hessian``: Algorithm 1. For each basis checkpoint in training order, the top k eigenvectors of P H P,
      with H the Hessian of the mean loss of ``hessian_batch`` and P = I - B B^T, are appended to B.
    - ``shuffled``: the same with the checkpoints in an order drawn from the seed (Appendix E).
    - ``random``: orthonormalised Gaussian vectors (Appendix E).
    - ``parameters``: the coordinate axes of the parameters largest in magnitude at the end of training, so
      that first-order POLCA becomes loss change allocation (LCA) on them (v3, Table 3).

    Each new vector is orthogonalised twice against all before it. Vectors are stored as they are found.

    Args:
        path: Zarr folder.
        config: of the run.
        checkpoints: of the run.
        hessian_batch: fixed sample from the distribution of the training data.

    Returns:
        Dataset with ``vectors`` (vector, parameter), unit norm, and coordinates ``vector`` (from 1),
        ``birth_step``, ``eigenvalue`` (nats per squared parameter unit, of P H P), ``residual`` (relative) and
        ``products`` (Hessian-vector products); the last three are NaN where they have no meaning.
    """
    births = _birth_steps(config)
    template = xr.Dataset(
        coords={
            "vector": np.arange(1, config.n_vectors + 1),
            "parameter": np.arange(checkpoints.token_loss.n_parameters),
            "birth_step": ("vector", births),
        }
    )
    records = dict.fromkeys(_RECORDS, (("vector",), "float64"))
    store = PieceStore(path, template, {"vectors": (("vector", "parameter"), "float32"), **records}, dim="vector")
    if missing := store.missing():
        # Start at the first vector of the block that was cut short.
        start = missing[0] // config.basis.k * config.basis.k
        done = torch.from_numpy(store.dataset()["vectors"][:start].values)
        vectors = list(done.to(checkpoints.device, checkpoints.token_loss.dtype))
        bar = tqdm(total=config.n_vectors, initial=start, desc=f"basis ({config.basis.kind})", unit="vector")
        with bar:
            for vector, record in _vectors(config, births, checkpoints, hessian_batch, vectors):
                store.write(len(vectors) - 1, vectors=vector.cpu().numpy(), **record)
                bar.update()
    return load_basis(path)


def load_basis(path: Path) -> xr.Dataset | None:
    """The basis at ``path``, as :func:`compute_basis` returns it, or nothing if it is not complete."""
    stored = PieceStore.load(path)
    return None if stored is None else stored.set_coords(_RECORDS)


def inner_products(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """All inner products of two sets of long vectors, summed in float64.

    In float32, torch sums a million squares to four digits or so: too few for lengths, and for the small part of a
    movement that lies along one direction.
    """
    chunks = zip(rows.split(2**20, dim=1), others.split(2**20, dim=1), strict=True)
    return sum(one.double() @ other.double().T for one, other in chunks)


def gram_error(vectors: Float[Tensor, "vector d"]) -> float:
    """Largest entry of abs(B B^T - I) for vectors in rows: zero for an orthonormal basis."""
    return (inner_products(vectors, vectors) - torch.eye(len(vectors), device=vectors.device)).abs().max().item()


def orthogonalise(vector: Float[Tensor, " d"], against: list[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """Unit vector orthogonal to the orthonormal ``against``: Gram-Schmidt, twice, in float64."""
    result = vector.double()
    for _ in range(2):
        for known in against:
            result = result - (known.double() @ result) * known.double()
    return (result / result.norm()).to(vector.dtype)


def _birth_steps(config: RunConfig) -> np.ndarray:
    steps = np.array(config.basis_steps)
    if config.basis.kind == "random":
        steps = np.zeros_like(steps)
    if config.basis.kind == "parameters":
        steps = np.full_like(steps, config.training.steps)
    if config.basis.kind == "shuffled":
        steps = np.random.default_rng(config.seed).permutation(steps)
    return np.repeat(steps, config.basis.k)[: config.n_vectors]


def _vectors(
    config: RunConfig,
    births: np.ndarray,
    checkpoints: CheckpointFolder,
    hessian_batch: Batch,
    vectors: list[Float[Tensor, " d"]],
) -> Iterator[tuple[Float[Tensor, " d"], dict[str, float]]]:
    """Append the missing vectors to ``vectors``, yielding each with what is known of it."""
    nothing = dict.fromkeys(_RECORDS, np.nan)
    settings = config.basis
    n_parameters = checkpoints.token_loss.n_parameters
    if settings.kind == "parameters":
        largest = checkpoints.theta(config.training.steps).abs().topk(config.n_vectors).indices
        for index in largest[len(vectors) :]:
            vectors.append(torch.nn.functional.one_hot(index, n_parameters).to(checkpoints.token_loss.dtype))
            yield vectors[-1], nothing
        return
    while len(vectors) < config.n_vectors:
        step = int(births[len(vectors)])
        start = _gaussian(config.seed, len(vectors), n_parameters, checkpoints)
        if settings.kind == "random":
            vectors.append(orthogonalise(start, vectors))
            yield vectors[-1], nothing
            continue
        hessian = HessianOperator(checkpoints.token_loss, checkpoints.theta(step), hessian_batch)
        found = torch.stack(vectors) if vectors else start.new_zeros(0, n_parameters)

        def project(vector: Tensor, found: Tensor = found) -> Tensor:
            return vector - found.T @ (found @ vector)

        pairs = top_eigenpairs(
            lambda v, hessian=hessian, project=project: project(hessian(project(v))),
            project(start),
            settings.k,
            which=settings.which,
            tolerance=settings.tolerance,
            max_products=settings.max_products,
        )
        if not pairs.converged:
            warnings.warn(
                f"basis vector {len(vectors) + 1} (step {step}) has relative residual {pairs.residuals.max():.3f} "
                f"after basis.max_products = {settings.max_products} products; "
                f"basis.tolerance = {settings.tolerance} was asked for",
                stacklevel=2,
            )
        for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
            if len(vectors) < config.n_vectors:
                vectors.append(orthogonalise(vector, vectors))
                found_by = (value.item(), residual.item(), pairs.products / settings.k)
                yield vectors[-1], dict(zip(_RECORDS, found_by, strict=True))


def _gaussian(seed: int, index: int, n: int, checkpoints: CheckpointFolder) -> Float[Tensor, " d"]:
    values = np.random.default_rng([seed, index]).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(values).to(checkpoints.device, checkpoints.token_loss.dtype)
