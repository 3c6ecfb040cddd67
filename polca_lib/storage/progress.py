"""Progress bars for a terminal, and occasional progress lines for a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS = 30.0  # between two lines of a log


def progress(of: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, done: int = 0) -> tqdm:
    """Show progress on standard error.

    Args:
        of: items to iterate over; without them, call ``update`` of the returned bar.
        total: number of items; ``done`` plus the length of ``of`` if not given.
        done: items that an earlier run finished.
    """
    if total is None and hasattr(of, "__len__"):
        total = done + len(of)
    options = {"desc": desc, "unit": unit, "total": total, "initial": done}
    if sys.stderr.isatty():
        return tqdm(of, **options)
    return tqdm(of, **options, file=_Lines(), mininterval=_SECONDS, maxinterval=_SECONDS, ascii=True, ncols=100)


class _Lines:
    """Standard error that gets a new line for each state of a bar."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n \x1b[A"):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
