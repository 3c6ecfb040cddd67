"""Directional derivatives in reverse mode: per-token gradients formed tile by tile, never as a whole.

The gradient of a token's loss with respect to a weight matrix is a sum of outer products over positions, of the
activation that enters the product and the backward signal that comes to its output. Both are small and are kept for
many examples. A tile of the gradients of some hundred tokens is then formed, fits into the processor's cache, and is
multiplied there by the same tile of all basis vectors:

    <dL(x)/dW, B_k> = sum over tiles of [sum over positions of signal activation^T] : B_k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vmap
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from polca_lib.sites import Derived, Layout, WatchProducts
from polca_lib.token_loss import Batch, TokenLoss, n_examples, split_examples

# Rows and columns of a tile of a weight matrix, as it lies in memory. On a CPU the gradients of some 128 tokens with
# respect to it fit into the cache (measured on two cores with 32 MiB of it); on a GPU only memory has to hold them.
_TILE = {torch.bfloat16: (128, 256), torch.float32: (64, 128), torch.float64: (32, 128)}
_TILE_ON_GPU = (512, 1024)


def _tile(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    return _TILE.get(dtype, _TILE[torch.float32]) if device.type == "cpu" else _TILE_ON_GPU


class _Product(torch.autograd.Function):
    """``x @ weight``, multiplied in the dtype of ``low`` on the way back."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        context.save_for_backward(inputs[2])

    @staticmethod
    def backward(context: Any, signal: Tensor) -> tuple[Tensor, None, None]:
        (low,) = context.saved_tensors
        # Contiguous, or torch would copy the weight for every example.
        signal_low = signal.to(low.dtype, memory_format=torch.contiguous_format)
        return (signal_low @ low.mT).to(signal.dtype), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, weight: Tensor, low: Tensor) -> tuple[Tensor, int]:
        return _Product.apply(x.movedim(in_dims[0], 0), weight, low), 0


class Factors(NamedTuple):
    """Gradients with respect to a matrix, as it lies in memory: left @ right, for each token.

    Both are cut into the blocks of its tiles. The activations that enter a product are the same for all tokens of an
    example: there, ``own`` is 1.
    """

    left: list[Float[Tensor, "example own rows position"]]
    right: list[Float[Tensor, "example own position columns"]]

    def batches(self, block: int) -> Float[Tensor, "batch rows position"]:
        """What to multiply with ``right`` when its first two dimensions are taken together."""
        left, own = self.left[block], self.right[0].shape[1]
        return left.flatten(1, 2) if own == 1 else left.expand(-1, own, -1, -1).flatten(0, 1)


@dataclass(frozen=True)
class Signals:
    """What the gradients of the tokens of some examples are made of."""

    loss: Float[Tensor, "example token"]
    factors: list[Factors]  # at each site, in the dtype of products
    gradients: dict[str, Float[Tensor, "example token ..."]]  # of the parameters used elsewhere

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in pytree.tree_leaves(vars(self)))


def signals(
    token_loss: TokenLoss, parameters: dict[str, Tensor], layout: Layout, batch: Batch, dtype: torch.dtype
) -> Signals:
    """Run one forward and, for each target token of an example, one backward pass, for all examples at once."""
    n = n_examples(batch)
    weights = [site.weight.build(parameters).detach() for site in layout.sites]
    low = [weight.to(dtype) for weight in weights]

    def run(elsewhere: dict[str, Tensor], probes: list[Tensor], example: Batch) -> tuple[Tensor, list[Tensor]]:
        entered = []

        def at_product(index: int, x: Tensor, _: Derived, bias: Tensor | None) -> Tensor:
            entered.append(x)
            # The gradient of a zero that is added to the product is the signal that comes back to it.
            result = _Product.apply(x, weights[index], low[index]) + probes[index]
            return result if bias is None else result + bias

        one = pytree.tree_map(lambda t: t[None], example)
        with WatchProducts({**parameters, **elsewhere}, at_product):
            return token_loss.at({**parameters, **elsewhere}, one), entered

    with torch.enable_grad():
        # One copy an example, without memory of its own, so that gradients come out by example.
        elsewhere = {k: parameters[k].expand(n, *parameters[k].shape).requires_grad_() for k in layout.elsewhere}
        probes = [weights[0].new_zeros(()).expand(n, *site.shape).requires_grad_() for site in layout.sites]
        loss, entered = vmap(run)(elsewhere, probes, batch)
        one_hot = torch.eye(layout.tokens, dtype=loss.dtype, device=loss.device)[:, None].expand(-1, n, -1)
        gradients = torch.autograd.grad(
            loss, [*elsewhere.values(), *probes], one_hot, is_grads_batched=True, materialize_grads=True
        )
    gradients = [g.movedim(0, 1) for g in gradients]
    factors = []
    for weight, x, signal in zip(weights, entered, gradients[len(elsewhere) :], strict=True):
        x, signal = x.detach().flatten(1, -2)[:, None], signal.flatten(2, -2)
        # In the last layers most positions carry no signal: those behind the last mixing of positions.
        active = (signal != 0).any(3).any(1).any(0)
        if not active.all():
            x, signal = x[:, :, active], signal[:, :, active]
        factors.append(_factors(weight, x.to(dtype), signal.to(dtype)))
    return Signals(loss.detach(), factors, dict(zip(elsewhere, gradients, strict=False)))


