"""What an analysis will take, before any of it is done: memory, disk, operations, time, and how it will go about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import cloudpickle
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.memory import rounded_budget, rows_that_fit
from polca_lib.derivatives.strategy import choose, differentiate
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples, to_device
from polca_lib.method.settings import HESSIAN_KINDS, BasisSettings

_HVP = 4  # operations of a product with a Hessian whose graph is kept, in those of a pass forward
_GRAPH = 3  # of building that graph

_GROWTH = (
    "Projections take time in proportion to tokens, checkpoints and parameters, in forward mode also to vectors;",
    "the basis of a Hessian to its examples, products and parameters. On disk the basis grows with vectors and",
    "parameters, projections with tokens, vectors and checkpoints. Workers share projections, not the basis.",
)

_SHORT = 0.3  # seconds that a pass may take for the ways of differentiating to be tried, and timed
_LONG = 30.0  # seconds that a pass may be expected to take for it to be timed at all
_PROBE = 8.0  # seconds that those tried are meant to take
_SQUARE = 1024  # of the matrices by which a device's rate is measured
_WAYS = {
    "jvp": "forward mode",
    "spared": "forward mode that spares products",
    "traced": "forward mode, traced",
    "reverse": "reverse mode",
}


@dataclass(frozen=True)
class Plan:
    """What an analysis will take. Bytes are bytes, times are seconds, operations are multiplications and additions."""

    parameters: int
    examples: int
    tokens: int
    vectors: int
    checkpoints: int
    workers: int
    device: str
    basis: str
    way: str  # of differentiating
    why: str
    block: int  # vectors in memory at once
    tasks: int  # that may be done side by side
    vector_bytes: int
    basis_bytes: int
    projection_bytes: int
    worker_bytes: int  # that a worker holds besides what a pass takes
    budget_bytes: int  # that it may take
    read_bytes: int  # checkpoints and vectors, over all tasks
    pass_operations: int  # of an example, forward
    basis_operations: float
    projection_operations: float
    products: int  # with the Hessian, at most
    operations_per_second: float
    basis_seconds: float
    projection_seconds: float
    measured: str  # what times come from

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("model", f"{self.parameters:,} trainable parameters, {_size(self.vector_bytes)} a vector or checkpoint"),
            ("data", f"{self.examples:,} examples, {self.tokens:,} tokens"),
            ("run", f"{self.checkpoints:,} checkpoints, {self.vectors:,} vectors"),
            ("way", f"{self.way}: {self.why}"),
            ("tasks", f"{self.tasks:,} of (checkpoint, block of {self.block} vectors)"),
            ("", ""),
            ("disk", f"basis {_size(self.basis_bytes)}, projections {_size(self.projection_bytes)}"),
            ("memory", f"{_size(self.worker_bytes)} a worker for vectors and weights, of {_size(self.budget_bytes)}"),
            ("reading", f"{_size(self.read_bytes)} of checkpoints and vectors"),
            ("operations", f"basis {self.basis_operations:.2g}, projections {self.projection_operations:.2g}"),
            ("", ""),
            ("basis", self._products()),
            (
                "projections",
                f"{_time(self.projection_seconds)}, shared by {self.workers} worker{'s'[: self.workers > 1]}",
            ),
            ("from", self.measured),
        ]
        told = [f"{name:<12}{text}".rstrip() for name, text in rows]
        if self.worker_bytes > self.budget_bytes:
            told.append("\nThis does not fit: take a device with more memory, or say how much there is (memory).")
        if self.block < self.vectors:
            told.append(
                "\nVectors do not all fit into memory: for the loss inside the basis they are read at each checkpoint; "
                "\nprojection.inside_loss = false saves that."
            )
        told += ["", *_GROWTH]
        return "\n".join(told)

    def _products(self) -> str:
        if not self.products:
            return "no product with a Hessian: reading checkpoints, and sums of them"
        return f"{_time(self.basis_seconds)} at most, for {self.products:,} products with the Hessian, on one worker"


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
) -> Plan:
    """Count what an analysis will take, and estimate its time from a short probe of model and device.

    If a pass forward on one example takes little time, the ways of differentiating are tried as they will be, and the
    chosen one is timed on a few examples and vectors. If it takes long, a pass along one vector is timed; and of a
    model that does not fit, or with ``operations_per_second`` given, nothing is run: operations are counted without
    data.

    Args:
        token_loss: of the model.
        validation: examples whose tokens are decomposed.
        checkpoints: how many.
        basis: its settings, with the number of vectors.
        projection: its settings.
        hessian_batch: sample for the Hessian.
        device: of the workers.
        memory: bytes a worker may take; half of what the device has free now if not given.
        workers: that share the projections.
        operations_per_second: of a worker; measured if not given.

    Raises:
        ValueError: a number out of range.
    """
    n_vectors = basis.n_vectors
    for name, value, least in (("checkpoints", checkpoints, 2), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} = {value}; allowed: {least} or more")
    if n_vectors is None or n_vectors > token_loss.n_parameters:
        raise ValueError(f"basis.n_vectors = {n_vectors}; allowed: 1 to {token_loss.n_parameters}, the parameters")
    d, one = token_loss.n_parameters, token_loss.n_parameters * token_loss.dtype.itemsize
    budget = rounded_budget(device) if memory is None else memory
    first = next(split_examples(validation, 1))
    examples, per_example, forward = n_examples(validation), *on_paper(token_loss, first)
    tokens, of_some = examples * per_example, projection.curvature and not projection.curvature_of_all
    found = probe(token_loss, validation, forward, n_vectors, projection, device, budget, operations_per_second)
    operations = examples * found.cost * checkpoints
    if of_some:
        operations += projection.curvature_examples * (1 + 4 * n_vectors) * forward * checkpoints
    if projection.inside_loss:
        operations += examples * forward * checkpoints
    block = rows_that_fit(n_vectors, one, budget // 2)
    blocks = math.ceil(n_vectors / block)
    products, hessian = 0, 0.0
    if basis.kind in HESSIAN_KINDS:
        sample = n_examples(validation if hessian_batch is None else hessian_batch)
        births = math.ceil(n_vectors / basis.k)
        products = births * basis.max_products
        hessian = float(sample * forward * births * (_GRAPH + _HVP * basis.max_products))
        # Lanczos and what is taken out of each product: two passes, over the vectors there are.
        hessian += products * 4.0 * d * (basis.max_products / 2 + n_vectors / 2)
    stored = {"random": 8 * n_vectors**2, "parameters": 8 * n_vectors}.get(basis.kind, n_vectors * one)
    curved = projection.curvature_examples * per_example if of_some else tokens * projection.curvature
    numbers = (tokens + curved) * n_vectors + (1 + projection.inside_loss) * tokens + 2 * n_vectors + 1
    vectors_read = n_vectors * one * (1 if blocks == 1 else checkpoints * (1 + projection.inside_loss))
    thetas_read = one * checkpoints * (1 if workers == 1 else 2)
    return Plan(
        parameters=d,
        examples=examples,
        tokens=tokens,
        vectors=n_vectors,
        checkpoints=checkpoints,
        workers=workers,
        device=device,
        basis=basis.kind,
        way=found.way,
        why=found.why,
        block=block,
        tasks=checkpoints * (blocks + 1 if blocks > 1 else 1),
        vector_bytes=one,
        basis_bytes=stored + 24 * n_vectors,
        projection_bytes=4 * numbers * checkpoints,
        worker_bytes=one * (block + 3),  # two checkpoints, and the point inside the basis
        budget_bytes=budget,
        read_bytes=vectors_read * (workers if blocks == 1 else 1) + thetas_read,
        pass_operations=forward,
        basis_operations=hessian,
        projection_operations=float(operations),
        products=products,
        operations_per_second=found.rate,
        basis_seconds=hessian / found.rate,
        projection_seconds=operations / found.rate / min(workers, checkpoints * blocks),
        measured=found.measured,
    )


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds > 2 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {seconds:.2g} seconds"


@dataclass(frozen=True)
class Probe:
    """What a probe found."""

    way: str  # of differentiating
    why: str
    cost: float  # operations of an example, for all vectors
    rate: float  # operations a second
    measured: str  # what it was that took time


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
    """How a pass will be differentiated, what that costs and how fast it goes.

    Args:
        token_loss: of the model.
        validation: examples whose tokens are decomposed.
        forward: operations of a pass on an example, see :func:`on_paper`.
        n_vectors: of the basis.
        settings: of the projection.
        device: that does it.
        memory: bytes there are.
        rate: operations a second; measured if not given. With it, nothing is run.
    """
    order = 2 if settings.curvature_of_all else 1
    plain = "forward mode", "a pass along each vector", float(forward * (1 + 2 * order * n_vectors))
    if rate is not None:
        return Probe(*plain, rate, "the operations per second that were given, and operations counted without data")
    matrices = _matrix_rate(device, token_loss.dtype)
    one = token_loss.n_parameters * token_loss.dtype.itemsize
    if 4 * one > memory or forward / matrices > _LONG:
        return Probe(
            *plain, matrices, f"products of matrices alone, {matrices:.2g} operations a second; nothing was run"
        )
    first = to_device(next(split_examples(validation, 1)), device)
    theta = 0.02 * torch.randn(token_loss.n_parameters, dtype=token_loss.dtype, device=device)
    with torch.no_grad():
        seconds = min(_timed(lambda: token_loss(theta, first)) for _ in range(3))  # the first takes longer
    if seconds > _SHORT:
        tangent = torch.randn_like(theta)
        took = _timed(lambda: torch.func.jvp(lambda at: token_loss(at, first), (theta,), (tangent,)))
        return Probe(*plain, 3 * forward / took, f"a pass along one vector on one example, {took:.1f} s")
    few = rows_that_fit(n_vectors, one, memory // 4)
    vectors = torch.randn(few, token_loss.n_parameters, dtype=token_loss.dtype, device=device)
    vectors /= vectors.norm(dim=1, keepdim=True)
    size = _several(token_loss, theta, validation, _PROBE / 2 / (1 + 2 * order * few))
    part = to_device(next(split_examples(validation, size)), device)
    strategy = choose(
        token_loss,
        theta,
        part,
        vectors,
        order=order,
        mode=settings.mode if order == 1 else "forward",
        precision=settings.precision if order == 1 else "float32",
        memory=memory // 2,
    )
    onward = "traced" if strategy.traced else "spared" if strategy.structure else "jvp"
    way = "reverse" if strategy.mode == "reverse" else onward
    cost = strategy.cost.get(way, strategy.cost["jvp"])
    more = n_vectors / few if way == "reverse" else (1 + 2 * order * n_vectors) / (1 + 2 * order * few)
    took = min(_timed(lambda: differentiate(strategy, token_loss, theta, part, vectors)) for _ in range(2))
    why = ", ".join(f"{_WAYS[name]} {strategy.cost[name]:.2g}" for name in _WAYS if name in strategy.cost)
    return Probe(
        _WAYS[way],
        f"operations of an example along {few} vectors: {why}",
        float(cost * more),
        n_examples(part) * cost / took,
        f"{n_examples(part)} examples along {few} vectors, done as they will be, {took:.1f} s",
    )


def _several(token_loss: TokenLoss, theta: Tensor, batch: Batch, seconds: float) -> int:
    """How many examples take so long in a pass: of few, much of the time is none of theirs."""
    n, every = 1, n_examples(batch)
    with torch.no_grad():
        while n < every:
            part = to_device(next(split_examples(batch, n)), theta.device)
            if _timed(lambda part=part: token_loss(theta, part)) > seconds:
                return n
            n = min(2 * n, every)
    return every


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    one = torch.randn(_SQUARE, _SQUARE, device=device, dtype=dtype)
    _timed(lambda: one @ one)
    return 2 * _SQUARE**3 / min(_timed(lambda: one @ one) for _ in range(5))


def on_paper(token_loss: TokenLoss, one: Batch) -> tuple[int, int]:
    """Losses of an example, and operations of a pass on it: counted on tensors without data, if the model allows.

    Raises:
        ValueError: it does not, and has no data of its own to do without.
    """
    try:
        copy = cloudpickle.loads(cloudpickle.dumps(token_loss))
        paper = TokenLoss(copy.model.to("meta"), copy.loss)
        theta = torch.empty(paper.n_parameters, dtype=paper.dtype, device="meta")
        return _count(paper, theta, to_device(one, "meta"))
    except Exception as error:  # not every model can be copied, and what a loss does may hang on its data
        if any(buffer.is_meta for buffer in token_loss.model.buffers()):
            raise ValueError(
                f"operations can't be counted without data ({error}), but the model has buffers on device meta; give "
                "it those, or, of transformers, build it with attn_implementation='eager'"
            ) from error
        return _count(token_loss, torch.zeros(token_loss.n_parameters, dtype=token_loss.dtype), one)


def _count(loss: TokenLoss, theta: Tensor, batch: Batch) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        losses = loss(theta, batch)
    return losses.numel(), counter.get_total_flops()
