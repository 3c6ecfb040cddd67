"""Directional derivatives in forward mode: all tokens at once, for a few vectors at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functionalize, jvp, vmap
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from polca_lib.derivatives.products import Derived, WatchProducts
from polca_lib.derivatives.token_loss import Batch, TokenLoss, restored

# Losses, and the first (and second) derivatives along all vectors.
Derivatives = tuple[Float[Tensor, " token"], list[Float[Tensor, "token vector"]]]
# By product: dL/dy at its output y, and the token that each position matters to.
Signals = Mapping[int, tuple[Float[Tensor, "position leaving"], Int[Tensor, " position"]]]

# Operations whose result may equal an argument, and the index of that argument.
_aten = torch.ops.aten
_COPIES = {_aten.detach.default: 0, _aten.alias.default: 0, _aten.clone.default: 0, _aten._to_copy.default: 0}
_COPIES |= {_aten.copy.default: 1}


@torch.no_grad()
def by_jvp(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    order: int,
    signals: Signals | None = None,
    graph: GraphModule | None = None,
) -> Derivatives:
    """<grad L(x), b>, and with order 2 also b^T H(x) b, for all tokens x and vectors b, by ``torch.func.jvp``.

    Under ``vmap`` passes along several vectors share the pass for the loss. First derivatives need not be carried
    through products y = x W + c whose output matters to a single token. With the signal dL/dy, the loss changes by

        <dL/dy, y'> = <dL/dy W^T, x'> + <dL/dy, x W' + c'>

    That saves half of such a product and everything after it: in a language model, the logits.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows.
        order: of the highest derivative, 1 or 2.
        signals: of products whose output matters to a single token, for order 1.
        graph: the derivatives as :func:`trace` returned them, for as many examples as it was traced on.
    """
    along = graph or _along(token_loss, order)
    loss, *derivatives = vmap(along, in_dims=(None, None, 0, None))(theta, batch, vectors, signals or {})
    return loss[0], [derivative.T for derivative in derivatives]


@torch.no_grad()
def trace(
    token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, order: int, signals: Signals | None = None
) -> GraphModule:
    """(theta, batch, b) -> L(x), <grad L(x), b>, b^T H(x) b as a graph that computes nothing twice.

    ``jvp`` nested in itself carries x' twice, and spends seven products on each product x W:

        (x W)' = x' W + x W',    (x W)'' = x'' W + 2 x' W'

    Without repetition there are four. Tracing takes seconds; the graph is valid for any theta and b, and any batch of
    this shape. Tracing uses tensors without values, so that no value of the batch can become a constant of the graph.

    Raises:
        Exception: of torch, if the operations of the model depend on the values in a tensor.
    """
    # Buffers and frozen parameters become constants of the graph: they are the same in each pass.
    tracer = make_fx(functionalize(_along(token_loss, order)), tracing_mode="fake", _allow_non_fake_inputs=True)
    with restored(token_loss.model):
        traced = tracer(theta, batch, torch.ones_like(theta), signals or {})
    _merge(traced.graph)
    traced.recompile()
    return traced


def _along(token_loss: TokenLoss, order: int) -> Callable[[Tensor, Batch, Tensor, Signals], tuple]:
    """Losses and derivatives at a point along a vector."""

    def along(theta: Tensor, batch: Batch, vector: Tensor, signals: Signals) -> tuple[Tensor, ...]:
        def slope(at: Tensor) -> tuple[Tensor, Tensor]:
            _, gradient, loss = jvp(
                lambda point: _losses(token_loss, point, batch, signals), (at,), (vector,), has_aux=True
            )
            return loss, gradient

        if order == 1:
            return slope(theta)
        (loss, gradient), (_, second) = jvp(slope, (theta,), (vector,))
        return loss, gradient, second

    return along


def _losses(token_loss: TokenLoss, theta: Tensor, batch: Batch, signals: Signals) -> tuple[Tensor, Tensor]:
    """Two values: one whose derivative is that of the losses, though some products carry none; and the losses."""
    if not signals:
        loss = token_loss(theta, batch)
        return loss, loss
    changes: list[tuple[Tensor, Tensor]] = []  # tokens of positions, and the change of their losses

    def at_product(index: int, x: Tensor, weight: Derived, bias: Tensor | None) -> Tensor:
        if index not in signals:
            return x @ weight.value if bias is None else x @ weight.value + bias
        signal, token = signals[index]
        y, change = _spare(signal, x, weight.value)
        changes.append((token, change if bias is None else change + signal @ bias))
        return y if bias is None else y + bias.detach()

    parameters = token_loss.unflatten(theta)
    with WatchProducts(parameters, at_product):
        loss = changing = token_loss.at(parameters, batch)
    # Add to each loss the changes at the positions that matter to it.
    for token, change in changes:
        changing = changing.index_add(0, token, change)
    return changing, loss


def _spare(signal: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Float[Tensor, " position"]]:
    """y = x W without derivatives, and a value at each position whose derivative is <dL/dy, x' W + x W'>."""
    # Multiply W' on the narrower side: logits along all vectors would be large.
    narrow, rows = weight.shape[0] < weight.shape[1], x.flatten(0, -2)
    y = x.detach() @ (weight.detach() if narrow else weight)
    entering = signal @ (weight if narrow else weight.detach()).T
    change = (rows * entering.detach()).sum(1)
    change = change + ((rows.detach() * entering) if narrow else (y.flatten(0, -2) * signal)).sum(1)
    return y.detach(), change


def _merge(graph: Graph) -> None:
    """Merge nodes that compute the same from the same arguments."""
    seen: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        # Nothing is changed in place, so replace a copy with the memory layout of its source by the source.
        source = node.args[_COPIES[node.target]] if node.target in _COPIES else None
        same = source if source and _kind(source) == _kind(node) else seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _kind(node: Node) -> tuple:
    tensor = node.meta["val"]
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _key(argument: Any) -> Any:
    """An argument of a node with its type, which tells 1 from 1.0."""
    if isinstance(argument, dict):
        argument = tuple(argument.items())
    if isinstance(argument, tuple | list):
        return tuple(_key(part) for part in argument)
    return type(argument), argument
