"""The orthonormal basis: Algorithm 1 of the paper, and the bases it is compared with."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.batches import as_batch
from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.memory import default_budget, rows_that_fit
from polca_lib.derivatives.token_loss import Batch, TokenLoss
from polca_lib.method.eigenpairs import Eigenpairs, krylov_rows, top_eigenpairs
from polca_lib.method.settings import HESSIAN_KINDS, BasisSettings
from polca_lib.method.vectors import gaussian, inner_products, mixing, orthogonalise, read_vectors, without
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.pieces import PieceStore
from polca_lib.storage.progress import progress

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

_WITHOUT_HESSIAN = ", ".join(kind for kind in _STORED if kind not in HESSIAN_KINDS)

_Piece = tuple[int, dict[str, np.ndarray | float]]


def compute_basis(
    path: Path,
    settings: BasisSettings,
    checkpoints: Checkpoints,
    hessian_batch: Batch | None,
    *,
    steps: Sequence[int],
    seed: int = 0,
    memory: int | None = None,
    hessian_loss: TokenLoss | None = None,
) -> xr.Dataset:
    """Compute (or finish, or just open) the basis at ``path``.

    ``settings.kind`` says which:

    - ``hessian``: Algorithm 1. For each basis checkpoint in training order, the top k eigenvectors of P H P,
      with H the Hessian of the mean loss of ``hessian_batch`` and P = I - B B^T, are appended to B.
    - ``shuffled``: the same with the checkpoints in an order drawn from the seed (Appendix E).
    - ``final``: the same with all vectors from the last checkpoint, each orthogonal to those before it.
    - ``trajectory``: principal directions of the checkpoints themselves, the first and the basis checkpoints, by
      variance: directions of long-term movement, without a Hessian.
    - ``random``: orthonormalised Gaussian vectors (Appendix E).
    - ``parameters``: the coordinate axes of the parameters largest in magnitude at the end of training, so
      that first-order POLCA becomes loss change allocation (LCA) on them (v3, Table 3).

    Each new vector is orthogonalised twice against all before it. Vectors are stored as they are found, and those
    for which ``memory`` has no room are read from there.

    Args:
        path: Zarr folder.
        settings: kind, number of vectors (k for each step, if not given), and how Lanczos goes about it.
        checkpoints: of the run.
        hessian_batch: fixed sample from the distribution of the training data; only the Hessian needs one.
        steps: basis checkpoints, in training order (t = 1 ... T of Algorithm 1).
        seed: of start vectors, random vectors and the shuffled order.
        memory: bytes to take; half of what the device has free if not given.
        hessian_loss: loss whose Hessian is taken; that of the checkpoints if not given.

    Returns:
        Dataset, opened but not read, with what :func:`polca_lib.method.vectors.read_vectors` needs: ``vectors``
        (vector, parameter), unit norm; or ``mixing`` (vector, gaussian), which combines the Gaussian vectors of the
        seed into a random basis; or ``axis`` (vector), the parameter along whose axis it points. Coordinates:
        ``vector`` (from 1), ``birth_step``, ``eigenvalue`` (nats per squared parameter unit, of P H P), ``residual``
        (relative) and ``products`` (Hessian-vector products); the last three are NaN where they have no meaning.

    Raises:
        ValueError: the memory is too small for the Hessian of a single example, or the Hessian has no batch.
    """
    kind, n_parameters = settings.kind, checkpoints.token_loss.n_parameters
    births = _birth_steps(settings, steps, seed, checkpoints)
    n_vectors = len(births)
    if hessian_batch is None and kind in HESSIAN_KINDS:
        raise ValueError(f"basis.kind = {kind!r} needs a batch for the Hessian; allowed without: {_WITHOUT_HESSIAN}")
    hessian_batch = None if hessian_batch is None else as_batch(hessian_batch, "hessian_batch")
    template = xr.Dataset(
        coords={"vector": np.arange(1, n_vectors + 1), "birth_step": ("vector", births)},
        attrs={"parameters": n_parameters, "seed": seed},
    )
    records = dict.fromkeys(_RECORDS, (("vector",), "float64"))
    sizes = {"parameter": n_parameters, "gaussian": n_vectors}
    store = PieceStore(path, template, {**_STORED[kind], **records}, dim="vector", sizes=sizes)
    store.repair_pieces()
    if missing := store.missing():
        if kind == "random":
            rows = mixing(seed, n_vectors, n_parameters)
            pieces = ((row, {"mixing": rows[row]}) for row in missing)
        elif kind == "parameters":
            axes = checkpoints.theta(checkpoints.steps[-1]).abs().topk(n_vectors).indices.cpu().numpy()
            pieces = ((row, {"axis": axes[row]}) for row in missing)
        else:
            memory = default_budget(checkpoints.device) if memory is None else memory
            block = settings.k if kind in HESSIAN_KINDS else 1

            def find(start: int) -> Iterator[_Piece]:
                if kind == "trajectory":
                    return _principal_directions(checkpoints, births, steps, store, start, memory)
                loss = hessian_loss or checkpoints.token_loss
                return _eigenvectors(settings, births, checkpoints, loss, hessian_batch, store, start, seed, memory)

            pieces = _in_sequence(missing, block, find)
        done = n_vectors - len(missing)
        with progress(desc=f"basis ({kind})", unit="vector", total=n_vectors, done=done) as bar:
            for row, piece in pieces:
                store.write(row, **piece)
                bar.update()
    return load_basis(path)


def load_basis(path: Path) -> xr.Dataset | None:
    """The basis at ``path``, as :func:`compute_basis` returns it, or nothing if it is not complete."""
    stored = PieceStore.load(path)
    return None if stored is None else stored.set_coords(_RECORDS)


def _birth_steps(settings: BasisSettings, steps: Sequence[int], seed: int, checkpoints: Checkpoints) -> np.ndarray:
    births = np.array(steps)
    if settings.kind == "random":
        births = np.zeros_like(births)
    if settings.kind in ("parameters", "trajectory", "final"):
        births = np.full_like(births, checkpoints.steps[-1])
    if settings.kind == "shuffled":
        births = np.random.default_rng(seed).permutation(births)
    return np.repeat(births, settings.k)[: settings.n_vectors]


def _in_sequence(missing: Sequence[int], block: int, find: Callable[[int], Iterator[_Piece]]) -> Iterator[_Piece]:
    """Pieces of missing vectors; ``find`` gives all from the first of a block on: those of a block come together."""
    left = deque(missing)
    while left:
        for row, piece in find(left[0] // block * block):
            if row == left[0]:
                left.popleft()
                yield row, piece
            if not left or (left[0] // block > row // block and left[0] > row + 1):
                break


class _Found:
    """The vectors found so far, one by one: as many as there is room for from memory, the others from disk."""

    def __init__(self, store: PieceStore, n: int, room: int, checkpoints: Checkpoints):
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
    settings: BasisSettings,
    births: np.ndarray,
    checkpoints: Checkpoints,
    hessian_loss: TokenLoss,
    hessian_batch: Batch,
    store: PieceStore,
    start: int,
    seed: int,
    memory: int,
) -> Iterator[tuple[int, dict[str, np.ndarray | float]]]:
    """Find the vectors from row ``start`` on; each must be stored before the next is asked for."""
    n_vectors, n_parameters = len(births), checkpoints.token_loss.n_parameters
    one = n_parameters * checkpoints.token_loss.dtype.itemsize
    krylov = krylov_rows(settings.max_products, settings.k, settings.solver) * one
    # Lanczos seldom needs all of its products: what they would take at most is no reason not to try. CoLA allocates it.
    shared = memory - (min(krylov, memory // 2) if settings.solver == "lanczos" else krylov)
    room = max(0, min(n_vectors, shared // 2 // one))
    found = _Found(store, start, room, checkpoints)
    first = checkpoints.theta(int(births[start]))
    hessian = HessianOperator(hessian_loss, first, hessian_batch, shared - room * one)

    def search(step: int) -> Eigenpairs:
        hessian.move_to(checkpoints.theta(step))
        # P once a product, after H: in Lanczos all vectors come from products, but for the start.
        return top_eigenpairs(
            lambda vector: without(hessian(vector), found),
            without(gaussian(seed, len(found), n_parameters, device=first.device, dtype=first.dtype), found),
            settings.k,
            which=settings.which,
            tolerance=settings.tolerance,
            max_products=settings.max_products,
            solver=settings.solver,
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


def _principal_directions(
    checkpoints: Checkpoints,
    births: np.ndarray,
    steps: Sequence[int],
    store: PieceStore,
    start: int,
    memory: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Principal directions of the checkpoints from row ``start`` on; each must be stored before the next is asked for.

    Besides directions there are never more than two checkpoints in memory, unless it has room for more.
    """
    one = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
    steps = [checkpoints.steps[0], *steps]
    gram = _gram(checkpoints, steps, rows_that_fit(len(steps), one, memory - one))
    gram -= gram.mean(dim=0)
    gram -= gram.mean(dim=1, keepdim=True)
    variances, weights = torch.linalg.eigh(gram)
    weights = (weights / variances.clamp_min(1e-300).sqrt()).T.flip(0)
    width = rows_that_fit(len(births) - start, one, memory - 2 * one)
    found = _Found(store, start, min(start, width), checkpoints)
    for first in range(start, len(births), width):
        rows = range(first, min(first + width, len(births)))
        directions = torch.zeros(len(rows), checkpoints.token_loss.n_parameters, dtype=checkpoints.token_loss.dtype)
        directions = directions.to(checkpoints.device)
        # The weights of a direction sum to zero, so that any reference does: with the first, little cancels.
        reference = checkpoints.theta(steps[0])
        for index, step in enumerate(steps[1:], 1):
            difference = checkpoints.theta(step).sub_(reference)
            for own, row in zip(directions, rows, strict=True):
                own.add_(difference, alpha=weights[row, index].item())
        del reference, difference
        for own, row in zip(directions, rows, strict=True):
            new = orthogonalise(own, found)
            yield row, {"vectors": new.cpu().numpy()}
            found.append(new)


def _gram(checkpoints: Checkpoints, steps: Sequence[int], held: int) -> Float[Tensor, "step step"]:
    """Inner products of all checkpoints, in float64, with ``held`` of them in memory and one more."""
    gram = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for first in range(0, len(steps), held):
        rows = [checkpoints.theta(step) for step in steps[first : first + held]]
        for index, step in enumerate(steps[first:], first):
            other = rows[index - first] if index < first + held else checkpoints.theta(step)
            for place, row in enumerate(rows, first):
                gram[place, index] = gram[index, place] = inner_products(row[None], other[None]).item()
            del other
        del rows
    return gram
