"""Show what is done and what is missing in a folder of results, from its files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from polca_lib.storage.artefacts import FORMAT_VERSION, Artefact
from polca_lib.storage.pieces import PieceStore, is_begun

FILES = {"basis": "basis.zarr", "projection": "projections.zarr", "clusters": "clusters.zarr"}
"""Name of the store of each stage."""

_SHOWN = 5  # missing pieces to name


def status(folder: str | Path, *, verify: bool = False) -> list[dict[str, Any]]:
    """State of each stage in a folder of results; changes nothing.

    Args:
        folder: folder of results.
        verify: read and check all pieces that are done.

    Returns:
        For each stage ``stage``, ``folder``, ``problem`` (None if it can be read) and, if known, ``format_version``,
        ``commit``, ``seconds`` of work, ``done`` and ``pieces`` (counts), ``missing`` (the first few as text) and
        ``damaged`` (files, with ``verify``).

    Raises:
        FileNotFoundError: the folder is missing.
    """
    folder = UPath(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is missing; start it with polca run")
    order = {stage: index for index, stage in enumerate(FILES)}
    rows = [_status(manifest.parent, verify) for manifest in folder.glob("*/manifest.json")]
    return sorted(rows, key=lambda row: (order.get(row["stage"], -1), row["folder"]))


def as_table(folder: str | Path, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of :func:`status` as text."""
    lines = [f"{folder}: {len(rows)} stages begun"]
    for row in rows:
        state = f"{row['done']} of {row['pieces']} pieces, {row['seconds']:.0f} s of work"
        lines.append(f"  {row['stage']:<11}{row['folder']:<26}{'not begun' if row['pieces'] is None else state}")
        if row["missing"]:
            more = row["pieces"] - row["done"] - len(row["missing"])
            lines.append(f"  {'':<11}missing: {'; '.join(row['missing'])}" + (f"; and {more} more" if more else ""))
        lines += [f"  {'':<11}damaged: {file}" for file in row["damaged"]]
        if row["problem"]:
            lines.append(f"  {'':<11}problem: {row['problem']}")
    return "\n".join(lines)


def _status(path: Path, verify: bool) -> dict[str, Any]:
    """State of one stage; an unreadable stage has a problem."""
    row: dict[str, Any] = {"stage": path.name.rpartition("-")[0], "folder": path.name, "problem": None}
    row |= {"format_version": None, "commit": None, "seconds": 0.0, "done": 0, "pieces": None}
    row |= {"missing": [], "damaged": []}
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version = manifest["format_version"]
        row |= {"format_version": version, "commit": manifest["software"]["commit"]}
        if version != FORMAT_VERSION:
            return row | {"problem": f"format {version}, not {FORMAT_VERSION}; this version does not change it"}
        file = path / FILES[manifest["stage"]]
        row["seconds"] = Artefact(path, "").seconds
        if is_begun(file):
            store = PieceStore.open(file)
            missing = store.missing()
            row |= {"done": store.pieces - len(missing), "pieces": store.pieces}
            row["missing"] = [store.describe(piece) for piece in missing[:_SHOWN]]
            if verify and (damaged := store.damaged()):
                row["damaged"] = [str(file) for files in damaged.values() for file in files]
                row["problem"] = "damaged pieces; recompute them with polca run"
    except (ValueError, KeyError, TypeError, OSError) as error:
        row["problem"] = f"{type(error).__name__}: {error}"
    return row
