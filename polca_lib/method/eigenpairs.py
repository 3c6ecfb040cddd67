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

from polca_lib.method.settings import TOLERANCE, Solver
from polca_lib.method.vectors import gaussian, inner_products, without

if TYPE_CHECKING:  # importing it takes seconds: functions do it when they are called
    from cola.ops import LinearOperator

_Product = Callable[[Float[Tensor, " d"]], Float[Tensor, " d"]]
_Which = Literal["largest", "magnitude"]
_Recurrence = tuple[Sequence[Float[Tensor, " d"]], list[float], list[float]]  # q_1 ... q_m, alpha and beta


_MARGIN = 10  # times the tolerance: the relative distance above a Ritz value in which an eigenvalue may be missed
_CHANCE = 1e-3  # probability that an eigenvalue beyond that distance is missed
_RANK = {"largest": np.positive, "magnitude": np.abs}  # of an eigenvalue; that of the most wanted is the largest
_ADDED = 2**31  # index of the random vector that is added to a start; no vector of a basis has it


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
    which: _Which = "largest",
    tolerance: float | None = None,
    max_products: int = 60,
    solver: Solver = "lanczos",
    seed: int | None = 0,
) -> Eigenpairs:
    """Top ``k`` pairs A v = lambda v of a symmetric operator by Lanczos with full re-orthogonalisation.

    After product m, the residual ``||A v - lambda v||`` of every wanted Ritz pair is ``abs(beta_m s_m)`` (s_m: last
    of the Ritz vector in the Krylov basis), without another product. The iteration stops once it is at most
    ``tolerance`` times the magnitude of the Ritz value for all ``k``, and no larger eigenvalue may have been missed.

    A small residual says that a Ritz value is near *an* eigenvalue. It may be the second, if the start has little of
    the top vector. The next Krylov vector, q_{m+1} = p_m(A) q_1, has length 1. With p_m(t) =
    prod_j (t - theta_j) / prod_i beta_i and the Ritz values theta_j, each eigenvector v with eigenvalue mu has

        abs(<v, q_1>) abs(p_m(mu)) = abs(<v, q_{m+1}>) <= 1.

    For a random start in d dimensions abs(<v, q_1>) < delta has a probability of about delta sqrt(2 d / pi). So at
    delta = 0.001 sqrt(pi / (2 d)), an eigenvalue lies where abs(p_m) > 1 / delta with a probability of 0.001 (van
    Dorsselaer, Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000). The iteration goes on until this
    rules out eigenvalues that would be among the ``k`` and that are further than 10 ``tolerance`` (relative, at most
    one half) from the Ritz values.

    The recurrence is this library's or CoLA's:

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
        tolerance: relative residual at which to stop; 0.001 if not given.
        max_products: products at most; then the current pairs are returned with ``converged=False``.
        solver: the library whose recurrence is used.
        seed: of a random vector that is added to ``start`` at the same length, in case ``start`` has nothing of a
            wanted eigenvector; None if ``start`` is random.

    Raises:
        ValueError: ``k`` < 1 or more than the dimension, ``max_products`` < ``k``, or ``start`` is zero or
            not finite.
        FloatingPointError: a product is not finite.
        ZeroDivisionError: the operator is zero.
    """
    if not 1 <= k <= start.numel():
        raise ValueError(f"k = {k} eigenvectors were asked for; allowed: 1 to {start.numel()}")
    if max_products < k:
        raise ValueError(f"max_products = {max_products} can't give k = {k} vectors; allowed: at least {k}")
    length, tolerance = _norm(start), TOLERANCE if tolerance is None else tolerance
    if not 0 < length < math.inf:
        raise ValueError(
            f"the start vector is zero or not finite (its length is {length}); pass one with a component along the "
            "wanted eigenvectors"
        )
    start = start / length
    if seed is not None:
        random = gaussian(seed, _ADDED, len(start), device=start.device, dtype=start.dtype)
        start += random.div_(_norm(random))
        start.div_(_norm(start))
        del random
    recurrence = _lanczos if solver == "lanczos" else _cola_lanczos
    steps = recurrence(product, start, min(max_products, start.numel()))
    for m, (krylov, alpha, beta) in enumerate(steps, 1):  # noqa: B007
        if not math.isfinite(alpha[-1] + beta[-1]):
            raise FloatingPointError(f"product {m} of the operator is not finite")
        # Ritz pairs: the eigenpairs of the tridiagonal matrix T = Q^T A Q.
        ritz, basis = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        exhausted = beta[-1] <= 1e-7 * np.abs(ritz).max()  # the Krylov space is invariant
        if exhausted and not ritz.any():
            raise ZeroDivisionError("the operator is zero and has no top eigenvector")
        wanted = np.argsort(-_RANK[which](ritz), kind="stable")[:k]
        estimates = np.abs(beta[-1] * basis[-1, wanted])
        converged = m >= k and bool(np.all(estimates <= tolerance * np.abs(ritz[wanted])) and np.all(ritz[wanted] != 0))
        converged = converged and (exhausted or _none_missed(ritz, ritz[wanted], beta, which, tolerance, len(start)))
        if converged or exhausted:
            break
    del steps  # and its last product
    # Ritz vectors y = Q s, normalised.
    vectors = start.new_zeros(len(wanted), start.numel())
    for vector, weights in zip(vectors, basis[:, wanted].T, strict=True):
        for weight, krylov_vector in zip(weights, krylov, strict=True):
            vector.add_(krylov_vector, alpha=float(weight))
        vector /= _norm(vector)
    sizes = np.maximum(np.abs(ritz[wanted]), 1e-300)
    values, residuals = (start.new_tensor(x) for x in (ritz[wanted], estimates / sizes))
    if solver == "cola":
        # Measure the pairs: lambda = y^T A y, |A y - lambda y| / |lambda|.
        del krylov, krylov_vector
        for row, vector in enumerate(vectors):
            image = product(vector)
            values[row] = inner_products(vector[None], image[None]).item()
            residuals[row] = _norm(image.sub(vector, alpha=values[row].item())) / values[row].abs()
        m, converged = m + len(vectors), converged and bool((residuals <= tolerance).all())
    return Eigenpairs(values, vectors, residuals, m, converged)


def _none_missed(
    ritz: np.ndarray, wanted: np.ndarray, beta: Sequence[float], which: _Which, tolerance: float, d: int
) -> bool:
    """Whether all eigenvalues that would be wanted are near wanted Ritz values, see :func:`top_eigenpairs`."""
    margin = min(_MARGIN * tolerance, 0.5)
    # Ends of the intervals around wanted Ritz values. By magnitude, eigenvalues of the other sign may be wanted, too.
    edges = np.concatenate([wanted + margin * np.abs(wanted), wanted - margin * np.abs(wanted), -(1 + margin) * wanted])
    # Keep ends beyond the last wanted value that are in no other interval. Between two neighbouring roots |p_m| has one
    # maximum, so if it is large at the ends of a gap, it is large in all of the gap.
    edges = edges[_RANK[which](edges) > _RANK[which](wanted).min()]
    inside = np.abs(edges[:, None] - wanted) < 0.999 * margin * np.abs(wanted)
    edges = edges[~inside.any(axis=1)]
    # |p_m(t)| >= 1 / delta, in logarithms.
    delta = _CHANCE * math.sqrt(math.pi / (2 * d))
    size = np.log(np.abs(edges[:, None] - ritz)).sum(axis=1) - np.log(beta).sum()
    return bool(np.all(size >= -math.log(delta)))


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
