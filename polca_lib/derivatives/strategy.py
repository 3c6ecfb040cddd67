"""Which way of differentiating is cheapest for a model and a set of vectors, and how much goes into memory at once."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.derivatives.batches import count_losses, map_examples
from polca_lib.derivatives.forward import Derivatives, Signals, by_jvp, trace
from polca_lib.derivatives.memory import default_budget, fit, peak_bytes
from polca_lib.derivatives.products import MatrixProduct, ModelStructure, model_structure, single_target_signals
from polca_lib.derivatives.reverse import project_reverse
from polca_lib.derivatives.signals import operations, signals, weights_of
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples

Mode = Literal["auto", "forward", "reverse"]
Precision = Literal["float32", "bfloat16"]

# On a CPU more at once does not help; other_parameters only memory limits it. Measured on two cores.
_CPU_TOKENS = {"forward": 512, "reverse": 128}
_CPU_VECTORS = 16
# Anywhere: among more, tokens side by side could not be told apart by their weights (see
# products.single_target_signals).
_TOKENS = 4096


_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}

# What else there is to do beside the products, in their terms; measured on two cores, at several widths. A pass back
# for a token has the operations of a pass forward, but in small products, and much that is none.
_BACKWARD = 4
_SPARED = 0.85  # what first derivatives that spare products may take of plain jvp to be worth it
# Operations at one checkpoint from which on it pays to trace them, which takes seconds.
_TRACED = 1e9


@dataclass(frozen=True)
class Strategy:
    """How to differentiate. Results do not depend on it beyond rounding, save for ``precision``."""

    mode: Literal["forward", "reverse"]
    order: int  # of the highest derivative
    precision: Precision
    structure: ModelStructure | None  # of the model: in reverse mode, and forward where products are spared
    n_vectors: int  # to differentiate along in all
    cost: dict[str, float]  # for one example and all vectors, in operations of matrix products; by way, and of a pass
    pass_examples: int = 2  # through the model at one time
    chunk_examples: int = 2  # whose signals are kept at one time, in reverse mode
    chunk_vectors: int = 2  # differentiated along at one time, in forward mode
    batched: bool = True  # whether vmap takes examples together in reverse mode; ragged losses go one by one
    traced: GraphModule | None = None  # derivatives of pass_examples examples, as a graph
    unfit: dict[str, str] = field(default_factory=dict)  # ways that do not fit this model, and why

    def in_full(self) -> Strategy:
        """The same without rounding."""
        return replace(self, precision="float32")


def choose(
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
    *,
    order: int = 1,
    mode: Mode = "auto",
    precision: Precision = "float32",
    memory: int | None = None,
) -> Strategy:
    """Choose by counting the operations of both modes, and by measuring memory on one example or a few.

    With F operations in a forward pass on an example with m target tokens, d parameters and K vectors, forward mode
    takes (1 + 2K) F, or (1 + 4K) F with second derivatives, and less where products matter to single tokens (see
    :func:`polca_lib.derivatives.forward.by_jvp`); reverse mode takes (1 + m) F, and for each of its products the less
    of two ways, see :func:`polca_lib.derivatives.signals.operations`. A pass back for a token counts as several, as it
    takes longer than its operations say. Where there is much to do, forward mode is traced, see
    :func:`polca_lib.derivatives.forward.trace`. Each way is first tried on a few examples and two vectors, against
    plain ``jvp``; what fails or differs is not used. No time is measured: with the same memory, the choice is the same
    whenever a run is resumed.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows.
        order: 2 if second derivatives are wanted; they come from forward mode.
        mode: to force one.
        precision: of the operands of matrix products in reverse mode; forward mode is always in the model's own.
        memory: bytes to take beyond the arguments; half of what the device has free if not given.

    Raises:
        ValueError: an argument is not allowed, the mode forced does not fit the model, or memory is too small.
    """
    for name, value, allowed in (
        ("mode", mode, ("auto", "forward", "reverse")),
        ("precision", precision, ("float32", "bfloat16")),
        ("order", order, (1, 2)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}; allowed: {', '.join(map(str, allowed))}")
    if mode == "reverse" and order == 2:
        raise ValueError("mode = 'reverse' gives no second derivatives; allowed with curvature: 'auto', 'forward'")
    if memory is not None and memory <= 0:
        raise ValueError(f"memory = {memory}; allowed: a positive number of bytes")
    budget = default_budget(theta.device) if memory is None else memory
    # Ragged losses: try, and measure memory, on the examples with most tokens.
    counts, batched = count_losses(partial(token_loss, theta), batch)
    if len(set(counts)) > 1:
        most_first = np.argsort(-counts, kind="stable")
        batch = map_examples(lambda t: t[torch.from_numpy(most_first).to(t.device)], batch)
    one, pair, few = next(split_examples(batch, 1)), next(split_examples(batch, 2)), vectors[:2]
    once = _operations(token_loss, theta, one)
    plain = Strategy("forward", order, "float32", structure=None, n_vectors=len(vectors), cost={"pass": once})
    plain.cost["jvp"] = once * (1 + 2 * order * len(vectors))

    def usable(strategy: Strategy, name: str, part: Batch = pair) -> bool:
        tolerance = _TOLERANCE[strategy.precision]
        simple = replace(strategy, mode="forward", structure=None, traced=None)
        reference = differentiate(simple, token_loss, theta, part, few)[1]
        try:
            found = differentiate(strategy, token_loss, theta, part, few)[1]
            error = max(relative_difference(ours, theirs) for ours, theirs in zip(found, reference, strict=True))
        except Exception as failure:  # of whatever a model does
            plain.unfit[name] = f"{type(failure).__name__}: {failure}"
            return False
        if not error <= tolerance:
            plain.unfit[name] = f"its derivatives differ from those of jvp by {error:.1g} of their size"
        return error <= tolerance

    if order == 1:
        seen = model_structure(token_loss, theta, one)
        plain.cost.update(_costs(seen, once, len(vectors), token_loss))
        forward = min(plain.cost["jvp"], plain.cost["spared"])
        if mode == "reverse" or (mode == "auto" and plain.cost["reverse"] < forward):
            try:
                _check_other_parameters(token_loss, seen, budget)
                reverse = replace(plain, mode="reverse", precision=precision, structure=seen, batched=batched)
                if usable(reverse, "reverse"):
                    return _sized(reverse, token_loss, theta, batch, vectors, budget)
            except ValueError as failure:  # too little memory: forward mode may do with less
                if mode == "reverse":
                    raise
                plain.unfit["reverse"] = str(failure)
        if mode == "reverse":
            raise ValueError(f"mode = 'reverse' does not fit this model ({plain.unfit['reverse']}); use 'forward'")
        spared = replace(plain, structure=seen)
        if plain.cost["spared"] < plain.cost["jvp"] and usable(spared, "spared"):
            plain = spared
    sized = _sized(plain, token_loss, theta, batch, vectors, budget)
    if plain.cost["jvp"] * n_examples(batch) < _TRACED:
        return sized
    part = next(split_examples(batch, sized.pass_examples))
    try:
        traced = replace(sized, traced=trace(token_loss, theta, part, order, _signals(sized, token_loss, theta, part)))
    except Exception as failure:  # of whatever a model does
        plain.unfit["traced"] = f"{type(failure).__name__}: {failure}"
        return sized
    # Tried on the same examples in another order, for the graph must hold for any.
    return traced if usable(traced, "traced", map_examples(lambda t: t.flip(0), part)) else sized


def differentiate(
    strategy: Strategy,
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
) -> Derivatives:
    """Carry a strategy out."""
    if strategy.mode == "reverse":
        loss, gradient = project_reverse(
            token_loss,
            theta,
            strategy.structure,
            batch,
            vectors,
            dtype=theta.dtype if strategy.precision == "float32" else torch.bfloat16,
            chunk_examples=strategy.chunk_examples,
            pass_examples=strategy.pass_examples if strategy.batched else 1,
            n_vectors=strategy.n_vectors,
            batched=strategy.batched,
        )
        return loss, [gradient]
    losses, derivatives = [], []
    for part in split_examples(batch, strategy.pass_examples):
        signals = _signals(strategy, token_loss, theta, part)
        # Without the graph goes what it was not traced for: a last part that is shorter, or other products to spare.
        same = n_examples(part) == strategy.pass_examples and len(signals) == len(_spared(strategy))
        graph = strategy.traced if same else None
        blocks = [
            by_jvp(token_loss, theta, part, block, strategy.order, signals, graph)
            for block in vectors.split(strategy.chunk_vectors)
        ]
        losses.append(blocks[0][0])
        derivatives.append([torch.cat(block, dim=1) for block in zip(*(found for _, found in blocks), strict=True)])
    return torch.cat(losses), [torch.cat(parts) for parts in zip(*derivatives, strict=True)]


def _spared(strategy: Strategy) -> Collection[int]:
    """Products to spare in forward mode."""
    return strategy.structure.single_target if strategy.structure else ()


def _signals(strategy: Strategy, token_loss: TokenLoss, theta: Tensor, part: Batch) -> Signals:
    """Their signals for some examples; without products whose output matters to several tokens here."""
    if not _spared(strategy):
        return {}
    found = single_target_signals(token_loss, token_loss.unflatten(theta), part, _spared(strategy))
    return {index: (signal, token) for index, (signal, token) in found.items() if token is not None}


def _operations(token_loss: TokenLoss, theta: Tensor, one: Batch) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_loss(theta, one)
    return counter.get_total_flops()


def _costs(seen: ModelStructure, once: int, n_vectors: int, token_loss: TokenLoss) -> dict[str, float]:
    """Of first derivatives forward with products spared, and in reverse, now that the products are known."""
    single_target = sum(_product_operations(seen.products[index]) for index in seen.single_target)
    other_parameters = sum(token_loss.parameters[name].numel() for name in seen.other_parameters)
    products = seen.tokens * n_vectors * other_parameters
    for product in seen.products:
        ways = operations(math.prod(product.shape[:-1]), seen.tokens, n_vectors, len(product.weight.value))
        products += product.weight.value.numel() * min(ways)
    return {
        # Two backward passes tell which token a position matters to.
        "spared": (once * (1 + 2 * n_vectors + 4) - single_target * n_vectors) / _SPARED,
        "reverse": once * (1 + _BACKWARD * seen.tokens) + 2 * products,
    }


def _check_other_parameters(token_loss: TokenLoss, seen: ModelStructure, budget: int) -> None:
    """Gradients with respect to parameters that do not multiply data are formed as a whole, at least for the trial."""
    whole = 2 * seen.tokens * sum(token_loss.parameters[name].nbytes for name in seen.other_parameters)
    if whole > budget:
        raise ValueError(
            f"gradients with respect to {sorted(seen.other_parameters)} take {whole:,} bytes for two examples in "
            f"reverse mode, but of memory only {budget:,} are left; raise memory, or use mode = 'forward'"
        )


def _product_operations(product: MatrixProduct) -> int:
    return 2 * math.prod(product.shape[:-1]) * product.weight.value.numel()


def _sized(
    strategy: Strategy, token_loss: TokenLoss, theta: Tensor, batch: Batch, vectors: Tensor, budget: int
) -> Strategy:
    """Fill in how many examples and vectors go into memory, by measuring what a few take."""
    on_cpu, total = theta.device.type == "cpu", n_examples(batch)
    one = next(split_examples(batch, 1))
    with torch.no_grad():
        tokens = len(token_loss(theta, one))
    most = min(total, max(1, (_CPU_TOKENS[strategy.mode] if on_cpu else _TOKENS) // max(1, tokens)))

    def peak(n: int, width: int) -> int:
        tried = replace(strategy, pass_examples=n, chunk_examples=n, chunk_vectors=width)
        part, some = next(split_examples(batch, n)), vectors if strategy.mode == "reverse" else vectors[:width]
        return peak_bytes(lambda: differentiate(tried, token_loss, theta, part, some), theta.device)

    width = len(vectors)
    if strategy.mode == "forward":
        widest, width = min(width, _CPU_VECTORS) if on_cpu else width, 1
        while width < widest and peak(1, width) * min(2, widest / width) <= budget:
            width = min(2 * width, widest)
    passing = fit(lambda n: peak(n, width), budget, most)
    chunk = passing
    if strategy.mode == "reverse":
        # Further examples add to the peak what is kept of them.
        dtype = theta.dtype if strategy.precision == "float32" else torch.bfloat16
        parameters = token_loss.unflatten(theta)
        matrices = weights_of(strategy.structure, parameters, dtype)
        structure, batched = strategy.structure, strategy.batched
        kept = max(1, signals(token_loss, parameters, structure, matrices, one, len(vectors), batched).nbytes)
        # A process takes more than its tensors: pieces that are kept and freed do not pack, and products need buffers.
        spare = budget * 5 // 8 - peak(passing, width)
        chunk = min(total, passing * (1 + max(0, spare // (kept * passing))))
    return replace(strategy, pass_examples=passing, chunk_examples=chunk, chunk_vectors=width)


def relative_difference(one: Tensor, two: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``two``; zero if there is none."""
    difference = (one - two).square().mean()
    return 0.0 if difference == 0 or not one.numel() else (difference / two.square().mean()).sqrt().item()
