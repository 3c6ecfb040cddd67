"""Top eigenpairs of a symmetric operator that is known by its products alone: Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs, best first."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    residuals: Float[Tensor, " k"]  # ||A v - lambda v|| / |lambda|
    products: int
    converged: bool


def top_eigenpairs(
    product: Callable[[Float[Tensor, " d"]], Float[Tensor, " d"]],
    start: Float[Tensor, " d"],
    k: int = 1,
    *,
    which: Literal["largest", "magnitude"] = "largest",
    tolerance: float = 0.01,
    max_products: int = 60,
) -> Eigenpairs:
    """Top ``k`` eigenpairs of a symmetric operator by Lanczos with full re-orthogonalisation.

    After each product the residual ``||A v - lambda v||`` of every wanted Ritz pair is ``|beta_m s_m|`` (s_m: last
    entry of the Ritz vector in the Krylov basis), without another product; the iteration stops once it is below
    ``tolerance`` times the magnitude of the Ritz value for all ``k``. Between products no Krylov vector is copied.

    Args:
        product: v -> A v.
        start: start vector, not zero; shape (d,).
        k: number of pairs.
        which: largest algebraically, or in magnitude.
        tolerance: relative residual at which to stop.
        max_products: products before giving up; what was reached is returned with ``converged=False``.

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
    krylov, alpha, beta = [start / length], [], []
    for m in range(1, min(max_products, start.numel()) + 1):
        rest = product(krylov[-1]).clone()  # which may be what the operator keeps
        alpha.append(0.0)
        for _ in range(2):  # in floating point, once leaves too much behind
            for index in reversed(range(m)):
                component = torch.dot(krylov[index], rest).item()
                rest.sub_(krylov[index], alpha=component)
                alpha[-1] += component if index == m - 1 else 0.0
        beta.append(_norm(rest))
        ritz, basis = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        wanted = np.argsort(-ritz if which == "largest" else -np.abs(ritz), kind="stable")[:k]
        estimates = np.abs(beta[-1] * basis[-1, wanted])
        exhausted = beta[-1] <= 1e-7 * np.abs(ritz).max()  # the Krylov space is invariant
        converged = m >= k and bool(np.all(estimates <= tolerance * np.abs(ritz[wanted])) and np.all(ritz[wanted] != 0))
        if converged or exhausted:
            break
        krylov.append(rest.div_(beta[-1]))
    del rest, krylov[m:]
    vectors = start.new_zeros(len(wanted), start.numel())
    for own, weights in zip(vectors, basis[:, wanted].T, strict=True):
        for weight, known in zip(weights, krylov, strict=True):
            own.add_(known, alpha=float(weight))
        own /= _norm(own)
    values, residuals = (start.new_tensor(x) for x in (ritz[wanted], estimates / np.abs(ritz[wanted])))
    return Eigenpairs(values, vectors, residuals, m, converged)


def krylov_rows(max_products: int, k: int = 1) -> int:
    """Vectors there are in :func:`top_eigenpairs` at one time, at most: with the start, a product and its copy."""
    return max_products + max(3, k + 1)


def _norm(vector: Float[Tensor, " d"]) -> float:
    # In float32, torch's norm of a million numbers is wrong in the fifth digit, and squares may vanish or overflow.
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
