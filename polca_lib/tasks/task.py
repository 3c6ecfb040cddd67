"""The interface that all tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import pandas as pd
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Batch


class Task(Protocol):
    """The data of a run: three samples of examples, the loss of their target tokens, and a table of these tokens."""

    groups: Sequence[str]
    """Names of the target tokens of an example, in order; empty if the tokens have no names."""
    validation: Batch
    """Examples whose tokens are decomposed. The model is not trained on them."""
    hessian: Batch
    """Fixed sample from the training distribution. The Hessian is that of its mean loss."""
    tokens: pd.DataFrame
    """One row per target token of ``validation``, in the order of :meth:`loss`."""
    identity: Mapping[str, str]
    """What the data depend on besides the settings of the run, for example the checksum of a corpus."""

    def batch(self, step: int) -> Batch:
        """Training batch of update ``step``, counted from 0. It must depend on ``step`` alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of the target tokens in nats, example by example."""

    def loss_of_all(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of all tokens that can be targets in nats, including those the model is not trained on."""
