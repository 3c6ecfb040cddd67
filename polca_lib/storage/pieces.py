"""Arrays on disk, or in an object store, whose pieces are written one by one, by any number of processes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.layout import ABOUT, CHECKED, Layout, begin, damaged, mend, zarr_store
from polca_lib.storage.pieces import is_begun


class PieceStore:
    """An ``xarray`` dataset in Zarr whose pieces are written as they finish.

    A piece is all there is at one index of ``dim``. With ``block``, variables along a second dimension are cut along
    it, too: for each index of ``dim`` there is then a piece for each block, and one for all other variables. Pieces are
    numbered from 0, those of one index side by side. Each lies in files of its own, with checksums, so that processes
    may write different pieces at the same time; a piece counts as done only once all of it is there.

    Args:
        path: the Zarr folder; started if missing. Any path of ``upath``, such as of an object store.
        template: coordinates and attributes of the dataset.
        variables: dimensions and dtype of each; ``dim`` comes first where it occurs.
        dim: dimension along which pieces are written.
        sizes: of the dimensions that have no coordinate.
        block: second dimension along which pieces are cut, and how much of it is a block. A store that is there stays
            cut as it was begun.

    Raises:
        DamagedFile: coordinates or metadata are not what was written, and can't be made again.
    """

    def __init__(
        self,
        path: Path,
        template: xr.Dataset,
        variables: Mapping[str, tuple[tuple[str, ...], str]],
        dim: str,
        sizes: Mapping[str, int] | None = None,
        block: tuple[str, int] | None = None,
    ):
        self.path, layout = path, Layout(template, variables, dim, sizes or {}, block)
        if not is_begun(path):
            begin(path, layout)
        elif damaged(path):
            mend(path, layout)
        self._open()

    @classmethod
    def open(cls, path: Path) -> PieceStore:
        """The store that is at ``path``, to read or to write pieces of it.

        Raises:
            FileNotFoundError: there is none, or its start was cut short.
            DamagedFile: coordinates or metadata are not what was written.
        """
        if not is_begun(path):
            raise FileNotFoundError(f"{path} is missing, or its start was cut short")
        if files := damaged(path):
            raise DamagedFile(f"{files[0]} is damaged; run the stage again to have it made anew")
        store = cls.__new__(cls)
        store.path = path
        store._open()
        return store

    def _open(self) -> None:
        self._group = zarr.open_group(zarr_store(self.path), mode="r+", zarr_format=2)
        about = self._group.attrs
        self.variables: list[str] = list(about["pieces"])
        self.attrs: dict[str, Any] = {name: about[name] for name in about if name not in ABOUT}
        self._dim, self._block = about["dim"], about["block"]
        self._dims = {name: list(self._group[name].attrs["_ARRAY_DIMENSIONS"]) for name in self.variables}
        self.parts: int = about["parts"]
        """Pieces of one index of ``dim``."""
        self.blocks = [slice(None)]
        """Ranges along the second dimension; the part of this number, if there are several parts, has that range."""
        if self.parts > 1:
            total = self.size(self._block[0])
            edges = [*range(0, total, self._block[1]), total]
            self.blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def size(self, dim: str) -> int:
        """Length of a dimension of the variables."""
        return next(self._group[name].shape[dims.index(dim)] for name, dims in self._dims.items() if dim in dims)

    @property
    def pieces(self) -> int:
        """How many there are in all."""
        return self._group["_done"].shape[0]

    def done(self) -> np.ndarray:
        """Whether each piece is written, (piece,); one whose mark is damaged is not."""
        marks = self._group["_done"]
        try:
            return marks[:]
        except (RuntimeError, ValueError):
            return np.array([self.is_done(piece) for piece in range(self.pieces)])

    def is_done(self, piece: int) -> bool:
        """Whether one piece is written."""
        try:
            return bool(self._group["_done"][piece])
        except (RuntimeError, ValueError):
            return False

    def missing(self) -> list[int]:
        """Pieces that are still to be computed."""
        return np.flatnonzero(~self.done()).tolist()

    def write(self, piece: int, **values: np.ndarray) -> None:
        """Store one piece; it counts as done only once all of it is there.

        Variables of the piece that are not given are NaN in it.

        Raises:
            KeyError: a variable that is not of this piece.
            OSError: the folder can't be written, or its disk is full; what is done stays.
        """
        own = self._of_part(piece % self.parts)
        if unknown := values.keys() - set(own):
            raise KeyError(f"{sorted(unknown)} are not variables of piece {piece} of {self.path}; they are {own}")
        try:
            # Empty chunks are written too: a chunk that is not there was lost.
            with zarr.config.set({"array.write_empty_chunks": True}):
                for name in own:
                    self._group[name][self._region(name, piece)] = values.get(name, np.nan)
                self._group["_done"][piece] = True
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}: piece {piece} could not be written, what was finished before stays; mend "
                "that and run again",
                str(self.path),
            ) from error

    def describe(self, piece: int) -> str:
        """A piece in words, by its coordinates."""
        index, part = divmod(piece, self.parts)
        told = f"{self._dim} {self._group[self._dim][index]}"
        if self.parts > 1 and part < len(self.blocks):
            own = self._group[self._block[0]][self.blocks[part]]
            told += f", {self._block[0]}s {own[0]} to {own[-1]}"
        return told

    def damaged(self) -> dict[int, list[Path]]:
        """Files of pieces that are done which are lost or not what was written, by piece. All of them are read."""
        found: dict[int, list[Path]] = {}
        for piece in np.flatnonzero(self.done()).tolist():
            names = [name for name, size in self.files(piece).items() if not self._is_sound(name, size)]
            if names:
                found[piece] = [self.path / name for name in names]
        return found

    def files(self, piece: int) -> dict[str, int]:
        """Names of the files of a piece, within the store, and how many bytes of numbers are in each."""
        found = {}
        for name in self._of_part(piece % self.parts):
            array = self._group[name]
            starts = [at if isinstance(at, int) else at.start or 0 for at in self._region(name, piece)]
            chunk = [start // size for start, size in zip(starts, array.chunks, strict=True)]
            found[f"{name}/{'.'.join(map(str, chunk))}"] = math.prod(array.chunks) * array.dtype.itemsize
        return found

    def _is_sound(self, name: str, size: int) -> bool:
        try:
            return len(CHECKED.decode((self.path / name).read_bytes())) == size
        except (OSError, RuntimeError, ValueError):
            return False

    def heal(self) -> list[Path]:
        """Have damaged pieces count as missing, and clear away what killed processes left; the files of the pieces.

        Only the one process that is at work on a store may do so.
        """
        for left in list(self.path.rglob("*.partial")):
            left.unlink()
        files = []
        for piece, own in self.damaged().items():
            self._group["_done"][piece] = False
            files += own
        if files:
            warnings.warn(f"{len(files)} files are damaged and will be made anew, among them {files[0]}", stacklevel=2)
        return files

    def dataset(self) -> xr.Dataset:
        """The dataset as it stands; numbers not yet computed read as NaN."""
        return _read(self.path)

    @staticmethod
    def load(path: Path) -> xr.Dataset | None:
        """The dataset at ``path`` if all its pieces were written, else nothing.

        Raises:
            DamagedFile: a piece that was written is not there any more, or coordinates are not what was written.
        """
        if not is_begun(path):
            return None
        store = PieceStore.open(path)
        if not store.done().all():
            return None
        for name in store.variables:
            array = store._group[name]
            if lost := array.nchunks - array.nchunks_initialized:
                raise DamagedFile(f"{path / name} has lost {lost} of its pieces; delete {path} to have it recomputed")
        return _read(path)

    def _of_part(self, part: int) -> list[str]:
        if self.parts == 1:
            return self.variables
        inner = part < len(self.blocks)
        return [name for name, dims in self._dims.items() if (self._block[0] in dims) == inner]

    def _region(self, name: str, piece: int) -> tuple[int | slice, ...]:
        index, part = divmod(piece, self.parts)
        where = {self._dim: index}
        if self.parts > 1 and part < len(self.blocks):
            where[self._block[0]] = self.blocks[part]
        return tuple(where.get(dim, slice(None)) for dim in self._dims[name])


def _read(path: Path) -> xr.Dataset:
    dataset = xr.open_zarr(zarr_store(path), chunks=None, zarr_format=2, consolidated=False).drop_vars("_done")
    for name in ABOUT:
        del dataset.attrs[name]
    return dataset
