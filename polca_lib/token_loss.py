"""``token_loss(theta, batch) -> Tensor[n_tokens]``: the one function that everything is a derivative of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Batch = Any
"""A tensor, or a nest of tensors, whose first dimension is the example."""


class _Composed(TorchFunctionMode):
    """Some functions from elementary operations, for the sake of second derivatives in forward mode.

    Of torch's own, layer norm's are wrong (pytorch issue 196700), and SiLU and Mish have none.
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


_COMPOSED = {
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.silu: _silu,
    nn.functional.mish: _mish,
}


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


class TokenLoss:
    """The loss of every target token as a function of the flat parameter vector.

    Args:
        model: any module without active dropout. It is never changed: parameters come in through ``theta``.
        loss: ``(model, batch) -> losses (n_tokens,)``, example-major, in nats.

    Raises:
        ValueError: the model has dropout that is switched on, or parameters of several dtypes.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]):
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
                raise ValueError(
                    f"module {name!r} drops out with p = {module.p}: a loss that changes from call to call "
                    "has no Hessian; call model.eval() first"
                )
        self.model = model
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        dtypes = {p.dtype for p in self.parameters.values()}
        if len(dtypes) != 1:
            raise ValueError(f"parameters have dtypes {sorted(map(str, dtypes))}; allowed: one, such as float32")
        self.dtype = dtypes.pop()
        self.n_parameters = sum(p.numel() for p in self.parameters.values())
        self._sizes = [p.numel() for p in self.parameters.values()]
        self._module = _LossModule(model, loss)

    def __call__(self, theta: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` at parameters ``theta``, differentiable in ``theta``."""
        return self.at(self.unflatten(theta), batch)

    def at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " tokens"]:
        """The same, for parameters by name."""
        state = {f"model.{name}": value for name, value in parameters.items()}
        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), _Composed():
            return torch.func.functional_call(self._module, state, (batch,))

    def flatten(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " d"]:
        """Named parameters as one vector, in the order of ``model.named_parameters()``.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape.
        """
        if set(parameters) != set(self.parameters):
            odd = sorted(set(parameters) ^ set(self.parameters))
            raise ValueError(f"parameters {odd[:3]} are in the checkpoint or in the model, but not in both")
        for name, own in self.parameters.items():
            if parameters[name].shape != own.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(parameters[name].shape)}; the model's is {tuple(own.shape)}"
                )
        return torch.cat([parameters[name].reshape(-1) for name in self.parameters])

    def unflatten(self, theta: Float[Tensor, "*vector d"]) -> dict[str, Float[Tensor, "*vector ..."]]:
        """Views of ``theta``, or of vectors in rows, by parameter name."""
        pieces = theta.split(self._sizes, dim=-1)
        return {
            name: piece.reshape((*piece.shape[:-1], *p.shape))
            for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }


def n_examples(batch: Batch) -> int:
    """Number of examples in ``batch``."""
    return len(pytree.tree_leaves(batch)[0])


def split_examples(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive pieces of ``batch``, of ``size`` examples each (the last may be shorter)."""
    for start in range(0, n_examples(batch), size):
        yield pytree.tree_map(lambda t: t[start : start + size], batch)  # noqa: B023
