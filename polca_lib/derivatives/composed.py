"""Operations composed of elementary ones, where torch has no derivative in forward mode or a wrong one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _Composed(TorchFunctionMode):
    """Compose some functions from elementary operations, so that forward mode has their second derivatives.

    Those of torch's layer norm (pytorch issue 196700) and instance norm are wrong. The others have no second derivative
    in forward mode, or no derivative at all there.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        return _COMPOSED.get(function, function)(*arguments, **(keywords or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _scaled(_standardised(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    weight, bias = (p if p is None else p.reshape(-1, *[1] * (input.ndim - 2)) for p in (weight, bias))
    return _scaled(_standardised(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = [index for index in range(v.ndim) if dim == -1 or index != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=dim != -1))


def _activation(formula: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(input: Tensor, inplace: bool = False) -> Tensor:
        return input.copy_(formula(input.clone())) if inplace else formula(input)

    return function


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _reduced(loss: Tensor, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    size = (input - target).abs()
    loss = torch.where(size <= delta, size.square() / 2, delta * (size - delta / 2))
    return _reduced(loss if weight is None else loss * weight, reduction)


def _soft_margin_loss(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Tensor:
    return _reduced(-nn.functional.logsigmoid(input * target), reduction, size_average, reduce)


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    positive = target if pos_weight is None else target * pos_weight
    log_sigmoid = nn.functional.logsigmoid
    loss = -(positive * log_sigmoid(input) + (1 - target) * log_sigmoid(-input))
    return _reduced(loss if weight is None else loss * weight, reduction, size_average, reduce)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    # torch zeroes the gradient of padding_idx in backward mode but not in forward mode; ignore it so that both agree.
    return nn.functional.embedding(input, weight)


def _unfused(recurrent: Callable[..., Any]) -> Callable[..., Any]:
    """Without the fused kernels of oneDNN and cuDNN, which have no forward-mode derivative."""

    def function(*arguments: Any, **keywords: Any) -> Any:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # backends.mkldnn.flags sets other flags, too, and warns
        try:
            with torch.backends.cudnn.flags(enabled=False):
                return recurrent(*arguments, **keywords)
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    return function


_functional = nn.functional
_COMPOSED = {
    _functional.embedding: _embedding,
    _functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    _functional.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
    Tensor.requires_grad_: lambda tensor, requires_grad=True: tensor,  # derivatives are with respect to theta alone
    _functional.silu: _activation(lambda x: x * x.sigmoid()),
    _functional.mish: _activation(lambda x: x * _functional.softplus(x).tanh()),
    _functional.hardsigmoid: _activation(lambda x: _functional.relu6(x + 3) / 6),
    _functional.glu: _glu,
    _functional.huber_loss: _huber_loss,
    _functional.soft_margin_loss: _soft_margin_loss,
    _functional.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    torch.cdist: lambda x1, x2, p=2.0, compute_mode=None: torch.linalg.vector_norm(
        x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1
    ),
    **{function: _unfused(function) for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}


class _NoCheckpoint:
    """Stands in for torch's reentrant gradient checkpointing: computes activations once."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *arguments: Any) -> Any:
        return function(*arguments)


def _no_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    """Stands in for torch's gradient checkpointing that is not reentrant."""
    yield


_STAND_INS = {"CheckpointFunction": _NoCheckpoint, "_checkpoint_without_reentrant_generator": _no_checkpoint}
_ORIGINALS = {name: getattr(torch.utils.checkpoint, name) for name in _STAND_INS}
_LOCK = threading.Lock()
_inside = 0  # calls that are inside differentiable, over all threads


@contextmanager
def differentiable() -> Iterator[None]:
    """Have models compute with operations that have derivatives in both modes."""
    global _inside
    # Checkpointed activations would be computed again in the backward pass, with the weights of the model, not theta.
    with _LOCK:
        _inside += 1
        vars(torch.utils.checkpoint).update(_STAND_INS)
    try:
        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), _Composed():
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                vars(torch.utils.checkpoint).update(_ORIGINALS)
