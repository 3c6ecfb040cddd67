"""Find the products of data with weight matrices in a model by watching a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from polca_lib.derivatives.token_loss import Batch, TokenLoss

_MATMULS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


@dataclass(frozen=True)
class Derived:
    """A tensor that depends on parameters alone, such as a rearranged weight."""

    value: Tensor
    leaves: frozenset[str]
    build: Callable[[Mapping[str, Tensor]], Tensor]  # named parameters -> value


@dataclass(frozen=True)
class MatrixProduct:
    """One product ``x @ weight`` of activations with a matrix that depends on parameters alone."""

    weight: Derived  # of shape (in, out)
    shape: tuple[int, ...]  # of the product, for one example


@dataclass(frozen=True)
class ModelStructure:
    """Matrix products in the forward pass of an example."""

    products: tuple[MatrixProduct, ...]
    other_parameters: frozenset[str]  # parameters used in any other way: biases, scales, embeddings
    tokens: int  # target tokens of the example
    single_target: frozenset[int]
    """Products whose output at each position matters to a single target, as after the last mixing of positions."""


class WatchProducts(TorchFunctionMode):
    """Intercept products of data with weights and let ``at_product`` compute them.

    Args:
        parameters: by name; tensors computed from parameters alone are weights, too.
        at_product: ``(index, x, weight, bias) -> x @ weight.value + bias``; the bias may be None.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        at_product: Callable[[int, Tensor, Derived, Tensor | None], Tensor],
    ):
        super().__init__()
        # Keyed by id(). The values hold the tensors, so that Python does not reuse an id.
        self._derived = {
            id(p): Derived(p, frozenset([name]), lambda named, name=name: named[name]) for name, p in parameters.items()
        }
        self._at_product = at_product
        self._count = 0
        self.other_parameters: set[str] = set()

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if (product := self._product(function, arguments, keywords)) is not None:
            return product
        leaves, spec = pytree.tree_flatten((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = {id(t): self._derived[id(t)] for t in tensors if id(t) in self._derived}
        result = function(*arguments, **keywords)
        if not known:
            return result
        sources = frozenset().union(*(derived.leaves for derived in known.values()))
        if any(id(t) not in known for t in tensors):
            self.other_parameters |= sources
            return result

        # Hold no reference to self: a cycle would keep the tensors of a pass until the garbage collector runs.
        def build(named: Mapping[str, Tensor]) -> Tensor:
            values = [known[id(x)].build(named) if isinstance(x, Tensor) else x for x in leaves]
            positional, by_name = pytree.tree_unflatten(values, spec)
            return function(*positional, **by_name)

        parts = (
            {(): result}
            if isinstance(result, Tensor)
            else dict(enumerate(result))
            if isinstance(result, tuple | list)
            else {}
        )
        for part, value in parts.items():
            pick = (lambda named: build(named)) if part == () else (lambda named, part=part: build(named)[part])
            self._derived[id(value)] = Derived(value, sources, pick)
        return result

    def _product(self, function: Callable, arguments: tuple, keywords: dict[str, Any]) -> Tensor | None:
        """The result, if this call is a product of data with a weight matrix (plus a bias)."""
        bias = None
        if function is functional.linear:
            named = dict(zip(("input", "weight", "bias"), arguments, strict=False)) | keywords
            x, weight, bias = named["input"], named["weight"], named.get("bias")
        elif function is torch.addmm and not keywords:
            bias, x, weight = arguments
        elif function in _MATMULS and len(arguments) == 2:
            x, weight = arguments
        else:
            return None
        derived = self._derived.get(id(weight))
        if derived is None or id(x) in self._derived or weight.ndim != 2 or x.ndim < 2:
            return None
        if bias is not None:
            self.other_parameters |= self._derived[id(bias)].leaves if id(bias) in self._derived else set()
        if function is functional.linear:
            build = derived.build
            derived = Derived(weight.mT, derived.leaves, lambda named: build(named).mT)
        self._count += 1
        return self._at_product(self._count - 1, x, derived, bias)


def model_structure(token_loss: TokenLoss, theta: Float[Tensor, " d"], example: Batch) -> ModelStructure:
    """Find the matrix products of a model, and those where each output position matters to a single token.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        example: a batch of one example.
    """
    # Take a random point: at theta a signal may happen to be zero.
    random = torch.Generator(theta.device).manual_seed(0)
    noise = torch.randn(theta.shape, generator=random, dtype=theta.dtype, device=theta.device)
    parameters = token_loss.unflatten(theta.detach() + theta.abs().mean() * noise)
    products: list[MatrixProduct] = []

    def note(_: int, x: Tensor, weight: Derived, bias: Tensor | None) -> Tensor:
        result = x @ weight.value
        products.append(MatrixProduct(weight, tuple(result.shape)))
        return result if bias is None else result + bias

    with torch.no_grad(), WatchProducts(parameters, note) as watch:
        tokens = token_loss.at(parameters, example).numel()
    signals = single_target_signals(token_loss, parameters, example, range(len(products)))
    single_target = frozenset(index for index, (signal, token) in signals.items() if token is not None and signal.any())
    return ModelStructure(tuple(products), frozenset(watch.other_parameters), tokens, single_target)


def single_target_signals(
    token_loss: TokenLoss, parameters: Mapping[str, Tensor], batch: Batch, products: Collection[int]
) -> dict[int, tuple[Float[Tensor, "position leaving"], Int[Tensor, " position"] | None]]:
    """d(sum of losses)/dy at the outputs y of products, and the token that each position matters to.

    Args:
        token_loss: the loss.
        parameters: by name.
        batch: examples; positions are those of all examples.
        products: indices of products.

    Returns:
        By product: the gradient, and the token of each position, or None if a position matters to several.
    """
    probes: dict[int, Tensor] = {}

    def add_probe(index: int, x: Tensor, weight: Derived, bias: Tensor | None) -> Tensor:
        result = x @ weight.value
        if index in products:
            # The gradient of a zero added to the product is its backward signal.
            probes[index] = torch.zeros_like(result, requires_grad=True)
            result = result + probes[index]
        return result if bias is None else result + bias

    with torch.enable_grad(), WatchProducts(parameters, add_probe):
        loss = token_loss.at(parameters, batch)
    if not probes or not len(loss):
        return {}
    # Take the signals of sum_j L_j and of sum_j w_j L_j. Where a position matters to token j alone, their ratio is w_j.
    weights = 1 + torch.arange(len(loss), dtype=loss.dtype, device=loss.device) / len(loss)
    plain, weighted = (
        torch.autograd.grad(loss, list(probes.values()), w, retain_graph=True, materialize_grads=True)
        for w in (torch.ones_like(weights), weights)
    )
    result = {}
    for index, signal, weighted_signal in zip(probes, plain, weighted, strict=True):
        signal, weighted_signal = signal.flatten(0, -2), weighted_signal.flatten(0, -2)
        # Estimate the ratio at each position by least squares, and round it to the nearest w_j.
        size = signal.square().sum(1)
        ratio = torch.where(size > 0, (signal * weighted_signal).sum(1) / size, 1.0)
        token = ((ratio - 1) * len(loss)).round().long().clamp(0, len(loss) - 1)
        # It is a single token's if nothing is left beyond rounding.
        residual = (weighted_signal - weights[token][:, None] * signal).norm(dim=1)
        is_single = bool((residual <= 1e-4 * size.sqrt() + 1e-7 * size.max().sqrt()).all())
        result[index] = (signal, token if is_single else None)
    return result
