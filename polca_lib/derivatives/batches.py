"""Batches: what a user hands over, made a nest of tensors whose first dimension is the example, and how it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

Batch = Any
"""A tensor, or a nest of tensors, whose first dimension is the example; see :func:`as_batch`."""

_CONSTANTS = (str, bytes, bool, int, float, complex, type(None))
_EXAMPLES, _NUMBERS = 4, 2048  # in one pass when losses are counted: at least so many examples, numbers of a tensor


class Shared(NamedTuple):
    """A tensor of a batch that all examples share, such as position_ids of shape (1, T). The loss gets ``value``."""

    value: Any


def _is_shared(value: object) -> bool:
    return isinstance(value, Shared)


def as_batch(data: Any, name: str = "batch") -> Batch:
    """Convert data to a batch, and check that all tensors have as many examples.

    Dict-likes (such as ``BatchEncoding``) become dicts; NumPy arrays and lists of equally long lists of numbers become
    tensors; the batches of a ``DataLoader`` are joined. All examples share numbers, text, None and :class:`Shared`.

    Args:
        data: a tensor, or a nest of dicts, lists and tuples of tensors whose first dimension is the example.
        name: of the data in messages.

    Raises:
        ValueError: there is no example, first dimensions differ, or something can't be converted.
    """
    if isinstance(data, DataLoader):
        data = _joined(data, name)
    if isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) for row in data):
        raise ValueError(f"{name} is a list of {len(data)} dicts; allowed: one dict of tensors, as a collator gives it")
    batch = _converted(data, name)
    if not n_examples(batch, name):
        raise ValueError(f"{name} has no example; allowed: 1 or more")
    return batch


def _converted(data: Any, name: str) -> Batch:
    """The data with all leaves converted: to tensors, constants or :class:`Shared`."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return Shared(torch.as_tensor(leaf.value) if isinstance(leaf.value, np.ndarray) else leaf.value)
        if isinstance(leaf, Mapping):
            return _converted(dict(leaf), name)
        if isinstance(leaf, list):
            try:
                leaf = torch.tensor(leaf)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{name} holds lists of numbers that are no tensor ({error}); pad them to one length, and leave "
                    "padding out with MaskedLoss"
                ) from None
        if isinstance(leaf, np.generic):
            return leaf.item()
        if isinstance(leaf, np.ndarray):
            # torch computes with signed integers, and embeds no others; text files of tokens are often uint16.
            leaf = leaf.astype(np.int64) if leaf.dtype.kind == "u" and leaf.dtype.itemsize > 1 else leaf
            # Text stays text. torch has native byte order alone, and no read-only memory.
            leaf = torch.tensor(leaf.astype(leaf.dtype.newbyteorder("="))) if leaf.dtype.kind in "biufc" else leaf
            leaf = leaf.tolist() if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "SU" else leaf
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
            return leaf if leaf.ndim else Shared(leaf)
        if isinstance(leaf, (*_CONSTANTS, list)):
            return leaf
        kind = type(leaf)
        what = f"a tensor of layout {leaf.layout}" if isinstance(leaf, Tensor) else f"{kind.__module__}.{kind.__name__}"
        raise ValueError(
            f"{name} holds {what}; allowed: dense tensors, NumPy arrays of numbers, dicts, lists and tuples of them, a "
            "DataLoader; and numbers, text and None, which all examples share"
        )

    def is_leaf(value: object) -> bool:
        numbers = pytree.tree_leaves(value) if isinstance(value, list) else ()
        kinds = (bool, int, float, np.generic)
        return _is_shared(value) or (bool(numbers) and all(isinstance(number, kinds) for number in numbers))

    return pytree.tree_map(convert, data, is_leaf=is_leaf)


def _joined(loader: DataLoader, name: str) -> Batch:
    """The batches of a loader as one."""

    def join(first: Any, *others: Any) -> Any:
        if isinstance(first, Tensor):
            return torch.cat([first, *others])
        if any(repr(leaf) != repr(first) for leaf in others):
            raise ValueError(f"{first!r} is not the same in all")
        return first

    def read() -> Batch:
        return pytree.tree_map(join, *[_converted(part, name) for part in loader] or [()], is_leaf=_is_shared)

    try:
        batch, again = map(pytree.tree_leaves, (read(), joined := read()))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} is a DataLoader whose batches can't be joined ({error}); pad all to one length, leave out text, "
            "and hand over one batch"
        ) from error
    if not all(torch.equal(*pair) for pair in zip(batch, again, strict=True) if isinstance(pair[0], Tensor)):
        raise ValueError(
            f"{name} is a DataLoader that gives other examples each time; switch off shuffle, or random crops"
        )
    return joined


