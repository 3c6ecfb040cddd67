"""Choose the cheapest way of differentiating a model along vectors, and how much goes into memory at once."""

from __future__ import annotations

import math
import time
import warnings
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
from polca_lib.derivatives.finite_differences import check_derivatives
from polca_lib.derivatives.forward import Derivatives, Signals, by_jvp, trace
from polca_lib.derivatives.memory import default_budget, fit, peak_bytes
from polca_lib.derivatives.products import MatrixProduct, ModelStructure, model_structure, single_target_signals
from polca_lib.derivatives.reverse import project_reverse
from polca_lib.derivatives.signals import operations, signals, weights_of
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples

Mode = Literal["auto", "forward", "reverse"]
Precision = Literal["float32", "bfloat16", "auto"]

# On a CPU more at once does not help; elsewhere only memory limits it. Measured on two cores.
_CPU_TOKENS = 512
_CPU_VECTORS = 16
# On any device: among more tokens, neighbours could not be told apart by their weights, see single_target_signals.
_TOKENS = 4096

# How far derivatives may differ from those of plain jvp, by precision.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}

# Factors of time to operations, measured on two cores at several widths. A backward pass for a token has the operations
# of a forward pass, but in small products, and with more besides products.
_BACKWARD = 4
_SPARED = 0.85  # sparing products must take less than this part of the operations of plain jvp
# Operations per checkpoint from which on tracing, which takes seconds, pays.
_TRACED = 1e9
_PAYS = 1.5  # times as fast as float32: from there on "auto" rounds to bfloat16


@dataclass(frozen=True)
class Strategy:
    """How to differentiate. Results do not depend on it beyond rounding, save for ``precision``."""

    mode: Literal["forward", "reverse"]
    order: int  # of the highest derivative
    precision: Literal["float32", "bfloat16"]
    structure: ModelStructure | None  # of the model: in reverse mode, and in forward mode where products are spared
    n_vectors: int  # to differentiate along in all
    cost: dict[str, float]  # for an example and all vectors, in operations of matrix products; by way, and of a pass
    pass_examples: int = 2  # in one pass through the model
    chunk_examples: int = 2  # whose signals are in memory at a time, in reverse mode
    chunk_vectors: int = 2  # in one pass, in forward mode
    batched: bool = True  # whether vmap takes examples together in reverse mode; ragged losses go one by one
    traced: GraphModule | None = None  # derivatives of pass_examples examples, as a graph
    unfit: dict[str, str] = field(default_factory=dict)  # ways that do not fit this model, and why

    def in_full(self) -> Strategy:
        """The same without rounding."""
        return replace(self, precision="float32")


