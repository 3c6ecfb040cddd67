"""Directional derivatives in reverse mode: per-token gradients formed tile by tile, never as a whole, or not at all.

The gradient of a token's loss with respect to a weight matrix is a sum of outer products over positions, of the
activation that enters the product and the backward signal that comes to its output. Both are small and are kept for
many examples. A tile of the gradients of some hundred tokens is then formed, fits into the processor's cache, and is
multiplied there by the same tile of all basis vectors:

    <dL(x)/dW, B_k> = sum over tiles of [sum over positions of signal activation^T] : B_k

Where few positions carry signals, it takes less to multiply the vectors with activations, and that with signals:

    <dL(x)/dW, B_k> = sum over positions of signal . (B_k activation)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """``x @ weight``, multiplied in the dtype of ``low`` on the way back, where ``keep`` gets the signal that comes.

    ``probe`` has an entry for each example and no effect, but asks for the signals of each example also where ``x``
    is a constant.
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
        # Contiguous, or torch would copy the weight for every example.
        signal_low = signal.to(low.dtype).contiguous()
        context.keep(signal_low.flatten(1, -2))
        back = (signal_low @ low.mT).to(signal.dtype) if context.needs_input_grad[0] else None
        return back, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *others: Any) -> tuple[Tensor, int]:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return _Product.apply(x, *others), 0


class Formed(NamedTuple):
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


class Passed(NamedTuple):
    """What multiplies B a, the change of a product's output along a direction: no gradient is formed."""

    entering: Float[Tensor, "example_position entering"]
    signals: Float[Tensor, "example_position token leaving"]


class Weight(NamedTuple):
    """A matrix (entering, leaving) that multiplies data, and the same in the dtype of the way back."""

    value: Tensor
    low: Tensor


@dataclass(frozen=True)
class Signals:
    """What the gradients of the tokens of some examples are made of."""

    loss: Float[Tensor, "example token"]
    factors: list[Formed | Passed]  # at each site, in the dtype of products
    gradients: dict[str, Float[Tensor, "example token ..."]]  # of the parameters used elsewhere

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in pytree.tree_leaves(vars(self)))


def weights_of(layout: Layout, parameters: dict[str, Tensor], dtype: torch.dtype) -> list[Weight]:
    """The matrices of all sites at ``parameters``; ``dtype`` is that of products on the way back."""
    values = [site.weight.build(parameters).detach() for site in layout.sites]
    return [Weight(value, value.to(dtype)) for value in values]


def signals(
    token_loss: TokenLoss,
    parameters: dict[str, Tensor],
    layout: Layout,
    weights: list[Weight],
    batch: Batch,
    n_vectors: int,
) -> Signals:
    """Run one forward and, for each target token of an example, one backward pass, for all examples at once."""
    n = n_examples(batch)
    kept: dict[int, Tensor] = {}  # the signals that the last pass back brought to each site

    def run(elsewhere: dict[str, Tensor], probe: Tensor, example: Batch) -> tuple[Tensor, list[Tensor]]:
        entered = []

        def at_product(index: int, x: Tensor, _: Derived, bias: Tensor | None) -> Tensor:
            entered.append(x)
            result = _Product.apply(x, probe, *weights[index], partial(kept.__setitem__, index))
            return result if bias is None else result + bias

        one = pytree.tree_map(lambda t: t[None], example)
        with WatchProducts({**parameters, **elsewhere}, at_product):
            return token_loss.at({**parameters, **elsewhere}, one), entered

    with torch.enable_grad():
        # One copy an example, without memory of its own, so that gradients come out by example.
        elsewhere = {k: parameters[k].expand(n, *parameters[k].shape).requires_grad_() for k in layout.elsewhere}
        probe = next(iter(parameters.values())).new_zeros(n, requires_grad=True)
        loss, entered = vmap(run)(elsewhere, probe, batch)
    entered = [x.detach().flatten(1, -2) for x in entered]
    by_token: list[list[Tensor]] = [[] for _ in weights]
    by_name: dict[str, list[Tensor]] = {name: [] for name in elsewhere}
    for token, one_hot in enumerate(torch.eye(layout.tokens, dtype=loss.dtype, device=loss.device)):
        found = torch.autograd.grad(
            loss,
            [*elsewhere.values(), probe],
            one_hot.expand(n, -1),
            retain_graph=token + 1 < layout.tokens,
            materialize_grads=True,
        )
        for own, gradient in zip(by_name.values(), found[:-1], strict=True):
            own.append(gradient)
        for index, (x, weight) in enumerate(zip(entered, weights, strict=True)):
            if index not in kept:  # no way back leads through it
                kept[index] = weight.low.new_zeros(()).expand(*x.shape[:2], weight.low.shape[1])
            by_token[index].append(kept[index])
        kept.clear()
    # One by one, so that little is there twice.
    factors = [_factors(weight, entered.pop(0), by_token.pop(0), n_vectors) for weight in weights]
    gradients = {name: torch.stack(by_name.pop(name), dim=1) for name in elsewhere}
    return Signals(loss.detach(), factors, gradients)


def operations(positions: int, tokens: int, n_vectors: int, entering: int) -> tuple[float, float]:
    """What an example takes for each number of a weight matrix: by :class:`Passed`, and by :class:`Formed`.

    Args:
        positions: with signals.
        tokens: target tokens.
        n_vectors: directions.
        entering: numbers that enter the product at a position.
    """
    # The vectors, for each position, then the signals, for each token too; or, for each token, the gradient, then the
    # vectors.
    return positions * n_vectors * (1 + tokens / entering), tokens * (positions + n_vectors)


