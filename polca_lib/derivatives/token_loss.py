"""``token_loss(theta, batch) -> Tensor[n_tokens]``: the one function that everything is a derivative of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pandas as pd
import torch
import torch.utils.checkpoint
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Batch = Any
"""A tensor, or a nest of tensors, whose first dimension is the example."""

# (model, batch) -> the loss of each target token, (n_tokens,), example by example, in nats
Loss = Callable[[nn.Module, Batch], Tensor]


class _Composed(TorchFunctionMode):
    """Compose some functions from elementary operations, so that forward mode has their second derivatives.

    Those of torch's layer norm (pytorch issue 196700) and instance norm are wrong. The others have none, or neither.
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
        return input.copy_(formula(input)) if inplace else formula(input)

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


@contextmanager
def _differentiable() -> Iterator[None]:
    """Have models compute with operations that have derivatives in both modes."""
    checkpoints = torch.utils.checkpoint
    stand_ins = {"CheckpointFunction": _NoCheckpoint, "_checkpoint_without_reentrant_generator": _no_checkpoint}
    originals = {name: getattr(checkpoints, name) for name in stand_ins}
    # Checkpointed activations would be computed again in the backward pass, with the weights of the model, not theta.
    vars(checkpoints).update(stand_ins)
    try:
        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), _Composed():
            yield
    finally:
        vars(checkpoints).update(originals)


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


@dataclass(frozen=True)
class Subject:
    """Model, loss and data of an analysis; weights come from the checkpoints.

    Args:
        model: any module; its weights are not used.
        loss: ``(model, batch) -> losses (n_tokens,)``, example-major, in nats.
        validation: examples whose tokens are decomposed.
        hessian: sample of the training data; a basis of the Hessian needs it.
        tokens: one row per token of ``validation``.
        hessian_loss: loss whose Hessian is taken with ``basis.targets = "all"``.
    """

    model: nn.Module
    loss: Loss
    validation: Batch
    hessian: Batch | None = None
    tokens: pd.DataFrame | None = None
    hessian_loss: Loss | None = None


