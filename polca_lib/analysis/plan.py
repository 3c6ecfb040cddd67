"""Estimate what an analysis costs before it runs: memory, disk, operations and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from textwrap import dedent
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.batches import as_batch, map_examples
from polca_lib.derivatives.memory import rounded_budget, rows_that_fit
from polca_lib.derivatives.strategy import choose, differentiate
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples, to_device
from polca_lib.method.settings import HESSIAN_KINDS, BasisSettings, check_n_vectors

_GRAPH, _HVP = 3, 4  # cost of building the graph of a Hessian and of a product with it, in forward passes
_COMPARE_SECONDS = 0.3  # compare the ways to differentiate only if a forward pass is faster than this
_RUN_SECONDS = 30.0  # run the model at all only if a forward pass is expected to be faster than this
_PROBE_SECONDS = 8.0  # approximate length of the probe
_COUNTED = 32  # examples that stand for all if their losses can't be counted without data
_MATRIX_SIZE = 1024  # of the products that measure the speed of a device
_WAYS = {
    "jvp": "forward mode",
    "spared": "forward mode that spares products",
    "traced": "forward mode, traced",
    "reverse": "reverse mode",
}


@dataclass(frozen=True)
class Plan:
    """Expected cost of an analysis, in bytes, seconds and operations (additions and multiplications)."""

    parameters: int
    examples: int
    tokens: int
    vectors: int
    checkpoints: int
    workers: int
    device: str
    basis: str
    way: str  # to differentiate
    why: str
    block: int  # vectors in memory at once
    tasks: int  # that can run in parallel
    vector_bytes: int
    basis_bytes: int
    projection_bytes: int
    worker_bytes: int  # weights and vectors of one worker, without activations
    budget_bytes: int  # memory of one worker
    read_bytes: int  # checkpoints and vectors, over all tasks
    pass_operations: int  # forward pass on one example
    basis_operations: float
    projection_operations: float
    products: int  # with the Hessian, at most
    operations_per_second: float
    basis_seconds: float
    projection_seconds: float
    measured: str  # source of the times
    spacing: str  # whether checkpoints see what is learned, see polca_lib.method.checkpoint_spacing

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """The plan as a table, with advice where memory is short."""
        basis = "no product with a Hessian, only reads and sums of checkpoints"
        if self.products:
            basis = f"{_time(self.basis_seconds)} at most, for {self.products:,} products with the Hessian, on 1 worker"
        text = dedent(f"""\
            model       {self.parameters:,} trainable parameters, {_size(self.vector_bytes)} a vector or checkpoint
            data        {self.examples:,} examples, {self.tokens:,} tokens
            run         {self.checkpoints:,} checkpoints, {self.vectors:,} vectors
            way         {self.way}: {self.why}
            tasks       {self.tasks:,} of (checkpoint, block of {self.block} vectors)

            disk        basis {_size(self.basis_bytes)}, projections {_size(self.projection_bytes)}
            memory      {_size(self.worker_bytes)} a worker for vectors and weights, of {_size(self.budget_bytes)}
            reading     {_size(self.read_bytes)} of checkpoints and vectors
            operations  basis {self.basis_operations:.2g}, projections {self.projection_operations:.2g}

            basis       {basis}
            projections {_time(self.projection_seconds)}, shared by {self.workers} worker{"s"[: self.workers > 1]}
            timing      {self.measured}
            checkpoints {self.spacing}
            """)
        if self.worker_bytes > self.budget_bytes:
            text += "\nThis does not fit: use a device with more memory, or raise the setting memory.\n"
        if self.block < self.vectors:
            text += dedent("""
                The vectors do not fit into memory at once. The loss inside the basis reads them at each checkpoint.
                Set projection.inside_loss = false to avoid that.
                """)
        text += dedent("""
            Time of the projections grows with tokens, checkpoints and parameters, in forward mode also with vectors.
            Time of a Hessian basis grows with its examples, products and parameters. Disk space grows with vectors and
            parameters (basis), and with tokens, vectors and checkpoints (projections). Workers share only projections.
            """)
        return text.rstrip()


def plan(
    token_loss: TokenLoss,
    validation: Batch,
    *,
    checkpoints: int,
    basis: BasisSettings,
    projection: ProjectionSettings,
    hessian_batch: Batch | None = None,
    device: str = "cpu",
    memory: int | None = None,
    workers: int = 1,
    operations_per_second: float | None = None,
    spacing: str = "not measured: losses at the checkpoints are not computed yet",
) -> Plan:
    """Estimate the cost of an analysis: count operations, and time a short :func:`probe` of the model.

    Args:
        validation: examples whose tokens are decomposed.
        checkpoints: number of checkpoints, 2 or more.
        hessian_batch: sample for the Hessian; ``validation`` if not given.
        memory: bytes for each worker; half of the free memory of the device if not given.
        workers: number of workers that share the projections.
        operations_per_second: speed of a worker; measured if not given. If given, nothing is run.
        spacing: what is known of the checkpoints, see :func:`polca_lib.method.checkpoint_spacing.advice`.

    Raises:
        ValueError: a number is out of range, or the operations can't be counted without data.
    """
    basis = basis if basis.every else basis.resolved([])
    n_vectors, n_parameters = basis.n_vectors, token_loss.n_parameters
    for name, value, least in (("checkpoints", checkpoints, 2), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} = {value}; allowed: {least} or more")
    if n_vectors is None:
        raise ValueError(f"basis.n_vectors = None; allowed: 1 to {n_parameters}, the number of parameters")
    check_n_vectors(n_vectors, n_parameters)
    validation = as_batch(validation, "validation")
    hessian_batch = validation if hessian_batch is None else as_batch(hessian_batch, "hessian")
    budget = rounded_budget(device) if memory is None else memory
    examples, (per_example, forward) = n_examples(validation), on_paper(token_loss, validation)
    tokens, sampled = round(examples * per_example), projection.curvature and not projection.curvature_of_all
    probed = probe(token_loss, validation, forward, n_vectors, projection, device, budget, operations_per_second)

    # Operations of the projections: derivatives of all examples, curvature of a sample, loss inside the basis.
    operations = examples * probed.cost * checkpoints
    if sampled:
        operations += projection.curvature_examples * (1 + 4 * n_vectors) * forward * checkpoints
    if projection.inside_loss:
        operations += examples * forward * checkpoints

    # Operations of the basis: the Hessian products, and two passes that orthogonalize each product against the
    # Lanczos vectors and the basis so far, half of each on average.
    products, hessian = 0, 0.0
    if basis.kind in HESSIAN_KINDS:
        births, most = math.ceil(n_vectors / basis.k), basis.max_products
        products = births * most
        sample = n_examples(hessian_batch)
        hessian = float(sample * forward * births * (_GRAPH + _HVP * most))
        hessian += products * 4.0 * n_parameters * (most / 2 + n_vectors / 2)

    # Bytes: a random basis stores a mixing matrix and an axis basis stores indices; the others store vectors.
    vector = n_parameters * token_loss.dtype.itemsize
    stored = {"random": 8 * n_vectors**2, "parameters": 8 * n_vectors}.get(basis.kind, n_vectors * vector)
    curved = round(projection.curvature_examples * per_example) if sampled else tokens * projection.curvature
    derivatives, others = (tokens + curved) * n_vectors, (1 + projection.inside_loss) * tokens + 2 * n_vectors + 1

    # Blocks: each worker keeps a single block in memory, but reads several blocks again at each checkpoint.
    block = rows_that_fit(n_vectors, vector, budget // 2)
    blocks = math.ceil(n_vectors / block)
    reads = workers if blocks == 1 else checkpoints * (1 + projection.inside_loss)
    return Plan(
        parameters=n_parameters,
        examples=examples,
        tokens=tokens,
        vectors=n_vectors,
        checkpoints=checkpoints,
        workers=workers,
        device=device,
        basis=basis.kind,
        way=probed.way,
        why=probed.why,
        block=block,
        tasks=checkpoints * (blocks + 1 if blocks > 1 else 1),
        vector_bytes=vector,
        basis_bytes=stored + 24 * n_vectors,
        projection_bytes=checkpoints * (np.dtype(projection.storage).itemsize * derivatives + 4 * others),
        worker_bytes=vector * (block + 3),  # two checkpoints, and the point inside the basis
        budget_bytes=budget,
        read_bytes=vector * (n_vectors * reads + checkpoints * min(workers, 2)),
        pass_operations=forward,
        basis_operations=hessian,
        projection_operations=float(operations),
        products=products,
        operations_per_second=probed.rate,
        basis_seconds=hessian / probed.rate,
        projection_seconds=operations / probed.rate / min(workers, checkpoints * blocks),
        measured=probed.measured,
        spacing=spacing,
    )


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`."""

    way: str  # to differentiate
    why: str
    cost: float  # operations per example, along all vectors
    rate: float  # operations per second
    measured: str  # source of the rate


