"""How a model and its loss travel to a worker: in one pickle, without the weights."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class PicklerWithoutWeights(cloudpickle.Pickler):
    """Pickles the trainable parameters of a model as shapes alone, from wherever they are reached."""

    def __init__(self, file: io.BytesIO, trainable: Sequence[nn.Parameter]):
        super().__init__(file)
        self._trainable = {id(p) for p in trainable}

    def reducer_override(self, value: Any) -> Any:
        """How ``value`` is pickled: parameters as shapes, parametrized modules by the class that torch began with."""
        if id(value) in self._trainable:
            return _empty_parameter, (tuple(value.shape), value.dtype)
        if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
            return type(None), ()  # an activation that a module noted in a pass that is over
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
