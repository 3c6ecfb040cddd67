"""A short look at a model and a device: how a pass will be differentiated, what it costs, and how fast it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import cloudpickle
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.analysis.settings import ProjectionConfig
from polca_lib.derivatives.memory import rows_that_fit
from polca_lib.derivatives.strategy import choose, differentiate
from polca_lib.derivatives.token_loss import Batch, TokenLoss, n_examples, split_examples, to_device

_SHORT = 0.3  # seconds that a pass may take for the ways of differentiating to be tried, and timed
_LONG = 30.0  # seconds that a pass may be expected to take for it to be timed at all
_PROBE = 8.0  # seconds that those tried are meant to take
_SQUARE = 1024  # of the matrices by which a device's rate is measured
_WAYS = {"jvp": "forward mode", "taylor": "forward mode by Taylor arithmetic", "reverse": "reverse mode"}


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
    settings: ProjectionConfig,
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
    way = "reverse" if strategy.mode == "reverse" else "taylor" if strategy.taylor else "jvp"
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
