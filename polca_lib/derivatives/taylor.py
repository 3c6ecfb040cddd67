"""Taylor-mode differentiation: first and second derivatives along many directions in one forward pass.

As the weights move from theta to theta + s b, every tensor of the model is a function of s. A
:class:`~polca_lib.derivatives.jets.Jet` carries its value and its derivatives with respect to s, for all directions b
at once. For a product of data with a weight matrix

    (x W)' = x' W + x W',    (x W)'' = x'' W + 2 x' W'

so that both derivatives cost four products a direction, where ``jvp`` nested in itself spends seven, and the value is
computed once for all directions. Operations without a rule of their own are differentiated by ``jvp``, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad
from torch.nn import functional

from polca_lib.derivatives.jets import RULES, Jet, derivatives_of, filled, named, order_of, total, value_of


def moving(
    parameters: Mapping[str, Tensor], directions: Mapping[str, Float[Tensor, "vector ..."]], order: int
) -> dict[str, Jet]:
    """Parameters that move along each direction at constant speed: a loss computed from them has its derivatives.

    Args:
        parameters: by name, the point.
        directions: by name, one direction for each index of the first dimension.
        order: of the highest derivative, 1 or 2.
    """
    still = [None] * (order - 1)
    return {name: Jet.make(value, [directions[name], *still]) for name, value in parameters.items()}


def _pointwise(function: Callable) -> Callable:
    """Rule for a function of single numbers: f' x', and f' x'' + f'' x'^2."""

    def rule(result: Tensor, x: Any, *others: Any, **settings: Any) -> list[Tensor | None] | None:
        if not isinstance(x, Jet) or any(isinstance(other, Tensor) for other in [*others, *settings.values()]):
            return None

        def slope(value: Tensor) -> Tensor:
            return grad(lambda t: function(t, *others, **settings).sum())(value)

        first, *second = x.derivatives
        rate = slope(value_of(x))
        derivatives = [None if first is None else first * rate]
        if second:
            squared = None if first is None else first.square()
            bend = None if first is None else grad(lambda t: slope(t).sum())(value_of(x))
            derivatives.append(_times(_times(None, second[0], rate), squared, bend))
        return derivatives

    return rule


def _sum(sign: int) -> Callable:
    def rule(result: Tensor, a: Any, b: Any, **settings: Any) -> list[Tensor | None] | None:
        if settings:
            return None
        pairs = zip(*(derivatives_of(x, result.ndim, order_of(a, b)) for x in (a, b)), strict=True)
        return filled([total(one, two if two is None or sign > 0 else -two) for one, two in pairs], result)

    return rule


def _times(total: Tensor | None, a: Tensor | None, b: Tensor | None, scale: int = 1) -> Tensor | None:
    """total + scale a b, in one go over memory."""
    if a is None or b is None:
        return total
    if total is None:
        return a * b if scale == 1 else scale * a * b
    return torch.addcmul(total, a, b, value=scale)


def _mixed(total: Tensor | None, a: Tensor | None, b: Tensor | None, scale: int = 1) -> Tensor | None:
    """total + scale a @ b."""
    if a is None or b is None:
        return total
    if total is None:
        return a @ b if scale == 1 else scale * (a @ b)
    return torch.add(total, a @ b, alpha=scale)


def _bilinear(add: Callable) -> Callable:
    """Rule for a function that is linear in each of two arguments: Leibniz."""

    def rule(result: Tensor, a: Any, b: Any) -> list[Tensor | None] | None:
        if not all(isinstance(value_of(x), Tensor) for x in (a, b)):
            return [None if d is None else d * b for d in a.derivatives] if isinstance(a, Jet) else None
        order = order_of(a, b)
        (a1, *a2), (b1, *b2) = (derivatives_of(x, result.ndim, order) for x in (a, b))
        derivatives = [add(add(None, a1, value_of(b)), value_of(a), b1)]
        if order == 2:
            derivatives.append(add(add(add(None, a2[0], value_of(b)), value_of(a), b2[0]), a1, b1, 2))
        return filled(derivatives, result)

    return rule


def _quotient(result: Tensor, a: Any, b: Any, **settings: Any) -> list[Tensor | None] | None:
    """From q b = a: q' = (a' - q b') / b, and q'' = (a'' - 2 q' b' - q b'') / b."""
    if settings:
        return None
    order = order_of(a, b)
    (a1, *a2), (b1, *b2) = (derivatives_of(x, result.ndim, order) for x in (a, b))
    above = [_times(a1, result, b1, -1)]
    first = None if above[0] is None else above[0] / value_of(b)
    if order == 2:
        above.append(_times(_times(a2[0], first, b1, -2), result, b2[0], -1))
    return filled([first, *(None if d is None else d / value_of(b) for d in above[1:])], result)


