"""A witness of a loss: its values and slopes on three examples, by which another loss is noticed.

Code has no hash that means anything: a loss may call any function and read any file. Its values have.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.token_loss import Batch, TokenLoss, direction, split_examples, to_device
from polca_lib.storage.artefacts import write_atomically

_EXAMPLES, _TOKENS = 3, 1000  # at most
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4  # tolerance: other devices, threads and dtypes round differently
_OF_LARGEST = 1e-2  # tolerance of slopes, which are sums of many terms, relative to the largest


class Witness(NamedTuple):
    """L(x; theta) and d/ds L(x; theta + s v) at s = 0 for a fixed v and tokens x of the first examples, in nats."""

    step: int
    losses: list[float]
    slopes: list[float]

    @classmethod
    def of(cls, token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, step: int) -> Witness:
        """The witness of a loss at the checkpoint ``theta`` of ``step``."""
        losses, slopes = [], []
        for example in islice(split_examples(batch, 1), _EXAMPLES):
            example = to_device(example, theta.device)
            try:
                pair = torch.func.jvp(lambda point: token_loss(point, example), (theta,), (direction(theta),))  # noqa: B023
            except (RuntimeError, NotImplementedError):  # TokenLoss.check says why
                with torch.no_grad():
                    pair = token_loss(theta, example), torch.empty(0)
            for values, part in zip((losses, slopes), pair, strict=True):
                values += [float(f"{value:.7g}") for value in part.detach().flatten().tolist()]
        return cls(step, losses[:_TOKENS], slopes[:_TOKENS])

    def difference(self, other: Witness) -> str | None:
        """The first large difference of ``other`` from this, in words, or nothing."""
        if len(other.losses) != len(self.losses):
            return f"{len(other.losses)} token losses, not {len(self.losses)}, for the first examples"
        for name, values, others in (("loss", self.losses, other.losses), ("slope", self.slopes, other.slopes)):
            if len(values) != len(others):  # slopes are missing on one side
                continue
            old, new = np.array(values), np.array(others)
            largest = np.nanmax(np.abs(old), initial=0.0) if name == "slope" else 0.0
            far = ~np.isclose(new, old, _RELATIVE, _ABSOLUTE + _OF_LARGEST * largest, equal_nan=True)
            if far.any():
                token = int(far.argmax())
                return (
                    f"{name} {new[token]:.6g}, not {old[token]:.6g}, for token {token} (allowed difference: "
                    f"{_RELATIVE:.1%} and {_ABSOLUTE + _OF_LARGEST * largest:.1g})"
                )
        return None

    @classmethod
    def read(cls, path: Path) -> Witness | None:
        """The witness that :meth:`write` stored, or nothing if there is none or it is damaged."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Store the witness as JSON."""
        write_atomically(path, json.dumps(self._asdict()).encode())