def faster_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """``bfloat16`` where it multiplies at least 1.5 times as fast as float32, else ``float32``.

    Timed in a tenth of a second, on products of the shape that reverse mode takes most time in.
    """

    def seconds(dtype: torch.dtype) -> float:
        vectors, gradients = (torch.ones(rows, 2**15, dtype=dtype, device=device) for rows in (64, 128))
        times = []
        for _ in range(6):
            start = time.perf_counter()
            (vectors @ gradients.T)[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times)

    try:
        return "bfloat16" if seconds(torch.float32) >= _PAYS * seconds(torch.bfloat16) else "float32"
    except RuntimeError as error:
        warnings.warn(f"precision = 'auto': products in bfloat16 fail here ({error}); float32 is taken", stacklevel=2)
        return "float32"


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
    of two ways, see :func:`polca_lib.derivatives.signals.operations`. A backward pass for a token counts as several, as
    it takes longer than its operations say. Where there is much to do, forward mode is traced, see
    :func:`polca_lib.derivatives.forward.trace`. Each way is first tried on a few examples and two vectors, against
    plain ``jvp``; a way that fails or differs is not used. Plain ``jvp`` is checked against finite differences. Without
    ``auto`` no time is measured: with the same memory, a resumed run makes the same choice.

    Args:
        token_loss: the loss.
        theta: parameters, shape (d,).
        batch: examples.
        vectors: directions in rows.
        order: 2 if second derivatives are wanted; they come from forward mode.
        mode: ``forward`` or ``reverse`` to force a mode.
        precision: of the operands of matrix products in reverse mode; forward mode always uses the model's. With
            ``auto``, what :func:`faster_precision` says.
        memory: bytes to take beyond the arguments; half of what the device has free if not given.

    Raises:
        ValueError: an argument is not allowed, the mode forced does not fit the model, or memory is too small; or torch
            has no such derivatives of the model, or wrong ones.
    """
    for name, value, allowed in (
        ("mode", mode, ("auto", "forward", "reverse")),
        ("precision", precision, ("float32", "bfloat16", "auto")),
        ("order", order, (1, 2)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}; allowed: {', '.join(map(str, allowed))}")
    if mode == "reverse" and order == 2:
        raise ValueError("mode = 'reverse' gives no second derivatives; allowed with curvature: 'auto', 'forward'")
    if memory is not None and memory <= 0:
        raise ValueError(f"memory = {memory}; allowed: a positive number of bytes")
    precision = faster_precision(theta.device) if precision == "auto" else precision
    budget = default_budget(theta.device) if memory is None else memory
    # Ragged losses: try, and measure memory, on the examples with most tokens.
    counts, batched = count_losses(partial(token_loss, theta), batch)
    if len(set(counts)) > 1:
        most_first = np.argsort(-counts, kind="stable")
        batch = map_examples(lambda t: t[torch.from_numpy(most_first).to(t.device)], batch)
    example, pair, few_vectors = next(split_examples(batch, 1)), next(split_examples(batch, 2)), vectors[:2]
    pass_operations = _operations(token_loss, theta, example)
    cost = {"pass": pass_operations, "jvp": pass_operations * (1 + 2 * order * len(vectors))}
    plain = Strategy("forward", order, "float32", structure=None, n_vectors=len(vectors), cost=cost)

    check_derivatives(token_loss, theta, pair, few_vectors, order, memory=budget)

    def usable(strategy: Strategy, name: str, part: Batch = pair) -> bool:
        tolerance = _TOLERANCE[strategy.precision]
        simple = replace(strategy, mode="forward", structure=None, traced=None)
        references = differentiate(simple, token_loss, theta, part, few_vectors)[1]
        try:
            derivatives = differentiate(strategy, token_loss, theta, part, few_vectors)[1]
            error = max(map(relative_difference, derivatives, references))
        except Exception as failure:  # a model may raise anything
            plain.unfit[name] = f"{type(failure).__name__}: {failure}"
            return False
        if not error <= tolerance:
            plain.unfit[name] = f"its derivatives differ from those of jvp by {error:.1g} of their size"
        return error <= tolerance

    if order == 1:
        # First derivatives: count the operations of all ways, and take the cheapest one that proves right.
        structure = model_structure(token_loss, theta, example)
        plain.cost.update(_costs(structure, pass_operations, len(vectors), token_loss))
        forward = min(plain.cost["jvp"], plain.cost["spared"])
        if mode == "reverse" or (mode == "auto" and plain.cost["reverse"] < forward):
            try:
                _check_other_parameters(token_loss, structure, budget)
                reverse = replace(plain, mode="reverse", precision=precision, structure=structure, batched=batched)
                if usable(reverse, "reverse"):
                    return _sized(reverse, token_loss, theta, batch, vectors, budget)
            except ValueError as failure:  # too little memory: forward mode may need less
                if mode == "reverse":
                    raise
                plain.unfit["reverse"] = str(failure)
        if mode == "reverse":
            raise ValueError(f"mode = 'reverse' does not fit this model ({plain.unfit['reverse']}); use 'forward'")
        spared = replace(plain, structure=structure)
        if plain.cost["spared"] < plain.cost["jvp"] and usable(spared, "spared"):
            plain = spared
    sized = _sized(plain, token_loss, theta, batch, vectors, budget)
    # Trace forward mode where there is much to do.
    if plain.cost["jvp"] * n_examples(batch) < _TRACED:
        return sized
    part = next(split_examples(batch, sized.pass_examples))
    part_signals = _signals(sized, token_loss, theta, part)
    if len(part_signals) < len(_spared(sized)):  # then the graph would not be tried, see differentiate
        plain.unfit["traced"] = "a product to spare matters to several tokens in the first examples"
        return sized
    try:
        traced = replace(sized, traced=trace(token_loss, theta, part, order, part_signals))
    except Exception as failure:  # a model may raise anything
        plain.unfit["traced"] = f"{type(failure).__name__}: {failure}"
        return sized
    # Try the graph on the examples in another order: it must be valid for any batch of this shape.
    return traced if usable(traced, "traced", map_examples(lambda t: t.flip(0), part)) else sized


def differentiate(
    strategy: Strategy,
    token_loss: TokenLoss,
    theta: Float[Tensor, " d"],
    batch: Batch,
    vectors: Float[Tensor, "vector d"],
) -> Derivatives:
    """Losses and derivatives, computed as ``strategy`` says."""
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
        part_signals = _signals(strategy, token_loss, theta, part)
        # The graph is valid for as many examples, and the same products to spare, as it was traced with.
        fits_graph = n_examples(part) == strategy.pass_examples and len(part_signals) == len(_spared(strategy))
        graph = strategy.traced if fits_graph else None
        blocks = [
            by_jvp(token_loss, theta, part, block, strategy.order, part_signals, graph)
            for block in vectors.split(strategy.chunk_vectors)
        ]
        losses.append(blocks[0][0])
        derivatives.append([torch.cat(block, dim=1) for block in zip(*(second for _, second in blocks), strict=True)])
    return torch.cat(losses), [torch.cat(parts) for parts in zip(*derivatives, strict=True)]


def _spared(strategy: Strategy) -> Collection[int]:
    """Products to spare in forward mode."""
    return strategy.structure.single_target if strategy.structure else ()


def _signals(strategy: Strategy, token_loss: TokenLoss, theta: Tensor, part: Batch) -> Signals:
    """Signals of the products to spare; those that matter to several tokens in this part are left out."""
    if not _spared(strategy):
        return {}
    all_signals = single_target_signals(token_loss, token_loss.unflatten(theta), part, _spared(strategy))
    return {index: (signal, token) for index, (signal, token) in all_signals.items() if token is not None}


def _operations(token_loss: TokenLoss, theta: Tensor, example: Batch) -> int:
    """Operations of matrix products in a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_loss(theta, example)
    return counter.get_total_flops()


