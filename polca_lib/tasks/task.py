"""What a run has to know of its data: the one interface that all tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import pandas as pd
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Batch


class Task(Protocol):
    """Samples, the loss of their target tokens, and what each decomposed token is."""

    groups: Sequence[str]
    """Names of the target tokens of an example, in order; empty if they have none."""

    @property
    def validation(self) -> Batch:
        """Examples whose tokens are decomposed; no update is made on them."""

    @property
    def hessian(self) -> Batch:
        """Fixed sample from the distribution of the training data, of whose mean loss the Hessian is."""

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per target token of ``validation``, in the order of :meth:`loss`."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What the data depend on beyond the settings of a run, such as the checksum of a corpus."""

    def batch(self, step: int) -> Batch:
        """The training batch of update ``step``, counted from 0; it depends on the step alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses of the target tokens, example-major, in nats."""

    def loss_of_all(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same of every token that could be a target, also those the model is not trained on."""