def probe(
    token_loss: TokenLoss,
    validation: Batch,
    forward: int,
    n_vectors: int,
    settings: ProjectionSettings,
    device: str,
    memory: int,
    rate: float | None = None,
) -> Probe:
    """Find how the analysis will differentiate, and time it on random weights and vectors.

    Models that do not fit or are too slow are not run: products of matrices are timed instead.

    Args:
        token_loss, validation, device, memory: see :func:`plan`.
        forward: operations of a forward pass on one example, see :func:`on_paper`.
        rate: operations per second; measured if not given. If given, nothing is run.
    """
    # With F operations in a forward pass, forward mode takes (1 + 2K) F, or (1 + 4K) F with second derivatives.
    order = 2 if settings.curvature_of_all else 1
    default = _WAYS["jvp"], "a pass along each vector", float(forward * (1 + 2 * order * n_vectors))
    if rate is not None:
        return Probe(*default, rate, "the operations per second that were given; operations counted without data")

    # Do not run a model that takes too much memory or time.
    matrix = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, device=device, dtype=token_loss.dtype)
    rate = 2 * _MATRIX_SIZE**3 / min([_timed(lambda: matrix @ matrix) for _ in range(6)][1:])
    vector = token_loss.n_parameters * token_loss.dtype.itemsize
    if 4 * vector > memory or forward / rate > _RUN_SECONDS:
        return Probe(*default, rate, f"products of matrices, {rate:.2g} operations per second; nothing was run")

    # Time one pass along one vector if a forward pass is slow. Take the fastest of three: the first is slower.
    example = to_device(next(split_examples(validation, 1)), device)
    theta = 0.02 * torch.randn(token_loss.n_parameters, dtype=token_loss.dtype, device=device)
    with torch.no_grad():
        seconds = min(_timed(lambda: token_loss(theta, example)) for _ in range(3))
    if seconds > _COMPARE_SECONDS:
        tangent = torch.randn_like(theta)
        seconds = _timed(lambda: torch.func.jvp(lambda at: token_loss(at, example), (theta,), (tangent,)))
        return Probe(*default, 3 * forward / seconds, f"a pass along one vector on one example, {seconds:.1f} s")

    # Otherwise choose as the analysis does, with the vectors that fit and enough examples to keep the device busy.
    n_tried = rows_that_fit(n_vectors, vector, memory // 4)
    vectors = torch.randn(n_tried, token_loss.n_parameters, dtype=token_loss.dtype, device=device)
    vectors /= vectors.norm(dim=1, keepdim=True)
    size = 1
    with torch.no_grad():
        while size < n_examples(validation):
            batch = to_device(next(split_examples(validation, size)), device)
            if _timed(lambda batch=batch: token_loss(theta, batch)) > _PROBE_SECONDS / 2 / (1 + 2 * order * n_tried):
                break
            size = min(2 * size, n_examples(validation))
    batch = to_device(next(split_examples(validation, size)), device)
    strategy = choose(token_loss, theta, batch, vectors, **settings.differentiation(order), memory=memory // 2)
    forward_way = "traced" if strategy.traced else "spared" if strategy.structure else "jvp"
    way = "reverse" if strategy.mode == "reverse" else forward_way
    cost = strategy.cost.get(way, strategy.cost["jvp"])
    seconds = min(_timed(lambda: differentiate(strategy, token_loss, theta, batch, vectors)) for _ in range(2))

    # Scale the cost from the vectors that were tried to all vectors.
    scale = n_vectors / n_tried if way == "reverse" else (1 + 2 * order * n_vectors) / (1 + 2 * order * n_tried)
    costs = ", ".join(f"{_WAYS[name]} {strategy.cost[name]:.2g}" for name in _WAYS if name in strategy.cost)
    return Probe(
        way=_WAYS[way],
        why=f"operations per example along {n_tried} vectors: {costs}",
        cost=float(cost * scale),
        rate=n_examples(batch) * cost / seconds,
        measured=f"{n_examples(batch)} examples along {n_tried} vectors, computed as in the analysis, {seconds:.1f} s",
    )


def on_paper(token_loss: TokenLoss, batch: Batch) -> tuple[float, int]:
    """Count the losses of an example, and the operations of a forward pass on it, without data if possible.

    Ragged losses depend on the data: the number is then the mean over a sample of the examples.

    Raises:
        ValueError: the model has neither data nor a loss that works without data.
    """

    def count(loss: TokenLoss, theta: Tensor, batch: Batch) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            losses = loss(theta, batch)
        if losses.ndim != 1:
            raise ValueError(
                f"the loss of one example has shape {tuple(losses.shape)}; allowed: one number for each target token: "
                'reduction="none", then flatten()'
            )
        return losses.numel(), counter.get_total_flops()

    one = next(split_examples(batch, 1))
    try:
        copy = cloudpickle.loads(cloudpickle.dumps(token_loss))
        empty = TokenLoss(copy.model.to("meta"), copy.loss)
        return count(empty, torch.empty(empty.n_parameters, dtype=empty.dtype, device="meta"), to_device(one, "meta"))
    except Exception as error:  # some models can't be copied, and some losses read their data
        if any(buffer.is_meta for buffer in token_loss.model.buffers()):
            raise ValueError(
                f"operations can't be counted without data ({error}), but the model has buffers on device meta; "
                "fill the buffers, or build a model of transformers with attn_implementation='eager'"
            ) from error
        theta = torch.zeros(token_loss.n_parameters, dtype=token_loss.dtype)
        some = map_examples(lambda t: t[:: math.ceil(len(t) / _COUNTED)], batch)
        losses, operations = zip(*(count(token_loss, theta, one) for one in split_examples(some, 1)), strict=True)
        return sum(losses) / len(losses), max(operations)


def _timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _size(n: float) -> str:
    """Bytes in readable units."""
    power = min(4, int(math.log2(max(1, n)) / 10))
    return f"{n / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _time(seconds: float) -> str:
    """Seconds in readable units."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds > 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {seconds:.2g} seconds"
