"""``token_loss(theta, batch) -> Tensor[n_tokens]``: the one function that everything is a derivative of."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polca_lib.derivatives.batches import (
    Batch,
    Shared,
    as_batch,
    losses_by_example,
    n_examples,
    split_examples,
    to_device,
    token_name,
    unshared,
)
from polca_lib.derivatives.composed import differentiable
from polca_lib.derivatives.travel import PicklerWithoutWeights

__all__ = ["Batch", "Loss", "MaskedLoss", "Shared", "Subject", "TokenLoss", "n_examples", "split_examples", "to_device"]

# (model, batch) -> the loss of each target token, (n_tokens,), example by example, in nats
Loss = Callable[[nn.Module, Batch], Tensor]

_ZEROS = 0.01  # share of losses that are exactly zero from which on a mask is missed


def lacks_derivatives(error: Exception, order: int = 1, mode: str = "forward") -> str:
    """Say that derivatives are missing, and what to do."""
    return (
        f"the model or the loss has no derivatives of order {order} in {mode} mode ({error}); write the part that "
        "lacks them with elementary operations of torch, give its autograd.Function derivatives, or load the model "
        'with plain operations (transformers: attn_implementation="eager", experts_implementation="eager")'
    )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Take back what modules note in a pass, such as tables in another dtype."""
    attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in attributes:
            now.clear()
            now.update(before)


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
        loss: ``(model, batch) -> losses (n_tokens,)``, example-major, in nats; see :class:`TokenLoss`.
        validation: examples whose tokens are decomposed, see :func:`polca_lib.derivatives.batches.as_batch`.
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


@dataclass(frozen=True)
class MaskedLoss:
    """L(x) of the targets x that ``mask`` keeps, so that padding is not a token.

    For a loss that is 0 at padding (``ignore_index``): ``MaskedLoss(loss, lambda batch: batch["labels"] != -100)``
    (``[:, 1:]`` of the labels where the loss shifts them).

    Args:
        loss: as of :class:`TokenLoss`, of all targets.
        mask: ``batch -> bool``, True for each target that counts, as many in all as ``loss`` has losses.
    """

    loss: Loss
    mask: Callable[[Batch], Bool[Tensor, ...]]

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, " tokens"]:
        """Losses of the targets that count."""
        losses, keep = self.loss(model, batch), self.mask(batch).flatten()
        if keep.shape != losses.shape or keep.dtype != torch.bool:
            raise ValueError(
                f"mask gives {tuple(keep.shape)} of {keep.dtype} for losses of shape {tuple(losses.shape)}; allowed: "
                "one bool for each loss, in the same order (of labels shifted as in the loss)"
            )
        return losses[keep]