class TokenLoss:
    """L(x; theta): the loss of every target token x as a function of the flat vector of trainable parameters.

    Frozen parameters (``requires_grad`` is off) and buffers keep the model's values. Tied parameters count once. The
    loss is computed in the widest dtype of the parameters, at least float32.

    Args:
        model: any module without active dropout. It is never changed: parameters come in through ``theta``.
        loss: ``(model, batch) -> losses (n_tokens,)``, example-major, in nats.

    Raises:
        ValueError: the model has active dropout, normalises over the batch, or has no floating-point parameters to
            train. :meth:`check` finds what can only be seen with data.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        _refuse_what_is_no_function(model)
        self.model, self.loss = model, loss
        named = dict(model.named_parameters())
        trainable = {name: p.detach() for name, p in named.items() if p.requires_grad}
        if not trainable or not all(p.is_floating_point() for p in named.values()):
            odd = next((name for name, p in named.items() if not p.is_floating_point()), None)
            what = f"parameter {odd!r} holds {named[odd].dtype}" if odd else "no parameter of the model requires_grad"
            raise ValueError(f"{what}; allowed: floating-point parameters, at least one of them trainable")
        self.dtype = reduce(torch.promote_types, (p.dtype for p in named.values()), torch.float32)
        # Parameters in another dtype are kept as shapes alone.
        self.parameters = {
            name: p if p.dtype == self.dtype else torch.empty_like(p, dtype=self.dtype, device="meta")
            for name, p in trainable.items()
        }
        self.n_parameters = sum(p.numel() for p in self.parameters.values())
        self._sizes = [p.numel() for p in self.parameters.values()]
        self._module = _LossModule(model, loss)
        first = {id(p): name for name, p in named.items()}
        self._tied = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self._fixed = {name: p.detach() for name, p in named.items() if not p.requires_grad} | dict(
            model.named_buffers()
        )
        self._cast = {
            f"model.{name}": value.to(self.dtype)
            for name, value in self._fixed.items()
            if value.is_floating_point() and value.dtype != self.dtype
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the weights: they come in through ``theta``."""
        light = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in self.model.parameters() if p.requires_grad
        }
        return TokenLoss, (deepcopy(self.model, light), self.loss)

    def __call__(self, theta: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` at parameters ``theta``, differentiable in ``theta``."""
        return self.at(self.unflatten(theta), batch)

    def at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` for named parameters."""
        state = {f"model.{name}": value for name, value in parameters.items()} | self._cast
        with _differentiable():
            return torch.func.functional_call(self._module, state, (batch,))

    def in_float64(self) -> TokenLoss:
        """The same function, computed in float64 for parameters and examples in float64."""
        precise = object.__new__(type(self))  # copy() would pickle the model
        vars(precise).update(vars(self), dtype=torch.float64)
        fixed = {f"model.{name}": value for name, value in self._fixed.items()}
        precise._cast = {name: value.double() for name, value in fixed.items() if value.is_floating_point()}
        return precise

    def check(self, theta: Float[Tensor, " d"], batch: Batch) -> None:
        """Check that the loss depends on the parameters alone, token by token.

        Args:
            theta: parameters, shape (d,).
            batch: examples; at most three are used.

        Raises:
            ValueError: the losses are not one number per token, change from call to call, or depend on the rest of the
                batch; or the model has no derivatives in forward mode. The message says what to do.
        """
        few = next(split_examples(batch, 3))
        with torch.no_grad():
            together, again = self(theta, few), self(theta, few)
            if together.ndim != 1 or not together.is_floating_point() or together.numel() % n_examples(few):
                raise ValueError(
                    f"the loss of {n_examples(few)} examples has shape {tuple(together.shape)} and dtype "
                    f"{together.dtype}; allowed: one floating-point number for each target token, example by example, "
                    'as many for each: reduction="none", then flatten()'
                )
            if not torch.equal(together, again) and not torch.isnan(together).any():
                raise ValueError(
                    f"two calls of the loss differ, by {(together - again).abs().max():.2g} nats at most: something is "
                    "drawn at random, such as dropout; call model.eval(), and switch off what draws elsewhere"
                )
            alone = torch.cat([self(theta, example) for example in split_examples(few, 1)])
            if alone.shape != together.shape or not torch.allclose(alone, together, 1e-3, 1e-4, equal_nan=True):
                raise ValueError(
                    "the loss of an example alone differs from its loss in a batch: it depends on the other examples "
                    "(normalisation over the batch, or a mean over it?), and can't be taken apart"
                )
        example, tangent = next(split_examples(few, 1)), torch.ones_like(theta)
        try:
            torch.func.jvp(lambda point: self(point, example), (theta,), (tangent,))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"the model has no derivatives in forward mode ({error}); write the part that lacks them with plain "
                "operations of torch, or give its autograd.Function a jvp"
            ) from error

    def flatten(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " d"]:
        """Named parameters as one vector, in the order of ``model.named_parameters()``.

        Args:
            parameters: all trainable parameters. Other names of tied parameters, frozen parameters and buffers may be
                there, as in a ``state_dict``; they must equal the model's.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape; tied parameters differ; or a frozen
                parameter or a buffer differs from the model's.
        """
        values: dict[str, Tensor] = {}
        unknown = []
        for name, value in parameters.items():
            first_name = self._tied.get(name, name)
            if first_name not in self.parameters and first_name not in self._fixed:
                unknown.append(name)
                continue
            expected = self.parameters.get(first_name, self._fixed.get(first_name))
            if value.shape != expected.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(value.shape)}; the model's is {tuple(expected.shape)}"
                )
            if first_name in self._fixed:
                self._check_fixed(name, value, expected)
            elif first_name in values and not torch.equal(values[first_name], value):
                raise ValueError(
                    f"parameters {first_name!r} and {name!r} are tied in the model, but differ in the checkpoint"
                )
            else:
                values[first_name] = value
        if odd := sorted(unknown + [name for name in self.parameters if name not in values]):
            raise ValueError(f"parameters {odd[:3]} are in the checkpoint or in the model, but not in both")
        return torch.cat([values[name].reshape(-1).to(self.dtype) for name in self.parameters])

    @staticmethod
    def _check_fixed(name: str, value: Tensor, expected: Tensor) -> None:
        """Refuse frozen parameters and buffers that differ from the model's; integer counters may differ."""
        if value.is_floating_point() and not torch.equal(value.to(expected), expected):
            raise ValueError(
                f"{name!r} is frozen, or a buffer, but differs from the model's own. POLCA explains changes of "
                "trainable parameters alone: set requires_grad, load this checkpoint into the model first, or train "
                "without running statistics"
            )

    def unflatten(self, theta: Float[Tensor, "*vector d"]) -> dict[str, Float[Tensor, "*vector ..."]]:
        """Views of ``theta``, or of vectors in rows, by parameter name."""
        pieces = theta.split(self._sizes, dim=-1)
        return {
            name: piece.reshape((*piece.shape[:-1], *p.shape))
            for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }


def _refuse_what_is_no_function(model: nn.Module) -> None:
    """Raise a ValueError for modules that drop out, mix examples, or change weights in the forward pass."""
    for name, module in model.named_modules():
        rate = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            rate = module.dropout
        if module.training and rate > 0:
            raise ValueError(
                f"module {name!r} drops out with p = {rate}: a loss that changes from call to call "
                "has no Hessian; call model.eval() first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"module {name!r} normalises over the batch: the loss of an example depends on the others; call "
                "model.eval() first, and keep running statistics"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ValueError(f"module {name!r} has max_norm = {module.max_norm}, which changes weights as it goes")


def n_examples(batch: Batch) -> int:
    """Number of examples in ``batch``."""
    return len(pytree.tree_leaves(batch)[0])


def split_examples(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive parts of ``batch`` with ``size`` examples each; the last may be shorter."""
    for start in range(0, n_examples(batch), size):
        yield pytree.tree_map(lambda t: t[start : start + size], batch)  # noqa: B023


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch with all its tensors on ``device``."""
    return pytree.tree_map(lambda tensor: tensor.to(device), batch)
