"""Hessian-vector products of the mean loss: H v for all examples, within a memory budget."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.batches import as_batch
from polca_lib.derivatives.finite_differences import by_backward, check_derivatives
from polca_lib.derivatives.memory import default_budget, fit, peak_bytes
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples

_CHUNK = 256  # examples whose graph is built at once, at most

_Graph = tuple[Float[Tensor, " d"], int]  # the gradient of a sum of losses, differentiable, and their number


class HessianOperator:
    """H v for the Hessian H of the mean loss over the tokens of ``batch`` at ``theta``.

    The batch is cut into chunks of equal size, weighted by their number of tokens. As many gradient graphs as fit into
    memory are built once and stored, so that a product costs one backward pass through them. The graphs of the other
    chunks are built again for each product.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        memory: bytes that graphs and a product may take; half of what the device has free if not given.

    Raises:
        ValueError: ``memory`` is too small for a single example, or backward passes give wrong second derivatives.
    """

    def __init__(self, token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, memory: int | None = None):
        self._token_loss = token_loss
        self._theta = theta.detach().clone().requires_grad_()
        budget = default_budget(theta.device) if memory is None else memory
        batch = as_batch(batch)
        examples = n_examples(batch)
        most = min(examples, _CHUNK)
        size = fit(lambda n: self._peak(next(split_examples(batch, n))), budget, most)
        # If memory is short, halve the chunk to leave room for stored graphs; chunks of very few examples are slow.
        size = size if size == most else max(min(size, 16), size // 2)
        self._chunks = list(split_examples(batch, math.ceil(examples / math.ceil(examples / size))))
        self._n_stored = self._count_stored(budget)
        if isinstance(token_loss, TokenLoss):
            vector = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0)).to(theta)
            # Take an example that has a target: without one, there is nothing to differentiate.
            with torch.no_grad():
                some = (example for example in split_examples(batch, 1) if len(token_loss(theta, example)))
                example = next(some, next(split_examples(batch, 1)))
            check_derivatives(token_loss, theta, example, vector[None], 2, derive=by_backward, memory=budget)
        self.move_to(theta)

    def move_to(self, theta: Float[Tensor, " d"]) -> None:
        """Make this the Hessian at another point, without measuring memory again; products count from 0."""
        self.products = 0
        self._theta = theta.detach().clone().requires_grad_()
        self._graphs: list[_Graph | None] = [None] * len(self._chunks)
        for index in range(self._n_stored):
            self._graphs[index] = self._gradient(self._chunks[index])

    def __call__(self, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return H @ vector."""
        self.products += 1
        return self._product(vector, self._chunks, self._graphs)

    def _product(self, vector: Float[Tensor, " d"], chunks: list[Batch], graphs: list[_Graph | None]) -> Tensor:
        total, tokens = torch.zeros_like(vector), 0
        for chunk, graph in zip(chunks, graphs, strict=True):
            gradient, count = graph or self._gradient(chunk)
            total += torch.autograd.grad(gradient, self._theta, vector, retain_graph=graph is not None)[0]
            tokens += count
            del gradient  # free it before the next graph is built
        return total / tokens

    def _gradient(self, chunk: Batch) -> _Graph:
        losses = self._token_loss(self._theta, chunk)
        return torch.autograd.grad(losses.sum(), self._theta, create_graph=True)[0], losses.numel()

    def _peak(self, chunk: Batch) -> int:
        """Bytes that building the graph of a chunk and a product with it take."""
        vector = self._theta.detach()
        return peak_bytes(lambda: self._product(vector, [chunk], [self._gradient(chunk)]), vector.device)

    def _count_stored(self, budget: int) -> int:
        """Number of graphs to store so that a product with another chunk still fits."""
        if len(self._chunks) == 1:
            return 1
        first = self._chunks[0]
        others = (budget - self._peak(first)) // peak_bytes(lambda: self._gradient(first), self._theta.device)
        return len(self._chunks) if others >= len(self._chunks) - 1 else others
