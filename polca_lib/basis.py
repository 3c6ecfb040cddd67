"""The orthonormal basis: Algorithm 1 of the paper, and the bases it is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
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
from polca_lib.curvature import Eigenpairs, HessianOperator, krylov_rows, top_eigenpairs
from polca_lib.memory import default_budget
from polca_lib.token_loss import Batch

_RECORDS = ("eigenvalue", "residual", "products")

# What is stored of a vector: all of it, or as little as gives it back.
_EIGENVECTORS = {"vectors": (("vector", "parameter"), "float32")}
_STORED = {
    "hessian": _EIGENVECTORS,
    "shuffled": _EIGENVECTORS,
    "final": _EIGENVECTORS,
    "trajectory": _EIGENVECTORS,
    "random": {"mixing": (("vector", "gaussian"), "float64")},
    "parameters": {"axis": (("vector",), "int64")},
}

_SLICE = 2**14  # parameters for which all Gaussian vectors are in memory at once


def compute_basis(path: Path, config: RunConfig, checkpoints: CheckpointFolder, hessian_batch: Batch) -> xr.Dataset:
    """Compute (or finish, or just open) the basis at ``path``.

    ``config.basis.kind`` says which:

    - ``hessian``: Algorithm 1. For each basis checkpoint in training order, the top k eigenvectors of P H P,
      with H the Hessian of the mean loss of ``hessian_batch`` and P = I - B B^T, are appended to B.
    - ``shuffled``: the same with the checkpoints in an order drawn from the seed (Appendix E).
    - ``final``: the same with all vectors from the last checkpoint, each orthogonal to those before it.
    - ``trajectory``: principal directions of the checkpoints themselves, step 0 and the basis checkpoints, by variance:
      directions of long-term movement, without a Hessian.
    - ``random``: orthonormalised Gaussian vectors (Appendix E).
    - ``parameters``: the coordinate axes of the parameters largest in magnitude at the end of training, so
      that first-order POLCA becomes loss change allocation (LCA) on them (v3, Table 3).

    Each new vector is orthogonalised twice against all before it. Vectors are stored as they are found, and those
    for which ``config.memory`` has no room are read from there.

    Args:
        path: Zarr folder.
        config: of the run.
        checkpoints: of the run.
        hessian_batch: fixed sample from the distribution of the training data.

    Returns:
        Dataset, opened but not read, with what :func:`read_vectors` needs: ``vectors`` (vector, parameter), unit norm;
        or ``mixing`` (vector, gaussian), which makes a random basis from the Gaussian vectors of the seed; or
        ``axis`` (vector), the parameter along whose axis it points. Coordinates: ``vector`` (from 1), ``birth_step``,
        ``eigenvalue`` (nats per squared parameter unit, of P H P), ``residual`` (relative) and ``products``
        (Hessian-vector products); the last three are NaN where they have no meaning.

    Raises:
        ValueError: the memory is too small for the Hessian of a single example.
    """
    births, kind = _birth_steps(config), config.basis.kind
    n_vectors, n_parameters = config.n_vectors, checkpoints.token_loss.n_parameters
    template = xr.Dataset(
        coords={"vector": np.arange(1, n_vectors + 1), "birth_step": ("vector", births)},
        attrs={"parameters": n_parameters, "seed": config.seed},
    )
    records = dict.fromkeys(_RECORDS, (("vector",), "float64"))
    sizes = {"parameter": n_parameters, "gaussian": n_vectors}
    store = PieceStore(path, template, {**_STORED[kind], **records}, dim="vector", sizes=sizes)
    if missing := store.missing():
        if kind == "random":
            mixing = _mixing(config.seed, n_vectors, n_parameters)
            pieces = ((row, {"mixing": mixing[row]}) for row in missing)
        elif kind == "parameters":
            axes = checkpoints.theta(config.training.steps).abs().topk(n_vectors).indices.cpu().numpy()
            pieces = ((row, {"axis": axes[row]}) for row in missing)
        elif kind == "trajectory":
            directions = _principal_directions(checkpoints, [0, *config.basis_steps], n_vectors)
            pieces = ((row, {"vectors": directions[row].cpu().numpy()}) for row in missing)
        else:
            # Start at the first vector of the block that was cut short.
            missing = range(missing[0] // config.basis.k * config.basis.k, n_vectors)
            pieces = _eigenvectors(config, births, checkpoints, hessian_batch, store, missing[0])
        bar = tqdm(total=n_vectors, initial=n_vectors - len(missing), desc=f"basis ({kind})", unit="vector")
        with bar:
            for row, piece in pieces:
                store.write(row, **piece)
                bar.update()
    return load_basis(path)


def load_basis(path: Path) -> xr.Dataset | None:
    """The basis at ``path``, as :func:`compute_basis` returns it, or nothing if it is not complete."""
    stored = PieceStore.load(path)
    return None if stored is None else stored.set_coords(_RECORDS)


def read_vectors(
    basis: xr.Dataset,
    start: int = 0,
    stop: int | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "block d"]:
    """Vectors ``start`` (from 0) up to, not including, ``stop`` of a basis, in rows; only those are read or made.

    Args:
        basis: as :func:`compute_basis` returns it.
        start, stop: rows; to the last one if ``stop`` is not given.
        device, dtype: of the result.
    """
    rows = range(basis.sizes["vector"])[start:stop]
    block = slice(rows.start, rows.stop)
    if "vectors" in basis:
        return torch.from_numpy(basis["vectors"][block].values).to(device, dtype)
    result = torch.zeros(len(rows), basis.attrs["parameters"], device=device, dtype=dtype)
    if "axis" in basis:
        return result.scatter_(1, torch.from_numpy(basis["axis"][block].values).to(device)[:, None], 1)
    mixing = torch.from_numpy(basis["mixing"][block].values)
    for part, gaussians in _gaussian_slices(basis.attrs["seed"], rows.stop, basis.attrs["parameters"]):
        # One by one, so that a vector is the same to the last bit in whichever block it is read.
        for own, row in enumerate(rows):
            result[own, part] = (mixing[own, : row + 1] @ gaussians[: row + 1]).to(result)
    return result


def inner_products(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """All inner products of two sets of long vectors, summed in float64.

    In float32, torch sums a million squares to four digits or so: too few for lengths, and for the small part of a
    movement that lies along one direction.
    """
    size = max(1, 2**22 // max(len(rows), len(others)))
    chunks = zip(rows.split(size, dim=1), others.split(size, dim=1), strict=True)
    return sum(one.double() @ other.double().T for one, other in chunks)


def gram_error(vectors: Float[Tensor, "vector d"]) -> float:
    """Largest entry of abs(B B^T - I) for vectors in rows: zero for an orthonormal basis."""
    return (inner_products(vectors, vectors) - torch.eye(len(vectors), device=vectors.device)).abs().max().item()


def without(vector: Float[Tensor, " d"], known: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """The part of ``vector`` that is orthogonal to the orthonormal ``known``, which are taken out one by one."""
    rest = vector.clone()
    for one in known:
        rest.sub_(one, alpha=inner_products(one[None], rest[None]).item())
    return rest


def orthogonalise(vector: Float[Tensor, " d"], against: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """Unit vector orthogonal to the orthonormal ``against``: Gram-Schmidt, twice, in float64."""
    rest = without(without(vector.double(), against), against)
    return (rest / rest.norm()).to(vector.dtype)


def _birth_steps(config: RunConfig) -> np.ndarray:
    steps = np.array(config.basis_steps)
    if config.basis.kind == "random":
        steps = np.zeros_like(steps)
    if config.basis.kind in ("parameters", "trajectory", "final"):
        steps = np.full_like(steps, config.training.steps)
    if config.basis.kind == "shuffled":
        steps = np.random.default_rng(config.seed).permutation(steps)
    return np.repeat(steps, config.basis.k)[: config.n_vectors]


class _Found:
    """The vectors found so far, one by one: as many as there is room for from memory, the others from disk."""

    def __init__(self, store: PieceStore, n: int, room: int, checkpoints: CheckpointFolder):
        self._basis, self._n, self._room = store.dataset(), n, room
        self._place = {"device": checkpoints.device, "dtype": checkpoints.token_loss.dtype}
        self._held = list(read_vectors(self._basis, 0, min(n, room), **self._place))

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Float[Tensor, " d"]]:
        yield from self._held
        for row in range(len(self._held), self._n):
            yield read_vectors(self._basis, row, row + 1, **self._place)[0]

    def append(self, vector: Float[Tensor, " d"]) -> None:
        """Add a vector that is already on disk."""
        self._n += 1
        if len(self._held) < self._room:
            self._held.append(vector)


def _eigenvectors(
    config: RunConfig,
    births: np.ndarray,
    checkpoints: CheckpointFolder,
    hessian_batch: Batch,
    store: PieceStore,
    start: int,
) -> Iterator[tuple[int, dict[str, np.ndarray | float]]]:
    """Find the vectors from row ``start`` on; each must be stored before the next is asked for."""
    settings = config.basis
    n_vectors, n_parameters = config.n_vectors, checkpoints.token_loss.n_parameters
    memory = default_budget(checkpoints.device) if config.memory is None else config.memory
    one = n_parameters * checkpoints.token_loss.dtype.itemsize
    # Lanczos seldom needs all of its products: what they would take at most is no reason not to try.
    shared = memory - min(krylov_rows(settings.max_products, settings.k) * one, memory // 2)
    room = min(n_vectors, shared // 2 // one)
    found = _Found(store, start, room, checkpoints)
    first = checkpoints.theta(int(births[start]))
    hessian = HessianOperator(checkpoints.token_loss, first, hessian_batch, shared - room * one)

    def search(step: int) -> Eigenpairs:
        hessian.move_to(checkpoints.theta(step))
        # P once a product, after H: in Lanczos all vectors come from products, but for the start.
        return top_eigenpairs(
            lambda vector: without(hessian(vector), found),
            without(_gaussian(config.seed, len(found), n_parameters, checkpoints), found),
            settings.k,
            which=settings.which,
            tolerance=settings.tolerance,
            max_products=settings.max_products,
        )

    while len(found) < n_vectors:
        step = int(births[len(found)])
        pairs = search(step)
        if not pairs.converged:
            warnings.warn(
                f"basis vector {len(found) + 1} (step {step}) has relative residual {pairs.residuals.max():.3f} "
                f"after basis.max_products = {settings.max_products} products; "
                f"basis.tolerance = {settings.tolerance} was asked for",
                stacklevel=2,
            )
        for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
            if len(found) < n_vectors:
                new = orthogonalise(vector, found)
                record = (value.item(), residual.item(), pairs.products / settings.k)
                yield len(found), {"vectors": new.cpu().numpy(), **dict(zip(_RECORDS, record, strict=True))}
                found.append(new)


def _principal_directions(checkpoints: CheckpointFolder, steps: list[int], n: int) -> Float[Tensor, "n d"]:
    """The first ``n`` principal directions of checkpoints, through their Gram matrix; all of them are in memory."""
    place = {"device": checkpoints.device, "dtype": checkpoints.token_loss.dtype}
    rows = torch.empty(len(steps), checkpoints.token_loss.n_parameters, **place)
    for row, step in zip(rows, steps, strict=True):
        row.copy_(checkpoints.theta(step))
    rows -= rows.mean(dim=0)
    variances, weights = torch.linalg.eigh(inner_products(rows, rows))
    directions = (weights / variances.clamp_min(1e-300).sqrt()).T.flip(0)[:n].to(rows) @ rows
    for index in range(n):
        directions[index] = orthogonalise(directions[index], directions[:index])
    return directions


def _gaussian(seed: int, index: int, n: int, checkpoints: CheckpointFolder) -> Float[Tensor, " d"]:
    values = np.random.default_rng([seed, index]).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(values).to(checkpoints.device, checkpoints.token_loss.dtype)


def _gaussian_slices(seed: int, n: int, d: int) -> Iterator[tuple[slice, Float[Tensor, "n part"]]]:
    """The first ``n`` Gaussian vectors of a seed, a part of their ``d`` entries at a time, in float64."""
    generators = [np.random.default_rng([seed, index]) for index in range(n)]
    for start in range(0, d, _SLICE):
        part = slice(start, min(start + _SLICE, d))
        draws = [g.standard_normal(part.stop - start, dtype=np.float32) for g in generators]
        yield part, torch.from_numpy(np.stack(draws)).double()


def _mixing(seed: int, n: int, d: int) -> Float[np.ndarray, "vector gaussian"]:
    """Gram-Schmidt as a lower triangular matrix: its rows make orthonormal vectors out of the Gaussian ones."""
    gram = sum(gaussians @ gaussians.T for _, gaussians in _gaussian_slices(seed, n, d))
    root = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(root, torch.eye(n, dtype=root.dtype), upper=False).numpy()