def _factors(
    weight: Float[Tensor, "entering leaving"],
    activations: Float[Tensor, "example 1 position entering"],
    signals: Float[Tensor, "example token position leaving"],
) -> Factors:
    left, right = (activations, signals) if _by_rows(weight) else (signals, activations)
    height, width = _tile(left.dtype, left.device)
    return Factors(
        [block.mT.contiguous() for block in left.split(height, dim=3)],
        [block.contiguous() for block in right.split(width, dim=3)],
    )


def _by_rows(matrix: Tensor) -> bool:
    """Whether numbers lie side by side along the last dimension."""
    return matrix.stride(-1) == 1


def contract(
    layout: Layout,
    parameters: dict[str, Tensor],
    directions: dict[str, Float[Tensor, "vector ..."]],
    parts: list[Signals],
) -> Float[Tensor, "token vector"]:
    """<grad L(x), b> for the tokens of ``parts`` and all directions (vectors split by parameter)."""
    n_vectors = len(next(iter(directions.values())))
    results = [part.loss.new_zeros(part.loss.numel(), n_vectors) for part in parts]
    for name in sorted(layout.elsewhere):
        for result, part in zip(results, parts, strict=True):
            result += part.gradients[name].reshape(len(result), -1) @ directions[name].reshape(n_vectors, -1).T
    for index, site in enumerate(layout.sites):
        weights = _pushed(site.weight, parameters, directions)
        weights = weights if _by_rows(site.weight.value) else weights.mT
        factors = [part.factors[index] for part in parts]
        dtype = factors[0].left[0].dtype
        height, width = _tile(dtype, weights.device)
        formed = weights.new_empty(0, dtype=dtype)
        for i, rows in enumerate(weights.split(height, dim=1)):
            lefts = [factor.batches(i) for factor in factors]
            for j, tile in enumerate(rows.split(width, dim=2)):
                tile = tile.to(dtype, memory_format=torch.contiguous_format).flatten(1)
                for result, left, factor in zip(results, lefts, factors, strict=True):
                    # Formed where the last tile was: fresh memory would cost more than the product.
                    formed = torch.bmm(left, factor.right[j].flatten(0, 1), out=formed.resize_(0))
                    gradients = formed.view(len(result), -1)
                    # The same product: either dtype is faster the one way round.
                    result += (tile @ gradients.T).T if dtype == torch.bfloat16 else gradients @ tile.T
    return torch.cat(results)


def _pushed(
    weight: Derived, parameters: dict[str, Tensor], directions: dict[str, Float[Tensor, "vector ..."]]
) -> Float[Tensor, "vector entering leaving"]:
    """How a weight matrix that is computed from parameters changes along each direction."""
    leaves = {name: parameters[name] for name in sorted(weight.leaves)}
    along = {name: directions[name] for name in leaves}
    return vmap(lambda direction: jvp(weight.build, (leaves,), (direction,))[1])(along)


def project_reverse(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    layout: Layout,
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    dtype: torch.dtype,
    chunk_examples: int,
    pass_examples: int,
) -> tuple[Float[Tensor, " token"], Float[Tensor, "token vector"]]:
    """Losses, and <grad L(x), b> by reverse mode.

    Args:
        token_loss: the loss.
        theta: parameters.
        layout: of the model, see :func:`polca_lib.sites.layout`.
        batch: examples.
        vectors: directions in rows.
        dtype: of the operands of matrix products on the way back and with the vectors.
        chunk_examples: examples whose signals are kept at one time.
        pass_examples: examples that go through the model at one time.
    """
    parameters = token_loss.unflatten(theta)
    directions = token_loss.unflatten(vectors)
    losses, gradients = [], []
    for chunk in split_examples(batch, chunk_examples):
        with record_function("signals"):
            passes = split_examples(chunk, pass_examples)
            parts = [signals(token_loss, parameters, layout, part, dtype) for part in passes]
        with torch.no_grad(), record_function("contract"):
            gradients.append(contract(layout, parameters, directions, parts))
        losses += [part.loss.flatten() for part in parts]
        del parts  # or they would be there while the next ones are built
    return torch.cat(losses), torch.cat(gradients)
