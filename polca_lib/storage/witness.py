"""A witness of a loss: its values and slopes on a few examples. Code has no hash, so these tell whether it changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polca_lib.derivatives.token_loss import Batch, TokenLoss, direction, split_examples, to_device

_EXAMPLES, _TOKENS = 3, 1000  # at most


class Witness(NamedTuple):
    """L(x; theta) and d/ds L(x; theta + s v) at s = 0 for a fixed v and tokens x of the first examples, in nats."""

    step: int
    losses: list[float]
    slopes: list[float]

    @classmethod
    def of(cls, token_loss: TokenLoss, theta: Float[Tensor, " d"], batch: Batch, step: int) -> Witness:
        """The witness of a loss at the checkpoint ``theta`` of ``step``."""
        losses, slopes, examples = torch.empty(0), torch.empty(0), 0
        for example in (to_device(example, theta.device) for example in split_examples(batch, 1)):
            try:
                pair = torch.func.jvp(lambda point: token_loss(point, example), (theta,), (direction(theta),))  # noqa: B023
            except RuntimeError:  # TokenLoss.check says why
                with torch.no_grad():
                    pair = token_loss(theta, example), torch.empty(0)
            new = (part.detach().cpu().flatten() for part in pair)
            losses, slopes = (torch.cat(parts) for parts in zip((losses, slopes), new, strict=True))
            examples += pair[0].numel() > 0  # an example may have no losses
            if examples == _EXAMPLES:
                break
        return cls(step, *([float(f"{x:.7g}") for x in values[:_TOKENS].tolist()] for values in (losses, slopes)))

    def difference(self, other: Witness) -> str | None:
        """Where ``other`` is far from this, in words, or nothing; other devices and dtypes round differently."""
        if len(other.losses) != len(self.losses):
            return f"{len(other.losses)} token losses, not {len(self.losses)}, for the first examples"
        # A slope is a sum of many terms: allow 1% of the largest.
        slack = 0.01 * np.abs(np.nan_to_num(self.slopes)).max(initial=0)
        for name, values, others, allowed in (
            ("loss", self.losses, other.losses, 1e-4),
            ("slope", self.slopes, other.slopes, 1e-4 + slack),
        ):
            if len(values) == len(others):  # slopes may be missing
                close = np.isclose(others, values, rtol=1e-3, atol=allowed, equal_nan=True)
                if not close.all():
                    token = int(close.argmin())
                    allowed = f"allowed difference: 0.1% and {allowed:.1g}"
                    return f"{name} {others[token]:.6g}, not {values[token]:.6g}, for token {token} ({allowed})"
        return None

    @classmethod
    def read(cls, path: Path) -> Witness | None:
        """The witness stored as JSON at ``path``; nothing if there is none or it is damaged."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
