"""Progress bars on a terminal, and lines now and then where a log is written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS = 30.0  # between two lines of a log


def progress(of: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, done: int = 0) -> tqdm:
    """A bar on standard error.

    Args:
        of: what is gone through; or nothing, and the bar is told by hand.
        desc, unit: what is done, and what is counted.
        total: how many there are in all; that of ``of`` and ``done`` if not given.
        done: of these before this start.
    """
    if total is None and hasattr(of, "__len__"):
        total = done + len(of)
    common = {"desc": desc, "unit": unit, "total": total, "initial": done}
    if sys.stderr.isatty():
        return tqdm(of, **common)
    return tqdm(of, **common, file=_Lines(), mininterval=_SECONDS, maxinterval=_SECONDS, ascii=True, ncols=100)


class _Lines:
    """Standard error, with a line for each state of a bar, rather than one that is written over."""

    def write(self, text: str) -> None:
        if shown := text.strip("\r\n \x1b[A"):
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()
