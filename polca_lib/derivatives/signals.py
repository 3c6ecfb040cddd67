"""Factors of per-token gradients: activations a_p that enter products, and backward signals s_p at their outputs.

    dL(x)/dW = sum over positions p of a_p s_p^T

Both factors are small. They are stored for many examples, cut into the blocks that
:mod:`polca_lib.derivatives.reverse` multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from polca_lib.derivatives.batches import by_example
from polca_lib.derivatives.products import Derived, ModelStructure, WatchProducts
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples

# Rows and columns of a tile of a weight matrix in memory order. On a CPU the gradients of _TOKENS tokens with respect
# to a tile fit into the cache (measured on two cores with 32 MiB). On a GPU they only have to fit into memory.
_TILE = {torch.bfloat16: (128, 256), torch.float32: (64, 128), torch.float64: (32, 128)}
_TILE_ON_GPU = (512, 1024)
_TOKENS = 128


def tile_shape(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of a weight matrix in memory order."""
    return _TILE.get(dtype, _TILE[torch.float32]) if device.type == "cpu" else _TILE_ON_GPU


class _Product(torch.autograd.Function):
    """``x @ weight`` whose backward pass multiplies in the dtype of ``low`` and hands the signal to ``keep``.

    ``probe`` has one entry per example and no effect. It makes autograd compute the signals of each example, even where
    ``x`` is a constant.
    """

    @staticmethod
    def forward(x: Tensor, probe: Tensor, weight: Tensor, low: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, low, context.keep = inputs
        context.save_for_backward(low)

    @staticmethod
    def backward(context: Any, signal: Tensor) -> tuple[Tensor | None, ...]:
        (low,) = context.saved_tensors
        # Make the signal contiguous: otherwise torch copies the weight for every example.
        signal_low = signal.to(low.dtype).contiguous()
        context.keep(signal_low.flatten(1, -2))
        back = (signal_low @ low.mT).to(signal.dtype) if context.needs_input_grad[0] else None
        return back, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return _Product.apply(x, *others), 0


class FormedGradients(NamedTuple):
    """Factors of gradients with respect to a matrix in memory order: left @ right, for each token.

    Both are cut into the blocks of its tiles. All tokens of an example share the activations that enter a product, so
    the dimension ``token`` of that factor has size 1.
    """

    left: list[Float[Tensor, "example token rows position"]]
    right: list[Float[Tensor, "example token position columns"]]

    def batches(self, block: int) -> Float[Tensor, "batch rows position"]:
        """Left factors to multiply with ``right``, its first two dimensions flattened."""
        left, tokens = self.left[block], self.right[0].shape[1]
        return left.flatten(1, 2) if tokens == 1 else left.expand(-1, tokens, -1, -1).flatten(0, 1)


class JacobianProducts(NamedTuple):
    """Factors of s . (B a), without forming a gradient: B a is the change of a product along a direction B."""

    entering: Float[Tensor, "example_position entering"]
    signals: Float[Tensor, "example_position token leaving"]


class Weight(NamedTuple):
    """A matrix (entering, leaving) that multiplies data, and the same in the dtype of the backward pass."""

    value: Tensor
    low: Tensor


@dataclass(frozen=True)
class Signals:
    """Factors of the gradients of all tokens of some examples."""

    loss: Float[Tensor, "example token"]
    factors: list[FormedGradients | JacobianProducts]  # at each product, in the dtype of products
    gradients: dict[str, Float[Tensor, "example token ..."]]  # with respect to other parameters

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in pytree.tree_leaves(vars(self)))

    def split(self) -> list[Signals]:
        """Groups of examples, of as many tokens as fit into the cache together; on a GPU one group."""
        n, tokens = self.loss.shape
        size = max(1, _TOKENS // tokens) if self.loss.device.type == "cpu" else n
        leaves, spec = pytree.tree_flatten(vars(self))
        # Positions of all examples may lie in one dimension.
        cut = (t.tensor_split([len(t) // n * start for start in range(size, n, size)]) for t in leaves)
        return [Signals(**pytree.tree_unflatten(group, spec)) for group in zip(*cut, strict=True)]


def weights_of(structure: ModelStructure, parameters: dict[str, Tensor], dtype: torch.dtype) -> list[Weight]:
    """The matrices of all products at ``parameters``; ``dtype`` is that of the backward pass."""
    values = [product.weight.build(parameters).detach() for product in structure.products]
    return [Weight(value, value.to(dtype)) for value in values]


def signals(
    token_loss: TokenLoss,
    parameters: dict[str, Tensor],
    structure: ModelStructure,
    weights: list[Weight],
    batch: Batch,
    n_vectors: int,
    batched: bool = True,
) -> Signals:
    """Run one forward pass and one backward pass per target token, for all examples at once.

    With ``batched`` off, ``batch`` is one example, which goes without ``vmap``: ragged losses allow none.
    """
    n = n_examples(batch)
    signal_of: dict[int, Tensor] = {}  # by product, of the last backward pass

    def run(other_parameters: dict[str, Tensor], probe: Tensor, batch_of_one: Batch) -> tuple[Tensor, list[Tensor]]:
        entered = []

        def at_product(index: int, x: Tensor, _: Derived, bias: Tensor | None) -> Tensor:
            entered.append(x)
            arguments = probe, *weights[index], partial(signal_of.__setitem__, index)
            # Without vmap, stand in for its dimension of examples.
            result = _Product.apply(x, *arguments) if batched else _Product.apply(x[None], *arguments)[0]
            return result if bias is None else result + bias

        with WatchProducts({**parameters, **other_parameters}, at_product):
            return token_loss.at({**parameters, **other_parameters}, batch_of_one), entered

    with torch.enable_grad():
        # Expand without copying: gradients with respect to the expanded parameters are gradients by example.
        other_parameters = {
            k: parameters[k].expand(n, *parameters[k].shape).requires_grad_() for k in structure.other_parameters
        }
        probe = next(iter(parameters.values())).new_zeros(n, requires_grad=True)
        if batched:
            loss, entered = by_example(run, batch, other_parameters, probe)
        else:
            loss, entered = run({name: value[0] for name, value in other_parameters.items()}, probe[0], batch)
            loss, entered = loss[None], [x[None] for x in entered]
    if not loss.numel():
        return Signals(loss.detach(), [], {})
    # Run one backward pass per target token; each product stores its signal in signal_of.
    entered = [x.detach().flatten(1, -2) for x in entered]
    by_token: list[list[Tensor]] = [[] for _ in weights]
    by_name: dict[str, list[Tensor]] = {name: [] for name in other_parameters}
    for token, one_hot in enumerate(torch.eye(loss.shape[1], dtype=loss.dtype, device=loss.device)):
        token_gradients = torch.autograd.grad(
            loss,
            [*other_parameters.values(), probe],
            one_hot.expand(n, -1),
            retain_graph=token + 1 < loss.shape[1],
            materialize_grads=True,
        )
        for gradients_of_name, gradient in zip(by_name.values(), token_gradients[:-1], strict=True):
            gradients_of_name.append(gradient)
        for index, (x, weight) in enumerate(zip(entered, weights, strict=True)):
            if index not in signal_of:  # the loss does not depend on this product
                signal_of[index] = weight.low.new_zeros(()).expand(*x.shape[:2], weight.low.shape[1])
            by_token[index].append(signal_of[index])
        signal_of.clear()
    # Release each product's activations and signals as soon as its factors are cut.
    factors = [_factors(weight, entered.pop(0), by_token.pop(0), n_vectors) for weight in weights]
    gradients = {name: torch.stack(by_name.pop(name), dim=1) for name in other_parameters}
    return Signals(loss.detach(), factors, gradients)


def operations(positions: int, tokens: int, n_vectors: int, entering: int) -> tuple[float, float]:
    """Operations per weight and example of :class:`JacobianProducts` and of :class:`FormedGradients`.

    Args:
        positions: with signals.
        tokens: target tokens.
        n_vectors: directions.
        entering: numbers that enter the product at a position.
    """
    # Jacobian products: vectors times activations at each position, then times the signals of each token.
    # Formed gradients: a gradient for each token, then its products with the vectors.
    return positions * n_vectors * (1 + tokens / entering), tokens * (positions + n_vectors)


def _factors(
    weight: Weight,
    activations: Float[Tensor, "example position entering"],
    by_token: list[Float[Tensor, "example position leaving"]],
    n_vectors: int,
) -> FormedGradients | JacobianProducts:
    dtype, tokens = weight.low.dtype, len(by_token)
    # Drop positions without a signal: after the last mixing of positions most of them have none.
    active = torch.stack([((s.amax(2) != 0) | (s.amin(2) != 0)).any(0) for s in by_token]).any(0)
    x = activations.to(dtype)
    if not active.all():
        x, by_token = x[:, active], [s[:, active] for s in by_token]
    height, width = tile_shape(dtype, x.device)
    # Take the way with fewer operations, if what it holds at a time is at most a tile per token.
    passed, formed = operations(x.shape[1], tokens, n_vectors, len(weight.value))
    if passed <= formed and x.shape[1] * n_vectors <= height * width:
        return JacobianProducts(x.flatten(0, 1), torch.stack(by_token, dim=2).flatten(0, 1))
    # Cut both factors into the blocks of tiles.
    if lies_by_rows(weight.value):
        left = [block.mT.unsqueeze(1).contiguous() for block in x.split(height, dim=2)]
        right = [torch.stack(blocks, dim=1) for blocks in zip(*(s.split(width, dim=2) for s in by_token), strict=True)]
    else:
        cut = zip(*(s.split(height, dim=2) for s in by_token), strict=True)
        left = [torch.stack([block.mT for block in blocks], dim=1) for blocks in cut]
        right = [block.unsqueeze(1).contiguous() for block in x.split(width, dim=2)]
    return FormedGradients(left, right)


def lies_by_rows(matrix: Tensor) -> bool:
    """Whether numbers lie side by side along the last dimension."""
    return matrix.stride(-1) == 1
