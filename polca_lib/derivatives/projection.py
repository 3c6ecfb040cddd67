"""<grad L(x; theta), b> and b^T H(x; theta) b for all tokens x and vectors b, at one point."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.batches import as_batch
from polca_lib.derivatives.strategy import Mode, Precision, Strategy, choose, differentiate, relative_difference
from polca_lib.derivatives.token_loss import Batch, TokenLoss, split_examples

_SAMPLE = 4, 8  # examples, and vectors, on which the error of products in bfloat16 is measured


class Projected(NamedTuple):
    """Losses and directional derivatives at one point, in nats per unit of length in weight space."""

    loss: Float[Tensor, " token"]
    gradient: Float[Tensor, "token vector"]
    curvature: Float[Tensor, "token vector"] | None
    error: float  # of gradient, root mean square over that of gradient, on a sample; 0 in full precision


def project(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    curvature: bool = False,
    mode: Mode = "auto",
    precision: Precision = "float32",
    memory: int | None = None,
    strategy: Strategy | None = None,
) -> Projected:
    """Derivatives of each token's loss along each vector.

    In forward mode a pass along b yields <grad L(x), b> for all tokens x at once, and b^T H(x) b with it. In reverse
    mode the gradient of each token is formed tile by tile and multiplied with the vectors, or the vectors are
    multiplied with the activations first, whichever takes fewer operations. Reverse mode is cheaper when few positions
    are targets. Gradients with respect to weights that multiply data are never held as a whole.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows, of unit length if the results are to be per unit of length.
        curvature: also second derivatives, in forward mode.
        mode: ``auto`` takes the mode with fewer operations, see :func:`polca_lib.derivatives.strategy.choose`.
        precision: ``float32`` multiplies in the dtype of the model. With ``bfloat16``, reverse mode rounds the
            operands of its products with the vectors, and of its backward passes, to 8 bits; sums stay in float32
            except for one rounding per tile. Forward mode, and hence curvature, is never rounded. ``auto`` takes the
            faster, see :func:`polca_lib.derivatives.strategy.faster_precision`.
        memory: bytes to take beyond the arguments; half of what the device has free if not given.
        strategy: as ``choose`` returned it for the same model, vectors of the same number and settings; chosen here
            if not given.

    Raises:
        ValueError: shapes do not fit, a setting is not allowed, memory is too small, or torch has no such derivatives
            or wrong ones.
    """
    batch = as_batch(batch)
    if vectors.ndim != 2 or vectors.shape[1] != token_loss.n_parameters:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)}; allowed: (any, {token_loss.n_parameters}), "
            "one direction in parameter space a row"
        )
    order = 2 if curvature else 1
    strategy = strategy or choose(
        token_loss, theta, batch, vectors, order=order, mode=mode, precision=precision, memory=memory
    )
    if strategy.order != order:
        raise ValueError(f"strategy was chosen for order = {strategy.order}; curvature = {curvature} needs {order}")
    loss, (gradient, *second) = differentiate(strategy, token_loss, theta, batch, vectors)
    error = 0.0
    if strategy.precision == "bfloat16":
        every = math.ceil(len(vectors) / _SAMPLE[1])
        for examples in split_examples(batch, _SAMPLE[0]):  # the first may have no targets
            exact = differentiate(strategy.in_full(), token_loss, theta, examples, vectors[::every])[1][0]
            if len(exact):
                break
        error = relative_difference(gradient[: len(exact), ::every], exact)
    return Projected(loss, gradient, second[0] if curvature else None, error)