class TokenLoss:
    """L(x; theta): the loss of every target token x as a function of the flat vector of trainable parameters.

    Frozen parameters (``requires_grad`` is off) and buffers keep the model's values. Tied parameters count once. The
    loss is computed in the widest dtype of the parameters, at least float32.

    Args:
        model: any module without active dropout. It is never changed: parameters come in through ``theta``.
        loss: ``(model, batch) -> losses (n_tokens,)``, example-major, in nats. Examples may have different numbers of
            losses, also none.

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
        PicklerWithoutWeights(content, self._trainable).dump((self.model, self.loss))
        return _from_pickle, (content.getvalue(),)

    def __call__(self, theta: Float[Tensor, " d"], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` at parameters ``theta``, differentiable in ``theta``."""
        return self.at(self.unflatten(theta), batch)

    def at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Float[Tensor, " tokens"]:
        """Loss of each target token of ``batch`` for named parameters."""
        state = {f"model.{name}": value for name, value in parameters.items()} | self._cast
        with differentiable():
            return torch.func.functional_call(self._module, state, (unshared(batch),))

    def in_float64(self) -> TokenLoss:
        """The same function, computed in float64 for parameters and examples in float64."""
        precise = object.__new__(type(self))  # copy() would pickle the model
        vars(precise).update(vars(self), dtype=torch.float64)
        fixed = {f"model.{name}": value for name, value in self._fixed.items()}
        precise._cast = {name: value.double() for name, value in fixed.items() if value.is_floating_point()}
        return precise

    def check(
        self, theta: Float[Tensor, " d"], batch: Batch, name: str = "batch", texts: Sequence[object] = ()
    ) -> Int[np.ndarray, " example"]:
        """Check that the loss depends on the parameters alone, token by token, and is finite.

        Args:
            theta: parameters, shape (d,).
            batch: examples; the losses of all are counted, at most three are used for the rest.
            name: of the batch in messages.
            texts: of the tokens, for messages.

        Returns:
            Number of losses of each example.

        Raises:
            ValueError: the losses are not one number per token, are not finite, change from call to call, or depend on
                the rest of the batch; or the model has no derivatives in forward mode. The message says what to do.
        """
        counts = self.check_data(theta, batch, name, texts)
        few = next(split_examples(as_batch(batch, name), 3))
        self._check_parameters_are_used(theta, few)
        example, tangent = next(split_examples(few, 1)), torch.ones_like(theta)
        try:
            torch.func.jvp(lambda point: self(point, example), (theta,), (tangent,))
        except RuntimeError as error:
            raise ValueError(lacks_derivatives(error)) from error
        return counts

    @torch.no_grad()
    def check_data(
        self, theta: Float[Tensor, " d"], batch: Batch, name: str = "batch", texts: Sequence[object] = ()
    ) -> Int[np.ndarray, " example"]:
        """The part of :meth:`check` that needs no derivatives."""
        batch = as_batch(batch, name)
        few = next(split_examples(batch, 3))
        together, again = self(theta, few), self(theta, few)
        if together.ndim != 1 or not together.is_floating_point():
            raise ValueError(
                f"the loss of {n_examples(few)} examples of {name} has shape {tuple(together.shape)} and dtype "
                f"{together.dtype}; allowed: one floating-point number for each target token, example by example: "
                'reduction="none", then flatten()'
            )
        if not torch.equal(together, again) and not torch.isnan(together).any():
            raise ValueError(
                f"two calls of the loss differ, by {(together - again).abs().max():.2g} nats at most: something is "
                "drawn at random, such as dropout; call model.eval(), and switch off what draws elsewhere"
            )
        alone = torch.cat([self(theta, example).reshape(-1) for example in split_examples(few, 1)])
        if alone.shape != together.shape or not torch.allclose(alone, together, 1e-3, 1e-4, equal_nan=True):
            raise ValueError(
                f"the loss of an example of {name} alone differs from its loss in a batch: it depends on the other "
                "examples (normalisation over the batch, or a mean over it?), and can't be taken apart"
            )
        losses, counts = losses_by_example(lambda part: self(theta, part), batch)
        if not len(losses):
            raise ValueError(f"{name} has no loss in {len(counts)} examples; allowed: at least one target token")
        if len(odd := (~losses.isfinite()).nonzero()[:, 0].tolist()):
            what = f"{losses[odd[0]].item()} for {token_name(odd[0], counts, texts)} of {name}"
            cause = "these data (a row that is masked as a whole, or a target out of range?); mend or leave them out"
            if len(odd) == len(losses):
                cause = "the model or its first checkpoint, as no loss is finite"
            raise ValueError(
                f"the loss is {what}, and not finite for {len(odd):,} of {len(losses):,} tokens, at the first "
                f"checkpoint already; check {cause}"
            )
        if (share := (losses == 0).double().mean().item()) >= _ZEROS:
            warnings.warn(
                f"{share:.0%} of the losses of {name} are exactly 0.0, as where targets are padding (ignore_index): "
                "each counts as a token; leave them out with polca_lib.MaskedLoss(loss, mask)",
                stacklevel=2,
            )
        return counts

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

    @property
    def names(self) -> dict[str, str]:
        """Each name of a parameter or buffer, with the first name of its tensor. Tied parameters have several names."""
        return self._tied | {name: name for name in self._fixed}

    def flatten(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, " d"]:
        """Named parameters as one vector, in the order of ``model.named_parameters()``.

        Args:
            parameters: all trainable parameters. Other names of tied parameters, frozen parameters and buffers may be
                there, as in a ``state_dict``; they must equal the model's. On device ``meta``, names and shapes alone
                are checked.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape or kind; tied parameters differ; or a frozen
                parameter or a buffer differs from the model's.
        """
        values: dict[str, Tensor] = {}
        first_names = self.names
        for name, value in parameters.items():
            if (first_name := first_names.get(name)) is None:
                continue
            expected = self.parameters.get(first_name, self._fixed.get(first_name))
            if value.shape != expected.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(value.shape)}; the model's is {tuple(expected.shape)}"
                )
            if first_name in self._fixed:
                self._check_fixed(name, value, expected)
            elif not value.is_floating_point():
                raise ValueError(f"parameter {name!r} holds {value.dtype}; allowed: floating-point numbers")
            elif first_name in values and not value.is_meta and not torch.equal(values[first_name], value):
                raise ValueError(
                    f"parameters {first_name!r} and {name!r} are tied in the model, but differ in the checkpoint"
                )
            else:
                values[first_name] = value
        unknown = [name for name in parameters if name not in first_names]
        if (missing := [name for name in self.parameters if name not in values]) or unknown:
            raise ValueError(describe_names(missing, unknown))
        return torch.cat([values[name].reshape(-1).to(self.dtype) for name in self.parameters])

    @staticmethod
    def _check_fixed(name: str, value: Tensor, expected: Tensor) -> None:
        """Refuse frozen parameters and buffers that differ from the model's; integer counters may differ."""
        if value.is_meta or (value.ndim == 0 and not value.is_floating_point()):
            return
        if expected.is_meta:
            raise ValueError(f"{name!r} is frozen, but the model has no values for it; load them into the model first")
        # The checkpoint may round what the model has, or the model what the checkpoint has. NaN equals NaN.
        value = value.to(expected.device)
        for dtype in (value.dtype, expected.dtype):
            first, second = value.to(dtype), expected.to(dtype)
            if ((first == second) | ((first != first) & (second != second))).all():
                return
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


def describe_names(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Say which side lacks which names, those with a similar name on the other side first, and what to do."""

    def side(text: str, names: Sequence[str], others: Sequence[str]) -> str:
        nearest = {name: get_close_matches(name, others[:500], n=1) for name in names[:100]}
        shown = sorted(nearest, key=lambda name: not nearest[name])[:3]
        told = [repr(name) + "".join(f" (nearest: {near!r})" for near in nearest[name]) for name in shown]
        return f"{text} {', '.join(told)}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    told = [side("the checkpoint lacks", missing, unknown)] if missing else []
    told += [side("the model lacks", unknown, missing)] if unknown else []
    if any("parametrizations." in name for name in (*missing, *unknown)):
        told.append("one side has parametrized weights: apply the same parametrization to the model")
    if any("_flat_param" in name for name in unknown):
        told.append("the checkpoint holds FSDP's flat parameters: save a full state_dict")
    return (
        "; ".join(told) + ". Build the model that was trained, or set rename, which maps regular expressions to names"
    )
