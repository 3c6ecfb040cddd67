"""The orthonormal basis: Algorithm 1 of the paper, and the bases it is compared with."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
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
from polca_lib.method.eigenpairs import krylov_rows, top_eigenpairs
from polca_lib.method.interventions import losses_at
from polca_lib.method.settings import HESSIAN_KINDS, TOLERANCE, BasisSettings, check_n_vectors, few_steps
from polca_lib.method.vectors import gaussian, inner_products, mixing, orthogonalise, read_vectors, without
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.pieces import PieceStore
from polca_lib.storage.progress import progress

_RECORDS = ("eigenvalue", "residual", "products")

# Arrays stored for a vector: all of its entries, or the few numbers from which it is computed.
_EIGENVECTORS = {"vectors": (("vector", "parameter"), "float32")}
_STORED = {
    "hessian": _EIGENVECTORS,
    "shuffled": _EIGENVECTORS,
    "final": _EIGENVECTORS,
    "trajectory": _EIGENVECTORS,
    "random": {"mixing": (("vector", "gaussian"), "float64")},
    "parameters": {"axis": (("vector",), "int64")},
}

WITHOUT_HESSIAN = ", ".join(kind for kind in _STORED if kind not in HESSIAN_KINDS)
"""Kinds of basis that need no Hessian, for messages."""

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
    ends: tuple[int, int] | None = None,
) -> xr.Dataset:
    """Compute the basis at ``path``; finish it if it is partly there, only open it if it is complete.

    ``settings.kind`` says which:

    - ``hessian``: Algorithm 1. For each basis checkpoint in training order, the top k eigenvectors of P H P,
      with H the Hessian of the mean loss of ``hessian_batch`` and P = I - B B^T, are appended to B.
    - ``shuffled``: the same with the checkpoints in an order drawn from the seed (Appendix E).
    - ``final``: the same with all vectors from the last checkpoint, each orthogonal to those before it.
    - ``trajectory``: principal directions of the checkpoints themselves, the first and the basis checkpoints, by
      variance: directions of long-term movement, without a Hessian. Directions that are only rounding of the weights
      are left out, with a warning; the basis then has fewer vectors.
    - ``random``: orthonormalised Gaussian vectors (Appendix E).
    - ``parameters``: the coordinate axes of the parameters largest in magnitude at the end of training, so
      that first-order POLCA becomes loss change allocation (LCA) on them (v3, Table 3).

    Each new vector is orthogonalised twice against all before it, and stored at once. Vectors for which ``memory``
    has no room are read from disk when they are needed.

    Args:
        path: Zarr folder.
        settings: kind, number of vectors (k for each step, if not given), and settings of Lanczos.
        checkpoints: of the run.
        hessian_batch: fixed sample from the distribution of the training data; only the Hessian needs one.
        steps: basis checkpoints, in training order (t = 1 ... T of Algorithm 1).
        seed: of start vectors, random vectors and the shuffled order.
        memory: bytes that may be used; half of the free memory of the device if not given.
        hessian_loss: loss whose Hessian is used; that of the checkpoints if not given.
        ends: first and last step of the run; those of all checkpoints if not given.

    Returns:
        Dataset, opened but not read, with what :func:`polca_lib.method.vectors.read_vectors` needs: ``vectors``
        (vector, parameter), unit norm; or ``mixing`` (vector, gaussian), which combines the Gaussian vectors of the
        seed into a random basis; or ``axis`` (vector), the parameter along whose axis it points. Coordinates:
        ``vector`` (from 1), ``birth_step``, ``eigenvalue`` (nats per squared parameter unit, of P H P), ``residual``
        (relative) and ``products`` (Hessian-vector products); the last three are NaN where they have no meaning.

    Raises:
        ValueError: the memory is too small for the Hessian of a single example; the Hessian has no batch, is zero or
            not finite; there are more vectors than parameters; all checkpoints are equal.
    """
    kind, n_parameters = settings.kind, checkpoints.token_loss.n_parameters
    available = checkpoints.steps or steps  # a random basis reads no checkpoint
    first, last = ends or (available[0], available[-1])
    births = _birth_steps(settings, steps, seed, last)
    check_n_vectors(len(births), n_parameters)
    if hessian_batch is None and kind in HESSIAN_KINDS:
        raise ValueError(f"basis.kind = {kind!r} needs a batch for the Hessian; allowed without: {WITHOUT_HESSIAN}")
    hessian_batch = None if hessian_batch is None else as_batch(hessian_batch, "hessian_batch")
    memory = default_budget(checkpoints.device) if memory is None else memory

    @cache
    def weights() -> Float[np.ndarray, "vector step"]:
        return _direction_weights(checkpoints, [first, *steps], memory)

    if kind == "trajectory":
        stored = load_basis(path)
        rank = len(weights()) if stored is None else stored.sizes["vector"]
        if rank < len(births):
            warnings.warn(
                f"basis.n_vectors = {len(births)}, but the {len(steps) + 1} checkpoints move in {rank} directions; the "
                f"others are rounding of the weights. The basis has {rank} vectors",
                stacklevel=2,
            )
        births = births[:rank]
    n_vectors = len(births)
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
            axes = checkpoints.theta(last).abs().topk(n_vectors).indices.cpu().numpy()
            pieces = ((row, {"axis": axes[row]}) for row in missing)
        else:
            block = settings.k if kind in HESSIAN_KINDS else 1

            def pieces_from(start: int) -> Iterator[_Piece]:
                if kind == "trajectory":
                    return _principal_directions(checkpoints, weights(), [first, *steps], store, start, memory)
                loss = hessian_loss or checkpoints.token_loss
                return _eigenvectors(settings, births, checkpoints, loss, hessian_batch, store, start, seed, memory)

            pieces = _in_sequence(missing, block, pieces_from)
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


def _birth_steps(settings: BasisSettings, steps: Sequence[int], seed: int, last: int) -> np.ndarray:
    births = np.array(steps)
    if settings.kind == "random":
        births = np.zeros_like(births)
    if settings.kind in ("parameters", "trajectory", "final"):
        births = np.full_like(births, last)
    if settings.kind == "shuffled":
        births = np.random.default_rng(seed).permutation(births)
    return np.repeat(births, settings.k)[: settings.n_vectors]


def _in_sequence(
    missing: Sequence[int], block: int, pieces_from: Callable[[int], Iterator[_Piece]]
) -> Iterator[_Piece]:
    """Pieces of the missing vectors, in order.

    Args:
        missing: rows without a vector, ascending.
        block: vectors that one search finds together; a search starts at the first vector of a block.
        pieces_from: yields the pieces of all vectors from a row on.
    """
    remaining = deque(missing)
    while remaining:
        # Search from the first missing block on, and skip vectors of it that are stored already.
        for row, piece in pieces_from(remaining[0] // block * block):
            if row == remaining[0]:
                remaining.popleft()
                yield row, piece
            # Stop where the next missing vector is in a later block, and start again there.
            if not remaining or (remaining[0] // block > row // block and remaining[0] > row + 1):
                break


class _BasisSoFar:
    """The vectors computed so far: the first ``room`` are in memory, the others are read from disk one at a time."""

    def __init__(self, store: PieceStore, n: int, room: int, checkpoints: Checkpoints):
        self._basis, self._n, self._room = store.dataset(), n, room
        self._options = {"device": checkpoints.device, "dtype": checkpoints.token_loss.dtype}
        self._in_memory = list(read_vectors(self._basis, 0, min(n, room), **self._options))

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Float[Tensor, " d"]]:
        yield from self._in_memory
        for row in range(len(self._in_memory), self._n):
            yield read_vectors(self._basis, row, row + 1, **self._options)[0]

    def append(self, vector: Float[Tensor, " d"]) -> None:
        """Add a vector that is already on disk."""
        self._n += 1
        if len(self._in_memory) < self._room:
            self._in_memory.append(vector)


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
    vector_bytes = n_parameters * checkpoints.token_loss.dtype.itemsize
    krylov = krylov_rows(settings.max_products, settings.k, settings.solver) * vector_bytes
    # Share the memory. Lanczos seldom needs all its products, so at most half is set aside for its vectors. CoLA
    # allocates all of its vectors at once, so all of their memory is set aside.
    shared = memory - (min(krylov, memory // 2) if settings.solver == "lanczos" else krylov)
    room = max(0, min(n_vectors, shared // 2 // vector_bytes))
    basis = _BasisSoFar(store, start, room, checkpoints)
    first = checkpoints.theta(int(births[start]))
    hessian = HessianOperator(hessian_loss, first, hessian_batch, shared - room * vector_bytes)
    tolerance = TOLERANCE if settings.tolerance is None else settings.tolerance
    how = {"which": settings.which, "max_products": settings.max_products, "solver": settings.solver, "seed": None}
    options = {"device": first.device, "dtype": first.dtype}
    largest = np.abs(store.dataset()["eigenvalue"].values[:start]).max(initial=0)
    while len(basis) < n_vectors:
        step = int(births[len(basis)])
        name = f"basis vector {len(basis) + 1} (step {step})"
        hessian.move_to(checkpoints.theta(step))
        try:
            # Solve P H P v = lambda v. P is applied once in a product, after H: in Lanczos every vector is a sum of
            # products and of the start, and P was applied to all of these.
            start_vector = without(gaussian(seed, len(basis), n_parameters, **options), basis)
            pairs = top_eigenpairs(
                lambda vector: without(hessian(vector), basis), start_vector, settings.k, tolerance=tolerance, **how
            )
            del start_vector
        except ArithmeticError as error:
            cause = _cause(error, hessian_loss, checkpoints.theta(step), hessian_batch)
            raise ValueError(f"{name}: {error}; {cause}") from error
        if not pairs.converged and pairs.products >= settings.max_products:
            missed = f"has relative residual {pairs.residuals.max():.3f}; basis.tolerance = {tolerance} was asked for"
            if pairs.residuals.max() <= tolerance:
                missed = "may not be the top one: the products do not rule out a larger eigenvalue"
            warnings.warn(
                f"{name} after basis.max_products = {settings.max_products} products {missed}; raise max_products",
                stacklevel=2,
            )
        # Products of H have errors of about eps |H|: a smaller eigenvalue of P H P is one of these errors.
        largest, smallest = max(largest, pairs.values.abs().max().item()), pairs.values.abs().min().item()
        if smallest <= 10 * torch.finfo(first.dtype).eps * largest:
            warnings.warn(
                f"{name} has eigenvalue {smallest:.0e}, which is rounding beside {largest:.0e}: the loss has no "
                "curvature in the directions left; lower basis.n_vectors",
                stacklevel=2,
            )
        for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals, strict=True):
            if len(basis) < n_vectors:
                # B <- B with P v / |P v| appended.
                new = orthogonalise(vector, basis)
                record = (value.item(), residual.item(), pairs.products / settings.k)
                yield len(basis), {"vectors": new.cpu().numpy(), **dict(zip(_RECORDS, record, strict=True))}
                basis.append(new)


def _cause(error: Exception, loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch) -> str:
    """What makes the eigenproblem of the Hessian fail at ``theta``, and what to do."""
    if isinstance(error, ZeroDivisionError):
        return "the loss has no curvature left here; lower basis.n_vectors, or set basis.kind = 'trajectory'"
    if not theta.isfinite().all():
        return "the weights of this checkpoint are not finite; leave it out of steps and basis.steps"
    if not losses_at(loss, theta, batch).isfinite().all():
        return "the loss of the Hessian's batch is not finite here; correct the batch, or leave out the checkpoint"
    return (
        "weights and losses are finite, but derivatives are not, such as that of a root or norm at 0; change the loss, "
        "or set basis.kind = 'trajectory'"
    )


def _direction_weights(checkpoints: Checkpoints, steps: Sequence[int], memory: int) -> Float[np.ndarray, "vector step"]:
    """Weights of the checkpoints in each of their principal directions, largest variance first.

    With the centred checkpoints in the rows of X, X X^T = sum_k v_k u_k u_k^T, and direction k is X^T u_k / sqrt(v_k).
    Directions of rounding are left out. Weights theta are stored with errors of up to abs(theta) eps / 2, and inner
    products have errors of about eps_64 abs(theta)^2, so n checkpoints that do not move have variances of up to
    v = n max(eps^2 / 4, eps_64) max_t |theta_t|^2.

    Raises:
        ValueError: a checkpoint is not finite, or all are equal but for rounding.
    """
    vector_bytes, dtype = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize, torch.float64
    gram = _gram(checkpoints, steps, rows_that_fit(len(steps), vector_bytes, memory - vector_bytes))
    if not (finite := gram.diagonal().isfinite()).all():
        step = steps[int((~finite).nonzero()[0])]
        raise ValueError(f"{checkpoints.name(step)} has weights that are not finite; leave step {step} out of steps")
    rounding = max(torch.finfo(checkpoints.token_loss.dtype).eps ** 2 / 4, torch.finfo(dtype).eps)
    floor = len(steps) * rounding * gram.diagonal().max()
    # X X^T: centre the inner products of the checkpoints.
    gram -= gram.mean(dim=0)
    gram -= gram.mean(dim=1, keepdim=True)
    # u_k / sqrt(v_k).
    variances, vectors = torch.linalg.eigh(gram)
    rank = int((variances > floor).sum())
    if rank == 0:
        raise ValueError(
            f"checkpoints at steps {few_steps(steps)} have equal weights but for rounding, so no direction has "
            "movement; use checkpoints that differ"
        )
    return (vectors / variances.clamp_min(1e-300).sqrt()).T.flip(0)[:rank].numpy()


def _principal_directions(
    checkpoints: Checkpoints,
    weights: Float[np.ndarray, "vector step"],
    steps: Sequence[int],
    store: PieceStore,
    start: int,
    memory: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Principal directions of the checkpoints from row ``start`` on; each must be stored before the next is asked for.

    At most two checkpoints are in memory beside the directions, or more where the memory allows it.
    """
    vector_bytes = checkpoints.token_loss.n_parameters * checkpoints.token_loss.dtype.itemsize
    n_vectors = store.pieces
    width = rows_that_fit(n_vectors - start, vector_bytes, memory - 2 * vector_bytes)
    basis = _BasisSoFar(store, start, min(start, width), checkpoints)
    for first in range(start, n_vectors, width):
        rows = range(first, min(first + width, n_vectors))
        directions = torch.zeros(len(rows), checkpoints.token_loss.n_parameters, dtype=checkpoints.token_loss.dtype)
        directions = directions.to(checkpoints.device)
        # X^T u_k / sqrt(v_k), as many directions at a time as the memory allows. The weights of a direction sum to
        # zero, so any point can be subtracted from all checkpoints; subtracting the first loses few digits.
        reference = checkpoints.theta(steps[0])
        for index, step in enumerate(steps[1:], 1):
            difference = checkpoints.theta(step).sub_(reference)
            for direction, row in zip(directions, rows, strict=True):
                direction.add_(difference, alpha=weights[row, index].item())
        del reference, difference
        for direction, row in zip(directions, rows, strict=True):
            new = orthogonalise(direction, basis)
            yield row, {"vectors": new.cpu().numpy()}
            basis.append(new)


def _gram(checkpoints: Checkpoints, steps: Sequence[int], block: int) -> Float[Tensor, "step step"]:
    """Inner products <theta_s, theta_t> of all checkpoints, in float64; ``block`` + 1 checkpoints are in memory."""
    gram = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for first in range(0, len(steps), block):
        rows = [checkpoints.theta(step) for step in steps[first : first + block]]
        for index, step in enumerate(steps[first:], first):
            other = rows[index - first] if index < first + block else checkpoints.theta(step)
            for row, theta in enumerate(rows, first):
                gram[row, index] = gram[index, row] = inner_products(theta[None], other[None]).item()
            del other
        del rows
    return gram
