"""Arrays on disk or in an object store whose pieces are written one at a time, by any number of processes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.storage import FsspecStore

from polca_lib.storage.artefacts import DamagedFile, key_of, write_atomically
from polca_lib.storage.hashing import hash_file

CHECKED = numcodecs.CRC32()
"""Filter that adds a checksum to each chunk."""

ABOUT = ("pieces", "dim", "block", "parts", "key")
"""Attributes that record how a store is divided into pieces, and the key of the artefact it belongs to."""

_MARKS = ("_done", "_sha256")  # of each piece: whether it is written, and the checksum of its content and place


class PieceStore:
    """An ``xarray`` dataset in Zarr whose pieces are written as they are computed.

    A piece holds all values at one index of ``dim``. With ``block``, variables with a second dimension are divided
    along it, too: each index of ``dim`` then has one piece per block, and a last piece for the other variables. Pieces
    are numbered from 0; the pieces of one index have consecutive numbers. Each piece has its own files with checksums,
    so processes may write different pieces at the same time.

    Args:
        path: the Zarr folder, local or of ``upath``; created if missing.
        template: coordinates and attributes of the dataset.
        variables: dimensions and dtype of each variable; ``dim`` comes first where it occurs.
        dim: dimension along which pieces are written.
        sizes: sizes of the dimensions without a coordinate.
        block: second dimension, and the size of a block along it. An existing store keeps its blocks.

    Raises:
        DamagedFile: coordinates or metadata are damaged and can't be restored.
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
        """Open the store at ``path``, to read or write its pieces.

        Raises:
            FileNotFoundError: the store is missing, or its creation was interrupted.
            DamagedFile: coordinates or metadata are damaged.
        """
        if not is_begun(path):
            raise FileNotFoundError(f"{path} is missing, or its creation was interrupted; run the stage again")
        if files := damaged_metadata(path):
            raise DamagedFile(f"{files[0]} is damaged; run the stage again to restore it")
        store = cls.__new__(cls)
        store.path = path
        store._open()
        return store

    def _open(self) -> None:
        """Read the names, dimensions and blocks of the variables from the metadata."""
        group = zarr.open_group(zarr_store(self.path), mode="r", zarr_format=2)
        self._array = cache(group.__getitem__)  # which would read the metadata of the array each time
        about, key = group.attrs, key_of(self.path.parent)
        self._key: str | None = about.get("key")
        if self._key and key and self._key != key:
            raise DamagedFile(
                f"{self.path} belongs to another stage or other settings than {self.path.parent / 'manifest.json'}: "
                "were folders exchanged? Put it back, or delete it to recompute it"
            )
        self.variables: list[str] = list(about["pieces"])
        self.attrs: dict[str, Any] = {name: about[name] for name in about if name not in ABOUT}
        self._dim, self._block = about["dim"], about["block"]
        self._dims = {name: list(self._array(name).attrs["_ARRAY_DIMENSIONS"]) for name in self.variables}
        self.parts: int = about["parts"]  # number of pieces per index of dim
        self.blocks = [slice(None)]  # range of each block along the second dimension
        if self.parts > 1:
            dim, size = self._block
            total = next(self._array(name).shape[dims.index(dim)] for name, dims in self._dims.items() if dim in dims)
            self.blocks = [slice(start, min(start + size, total)) for start in range(0, total, size)]

    @cached_property
    def _writable(self) -> Callable[[str], zarr.Array]:
        """The same arrays for writing, opened when they are needed: a finished store may be on a read-only disk."""
        return cache(zarr.open_group(zarr_store(self.path), mode="r+", zarr_format=2).__getitem__)

    @property
    def pieces(self) -> int:
        """Total number of pieces."""
        return self._array("_done").shape[0]

    def done(self) -> np.ndarray:
        """Whether each piece is written, (piece,); a piece with a damaged mark is not."""
        try:
            return self._array("_done")[:]
        except (RuntimeError, ValueError):
            return np.array([self.is_done(piece) for piece in range(self.pieces)])

    def is_done(self, piece: int) -> bool:
        """Whether one piece is written."""
        try:
            return bool(self._array("_done")[piece])
        except (RuntimeError, ValueError):
            return False

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not written."""
        return np.flatnonzero(~self.done()).tolist()

    def write(self, piece: int, **values: np.ndarray) -> None:
        """Store one piece, with NaN for its variables of floats without ``values``, and then mark it as done.

        Raises:
            KeyError: a variable does not belong to this piece.
            ValueError: values are not exactly of the shape and kind of the variable, or an integer is missing.
            OSError: the folder can't be written, or its disk is full; finished pieces stay.
        """
        names = self._names(piece)
        if unknown := values.keys() - set(names):
            raise KeyError(f"{sorted(unknown)} are not variables of piece {piece} of {self.path}; allowed: {names}")
        for name in names:
            array, value = self._array(name), np.asarray(values.get(name, np.nan))
            region = zip(self._region(name, piece), array.shape, strict=True)
            shape = tuple(len(range(size)[at]) for at, size in region if isinstance(at, slice))
            given = name in values and value.shape != shape
            if given or not np.can_cast(value.dtype, array.dtype, "same_kind"):
                raise ValueError(
                    f"{name} of {self.describe(piece)} of {self.path} "
                    + (f"has shape {value.shape} and dtype {value.dtype}" if name in values else "is missing")
                    + f"; allowed: shape {shape} and {array.dtype}. Nothing was written"
                )
        try:
            # Write chunks of fill values, too: then a missing chunk is a lost one.
            with zarr.config.set({"array.write_empty_chunks": True}):
                for name in names:
                    self._writable(name)[self._region(name, piece)] = values.get(name, np.nan)
                if self._key is not None:
                    self._writable("_sha256")[piece] = self._checksum(piece, dict.fromkeys(names, np.nan) | values)
                self._writable("_done")[piece] = True
        except OSError as error:
            problem = f"{error.strerror or error}: piece {piece} was not written, finished pieces stay"
            raise OSError(error.errno, f"{problem}; fix the cause and run again", str(self.path)) from error

    def describe(self, piece: int) -> str:
        """Name the coordinates of a piece, for messages."""
        index, part = divmod(piece, self.parts)
        text = f"{self._dim} {self._array(self._dim)[index]}"
        if self.parts > 1 and part < len(self.blocks):
            values = self._array(self._block[0])[self.blocks[part]]
            text += f", {self._block[0]}s {values[0]} to {values[-1]}"
        return text

    def damaged(self) -> dict[int, list[Path]]:
        """Read all finished pieces, and list the files that are lost, damaged or in the wrong place, by piece."""
        damaged: dict[int, list[Path]] = {}
        for piece in np.flatnonzero(self.done()).tolist():
            files = self.files(piece)
            odd = [name for name, size in files.items() if not _is_sound(self.path / name, size)]
            if odd or not self._is_in_place(piece):
                damaged[piece] = [self.path / name for name in odd or files]
        return damaged

    def _is_in_place(self, piece: int) -> bool:
        """Whether a piece is the one that was written there; older stores do not tell."""
        if self._key is None:
            return True
        try:
            content = {name: self._array(name)[self._region(name, piece)] for name in self._names(piece)}
            return bool((self._array("_sha256")[piece] == self._checksum(piece, content)).all())
        except (RuntimeError, ValueError):
            return False

    def _checksum(self, piece: int, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """SHA-256 of the values of a piece and of the place they belong to, as 32 bytes."""
        digest = hashlib.sha256(json.dumps([self._key, piece]).encode())
        for name in sorted(values):
            array, region = self._array(name), self._region(name, piece)
            shape = [len(range(n)[at]) for n, at in zip(array.shape, region, strict=True) if isinstance(at, slice)]
            digest.update(json.dumps([name, str(array.dtype), shape]).encode())
            value = np.broadcast_to(np.asarray(values[name], array.dtype), shape)
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return np.frombuffer(digest.digest(), np.uint8)

    def files(self, piece: int) -> dict[str, int]:
        """Paths of the files of a piece, relative to the store, and the size of their values in bytes."""
        files = {}
        for name in self._names(piece):
            array = self._array(name)
            starts = [at if isinstance(at, int) else at.start or 0 for at in self._region(name, piece)]
            chunk = [start // size for start, size in zip(starts, array.chunks, strict=True)]
            files[f"{name}/{'.'.join(map(str, chunk))}"] = math.prod(array.chunks) * array.dtype.itemsize
        return files

    def repair_pieces(self) -> list[Path]:
        """Mark damaged pieces as missing, delete the partial files of killed processes, and return damaged files.

        Only the process that holds the lock of the artefact may call this.
        """
        for partial in list(self.path.rglob("*.partial")):
            partial.unlink(missing_ok=True)  # an orphaned worker may end meanwhile
        files: list[Path] = []
        for piece, damaged in self.damaged().items():
            self._writable("_done")[piece] = False
            files += damaged
        if files:
            warnings.warn(f"{len(files)} files are damaged and will be recomputed, such as {files[0]}", stacklevel=2)
        return files

    def dataset(self) -> xr.Dataset:
        """Open the dataset; values of missing pieces are NaN."""
        store = zarr_store(self.path)
        dataset = xr.open_zarr(store, chunks=None, zarr_format=2, consolidated=False).drop_vars(_MARKS, errors="ignore")
        for name in ABOUT:
            dataset.attrs.pop(name, None)
        for name in self.variables:
            array = indexing.LazilyIndexedArray(_Stored(self._array(name), self.path / name))
            dataset[name] = xr.Variable(self._dims[name], array, dataset[name].attrs)
        return dataset[sorted(dataset.variables)]  # Zarr lists them in no fixed order

    @staticmethod
    def load(path: Path) -> xr.Dataset | None:
        """Open the dataset at ``path`` if all its pieces are written, else return None.

        This counts the files; :meth:`damaged` also reads them.
        """
        try:
            store = PieceStore.open(path)
        except (FileNotFoundError, DamagedFile):
            return None
        arrays = [store._array(name) for name in store.variables]
        complete = store.done().all() and all(array.nchunks_initialized >= array.nchunks for array in arrays)
        return store.dataset() if complete else None

    def _names(self, piece: int) -> list[str]:
        """Variables of a piece."""
        if self.parts == 1:
            return self.variables
        in_block = piece % self.parts < len(self.blocks)
        return [name for name, dims in self._dims.items() if (self._block[0] in dims) == in_block]

    def _region(self, name: str, piece: int) -> tuple[int | slice, ...]:
        """Index of a piece in a variable."""
        index, part = divmod(piece, self.parts)
        indexers = {self._dim: index}
        if self.parts > 1 and part < len(self.blocks):
            indexers[self._block[0]] = self.blocks[part]
        return tuple(indexers.get(dim, slice(None)) for dim in self._dims[name])


class _Stored(BackendArray):
    """A variable that is read from disk on demand, float16 as float32; raises DamagedFile."""

    def __init__(self, array: zarr.Array, path: Path):
        self._array, self._path, self.shape = array, path, array.shape
        self.dtype = np.dtype("float32") if array.dtype == "float16" else array.dtype  # to compute with

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        try:
            return self._array.oindex[key].astype(self.dtype, copy=False)
        except (RuntimeError, ValueError) as error:
            raise DamagedFile(
                f"{self._path} is damaged ({error}); polca run, polca paper run or verify = True finds the damaged "
                "pieces and computes them again"
            ) from None


def _is_sound(path: Path, size: int) -> bool:
    """Whether a chunk has ``size`` bytes of values and its checksum matches."""
    try:
        return len(CHECKED.decode(path.read_bytes())) == size
    except (OSError, RuntimeError, ValueError):
        return False


class StoreLayout(NamedTuple):
    """Arguments of :class:`polca_lib.storage.pieces.PieceStore` that define its coordinates and metadata."""

    template: xr.Dataset
    variables: Mapping[str, tuple[tuple[str, ...], str]]
    dim: str
    sizes: Mapping[str, int]
    block: tuple[str, int] | None
    key: str | None = None  # of the artefact; stores of version 0.2 and earlier have none, nor checksums of pieces

    def write(self, path: Path) -> None:
        """Write coordinates and metadata; equal layouts give equal bytes."""
        # One piece per block, and one for the variables without blocks. A single block is no division.
        sizes, chunks, parts = {**self.template.sizes, **self.sizes}, {self.dim: 1, "_piece": 1}, 1
        if self.block is not None and self.block[1] < sizes[self.block[0]]:
            parts = math.ceil(sizes[self.block[0]] / self.block[1]) + 1
            chunks[self.block[0]] = self.block[1]
        sizes |= {"_piece": sizes[self.dim] * parts, "_byte": 32}
        # Write coordinates and attributes.
        self.template.to_zarr(zarr_store(path), mode="a", zarr_format=2, consolidated=False)
        group = zarr.open_group(zarr_store(path), mode="a", zarr_format=2)
        key = {} if self.key is None else {"key": self.key}
        group.attrs.update(pieces=list(self.variables), dim=self.dim, block=self.block, parts=parts, **key)
        # Create the variables, one chunk per piece.
        marks = {"_done": (("_piece",), "bool")} | ({"_sha256": (("_piece", "_byte"), "uint8")} if key else {})
        for name, (dims, dtype) in {**self.variables, **marks}.items():
            if name in group:  # in an object store, after an interrupted creation
                continue
            # No compression: float32 values hardly shrink, and Blosc reads past the end of a truncated chunk.
            group.create_array(
                name,
                shape=tuple(sizes[dim] for dim in dims),
                chunks=tuple(chunks.get(dim, sizes[dim]) for dim in dims),
                dtype=dtype,
                filters=[CHECKED],
                compressors=None,
                fill_value={"b": False, "f": np.nan}.get(np.dtype(dtype).kind),
                attributes={"_ARRAY_DIMENSIONS": list(dims)},
            )


def is_begun(path: Path) -> bool:
    """Whether coordinates, metadata and their checksums are written."""
    return _checksums(path).exists() and path.exists()


def create(path: Path, layout: StoreLayout) -> None:
    """Write coordinates and metadata, and then their checksums, without which the store does not count.

    Raises:
        DamagedFile: the store has pieces, but nothing says how they are divided.
    """
    layout = layout._replace(key=key_of(path.parent) or "")
    try:  # if only the checksums were lost, keep the pieces as they are divided
        about = json.loads((path / ".zattrs").read_text())
        layout = layout._replace(block=about["block"], key=about.get("key"))
    except (OSError, ValueError, KeyError):
        if any((path / "_done").glob("[0-9]*")):
            problem = f"{path / '.zattrs'} and {_checksums(path)} are lost or damaged; restore one of them"
            raise DamagedFile(f"{problem}, or delete {path} to recompute it") from None
    if isinstance(path, Path):
        # Write to a temporary folder first, so that no store is left half-written.
        temporary = _temporary(path)
        _remove(temporary)
        layout.write(temporary)
        if not path.exists():
            temporary.replace(path)
        else:
            shutil.copytree(temporary, path, dirs_exist_ok=True)
            shutil.rmtree(temporary)
    else:
        layout.write(path)
    # Hash all files except the pieces: chunks of variables, whose names start with a digit.
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".partial")]
    names = sorted(file.relative_to(path).as_posix() for file in files)
    chunks = tuple(f"{name}/{digit}" for name in (*layout.variables, *_MARKS) for digit in range(10))
    checksums = {name: hash_file(path / name) for name in names if not name.startswith(chunks)}
    record = {"block": layout.block, "key": layout.key, "files": checksums}
    write_atomically(_checksums(path), json.dumps(record, indent=1).encode())


def damaged_metadata(path: Path) -> list[Path]:
    """List files of coordinates and metadata whose checksums do not match."""
    try:
        checksums = json.loads(_checksums(path).read_text())["files"]
        if any(".." in name.split("/") or name.startswith("/") for name in checksums):  # outside of the store
            return [_checksums(path)]
        return [path / name for name, checksum in checksums.items() if hash_file(path / name) != checksum]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [_checksums(path)]


def repair_metadata(path: Path, layout: StoreLayout) -> None:
    """Write coordinates and metadata to a temporary folder, and copy the damaged files from there.

    Raises:
        DamagedFile: the layout has changed since the store was created, or the checksums are damaged.
    """
    files, temporary = damaged_metadata(path), _temporary(path)
    try:
        _remove(temporary)
        about = json.loads(_checksums(path).read_text())
        layout._replace(block=about["block"], key=about.get("key")).write(temporary)
        for file in files:
            name = file.relative_to(path)
            if hash_file(temporary / name) != about["files"][name.as_posix()]:
                raise ValueError("the layout has changed")
            write_atomically(file, (temporary / name).read_bytes())
            warnings.warn(f"{file} was damaged and has been restored", stacklevel=3)
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(f"{files[0]} is damaged; delete {path} to recompute it") from None
    finally:
        _remove(temporary)


def zarr_store(path: Path) -> Path | FsspecStore:
    """Convert a local or remote path to a store for Zarr."""
    if isinstance(path, Path):
        return path
    return FsspecStore.from_url(str(path), storage_options=dict(path.storage_options))


def _checksums(path: Path) -> Path:
    """File beside a store with the checksums of its metadata."""
    return path.with_name(f"{path.name}.ready")


def _remove(folder: Path) -> None:
    """Delete a local or remote folder, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmdir(recursive=True)


def _temporary(path: Path) -> Path:
    """Folder beside a store where its metadata is written first."""
    return path.with_name(f".{path.name}.beside")
