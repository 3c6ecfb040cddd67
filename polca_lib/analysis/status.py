"""What is done and what is missing in a folder of results, from its files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from polca_lib.storage.artefacts import FORMAT_VERSION, Artefact
from polca_lib.storage.pieces import PieceStore, is_begun

FILES = {"basis": "basis.zarr", "projection": "projections.zarr", "clusters": "clusters.zarr"}
"""Where the pieces of each stage of an analysis are."""

_SHOWN = 5  # missing pieces that are named


def status(folder: str | Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """What is done and what is missing; nothing is changed.

    Args:
        folder: of results.
        verify: read all pieces that are done, and check them.

    Returns:
        For each stage kept: ``stage``, ``folder``, ``problem`` (none if it can be read) and, if known,
        ``format_version``, ``commit``, ``seconds`` of work, ``done`` and ``pieces`` (how many), ``missing`` (the first
        few of them, as text), ``damaged`` (files, if they were checked).

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = UPath(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is missing; polca run makes it")
    order = list(FILES)
    rows = [_status(file.parent, verify) for file in folder.glob("*/manifest.json")]
    return sorted(rows, key=lambda row: (order.index(row["stage"]) if row["stage"] in order else -1, row["folder"]))


def as_table(folder: str | Path, rows: Sequence[dict[str, Any]]) -> str:
    """The same as text."""
    lines = [f"{folder}: {len(rows)} stages begun"]
    for row in rows:
        if row["pieces"] is None:
            state = "not begun"
        else:
            state = f"{row['done']} of {row['pieces']} pieces, {row['seconds']:.0f} s of work"
        lines.append(f"  {row['stage']:<11}{row['folder']:<26}{state}")
        if row["missing"]:
            more = row["pieces"] - row["done"] - len(row["missing"])
            lines.append(f"  {'':<11}missing: {'; '.join(row['missing'])}" + (f"; and {more} more" if more else ""))
        lines += [f"  {'':<11}damaged: {file}" for file in row["damaged"]]
        if row["problem"]:
            lines.append(f"  {'':<11}problem: {row['problem']}")
    return "\n".join(lines)


def _status(path: Path, verify: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": path.name.rpartition("-")[0], "folder": path.name, "problem": None}
    found |= {"format_version": None, "commit": None, "seconds": 0.0, "done": 0, "pieces": None}
    found |= {"missing": [], "damaged": []}
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        found |= {"format_version": manifest["format_version"], "commit": manifest["software"]["commit"]}
        if manifest["format_version"] != FORMAT_VERSION:
            older = f"format {manifest['format_version']}, not {FORMAT_VERSION}; this version leaves it as it is"
            return found | {"problem": older}
        store = path / FILES[manifest["stage"]]
        found |= {"seconds": Artefact(path, "").seconds}
        if is_begun(store):
            opened = PieceStore.open(store)
            missing = opened.missing()
            found |= {"done": opened.pieces - len(missing), "pieces": opened.pieces}
            found["missing"] = [opened.describe(piece) for piece in missing[:_SHOWN]]
            if verify:
                found["damaged"] = [str(file) for files in opened.damaged().values() for file in files]
                found["problem"] = "damaged pieces; polca run makes them anew" if found["damaged"] else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        found["problem"] = f"{type(error).__name__}: {error}"
    return found