def n_examples(batch: Batch, name: str = "batch") -> int:
    """Number of examples in ``batch``.

    Raises:
        ValueError: there is no tensor, or first dimensions differ.
    """
    leaves = pytree.tree_leaves(batch, is_leaf=_is_shared)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    if len(sizes) == 1:
        return sizes.pop()
    if not sizes:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise ValueError(f"{name} holds no tensor, only {kinds}; allowed: tensors whose first dimension is the example")
    named, _ = pytree.tree_flatten_with_path(batch, is_leaf=_is_shared)
    told = [f"{name}{pytree.keystr(path)} has {len(leaf)}" for path, leaf in named if isinstance(leaf, Tensor)]
    raise ValueError(
        f"tensors of {name} differ in their first dimension, the example: {', '.join(told[:6])}. Wrap what all "
        "examples share, as polca_lib.Shared(position_ids), or repeat it; pad sequences, and put them into one tensor"
    )


def map_examples(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The batch with ``function`` of each tensor that has examples; what examples share stays."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch, is_leaf=_is_shared)


def split_examples(batch: Batch, size: int) -> Iterator[Batch]:
    """Consecutive parts of ``batch`` with ``size`` examples each; the last may be shorter."""
    for start in range(0, n_examples(batch), size):
        yield map_examples(lambda t: t[start : start + size], batch)  # noqa: B023


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch with all its tensors on ``device``."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def unshared(batch: Batch) -> Batch:
    """The batch as the loss gets it: :class:`Shared` tensors without their wrapper."""
    return pytree.tree_map(lambda leaf: leaf.value if _is_shared(leaf) else leaf, batch, is_leaf=_is_shared)


def by_example(function: Callable[..., Any], batch: Batch, *others: Any) -> Any:
    """``function(*rows of others, batch of one example)`` for all examples at once, by ``vmap``.

    Raises:
        Exception: of torch, if shapes depend on the numbers in the batch, as those of ragged losses do.
    """
    dims = pytree.tree_map(
        lambda leaf: 0 if isinstance(leaf, Tensor) else Shared(None) if _is_shared(leaf) else None,
        batch,
        is_leaf=_is_shared,
    )

    def alone(example: Batch, *rows: Any) -> Any:
        return function(*rows, map_examples(lambda t: t[None], example))

    return vmap(alone, in_dims=(dims, *(0 for _ in others)))(batch, *others)


def _pass_size(batch: Batch) -> int:
    """Number of examples in one pass: as many as have few numbers, so that small ones take few passes."""
    leaves = pytree.tree_leaves(batch, is_leaf=_is_shared)
    largest = max(leaf[:1].numel() for leaf in leaves if isinstance(leaf, Tensor))
    return max(_EXAMPLES, _NUMBERS // max(1, largest))


@torch.no_grad()
def count_losses(loss: Callable[[Batch], Tensor], batch: Batch) -> tuple[Int[np.ndarray, " example"], bool]:
    """Number of losses of each example, and whether ``vmap`` can take any of them together.

    Under ``vmap``, torch refuses examples with different numbers of losses. They are then run one by one.
    """
    counts: list[int] = []
    try:
        for part in split_examples(batch, _pass_size(batch)):
            counts += [by_example(loss, part).shape[1]] * n_examples(part)
        return np.array(counts), len(set(counts)) == 1
    except Exception:  # of whatever a loss does
        return np.array([len(loss(example)) for example in split_examples(batch, 1)]), False


@torch.no_grad()
def losses_by_example(
    loss: Callable[[Batch], Tensor], batch: Batch, counts: Int[np.ndarray, " example"] | None = None
) -> tuple[Float[Tensor, " token"], Int[np.ndarray, " example"]]:
    """Losses of all tokens, and how many each example has.

    Args:
        counts: how many each example has; counted if not given.

    Raises:
        ValueError: examples have another number of losses together than alone.
    """
    counts = count_losses(loss, batch)[0] if counts is None else counts
    size, losses = _pass_size(batch), []
    for start, part in zip(range(0, len(counts), size), split_examples(batch, size), strict=True):
        losses.append(loss(part))
        alone = counts[start : start + size]
        if len(losses[-1]) != alone.sum():
            raise ValueError(
                f"examples {start} to {start + len(alone) - 1} have {len(losses[-1])} losses together, but "
                f"{alone.sum()} one by one: the number depends on the other examples, and they can't be taken apart"
            )
    return torch.cat(losses), counts


def token_name(index: int, counts: Int[np.ndarray, " example"], texts: Sequence[object] = ()) -> str:
    """Name a token for messages, such as "example 5, position 3 ('the')"."""
    starts = np.cumsum(counts) - counts
    example = int(np.searchsorted(starts + counts, index, side="right"))
    text = f" ({texts[index]!r})" if len(texts) == counts.sum() else ""
    return f"example {example}, position {index - int(starts[example])}{text}"
