"""How a store of pieces lies on disk: what is written once, when it is begun, and its checksums."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numcodecs
import numpy as np
import xarray as xr
import zarr
from zarr.storage import FsspecStore

from polca_lib.storage.artefacts import DamagedFile, write_atomically

CHECKED = numcodecs.CRC32()
"""Filter that puts a checksum to each chunk."""

ABOUT = ("pieces", "dim", "block", "parts")
"""Attributes by which a store knows how it is cut."""


class Layout(NamedTuple):
    """What a store holds and how it is cut, see :class:`polca_lib.storage.pieces.PieceStore`."""

    template: xr.Dataset
    variables: Mapping[str, tuple[tuple[str, ...], str]]  # dimensions and dtype of each
    dim: str
    sizes: Mapping[str, int]
    block: tuple[str, int] | None

    def write(self, path: Path) -> None:
        """Write coordinates and metadata, which are always the same."""
        sizes = {**self.template.sizes, **self.sizes}
        blocks = 1 if self.block is None else math.ceil(sizes[self.block[0]] / self.block[1])
        parts = blocks + 1 if blocks > 1 else 1
        self.template.to_zarr(zarr_store(path), mode="a", zarr_format=2, consolidated=False)
        group = zarr.open_group(zarr_store(path), mode="a", zarr_format=2)
        about = list(self.variables), self.dim, self.block, parts
        group.attrs.update(dict(zip(ABOUT, about, strict=True)))
        chunks = {self.dim: 1} if parts == 1 else {self.dim: 1, self.block[0]: self.block[1]}
        for name, (dims, dtype) in {**self.variables, "_done": (("_piece",), "bool")}.items():
            if name in group:  # in an object store, where a start was cut short
                continue
            shape = tuple(sizes[d] if name != "_done" else sizes[self.dim] * parts for d in dims)
            # Not compressed: float32 hardly shrinks, and Blosc reads on past the end of a truncated piece.
            group.create_array(
                name,
                shape=shape,
                chunks=(1,) if name == "_done" else tuple(chunks.get(d, n) for d, n in zip(dims, shape, strict=True)),
                dtype=dtype,
                filters=[CHECKED],
                compressors=None,
                fill_value={"b": False, "f": np.nan}.get(np.dtype(dtype).kind),
                attributes={"_ARRAY_DIMENSIONS": list(dims)},
            )


def is_begun(path: Path) -> bool:
    """Whether all that is written once is there."""
    return _note(path).exists() and path.exists()


def begin(path: Path, layout: Layout) -> None:
    """Write coordinates and metadata, all of them or, if that is cut short, nothing that counts."""
    if isinstance(path, Path):
        beside = _beside(path)
        shutil.rmtree(beside, ignore_errors=True)
        layout.write(beside)
        if not path.exists():
            beside.replace(path)
        else:  # only the note that it was begun is lost
            shutil.copytree(beside, path, dirs_exist_ok=True)
            shutil.rmtree(beside)
    else:
        layout.write(path)
    about = {"block": layout.block, "files": _checksums(path, layout)}
    write_atomically(_note(path), json.dumps(about, indent=1).encode())


def damaged(path: Path) -> list[Path]:
    """Coordinates and metadata that are not what was written."""
    try:
        wanted = json.loads(_note(path).read_text())["files"]
        if any(".." in name.split("/") or name.startswith("/") for name in wanted):  # outside of the store
            return [_note(path)]
        return [path / name for name, digest in wanted.items() if _digest(path / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [_note(path)]


def mend(path: Path, layout: Layout) -> None:
    """Make damaged coordinates and metadata again, beside the store, and put them where they belong.

    Raises:
        DamagedFile: what is made now is not what was there.
    """
    files, beside = damaged(path), _beside(path)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        about = json.loads(_note(path).read_text())
        layout._replace(block=about["block"]).write(beside)
        for file in files:
            inner = file.relative_to(path)
            if _digest(beside / inner) != about["files"][inner.as_posix()]:
                raise ValueError("it is another now")
            write_atomically(file, (beside / inner).read_bytes())
            warnings.warn(f"{file} was damaged, and is made anew", stacklevel=3)
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(f"{files[0]} is damaged; delete {path} to have it recomputed") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def zarr_store(path: Path) -> Path | FsspecStore:
    """What Zarr takes for a path, local or not."""
    if isinstance(path, Path):
        return path
    return FsspecStore.from_url(str(path), storage_options=dict(path.storage_options))


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.ready")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.beside")


def _checksums(path: Path, layout: Layout) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".partial")]
    inner = sorted(file.relative_to(path).as_posix() for file in files)
    moving = tuple(f"{name}/{digit}" for name in (*layout.variables, "_done") for digit in range(10))
    return {name: _digest(path / name) for name in inner if not name.startswith(moving)}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
