"""Arrays on disk, or in an object store, whose pieces are written one by one, by any number of processes."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import xarray as xr
import zarr
from zarr.storage import FsspecStore

from polca_lib.storage.artefacts import DamagedFile, write_atomically
from polca_lib.storage.hashing import hash_file

CHECKED = numcodecs.CRC32()
"""Filter that puts a checksum to each chunk."""

ABOUT = ("pieces", "dim", "block", "parts")
"""Attributes by which a store knows how it is cut."""


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
        self.path, layout = path, StoreLayout(template, variables, dim, sizes or {}, block)
        if not is_begun(path):
            create(path, layout)
        elif damaged_metadata(path):
            repair_metadata(path, layout)
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
        if files := damaged_metadata(path):
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

    def repair_pieces(self) -> list[Path]:
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
        """The dataset at ``path`` if all its pieces are there, else nothing: then the stage has work to do.

        Files are counted, not read; :meth:`damaged` reads them.
        """
        try:
            store = PieceStore.open(path)
        except (FileNotFoundError, DamagedFile):
            return None
        arrays = [store._group[name] for name in store.variables]
        if not store.done().all() or any(array.nchunks_initialized < array.nchunks for array in arrays):
            return None
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


# How a store lies on disk: what is written once, when it is created, and its checksums.


class StoreLayout(NamedTuple):
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


def create(path: Path, layout: StoreLayout) -> None:
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


def damaged_metadata(path: Path) -> list[Path]:
    """Coordinates and metadata that are not what was written."""
    try:
        wanted = json.loads(_note(path).read_text())["files"]
        if any(".." in name.split("/") or name.startswith("/") for name in wanted):  # outside of the store
            return [_note(path)]
        return [path / name for name, digest in wanted.items() if hash_file(path / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [_note(path)]


def repair_metadata(path: Path, layout: StoreLayout) -> None:
    """Make damaged coordinates and metadata again, beside the store, and put them where they belong.

    Raises:
        DamagedFile: what is made now is not what was there.
    """
    files, beside = damaged_metadata(path), _beside(path)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        about = json.loads(_note(path).read_text())
        layout._replace(block=about["block"]).write(beside)
        for file in files:
            inner = file.relative_to(path)
            if hash_file(beside / inner) != about["files"][inner.as_posix()]:
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


def _checksums(path: Path, layout: StoreLayout) -> dict[str, str]:
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".partial")]
    inner = sorted(file.relative_to(path).as_posix() for file in files)
    moving = tuple(f"{name}/{digit}" for name in (*layout.variables, "_done") for digit in range(10))
    return {name: hash_file(path / name) for name in inner if not name.startswith(moving)}
