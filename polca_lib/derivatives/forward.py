"""Directional derivatives in forward mode: all tokens at once, for a few vectors at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vmap

from polca_lib.derivatives.jets import Jet, value_of
from polca_lib.derivatives.products import Derived, WatchProducts, single_target_signals
from polca_lib.derivatives.taylor import moving
from polca_lib.derivatives.token_loss import Batch, TokenLoss

# Losses, and the first (and second) derivatives along all vectors.
Derivatives = tuple[Float[Tensor, " token"], list[Float[Tensor, "token vector"]]]


@torch.no_grad()
def by_jvp(
    token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, vectors: Float[Tensor, "vector d"], order: int
) -> Derivatives:
    """Forward mode by torch.func, for any module: one pass along b yields <grad L(x), b> for all tokens x at once.

    Nested in itself it yields b^T H(x) b too. Passes along several vectors share the primal one under ``vmap``.
    """

    def slope(at: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(lambda point: token_loss(point, batch), (at,), (vector,))

    def along(vector: Tensor) -> tuple[Tensor, ...]:
        if order == 1:
            return slope(theta, vector)
        (loss, gradient), (_, second) = jvp(lambda at: slope(at, vector), (theta,), (vector,))
        return loss, gradient, second

    loss, *derivatives = vmap(along)(vectors)
    return loss[0], [derivative.T for derivative in derivatives]


@torch.no_grad()
def by_taylor(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    blocks: Iterable[Float[Tensor, "vector d"]],
    order: int,
    single_target: Collection[int] = (),
) -> Iterator[Derivatives]:
    """Forward mode by Taylor arithmetic, see :mod:`polca_lib.derivatives.taylor`, for one block of vectors after the
    other.

    First derivatives need not be carried through products whose output matters to one token single_target: there, a
    backward pass tells how the losses change with the output y = x W + b, and

        <dL/dy, y'> = <dL/dy W^T, x'> + <dL/dy, x W' + b'>

    is taken on the spot. That spares half of such a product, and everything behind it: in a language model, the
    logits.

    Args:
        token_loss: the loss.
        theta: parameters.
        batch: examples.
        blocks: directions in rows.
        order: of the highest derivative, 1 or 2.
        single_target: such products, see :class:`polca_lib.derivatives.products.ModelStructure`; for first derivatives
            only. Those that are not such
            for this batch are treated as all others.
    """
    parameters = token_loss.unflatten(theta)
    found = single_target_signals(token_loss, parameters, batch, single_target) if single_target else {}
    signals = {index: (signal, token) for index, (signal, token) in found.items() if token is not None}
    for vectors in blocks:
        jets = moving(parameters, token_loss.unflatten(vectors), order)
        taken: list[Tensor] = []

        def at_product(
            index: int, x: Tensor, weight: Derived, bias: Tensor | None, taken: list[Tensor] = taken
        ) -> Tensor:
            held = index in signals
            if held:
                signal, token = signals[index]
                taken.append(_by_token(_change_of_loss(signal, x, weight.value, bias), token))
            product = value_of(x) @ value_of(weight.value) if held else x @ weight.value
            return product if bias is None else product + (value_of(bias) if held else bias)

        with WatchProducts(jets, at_product):
            loss = token_loss.at(jets, batch)
        found = loss.derivatives if isinstance(loss, Jet) else [None] * order
        zero = vectors.new_zeros(len(vectors), len(loss))
        derivatives = [zero if derivative is None else derivative for derivative in found]
        for part in taken:
            derivatives[0] = derivatives[0] + torch.nn.functional.pad(part, (0, len(loss) - part.shape[1]))
        yield value_of(loss), [derivative.T for derivative in derivatives]


def _by_token(
    change: Float[Tensor, "vector position"], token: Int[Tensor, " position"]
) -> Float[Tensor, "vector token"]:
    return change.new_zeros(len(change), int(token.max()) + 1).index_add_(1, token, change)


def _change_of_loss(
    signal: Float[Tensor, "position leaving"], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Float[Tensor, "vector position"]:
    """<dL/dy, y'> for y = x W + b, at each position."""
    entering, (bend,) = value_of(x).flatten(0, -2), weight.derivatives
    # The narrower side last: logits along every vector would be large.
    if weight.shape[0] < weight.shape[1]:
        result = ((bend @ signal.T) * entering.T).sum(1)
    else:
        result = ((entering @ bend) * signal).sum(2)
    if isinstance(bias, Jet):
        result += bias.derivatives[0] @ signal.T
    if isinstance(x, Jet) and x.derivatives[0] is not None:
        result += (x.derivatives[0].flatten(1, -2) * (signal @ value_of(weight).T)).sum(2)
    return result
