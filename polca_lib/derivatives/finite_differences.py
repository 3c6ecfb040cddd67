"""Check derivatives against central differences of what they are the derivatives of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from polca_lib.derivatives.forward import Derivatives, by_jvp
from polca_lib.derivatives.token_loss import Batch, TokenLoss, lacks_derivatives, restored

_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # relative to the norm of the parameters
_TOLERANCE = 1e-3
_LITTLE = 2**26  # bytes that are taken in any case
_NOISE = 8 * torch.finfo(torch.float64).eps  # of a loss or a slope, relative

# Functions whose derivatives of some order are wrong in torch, see pytorch issue 198017.
_SUSPECTS = {
    *("batch_norm", "cholesky_inverse", "det", "linalg_det", "linalg_householder_product", "linalg_slogdet"),
    *("linalg_solve", "linalg_tensorsolve", "logdet", "native_layer_norm", "slogdet"),
}


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Float64(TorchFunctionMode):
    """Compute in float64 wherever a model asks for another floating-point dtype; note the functions called by name."""

    def __init__(self, called: set[str]):
        super().__init__()
        self._called = called

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        self._called.add(name)
        function = Tensor.double if function in (Tensor.float, Tensor.half, Tensor.bfloat16) else function
        arguments, keywords = pytree.tree_map_only(
            torch.dtype, lambda dtype: torch.float64 if dtype.is_floating_point else dtype, (arguments, keywords or {})
        )
        # A constant of the loss may be in another dtype, which products of matrices refuse. Leave what is written to.
        leaves = [leaf for leaf in pytree.tree_leaves((arguments, keywords)) if _is_floating(leaf)]
        in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and name[:2] != "__")
        if not in_place and len({leaf.dtype for leaf in leaves}) > 1:
            arguments, keywords = pytree.tree_map_only(_is_floating, Tensor.double, (arguments, keywords))
        return function(*arguments, **keywords)

    def __enter__(self) -> _Float64:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)


def by_backward(
    token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, vectors: Float[Tensor, "vector d"], order: int
) -> Derivatives:
    """Loss, slopes and curvatures of the sum over all tokens by backward passes.

    The form is that of :func:`polca_lib.derivatives.forward.by_jvp`.
    """
    theta = theta.detach().clone().requires_grad_()
    nothing = 0 * theta.sum()  # makes constants differentiable
    loss = token_loss(theta, batch).sum() + nothing
    slopes = vectors @ torch.autograd.grad(loss, theta, create_graph=order == 2)[0] + nothing
    derivatives = [slopes.detach()[None]]
    if order == 2:
        products = [torch.autograd.grad(slope, theta, retain_graph=True)[0] for slope in slopes]
        derivatives.append((torch.stack(products) * vectors).sum(1)[None])
    return loss.detach()[None], derivatives


def check_derivatives(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    order: int,
    derive: Callable[..., Derivatives] = by_jvp,
    memory: int | None = None,
) -> None:
    """Check derivatives against central differences in float64.

        <grad L, b> = (L(theta + h b) - L(theta - h b)) / 2h + O(h^2)
        b^T H b = (<grad L(theta + h b), b> - <grad L(theta - h b), b>) / 2h + O(h^2)

    A difference counts where it is the same for two steps h and on both sides: near a kink, as that of ReLU, and where
    rounding prevails, it is not. A warning says so if no difference counts, or the model can't compute in float64.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: a few examples.
        vectors: a few directions in rows; the direction of the differences has a part in each.
        order: of the highest derivative, 1 or 2.
        derive: computes losses and derivatives, by default as forward mode does.
        memory: bytes for weights in float64; if they need more, a warning says that nothing was checked.

    Raises:
        ValueError: torch has no such derivatives, or wrong ones. The message names operations that may be the reason.
    """
    try:
        derive(token_loss, theta, batch, vectors, order)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        raise ValueError(lacks_derivatives(failure, order, "forward" if derive is by_jvp else "reverse")) from failure
    # Forward mode holds about 6 vectors in float64, backward mode about 12.
    numbers = (6 if derive is by_jvp else 12) * len(theta) + sum(value.numel() for value in token_loss.fixed.values())
    if memory is not None and 8 * numbers > max(memory, _LITTLE):
        warnings.warn(f"derivatives were not checked: {8 * numbers:,} bytes are needed of {memory:,}", stacklevel=2)
        return
    point = theta.double()
    precise, length = token_loss.in_float64(), point.norm().item() or 1.0
    examples = pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, batch
    )
    # Add all vectors to one direction; with unlike weights, or two that are opposite would cancel.
    direction = torch.zeros_like(point)
    for number, vector in enumerate(vectors, start=1):
        direction.add_(vector, alpha=1 / (number * (vector.norm().item() or 1.0)))
    direction = direction.div_(direction.norm().item() or 1.0)[None]
    called: set[str] = set()

    def shifted(step: float, order: int = 1) -> list[Tensor]:
        with _Float64(called), restored(token_loss.model):
            loss, derived = derive(precise, torch.add(point, direction[0], alpha=step), examples, direction, order)
        return [loss, *(derivative.flatten() for derivative in derived)]

    try:
        computed = shifted(0.0, order)
        # Skip without a target token. What is not finite is named where it is used.
        if not computed[0].numel() or not all(values.isfinite().all() for values in computed):
            return
        errors = _relative_errors(computed, shifted, length)
    except Exception as failure:  # a model may raise anything
        warnings.warn(f"derivatives were not checked: in float64 {type(failure).__name__}: {failure}", stacklevel=2)
        return
    for index, error in sorted(errors.items()):
        if not error <= _TOLERANCE:
            raise ValueError(_message(index + 1, error, sorted(_SUSPECTS & called)))
    if len(errors) < order:
        what = "the loss has kinks at each step, as with ReLU, or is rounded"
        warnings.warn(f"derivatives were not checked: {what}", stacklevel=2)


def _relative_errors(
    computed: list[Float[Tensor, " token"]], shifted: Callable[[float], list[Tensor]], length: float
) -> dict[int, float]:
    """Error of the first and second derivative relative to its size, where differences can tell."""
    errors: dict[int, float] = {}
    smaller, smaller_step = [], 0.0
    for step in (length * step for step in _STEPS):
        # Differences on both sides of the point; the second is how much the two sides differ.
        sides = zip(shifted(step), shifted(-step), computed, strict=False)
        larger = [((b - a) / (2 * step), (b + a - 2 * middle) / (2 * step)) for b, a, middle in sides]
        for index in range(len(computed) - 1) if smaller else ():
            # Losses are rounded to parts of 1 nat at least, slopes accordingly.
            noise = _NOISE * (_size(computed[index]) + (1 + _size(computed[0])) / length**index) / smaller_step
            error = _relative_error(computed[index + 1], *smaller[index], larger[index][0], noise)
            if error is not None:
                errors.setdefault(index, error)
        if len(errors) == len(computed) - 1:
            break
        smaller, smaller_step = larger, step
    return errors


def _relative_error(computed: Tensor, smaller: Tensor, bend: Tensor, larger: Tensor, noise: float) -> float | None:
    """Error where differences agree for two steps and on both sides; None if that is not even half of the tokens."""
    size = max(_size(computed), smaller.nan_to_num().abs().median().item())
    settled = torch.maximum((smaller - larger).abs(), bend.abs()) <= _TOLERANCE / 4 * size + noise
    if not 2 * settled.sum() >= len(computed):
        return None
    error = (computed - smaller)[settled].square().mean().sqrt().item()
    return 0.0 if error <= noise else error / size


def _size(values: Tensor) -> float:
    """Root mean square."""
    return values.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt().item()


def _message(order: int, error: float, suspects: list[str]) -> str:
    what, of = (("first", "loss"), ("second", "first derivatives"))[order - 1]
    reason = f"; those of {' and '.join(suspects)} are known to be wrong in torch" if suspects else ""
    need = "order = 'second' and a basis of the Hessian need them, order = 'trapezoid' and other bases do not"
    return (
        f"the {what} derivatives that torch computes for this model and loss differ by {error:.1%} from central "
        f"differences of the {of} in float64{reason}. Write what detaches tensors, is an autograd.Function, or is not "
        f"elementary, with elementary operations of torch{f'; {need}' if order == 2 else ''}"
    )