def _costs(structure: ModelStructure, pass_operations: int, n_vectors: int, token_loss: TokenLoss) -> dict[str, float]:
    """Operations of first derivatives in forward mode with products spared, and in reverse mode."""
    single_target = sum(_product_operations(structure.products[index]) for index in structure.single_target)
    other_parameters = sum(token_loss.parameters[name].numel() for name in structure.other_parameters)
    products = structure.tokens * n_vectors * other_parameters
    for product in structure.products:
        ways = operations(math.prod(product.shape[:-1]), structure.tokens, n_vectors, len(product.weight.value))
        products += product.weight.value.numel() * min(ways)
    return {
        # Two backward passes tell which token a position matters to.
        "spared": (pass_operations * (1 + 2 * n_vectors + 4) - single_target * n_vectors) / _SPARED,
        "reverse": pass_operations * (1 + _BACKWARD * structure.tokens) + 2 * products,
    }


def _check_other_parameters(token_loss: TokenLoss, structure: ModelStructure, budget: int) -> None:
    """Raise a ValueError if two examples' gradients with respect to other parameters, formed as a whole, don't fit."""
    whole = 2 * structure.tokens * sum(token_loss.parameters[name].nbytes for name in structure.other_parameters)
    if whole > budget:
        raise ValueError(
            f"gradients with respect to {sorted(structure.other_parameters)} take {whole:,} bytes for two examples in "
            f"reverse mode, but of memory only {budget:,} are left; raise memory, or use mode = 'forward'"
        )


def _product_operations(product: MatrixProduct) -> int:
    return 2 * math.prod(product.shape[:-1]) * product.weight.value.numel()


def _sized(
    strategy: Strategy, token_loss: TokenLoss, theta: Tensor, batch: Batch, vectors: Tensor, budget: int
) -> Strategy:
    """Fill in how many examples and vectors go into memory, by measuring what a few take."""
    on_cpu, total = theta.device.type == "cpu", n_examples(batch)
    example = next(split_examples(batch, 1))
    with torch.no_grad():
        tokens = len(token_loss(theta, example))
    most = min(total, max(1, (_CPU_TOKENS if on_cpu else _TOKENS) // max(1, tokens)))

    def peak(n: int, width: int) -> int:
        tried = replace(strategy, pass_examples=n, chunk_examples=n, chunk_vectors=width)
        part, block = next(split_examples(batch, n)), vectors if strategy.mode == "reverse" else vectors[:width]
        return peak_bytes(lambda: differentiate(tried, token_loss, theta, part, block), theta.device)

    # Forward mode: double the number of vectors per pass while two examples would fit.
    width = len(vectors)
    if strategy.mode == "forward":
        widest, width = min(width, _CPU_VECTORS) if on_cpu else width, 1
        while width < widest and peak(1, width) * min(2, widest / width) <= budget:
            width = min(2 * width, widest)
    # Then as many examples per pass as fit.
    passing = fit(lambda n: peak(n, width), budget, most)
    chunk = passing
    if strategy.mode == "reverse":
        # Reverse mode: each further example in a chunk adds the bytes of its signals to the peak.
        dtype = theta.dtype if strategy.precision == "float32" else torch.bfloat16
        parameters = token_loss.unflatten(theta)
        matrices = weights_of(strategy.structure, parameters, dtype)
        structure, batched = strategy.structure, strategy.batched
        example_signals = signals(token_loss, parameters, structure, matrices, example, len(vectors), batched)
        signal_bytes = max(1, example_signals.nbytes)
        # Leave 3/8 of the budget for what the measurement misses: fragmentation, and buffers of products.
        spare = budget * 5 // 8 - peak(passing, width)
        chunk = min(total, passing * (1 + max(0, spare // (signal_bytes * passing))))
    return replace(strategy, pass_examples=passing, chunk_examples=chunk, chunk_vectors=width)


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``reference``; zero if there is none."""
    difference = (value - reference).square().mean()
    return 0.0 if difference == 0 or not value.numel() else (difference / reference.square().mean()).sqrt().item()
