"""Results on disk: each knows what it was made from, and half-made ones resume.

An artefact is a folder with a ``manifest.json`` that holds the configuration of its stage and the keys of
the artefacts it came from. Arrays that are computed piece by piece lie in a :class:`PieceStore`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import xarray as xr
import zarr

FORMAT_VERSION = 2


class ArtefactMismatch(ValueError):
    """A folder holds something else than what was asked for."""


class DamagedFile(ValueError):
    """A stored file is truncated, changed or lost."""


def fingerprint(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a later run, sees all of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Artefact:
    """A folder and what it holds."""

    path: Path
    key: str

    @classmethod
    def open(cls, path: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> Artefact:
        """Open the artefact at ``path``, or start it there.

        Args:
            path: folder; made if missing.
            stage: name of the stage that makes it.
            config: the settings it depends on, as JSON values.
            parents: keys of the artefacts it is made from, by stage.

        Raises:
            ArtefactMismatch: the folder holds another configuration or format; the message names the field.
        """
        wanted = {"format_version": FORMAT_VERSION, "stage": stage, "config": config, "parents": parents}
        wanted = json.loads(json.dumps(wanted))
        manifest = path / "manifest.json"
        if manifest.exists():
            try:
                found = json.loads(manifest.read_text())
                if not isinstance(found, dict):
                    raise ValueError("it is no JSON object")
            except ValueError as error:
                raise ArtefactMismatch(f"{manifest} is damaged ({error}); delete the folder to recompute it") from None
            difference = next(differences({k: found.get(k) for k in wanted}, wanted), None)
            if difference:
                name, have, want = difference
                raise ArtefactMismatch(
                    f"{path} holds {name} = {have!r}, but {name} = {want!r} was asked for; "
                    "use another folder, or delete this one to recompute it"
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            record = {**wanted, "software": software()}
            write_atomically(manifest, json.dumps(record, indent=1).encode())
        return cls(path, fingerprint(wanted))

    @property
    def software(self) -> dict[str, str]:
        """Commit and versions that started this artefact."""
        return json.loads((self.path / "manifest.json").read_text())["software"]

    @property
    def seconds(self) -> float:
        """Wall time spent on this artefact so far, over all runs that worked on it."""
        log = self.path / "seconds.txt"
        return sum(map(float, log.read_text().split())) if log.exists() else 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall time of the block to :attr:`seconds`, also when it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with (self.path / "seconds.txt").open("a") as log:
                log.write(f"{time.perf_counter() - start:.2f}\n")


class PieceStore:
    """An ``xarray`` dataset in Zarr whose pieces along one dimension are written as they finish.

    Args:
        path: the Zarr folder; started if missing.
        template: coordinates and attributes of the dataset.
        variables: dimensions and dtype of each variable; ``dim`` comes first where it occurs.
        dim: dimension along which pieces are written.
        sizes: of the dimensions that have no coordinate.
    """

    def __init__(
        self,
        path: Path,
        template: xr.Dataset,
        variables: Mapping[str, tuple[tuple[str, ...], str]],
        dim: str,
        sizes: Mapping[str, int] | None = None,
    ):
        self.path, self.dim = path, dim
        ready = path.with_name(f"{path.name}.ready")
        if not (ready.exists() and path.exists()):
            # Coordinates are small and always the same: writing them again heals a start that was cut short.
            template.to_zarr(path, mode="a", zarr_format=2, consolidated=False)
            group = zarr.open_group(path, mode="a", zarr_format=2)
            group.attrs["pieces"] = list(variables)
            sizes = {**template.sizes, **(sizes or {})}
            for name, (dims, dtype) in {**variables, "_done": ((dim,), "bool")}.items():
                if name in group:
                    continue
                shape = tuple(sizes[d] for d in dims)
                # Not compressed: float32 hardly shrinks, and Blosc reads on past the end of a truncated piece.
                group.create_array(
                    name,
                    shape=shape,
                    chunks=tuple(1 if d == dim else n for d, n in zip(dims, shape, strict=True)),
                    dtype=dtype,
                    filters=[numcodecs.CRC32()],
                    compressors=None,
                    fill_value={"b": False, "f": np.nan}.get(np.dtype(dtype).kind),
                    attributes={"_ARRAY_DIMENSIONS": list(dims)},
                )
            ready.touch()
        self._group = zarr.open_group(path, mode="r+", zarr_format=2)

    def missing(self) -> list[int]:
        """Indices along ``dim`` that are still to be computed."""
        return np.flatnonzero(~self._group["_done"][:]).tolist()

    def write(self, index: int, **values: np.ndarray) -> None:
        """Store one piece, NaN for variables not given; it counts as done only once all of it is on disk."""
        if unknown := values.keys() - set(self._group.attrs["pieces"]):
            raise KeyError(
                f"{sorted(unknown)} are not variables of {self.path}; they are {self._group.attrs['pieces']}"
            )
        # Empty chunks are written too: a chunk that is not there was lost.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name in self._group.attrs["pieces"]:
                self._group[name][index] = values.get(name, np.nan)
            self._group["_done"][index] = True

    def dataset(self) -> xr.Dataset:
        """The dataset as it stands; numbers not yet computed read as NaN."""
        return _read(self.path)

    @staticmethod
    def load(path: Path) -> xr.Dataset | None:
        """The dataset at ``path`` if all its pieces were written, else nothing.

        Raises:
            DamagedFile: a piece that was written is not there any more; names the variable.
        """
        if not (path.exists() and path.with_name(f"{path.name}.ready").exists()):
            return None
        # Not by xarray: it takes False, the fill value, for missing.
        group = zarr.open_group(path, mode="r", zarr_format=2)
        if not group["_done"][:].all():
            return None
        for name in group.attrs["pieces"]:
            if lost := group[name].nchunks - group[name].nchunks_initialized:
                raise DamagedFile(f"{path / name} has lost {lost} of its pieces; delete {path} to have it recomputed")
        return _read(path)


def _read(path: Path) -> xr.Dataset:
    dataset = xr.open_zarr(path, chunks=None, zarr_format=2, consolidated=False).drop_vars("_done")
    del dataset.attrs["pieces"]
    return dataset


@cache
def software() -> dict[str, str]:
    """Commit of the checkout, versions of what computes, and the machine."""
    names = ("torch", "transformer-lens", "hdbscan", "numpy", "xarray")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
    return head + (" with local changes" if changes else "")


def differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted(have.keys() | want.keys()):
            yield from differences(have.get(key), want.get(key), f"{name}.{key}" if name else key)
    elif have != want:
        yield name, have, want
