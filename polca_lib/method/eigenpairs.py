"""Top eigenpairs of a symmetric operator of which only products A v are computed: Lanczos, and an operator for CoLA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polca_lib.method.settings import Solver
from polca_lib.method.vectors import inner_products, without

if TYPE_CHECKING:  # importing it takes seconds: functions do it when they are called
    from cola.ops import LinearOperator

_Product = Callable[[Float[Tensor, " d"]], Float[Tensor, " d"]]
_Recurrence = tuple[Sequence[Float[Tensor, " d"]], list[float], list[float]]  # q_1 ... q_m, alpha and beta


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs, best first."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    residuals: Float[Tensor, " k"]  # ||A v - lambda v|| / |lambda|
    products: int
    converged: bool


def as_cola(product: _Product, like: Float[Tensor, " d"], known: Iterable[Float[Tensor, " d"]] = ()) -> LinearOperator:
    """P A P as a self-adjoint CoLA operator, P = I - B B^T, on which all algorithms of CoLA work.

    Args:
        product: v -> A v, A symmetric, such as :class:`polca_lib.derivatives.hessian.HessianOperator`.
        like: a vector that gives the dimension d, the dtype and the device.
        known: B, orthonormal, one vector after another; the operator is A if there are none.

    Returns:
        Operator of shape (d, d). It multiplies a block (d, m) column by column: m products.
    """
    import cola

    # (P A P) v for each column v.
    def multiply(block: Float[Tensor, "d m"]) -> Float[Tensor, "d m"]:
        # without() returns a copy. CoLA passes strided columns, and writes into what it gets back.
        return torch.stack([without(product(without(column, known)), known) for column in block.T], dim=1)

    operator = cola.ops.LinearOperator(like.dtype, (len(like), len(like)), multiply, {cola.SelfAdjoint})
    operator.device = like.device
    return operator


def top_eigenpairs(
    product: _Product,
    start: Float[Tensor, " d"],
    k: int = 1,
    *,
    which: Literal["largest", "magnitude"] = "largest",
    tolerance: float = 0.01,
    max_products: int = 60,
    solver: Solver = "lanczos",
) -> Eigenpairs:
    """Top ``k`` pairs A v = lambda v of a symmetric operator by Lanczos with full re-orthogonalisation.

    After product m, the residual ``||A v - lambda v||`` of every wanted Ritz pair is ``|beta_m s_m|`` (s_m: last entry
    of the Ritz vector in the Krylov basis), without another product. The iteration stops once it is at most
    ``tolerance`` times the magnitude of the Ritz value for all ``k``. The recurrence is this library's or CoLA's:

    - ``lanczos``: no Krylov vector is copied between products, and memory grows with m.
    - ``cola``: the iteration of ``cola.eig(A, k, which, cola.linalg.Lanczos())``, halted after each product, since CoLA
      has no test of convergence. All ``max_products`` vectors are allocated at once, and copied twice a product. The
      values and residuals returned are measured, lambda = v^T A v: ``k`` products more, which count in ``products`` but
      not in ``max_products``.

    :func:`krylov_rows` says what memory each takes.

    Args:
        product: v -> A v.
        start: start vector, not zero; shape (d,).
        k: number of pairs.
        which: largest algebraically, or in magnitude.
        tolerance: relative residual at which to stop.
        max_products: products at most; then the current pairs are returned with ``converged=False``.
        solver: the library whose recurrence is used.

    Raises:
        ValueError: ``k`` < 1 or more than the dimension, ``max_products`` < ``k``, or ``start`` is zero or
            not finite.
    """
    if not 1 <= k <= start.numel():
        raise ValueError(f"k = {k} eigenvectors were asked for; allowed: 1 to {start.numel()}")
    if max_products < k:
        raise ValueError(f"max_products = {max_products} can't give k = {k} vectors; allowed: at least {k}")
    length = _norm(start)
    if not 0 < length < math.inf:
        raise ValueError(
            f"the start vector is zero or not finite (its length is {length}); pass one with a component along the "
            "wanted eigenvectors"
        )
    recurrence = _lanczos if solver == "lanczos" else _cola_lanczos
    steps = recurrence(product, start / length, min(max_products, start.numel()))
    for m, (krylov, alpha, beta) in enumerate(steps, 1):  # noqa: B007
        # Ritz pairs: the eigenpairs of the tridiagonal matrix T = Q^T A Q.
        ritz, basis = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        wanted = np.argsort(-ritz if which == "largest" else -np.abs(ritz), kind="stable")[:k]
        estimates = np.abs(beta[-1] * basis[-1, wanted])
        exhausted = beta[-1] <= 1e-7 * np.abs(ritz).max()  # the Krylov space is invariant
        converged = m >= k and bool(np.all(estimates <= tolerance * np.abs(ritz[wanted])) and np.all(ritz[wanted] != 0))
        if converged or exhausted:
            break
    del steps  # and its last product
    # Ritz vectors y = Q s, normalised.
    vectors = start.new_zeros(len(wanted), start.numel())
    for vector, weights in zip(vectors, basis[:, wanted].T, strict=True):
        for weight, krylov_vector in zip(weights, krylov, strict=True):
            vector.add_(krylov_vector, alpha=float(weight))
        vector /= _norm(vector)
    values, residuals = (start.new_tensor(x) for x in (ritz[wanted], estimates / np.abs(ritz[wanted])))
    if solver == "cola":
        # Measure the pairs: lambda = y^T A y, |A y - lambda y| / |lambda|.
        del krylov, krylov_vector
        for row, vector in enumerate(vectors):
            image = product(vector)
            values[row] = inner_products(vector[None], image[None]).item()
            residuals[row] = _norm(image.sub(vector, alpha=values[row].item())) / values[row].abs()
        m, converged = m + len(vectors), len(vectors) == k and bool((residuals <= tolerance).all())
    return Eigenpairs(values, vectors, residuals, m, converged)


def _lanczos(product: _Product, start: Float[Tensor, " d"], steps: int) -> Iterator[_Recurrence]:
    """A q_m = beta_{m-1} q_{m-1} + alpha_m q_m + beta_m q_{m+1} from the unit vector q_1, one product after another."""
    krylov, alpha, beta, rest = [], [], [], start
    for m in range(1, steps + 1):
        # r = A q_m, copied, because the operator may keep it.
        krylov.append(rest)
        rest = product(krylov[-1]).clone()
        # alpha_m = <q_m, r>, r <- r - sum_j <q_j, r> q_j. Once leaves rounding errors, so do it twice.
        alpha.append(0.0)
        for _ in range(2):
            for index in reversed(range(m)):
                component = torch.dot(krylov[index], rest).item()
                rest.sub_(krylov[index], alpha=component)
                alpha[-1] += component if index == m - 1 else 0.0
        # beta_m = |r|, q_{m+1} = r / beta_m.
        beta.append(_norm(rest))
        yield krylov, alpha, beta
        rest.div_(beta[-1])


def _cola_lanczos(product: _Product, start: Float[Tensor, " d"], steps: int) -> Iterator[_Recurrence]:
    """The same recurrence, computed by CoLA."""
    from cola.linalg.decompositions.lanczos import init_lanczos, lanczos_fact

    operator = as_cola(product, start)
    vectors, *state = init_lanczos(operator.xnp, start[:, None], steps, start.dtype)
    # Store each vector contiguously: over strides, torch sums a million squares one by one, with an error of 0.1%.
    state = vectors.mT.contiguous().mT, *state
    del vectors
    for m in range(1, steps + 1):
        # One more step from the current state. CoLA's tolerance tests breakdown only; 0 switches that test off.
        *state, _ = lanczos_fact(operator, state, max_iters=m, tol=0)
        vectors, alpha, beta, _ = state  # a batch of one; column 1 is the first of vectors and of beta
        yield vectors[0, :, 1 : m + 1].T, alpha[0, :m].tolist(), beta[0, 1 : m + 1].tolist()


def krylov_rows(max_products: int, k: int = 1, solver: Solver = "lanczos") -> int:
    """Largest number of vectors in memory in :func:`top_eigenpairs`, including the start, a product and its copies."""
    return max_products + max(3, k + 1) if solver == "lanczos" else 2 * max_products + 9


def _norm(vector: Float[Tensor, " d"]) -> float:
    # In float32, torch's norm of a million numbers is wrong in the fifth digit, and squares may underflow or overflow.
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
