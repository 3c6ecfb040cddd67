"""Three-digit addition: ``a + b = s``, most significant digit first (PAPER section 4.1, Figure 2).

An example is 12 tokens, ``a2 a1 a0 + b2 b1 b0 = s3 s2 s1 s0``. Only the four answer tokens carry loss.
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
SKILLS = (
    "1000s, carry", "1000s, no carry", "100s, carry", "100s, no carry",
    "10s, carry", "10s, no carry", "1s",
)  # fmt: skip


class Samples(NamedTuple):
    """Three samples of operand pairs, each from a random stream of its own, so that none is drawn from another."""

    validation: Int[np.ndarray, "validation 2"]
    hessian: Int[np.ndarray, "hessian 2"]
    train: Int[np.ndarray, "train 2"]


def sample_pairs(seed: int, validation: int, hessian: int, train: int) -> Samples:
    """Draw operand pairs (a, b), each uniform on 0...999, for the three samples.

    Each sample has a stream of its own, fixed by ``seed``, so that changing the size of one leaves the others as
    they are. Pairs are drawn with replacement from the 10^6 possible ones, so a validation sum may also occur in
    training: :func:`count_shared` says how many do. The Hessian sample follows the distribution of the training
    data; no update is made on it.

    Args:
        seed: of the streams.
        validation, hessian, train: numbers of examples.
    """
    sizes = (validation, hessian, train)
    return Samples(*(np.random.default_rng([seed, i]).integers(0, 1000, size=(n, 2)) for i, n in enumerate(sizes)))


class Addition:
    """The task of a run (see :class:`polca_lib.tasks.task.Task`)."""

    groups = PLACES
    identity: dict[str, str] = {}  # noqa: RUF012  (the settings say it all)

    def __init__(self, settings: RunSettings):
        self._seed, self._data, self._training = settings.seed, settings.data, settings.training

    @cached_property
    def samples(self) -> Samples:
        """Operand pairs for validation, for the Hessian, and for training."""
        data, training = self._data, self._training
        n_train = training.steps * training.batch_size
        return sample_pairs(self._seed, data.validation_examples, data.hessian_examples, n_train)

    @property
    def validation(self) -> Int[Tensor, "n 12"]:
        """Sums whose answer tokens are decomposed."""
        return encode(self.samples.validation)

    @property
    def hessian(self) -> Int[Tensor, "n 12"]:
        """Sums whose loss the Hessian is of."""
        return encode(self.samples.hessian)

    @property
    def tokens(self) -> pd.DataFrame:
        """See :func:`token_table`."""
        return token_table(self.samples.validation)

    def batch(self, step: int) -> Int[Tensor, "batch 12"]:
        """Sums of update ``step``; each is drawn for one update."""
        size = self._training.batch_size
        return encode(self.samples.train[step * size : (step + 1) * size])

    @staticmethod
    def loss(model: nn.Module, batch: Int[Tensor, "n 12"]) -> Float[Tensor, " n*4"]:
        """See :func:`answer_loss`."""
        return answer_loss(model, batch)

    @staticmethod
    def loss_of_all(model: nn.Module, batch: Int[Tensor, "n 12"]) -> Float[Tensor, " n*9"]:
        """See :func:`digit_loss`."""
        return digit_loss(model, batch)


def count_shared(pairs: Int[np.ndarray, "n 2"], others: Int[np.ndarray, "m 2"]) -> int:
    """Number of ``pairs`` that occur, in the same order of operands, among ``others``."""
    return int(np.isin(pairs @ [1000, 1], others @ [1000, 1]).sum())


def encode(pairs: Int[np.ndarray, "n 2"]) -> Int[Tensor, "n 12"]:
    """Token ids of each example: digits are themselves, plus is 10, equals is 11."""
    a, b = pairs[:, 0], pairs[:, 1]
    symbol = np.ones_like(a)
    columns = [*_digits(a, 3), PLUS * symbol, *_digits(b, 3), EQUALS * symbol, *_digits(a + b, 4)]
    return torch.from_numpy(np.stack(columns, axis=1))


def answer_loss(model: nn.Module, tokens: Int[Tensor, "n 12"]) -> Float[Tensor, " n*4"]:
    """Cross-entropy, in nats, of each answer token given all before it; example-major.

    The last token of an example predicts nothing, so it is not fed to the model.
    """
    logits = model(tokens[:, :-1])[:, -N_ANSWER:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -N_ANSWER:].flatten(), reduction="none")


def digit_loss(model: nn.Module, tokens: Int[Tensor, "n 12"]) -> Float[Tensor, " n*9"]:
    """Cross-entropy, in nats, of every digit that has tokens before it, operands too; example-major.

    The model has no output for plus and equals, so these are no targets. It is trained on :func:`answer_loss` alone.
    """
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    digits = [position for position in range(targets.shape[1]) if position not in (2, 6)]
    return nn.functional.cross_entropy(logits[:, digits].flatten(0, 1), targets[:, digits].flatten(), reduction="none")


def token_table(pairs: Int[np.ndarray, "n 2"]) -> pd.DataFrame:
    """One row per answer token, in the order of :func:`answer_loss`.

    Columns: ``example``, ``position`` (index in the 12 tokens), ``place``, ``digit`` (the target), ``carry``
    (a carry comes into this place from the lower ones; never in the 1s place), ``skill``, ``text``.
    """
    a, b = pairs[:, 0], pairs[:, 1]
    carry = np.stack([a % m + b % m >= m for m in (1000, 100, 10)] + [np.zeros(len(a), bool)], axis=1)
    table = pd.DataFrame(
        {
            "example": np.repeat(np.arange(len(a)), N_ANSWER),
            "position": np.tile(np.arange(8, 12), len(a)),
            "place": np.tile(PLACES, len(a)),
            "digit": np.stack(_digits(a + b, 4), axis=1).ravel(),
            "carry": carry.ravel(),
        }
    )
    suffix = np.where(table["place"] == "1s", "", np.where(table["carry"], ", carry", ", no carry"))
    table["skill"] = table["place"] + suffix
    table["text"] = np.repeat([f"{x}+{y}={x + y:04d}" for x, y in pairs], N_ANSWER)
    return table


def _digits(number: Int[np.ndarray, " n"], count: int) -> list[Int[np.ndarray, " n"]]:
    return [number // 10**place % 10 for place in reversed(range(count))]