def _factors(
    weight: Weight,
    activations: Float[Tensor, "example position entering"],
    by_token: list[Float[Tensor, "example position leaving"]],
    n_vectors: int,
) -> Formed | Passed:
    dtype, tokens = weight.low.dtype, len(by_token)
    # In the last layers most positions carry no signal: those behind the last mixing of positions.
    active = torch.stack([((s.amax(2) != 0) | (s.amin(2) != 0)).any(0) for s in by_token]).any(0)
    x = activations.to(dtype)
    if not active.all():
        x, by_token = x[:, active], [s[:, active] for s in by_token]
    height, width = _tile(dtype, x.device)
    passed, formed = operations(x.shape[1], tokens, n_vectors, len(weight.value))
    # In either way, what is in memory at a time is no more than a tile for each token.
    if passed <= formed and x.shape[1] * n_vectors <= height * width:
        return Passed(x.flatten(0, 1), torch.stack(by_token, dim=2).flatten(0, 1))
    if _by_rows(weight.value):
        left = [block.mT.unsqueeze(1).contiguous() for block in x.split(height, dim=2)]
        right = [torch.stack(blocks, dim=1) for blocks in zip(*(s.split(width, dim=2) for s in by_token), strict=True)]
    else:
        cut = zip(*(s.split(height, dim=2) for s in by_token), strict=True)
        left = [torch.stack([block.mT for block in blocks], dim=1) for blocks in cut]
        right = [block.unsqueeze(1).contiguous() for block in x.split(width, dim=2)]
    return Formed(left, right)


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
        weights, by_rows = _pushed(site.weight, parameters, directions), _by_rows(site.weight.value)
        factors = [part.factors[index] for part in parts]
        for kind, add in ((Formed, _add_formed), (Passed, _add_passed)):
            if own := [pair for pair in zip(results, factors, strict=True) if isinstance(pair[1], kind)]:
                add(weights, by_rows, own)
    return torch.cat(results)


def _add_formed(
    weights: Float[Tensor, "vector entering leaving"],
    by_rows: bool,
    parts: list[tuple[Float[Tensor, "token vector"], Formed]],
) -> None:
    """Add the inner products of gradients, tile by tile, with the vectors."""
    weights = weights if by_rows else weights.mT
    dtype = parts[0][1].left[0].dtype
    height, width = _tile(dtype, weights.device)
    formed = weights.new_empty(0, dtype=dtype)
    for i, rows in enumerate(weights.split(height, dim=1)):
        lefts = [factors.batches(i) for _, factors in parts]
        for j, tile in enumerate(rows.split(width, dim=2)):
            tile = tile.to(dtype, memory_format=torch.contiguous_format).flatten(1)
            for (result, factors), left in zip(parts, lefts, strict=True):
                # Formed where the last tile was: fresh memory would cost more than the product.
                formed = torch.bmm(left, factors.right[j].flatten(0, 1), out=formed.resize_(0))
                gradients = formed.view(len(result), -1)
                # The same product: either dtype is faster the one way round.
                result += (tile @ gradients.T).T if dtype == torch.bfloat16 else gradients @ tile.T


def _add_passed(
    weights: Float[Tensor, "vector entering leaving"],
    by_rows: bool,
    parts: list[tuple[Float[Tensor, "token vector"], Passed]],
) -> None:
    """Add the products of signals with what the vectors do to activations, a block of outputs at a time."""
    n_vectors, entering, _ = weights.shape
    dtype = parts[0][1].entering.dtype
    width = max(1, math.prod(_tile(dtype, weights.device)) // entering)
    signals = [part.signals.split(width, dim=2) for _, part in parts]
    for index, block in enumerate(weights.split(width, dim=2)):
        # As the weights lie in memory: the copy is faster.
        block = (block.movedim(0, 1) if by_rows else block.mT).to(dtype).contiguous()
        block = block.flatten(1) if by_rows else block.flatten(0, 1).mT
        for (result, (activations, _)), blocks in zip(parts, signals, strict=True):
            changes = (activations @ block).unflatten(1, (n_vectors, -1))
            by_position = torch.bmm(blocks[index], changes.mT).to(result.dtype)
            if len(by_position):
                positions = len(activations) * by_position.shape[1] // len(result)
                result += by_position.unflatten(0, (-1, positions)).sum(1).flatten(0, 1)


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
    n_vectors: int | None = None,
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
        n_vectors: how many vectors to choose for between forming gradients and not; as many as there are if not given.
    """
    parameters = token_loss.unflatten(theta.contiguous())  # or weights would not lie as in the layout
    directions = token_loss.unflatten(vectors)
    weights = weights_of(layout, parameters, dtype)
    losses, gradients = [], []
    for chunk in split_examples(batch, chunk_examples):
        with record_function("signals"):
            passes = split_examples(chunk, pass_examples)
            parts = [
                signals(token_loss, parameters, layout, weights, part, n_vectors or len(vectors)) for part in passes
            ]
        with torch.no_grad(), record_function("contract"):
            gradients.append(contract(layout, parameters, directions, parts))
        losses += [part.loss.flatten() for part in parts]
        del parts  # or they would be there while the next ones are built
    return torch.cat(losses), torch.cat(gradients)
