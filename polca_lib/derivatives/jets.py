"""Tensors that carry derivatives along many directions at once, and how any function of them is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn import functional
from torch.utils import _pytree as pytree


def named(owner: Any, names: str) -> set[Callable]:
    """The functions of ``owner`` with these names."""
    return {getattr(owner, name) for name in names.split() if hasattr(owner, name)}


_STRUCTURE = (
    "reshape view permute transpose unsqueeze squeeze flatten unflatten expand contiguous clone to float double "
    "mean sum cat stack chunk split unbind movedim swapaxes neg roll flip tril triu index_select gather narrow "
    "repeat repeat_interleave broadcast_to __getitem__ select"
)
# Linear in all of their floating-point tensors together.
_LINEAR = named(Tensor, _STRUCTURE) | named(torch, _STRUCTURE) | {functional.embedding}
_LINEAR |= {getattr(Tensor, name).__get__ for name in ("T", "mT")}
# The derivative of a tensor need not lie in memory as the tensor does.
_RESHAPING = {Tensor.view: Tensor.reshape}
_CONSTANT = named(torch, "zeros_like ones_like full_like empty_like rand_like randn_like sign") | {Tensor.detach}
_MAY_BE_IN_PLACE = {"relu", "silu", "mish", "elu", "leaky_relu"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imatmul__"}

RULES: dict[Callable, Callable] = {}
"""``(result, *arguments) -> derivatives of the result``, or None where a rule does not cover the arguments."""


class Jet(Tensor):
    """A tensor with its derivatives along every direction, of shape ``(vector, ...)``, or None for zero."""

    derivatives: list[Tensor | None]

    @classmethod
    def make(cls, value: Tensor, derivatives: list[Tensor | None]) -> Self:
        """Attach derivatives to a value."""
        jet = value.as_subclass(cls)
        jet.derivatives = derivatives
        return jet

    @property
    def value(self) -> Tensor:
        """The tensor itself."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        with torch._C.DisableTorchFunctionSubclass():
            leaves, spec = pytree.tree_flatten((arguments, keywords))

            def call(replaced: Sequence[Any], by: Callable = function) -> Any:
                positional, by_name = pytree.tree_unflatten(replaced, spec)
                return by(*positional, **by_name)

            name = getattr(function, "__name__", "")
            inplace = keywords.get("inplace") or (name in _MAY_BE_IN_PLACE and arguments[-1] is True)
            if inplace or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                raise NotImplementedError(f"{name} changes a tensor in place; Taylor mode can't follow it")
            result = call([value_of(leaf) for leaf in leaves])
            values, outer = pytree.tree_flatten(result)
            if function in _CONSTANT or not any(_real(value) for value in values):
                return result
            derivatives = None
            if function in RULES and arguments and not any(isinstance(x, Tensor) for x in keywords.values()):
                derivatives = RULES[function](result, *arguments, **keywords)
            if derivatives is None and function in _LINEAR:
                derivatives = _linear(lambda replaced: call(replaced, _RESHAPING.get(function, function)), leaves)
            if derivatives is None:
                derivatives = _by_jvp(call, leaves)
            # From one nest of results for each derivative to one jet for each result.
            by_value = zip(*(pytree.tree_leaves(d, is_leaf=_nothing) for d in derivatives), strict=True)
            jets = [cls.make(v, list(ds)) if _real(v) else v for v, ds in zip(values, by_value, strict=True)]
            return pytree.tree_unflatten(jets, outer)


def _nothing(leaf: Any) -> bool:
    return leaf is None


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def value_of(leaf: Any) -> Any:
    """The tensor of a jet; anything else as it is."""
    return leaf.as_subclass(Tensor) if isinstance(leaf, Jet) else leaf


def derivatives_of(x: Any, ndim: int, order: int) -> list[Tensor | None]:
    """Derivatives of ``x``, made ready to be broadcast with those of tensors of ``ndim`` dimensions."""
    if not isinstance(x, Jet):
        return [None] * order
    lift = (1,) * (ndim - x.ndim)
    return [None if d is None else d.reshape(len(d), *lift, *d.shape[1:]) for d in x.derivatives]


def order_of(*arguments: Any) -> int:
    """How many derivatives the jets among ``arguments`` carry."""
    return next(len(x.derivatives) for x in arguments if isinstance(x, Jet))


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not zero."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def filled(derivatives: list[Tensor | None], like: Tensor) -> list[Tensor | None]:
    """Derivatives in the full shape of the result."""
    return [None if d is None else d.expand(len(d), *like.shape) for d in derivatives]


def _linear(call: Callable[[Sequence[Any]], Any], leaves: Sequence[Any]) -> list[Any]:
    """For a function that is linear in all of its floating-point tensors together: it, applied to derivatives."""
    constant = [value_of(leaf).new_zeros(()).expand(leaf.shape) if _real(leaf) else leaf for leaf in leaves]

    def apply(given: list[Tensor | None]) -> Any:
        return call([known if new is None else new for new, known in zip(given, constant, strict=True)])

    results = []
    for which in range(order_of(*leaves)):
        given = [leaf.derivatives[which] if isinstance(leaf, Jet) else None for leaf in leaves]
        if any(d is not None for d in given):
            results.append(vmap(apply, in_dims=([None if d is None else 0 for d in given],))(given))
        else:
            results.append(pytree.tree_map(lambda _: None, call(constant)))
    return results


def _by_jvp(call: Callable[[Sequence[Any]], Any], leaves: Sequence[Any]) -> list[Any]:
    """For any function f: Df [x'], and D2f [x', x'] + Df [x'']."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    values = tuple(value_of(leaves[place]) for place in places)
    vectors = next(len(d) for place in places for d in leaves[place].derivatives if d is not None)

    def function(*inputs: Tensor) -> Any:
        replaced = list(leaves)
        for place, value in zip(places, inputs, strict=True):
            replaced[place] = value
        return pytree.tree_map(lambda leaf: leaf if _real(leaf) else values[0].new_zeros(()), call(replaced))

    def tangents(which: int) -> tuple[Tensor, ...]:
        given = [leaves[place].derivatives[which] for place in places]
        shapes = [(vectors, *value.shape) for value in values]
        return tuple(v.new_zeros(s) if d is None else d for d, v, s in zip(given, values, shapes, strict=True))

    def slope(inputs: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Any:
        return jvp(function, inputs, along)[1]

    if order_of(*leaves) == 1:
        return [vmap(lambda along: slope(values, along))(tangents(0))]

    def both(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Any, Any]:
        rate, bend = jvp(lambda *inputs: slope(inputs, first), values, first)
        return rate, pytree.tree_map(torch.add, bend, slope(values, second))

    return list(vmap(both)(tangents(0), tangents(1)))