def _softmax(result: Tensor, x: Jet, *others: Any, log: bool = False, **settings: Any) -> list[Tensor | None] | None:
    """With l = log y and s = x'' + l'^2: l' = x' - <y, x'>, l'' = x'' - <y, s>, y' = y l', y'' = y (s - <y, s>)."""
    if settings.get("dtype") not in (None, result.dtype) or len(others) > 1 or x.derivatives[0] is None:
        return None
    dim = others[0] if others else settings["dim"]
    dim = dim if dim < 0 else dim - result.ndim
    y = result.exp() if log else result

    def centred(t: Tensor) -> Tensor:
        return t - (y * t).sum(dim, keepdim=True)

    slope = centred(x.derivatives[0])
    derivatives = [slope if log else y * slope]
    if len(x.derivatives) == 2:
        bend = _times(x.derivatives[1], slope, slope)
        derivatives.append(centred(bend) - slope.square() if log else y * centred(bend))
    return derivatives


def _matmul(result: Tensor, x: Any, weight: Any) -> list[Tensor | None] | None:
    """Data times a weight matrix, in as few and as large products as there can be."""
    if min(value_of(x).ndim, value_of(weight).ndim) < 2:
        return None
    if value_of(weight).ndim > 2:
        return _bilinear(_mixed)(result, x, weight)
    rows, order = value_of(x).flatten(0, -2), order_of(x, weight)
    (x1, *x2), (w1, *w2) = (derivatives_of(jet, 2, order) for jet in (x, weight))
    entering = [None if d is None else d.flatten(1, -2) for d in (x1, *x2)]

    def through(derivative: Tensor | None) -> Tensor | None:
        return None if derivative is None else derivative @ value_of(weight)

    def add(total: Tensor | None, left: Tensor | None, right: Tensor | None, scale: int = 1) -> Tensor | None:
        if left is None or right is None:
            return total
        left = left.expand(len(right), *left.shape[-2:])
        if total is None:
            return torch.bmm(left, right) * scale if scale != 1 else torch.bmm(left, right)
        return total.baddbmm_(left, right, alpha=scale)

    derivatives = [add(through(entering[0]), rows, w1)]
    if order == 2:
        derivatives.append(add(add(through(entering[1]), entering[0], w1, 2), rows, w2[0]))
    return [None if d is None else d.view(len(d), *result.shape) for d in derivatives]


def _addmm(result: Tensor, bias: Any, x: Any, weight: Any, **settings: Any) -> list[Tensor | None] | None:
    if settings:
        return None
    biases = derivatives_of(bias, result.ndim, order_of(bias, x, weight))
    if not isinstance(x, Jet) and not isinstance(weight, Jet):
        return filled(biases, result)
    products = _matmul(result, x, weight)
    if products is None or not isinstance(bias, Jet):
        return products
    return filled([total(*pair) for pair in zip(products, biases, strict=True)], result)


def _affine(result: Tensor, x: Any, weight: Any, bias: Any = None) -> list[Tensor | None] | None:
    if isinstance(weight, Jet):
        turned = Jet.make(value_of(weight).mT, [None if d is None else d.mT for d in weight.derivatives])
    else:
        turned = weight.mT
    return _addmm(result, bias, x, turned)


def _where(result: Tensor, mask: Any, a: Any, b: Any) -> list[Tensor | None]:
    pairs = zip(*(derivatives_of(x, result.ndim, order_of(a, b)) for x in (a, b)), strict=True)
    chosen = [
        None if one is two is None else torch.where(mask, 0.0 if one is None else one, 0.0 if two is None else two)
        for one, two in pairs
    ]
    return filled(chosen, result)


def _masked_fill(result: Tensor, x: Any, mask: Tensor, value: Any) -> list[Tensor | None] | None:
    if isinstance(value, Jet) or not isinstance(x, Jet):
        return None
    return filled([None if d is None else d.masked_fill(mask, 0) for d in derivatives_of(x, result.ndim, 0)], result)


_POINTWISE = "relu sqrt rsqrt exp log tanh sigmoid square sin cos erf reciprocal pow abs expm1 log1p"
_ACTIVATIONS = "gelu relu silu tanh sigmoid softplus mish elu leaky_relu logsigmoid"
RULES |= {
    **{f: _pointwise(f) for owner in (torch, Tensor) for f in named(owner, _POINTWISE)},
    **{f: _pointwise(f) for f in named(functional, _ACTIVATIONS)},
    **dict.fromkeys(named(torch, "add") | named(Tensor, "add __add__ __radd__"), _sum(1)),
    **dict.fromkeys(named(torch, "sub subtract") | named(Tensor, "sub __sub__"), _sum(-1)),
    **dict.fromkeys(named(torch, "mul multiply") | named(Tensor, "mul __mul__ __rmul__"), _bilinear(_times)),
    **dict.fromkeys(named(torch, "div true_divide") | named(Tensor, "div __truediv__ __div__"), _quotient),
    **dict.fromkeys(named(torch, "matmul mm bmm") | named(Tensor, "matmul mm bmm __matmul__"), _matmul),
    **dict.fromkeys({torch.where}, _where),
    **dict.fromkeys({torch.masked_fill, Tensor.masked_fill}, _masked_fill),
    **dict.fromkeys({torch.softmax, Tensor.softmax, functional.softmax}, _softmax),
    **dict.fromkeys({torch.log_softmax, Tensor.log_softmax, functional.log_softmax}, partial(_softmax, log=True)),
    functional.linear: _affine,
    torch.addmm: _addmm,
}
