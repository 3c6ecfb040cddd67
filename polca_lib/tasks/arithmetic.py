"""Three-digit addition: ``a + b = s``, most significant digit first (PAPER section 4.1, Figure 2).

An example has 12 tokens, ``a2 a1 a0 + b2 b1 b0 = s3 s2 s1 s0``. The model is trained on the four answer tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polca_lib.tasks.settings import RunSettings

PLUS, EQUALS = 10, 11
N_ANSWER = 4
PLACES = ("1000s", "100s", "10s", "1s")
SKILLS = (*(f"{place}, {carry}" for place in PLACES[:-1] for carry in ("carry", "no carry")), "1s")


class Samples(NamedTuple):
    """Operand pairs of the three samples of a run."""

    validation: Int[np.ndarray, "validation 2"]
    hessian: Int[np.ndarray, "hessian 2"]
    train: Int[np.ndarray, "train 2"]


def sample_pairs(seed: int, validation: int, hessian: int, train: int) -> Samples:
    """Draw operand pairs (a, b) for the three samples, with a and b uniform on 0...999.

    Each sample has its own random stream, so its size does not change the other samples. Pairs are drawn with
    replacement, so validation and training may share some (see :func:`count_shared`).

    Args:
        validation, hessian, train: numbers of examples.
    """
    sizes = (validation, hessian, train)
    return Samples(*(np.random.default_rng([seed, i]).integers(0, 1000, size=(n, 2)) for i, n in enumerate(sizes)))


def count_shared(pairs: Int[np.ndarray, "n 2"], others: Int[np.ndarray, "m 2"]) -> int:
    """Number of ``pairs`` that also occur in ``others``, with the operands in the same order."""
    return int(np.isin(pairs @ [1000, 1], others @ [1000, 1]).sum())


def encode(pairs: Int[np.ndarray, "n 2"]) -> Int[Tensor, "n 12"]:
    """Token ids of each example. A digit is its own id, plus is 10, equals is 11."""
    a, b = pairs.T
    plus, equals = np.full_like(a, PLUS), np.full_like(a, EQUALS)
    return torch.from_numpy(np.column_stack([_digits(a, 3), plus, _digits(b, 3), equals, _digits(a + b, 4)]))


def answer_loss(model: nn.Module, tokens: Int[Tensor, "n 12"]) -> Float[Tensor, " n*4"]:
    """Cross-entropy of each answer token given all tokens before it, in nats, example by example."""
    # The last token predicts nothing, so the model does not read it.
    logits = model(tokens[:, :-1])[:, -N_ANSWER:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -N_ANSWER:].flatten(), reduction="none")


def digit_loss(model: nn.Module, tokens: Int[Tensor, "n 12"]) -> Float[Tensor, " n*9"]:
    """Cross-entropy of each digit after the first, operands included, in nats, example by example."""
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    # The model has no outputs for plus and equals, targets 2 and 6.
    digits = [position for position in range(targets.shape[1]) if position not in (2, 6)]
    return nn.functional.cross_entropy(logits[:, digits].flatten(0, 1), targets[:, digits].flatten(), reduction="none")


def token_table(pairs: Int[np.ndarray, "n 2"]) -> pd.DataFrame:
    """One row per answer token, in the order of :func:`answer_loss`.

    Returns:
        Columns ``example``, ``position`` (index in the 12 tokens), ``place``, ``digit`` (the target), ``carry`` (the
        lower places carry into this place), ``skill`` and ``text``.
    """
    a, b = pairs.T
    # A place receives a carry if the operands' lower digits add up to at least its value. The 1s have no lower digits.
    carry = np.column_stack([a % value + b % value >= value for value in (1000, 100, 10, 1)])
    table = pd.DataFrame(
        {
            "example": np.repeat(np.arange(len(a)), N_ANSWER),
            "position": np.tile(np.arange(8, 12), len(a)),
            "place": np.tile(PLACES, len(a)),
            "digit": _digits(a + b, 4).ravel(),
            "carry": carry.ravel(),
        }
    )
    suffix = np.where(table["place"] == "1s", "", np.where(table["carry"], ", carry", ", no carry"))
    table["skill"] = table["place"] + suffix
    table["text"] = np.repeat([f"{x}+{y}={x + y:04d}" for x, y in pairs], N_ANSWER)
    return table


def _digits(numbers: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, "n count"]:
    """The last ``count`` decimal digits of each number, most significant first."""
    return numbers[:, None] // 10 ** np.arange(count)[::-1] % 10


class Addition:
    """The task ``addition`` (see :class:`polca_lib.tasks.task.Task`)."""

    groups = PLACES
    loss, loss_of_all = staticmethod(answer_loss), staticmethod(digit_loss)
    identity: dict[str, str] = {}  # noqa: RUF012  (the settings determine the data)

    def __init__(self, settings: RunSettings):
        self._settings = settings

    @cached_property
    def samples(self) -> Samples:
        """Operand pairs for validation, for the Hessian, and for training."""
        data, training = self._settings.data, self._settings.training
        sizes = data.validation_examples, data.hessian_examples, training.steps * training.batch_size
        return sample_pairs(self._settings.seed, *sizes)

    @property
    def validation(self) -> Int[Tensor, "n 12"]:
        """Sums whose answer tokens are decomposed."""
        return encode(self.samples.validation)

    @property
    def hessian(self) -> Int[Tensor, "n 12"]:
        """Sums whose mean loss gives the Hessian."""
        return encode(self.samples.hessian)

    @property
    def tokens(self) -> pd.DataFrame:
        """See :func:`token_table`."""
        return token_table(self.samples.validation)

    def batch(self, step: int) -> Int[Tensor, "batch 12"]:
        """Sums of update ``step``. Each training pair is used once."""
        size = self._settings.training.batch_size
        return encode(self.samples.train[step * size : (step + 1) * size])
