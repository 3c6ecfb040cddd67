"""Directional derivatives in reverse mode, without holding per-token gradients.

With activations a_p that enter a product and signals s_p at its output (see :mod:`polca_lib.derivatives.signals`), one
tile of the gradients of about a hundred tokens is formed at a time. It fits into the processor's cache and is
multiplied there by the same tile of all basis vectors B_k:

    <dL(x)/dW, B_k> = sum over tiles of [sum over positions p of a_p s_p^T] : B_k

Where few positions carry signals, it is cheaper to multiply the vectors with the activations first:

    <dL(x)/dW, B_k> = sum over positions p of s_p . (B_k a_p)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vmap
from torch.profiler import record_function

from polca_lib.derivatives.products import Derived, ModelStructure
from polca_lib.derivatives.signals import (
    FormedGradients,
    JacobianProducts,
    Signals,
    lies_by_rows,
    signals,
    tile_shape,
    weights_of,
)
from polca_lib.derivatives.token_loss import Batch, TokenLoss, split_examples


def project_signals(
    structure: ModelStructure,
    parameters: dict[str, Tensor],
    directions: dict[str, Float[Tensor, "vector ..."]],
    parts: list[Signals],
) -> Float[Tensor, "token vector"]:
    """<grad L(x), b> for the tokens of ``parts`` and all directions b, split by parameter."""
    n_vectors = len(next(iter(directions.values())))
    results = [part.loss.new_zeros(part.loss.numel(), n_vectors) for part in parts]
    for name in sorted(structure.other_parameters):
        for result, part in zip(results, parts, strict=True):
            result += part.gradients[name].reshape(len(result), -1) @ directions[name].reshape(n_vectors, -1).T
    for index, product in enumerate(structure.products):
        # Leave out vectors that do not change this weight.
        weights, by_rows = _pushed(product.weight, parameters, directions), lies_by_rows(product.weight.value)
        rows = _touching(weights)
        weights = weights[rows]
        is_subset = len(weights) < n_vectors
        sums = [result.new_zeros(len(result), len(weights)) for result in results] if is_subset else results
        # Add <dL/dW, B> in the way that each part chose for its factors.
        factors = [part.factors[index] for part in parts]
        for kind, add in ((FormedGradients, _add_formed), (JacobianProducts, _add_passed)):
            of_kind = [pair for pair in zip(sums, factors, strict=True) if isinstance(pair[1], kind)]
            if of_kind and len(weights):
                add(weights, by_rows, of_kind)
        if is_subset:
            for result, product_sum in zip(results, sums, strict=True):
                result[:, rows] += product_sum
    return torch.cat(results)


def _touching(weights: Float[Tensor, "vector entering leaving"]) -> slice | Int[Tensor, " row"]:
    """Vectors that change a weight matrix at all; the others, such as axes of other parameters, are skipped."""
    touches = weights[:, 0, 0] != 0  # for most vectors this is enough
    touches[~touches] = weights[~touches].flatten(1).any(dim=1)
    rows = touches.nonzero()[:, 0]
    contiguous = len(rows) > 0 and rows[-1] - rows[0] < len(rows)
    return slice(int(rows[0]), int(rows[-1]) + 1) if contiguous else rows  # a slice gives a view, rows a copy


def _add_formed(
    weights: Float[Tensor, "vector entering leaving"],
    by_rows: bool,
    parts: list[tuple[Float[Tensor, "token vector"], FormedGradients]],
) -> None:
    """Add the inner products of gradients, tile by tile, with the vectors."""
    weights = weights if by_rows else weights.mT
    dtype = parts[0][1].left[0].dtype
    height, width = tile_shape(dtype, weights.device)
    formed = weights.new_empty(0, dtype=dtype)
    for i, rows in enumerate(weights.split(height, dim=1)):
        lefts = [factors.batches(i) for _, factors in parts]
        for j, tile in enumerate(rows.split(width, dim=2)):
            tile = tile.to(dtype, memory_format=torch.contiguous_format).flatten(1)
            for (result, factors), left in zip(parts, lefts, strict=True):
                # Reuse the memory of the last tile: allocating would take longer than the product.
                formed = torch.bmm(left, factors.right[j].flatten(0, 1), out=formed.resize_(0))
                gradients = formed.view(len(result), -1)
                # The same product in two orders: each dtype is faster in one of them.
                result += (tile @ gradients.T).T if dtype == torch.bfloat16 else gradients @ tile.T


def _add_passed(
    weights: Float[Tensor, "vector entering leaving"],
    by_rows: bool,
    parts: list[tuple[Float[Tensor, "token vector"], JacobianProducts]],
) -> None:
    """Add s_p . (B_k a_p) over positions, a block of outputs at a time."""
    n_vectors, entering, _ = weights.shape
    dtype = parts[0][1].entering.dtype
    width = max(1, math.prod(tile_shape(dtype, weights.device)) // entering)
    cut = [part.signals.split(width, dim=2) for _, part in parts]
    for index, block in enumerate(weights.split(width, dim=2)):
        # Copy in memory order, which is faster.
        block = (block.movedim(0, 1) if by_rows else block.mT).to(dtype).contiguous()
        block = block.flatten(1) if by_rows else block.flatten(0, 1).mT
        for (result, (activations, _)), blocks in zip(parts, cut, strict=True):
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
    structure: ModelStructure,
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    dtype: torch.dtype,
    chunk_examples: int,
    pass_examples: int,
    n_vectors: int | None = None,
    batched: bool = True,
) -> tuple[Float[Tensor, " token"], Float[Tensor, "token vector"]]:
    """Losses, and <grad L(x), b> by reverse mode.

    Args:
        token_loss: the loss.
        theta: parameters.
        structure: of the model, see :func:`polca_lib.derivatives.products.model_structure`.
        batch: examples.
        vectors: directions in rows.
        dtype: of the operands of matrix products in backward passes and with the vectors.
        chunk_examples: examples whose signals are in memory at a time.
        pass_examples: examples in one pass through the model.
        n_vectors: number of vectors for which to decide whether gradients are formed; ``len(vectors)`` if not given.
        batched: see :func:`polca_lib.derivatives.signals.signals`; otherwise ``pass_examples`` must be 1.
    """
    # Weights must have the memory order that the structure was found with.
    parameters = token_loss.unflatten(theta.contiguous())
    directions = token_loss.unflatten(vectors)
    weights = weights_of(structure, parameters, dtype)
    losses, gradients = [], [theta.new_zeros(0, len(vectors))]
    for chunk in split_examples(batch, chunk_examples):
        with record_function("signals"):
            passes = split_examples(chunk, pass_examples)
            width = n_vectors or len(vectors)
            parts = [signals(token_loss, parameters, structure, weights, part, width, batched) for part in passes]
        losses += [part.loss.flatten() for part in parts]
        parts = [group for part in parts if part.loss.numel() for group in part.split()]  # some have no target
        with torch.no_grad(), record_function("project_signals"):
            gradients += [project_signals(structure, parameters, directions, parts)] if parts else []
        del parts  # free the signals before those of the next chunk are computed
    return torch.cat(losses), torch.cat(gradients)
