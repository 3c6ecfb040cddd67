"""``token_loss(theta, batch) -> Tensor[n_tokens]``: the one function that everything is a derivative of."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import cloudpickle
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Batch = Any
"""A tensor, or a nest of tensors, whose first dimension is the example."""

# (model, batch) -> the loss of each target token, (n_tokens,), example by example, in nats
Loss = Callable[[nn.Module, Batch], Tensor]


class _Composed(TorchFunctionMode):
    """Composes some functions from elementary operations, so that forward mode has their second derivatives.

    Those of torch's layer norm are wrong (pytorch issue 196700); SiLU and Mish have none.
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
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    scaled = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    product = input * input.sigmoid()
    return input.copy_(product) if inplace else product


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    product = input * nn.functional.softplus(input).tanh()
    return input.copy_(product) if inplace else product


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


_COMPOSED = {
    nn.functional.embedding: _embedding,
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.silu: _silu,
    nn.functional.mish: _mish,
}


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

    @property
    def _trainable(self) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.parameters]

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Frozen parameters, and buffers that a ``state_dict`` has: what the loss depends on beside ``theta``."""
        names = self.model.state_dict().keys()
        return {name: value for name, value in self._fixed.items() if name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the weights: they come in through ``theta``.

        Model and loss are pickled in one pass, so that closures, hooks and the loss reach the model that travels.
        """
        content = io.BytesIO()
        _WithoutWeights(content, self._trainable).dump((self.model, self.loss))
        return _from_pickle, (content.getvalue(),)

    def __call__(self, theta: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` at parameters ``theta``, differentiable in ``theta``."""
        return self.at(self.unflatten(theta), batch)

    def at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` for named parameters."""
        state = {f"model.{name}": value for name, value in parameters.items()} | self._cast
        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), _Composed():
            return torch.func.functional_call(self._module, state, (batch,))

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
        self._check_parameters_are_used(theta, few)
        example, tangent = next(split_examples(few, 1)), torch.ones_like(theta)
        try:
            torch.func.jvp(lambda point: self(point, example), (theta,), (tangent,))
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"the model has no derivatives in forward mode ({error}); write the part that lacks them with plain "
                "operations of torch, or give its autograd.Function a jvp"
            ) from error

    @torch.no_grad()
    def _check_parameters_are_used(self, theta: Float[Tensor, " d"], batch: Batch) -> None:
        """Compare with the losses of the model when it really holds other weights, which are taken back at once."""
        trainable = self._trainable
        if any(p.is_meta for p in trainable):  # a model without weights has none to hold on to
            return
        # Move all weights: at theta itself, a weight that is held on to may have the right value by chance.
        point = theta + (0.1 * theta.square().mean().sqrt() + 0.01) * direction(theta)
        given, before = self(point, batch), [(p.data, p.data.to("cpu", copy=True)) for p in trainable]
        try:
            for p, value in zip(trainable, self.unflatten(point).values(), strict=True):
                if (p.dtype, p.device) == (value.dtype, value.device):
                    p.data.copy_(value)  # in place, for those that share memory with it
                else:
                    p.data = value
            held = self.at({}, batch)
        finally:
            for p, (data, values) in zip(trainable, before, strict=True):
                p.data = data
                p.data.copy_(values)
        if given.shape != held.shape or not torch.allclose(given, held, 1e-3, 1e-4, equal_nan=True):
            raise ValueError(
                f"the loss does not follow the parameters it is given: it is {given.sum():.4g} in all for parameters "
                f"that are passed in, and {held.sum():.4g} if the model holds them. A function or an attribute keeps "
                "a weight (w = self.layer.weight, or its .data); reach it through its module at each call "
                "(self.layer.weight), so that it can be replaced"
            )

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


class _WithoutWeights(cloudpickle.Pickler):
    """Pickles the trainable parameters of a model as shapes alone, from wherever they are reached."""

    def __init__(self, file: io.BytesIO, trainable: Sequence[nn.Parameter]):
        super().__init__(file)
        self._trainable = {id(p) for p in trainable}

    def reducer_override(self, value: Any) -> Any:
        if id(value) in self._trainable:
            return _empty_parameter, (tuple(value.shape), value.dtype)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):  # torch refuses to pickle its class
            return _parametrized, (type(value).__base__, list(value.parametrizations)), value.__dict__
        return super().reducer_override(value)


def _empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _parametrized(base: type[nn.Module], names: Sequence[str]) -> nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _from_pickle(content: bytes) -> TokenLoss:
    return TokenLoss(*pickle.loads(content))


def direction(theta: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """A fixed direction in which each parameter changes, whatever its value."""
    return torch.linspace(-1, 1, 102, dtype=theta.dtype).to(theta.device).repeat(len(theta) // 102 + 1)[: len(theta)]


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
