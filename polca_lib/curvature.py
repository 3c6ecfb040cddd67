"""Hessian-vector products of the mean loss, and top eigenvectors by CoLA's Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cola
import numpy as np
import torch
from cola.linalg.decompositions.lanczos import init_lanczos, lanczos_fact
from jaxtyping import Float
from torch import Tensor

from polca_lib.token_loss import Batch, TokenLoss, n_examples, split_examples

_GROWTH = 8  # Lanczos vectors allocated at a time: CoLA touches all allocated ones in each iteration.


class HessianOperator:
    """H v for the Hessian H of the mean loss over the tokens of ``batch`` at ``theta``.

    Each piece of the batch counts by its number of tokens. With a single piece the graph of its gradient is
    built once and kept, so that a product costs one backward pass; with several it is rebuilt each time.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        chunk_examples: examples held in memory at once.
    """

    def __init__(self, token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, chunk_examples: int = 256):
        self.products = 0
        self._token_loss = token_loss
        self._theta = theta.detach().clone().requires_grad_()
        self._chunks = list(split_examples(batch, chunk_examples))
        self._kept = self._gradient(self._chunks[0]) if n_examples(batch) <= chunk_examples else None

    def _gradient(self, chunk: Batch) -> tuple[Float[Tensor, " d"], int]:
        losses = self._token_loss(self._theta, chunk)
        return torch.autograd.grad(losses.sum(), self._theta, create_graph=True)[0], losses.numel()

    def __call__(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return H @ vector."""
        self.products += 1
        total, tokens = torch.zeros_like(vector), 0
        for chunk in self._chunks:
            gradient, count = self._kept or self._gradient(chunk)
            total += torch.autograd.grad(gradient, self._theta, vector, retain_graph=self._kept is not None)[0]
            tokens += count
        return total / tokens


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs, best first."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    residuals: Float[Tensor, " k"]  # ||A v - lambda v|| / |lambda|, by one more product each
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
    """Top ``k`` eigenpairs of a symmetric operator by Lanczos with full re-orthogonalisation (CoLA).

    CoLA is stepped one product at a time. After each, the residual of every wanted Ritz pair is
    ``|beta_m s_m|`` (s_m: last entry of the Ritz vector in the Krylov basis); the iteration stops once it is
    below ``tolerance`` times the magnitude of the Ritz value for all ``k``.

    Args:
        product: v -> A v.
        start: start vector, not zero; shape (d,).
        k: number of pairs.
        which: largest algebraically, or in magnitude.
        tolerance: relative residual at which to stop.
        max_products: products before giving up; what was reached is returned with ``converged=False``.

    Raises:
        ValueError: ``k`` < 1 or more than the dimension, ``max_products`` < ``k``, or ``start`` is zero.
    """
    if not 1 <= k <= start.numel():
        raise ValueError(f"k = {k} eigenvectors were asked for; allowed: 1 to {start.numel()}")
    if max_products < k:
        raise ValueError(f"max_products = {max_products} can't give k = {k} vectors; allowed: at least {k}")
    if not start.norm() > 0:
        raise ValueError("the start vector is zero; pass one with a component along the wanted eigenvectors")
    operator = cola.ops.LinearOperator(
        start.dtype, (start.numel(), start.numel()), matmat=lambda block: product(block[:, 0])[:, None]
    )
    operator.device = start.device
    limit = min(max_products, start.numel())
    state = init_lanczos(operator.xnp, start[:, None], max_iters=min(_GROWTH, limit), dtype=start.dtype)
    for m in range(1, limit + 1):
        if m > state[1].shape[-1]:
            state = _grow(state)
        # tol=-1 switches CoLA's own test off: it tests breakdown, not convergence.
        *state, _ = lanczos_fact(operator, state, max_iters=m, tol=-1.0)
        krylov, diagonal, offdiagonal, _ = state
        alpha = diagonal[0, :m].double().cpu().numpy()
        beta = offdiagonal[0, 1 : m + 1].double().cpu().numpy()
        ritz, basis = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
        wanted = np.argsort(-ritz if which == "largest" else -np.abs(ritz), kind="stable")[:k]
        estimates = np.abs(beta[-1] * basis[-1, wanted])
        exhausted = beta[-1] <= 1e-7 * np.abs(ritz).max()  # the Krylov space is invariant
        converged = m >= k and bool(np.all(estimates <= tolerance * np.abs(ritz[wanted])) and np.all(ritz[wanted] != 0))
        if converged or exhausted:
            break
    combination = torch.from_numpy(basis[:, wanted]).to(krylov)
    vectors = (krylov[0, :, 1 : m + 1] @ combination).T
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    values = torch.from_numpy(ritz[wanted]).to(krylov)
    residuals = torch.stack(
        [(product(v) - value * v).norm() / value.abs() for v, value in zip(vectors, values, strict=True)]
    )
    return Eigenpairs(values, vectors.contiguous(), residuals, m + len(wanted), converged)


def _grow(state: list) -> list:
    krylov, diagonal, offdiagonal, index = state
    return [*(torch.nn.functional.pad(t, (0, _GROWTH)) for t in (krylov, diagonal, offdiagonal)), index]
