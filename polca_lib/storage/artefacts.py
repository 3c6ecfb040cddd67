"""Folders of results with a ``manifest.json`` that records the settings and inputs they were computed from.

Paths may be local or any URL that ``upath`` (fsspec) supports, such as ``s3://bucket/run``.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from filelock import FileLock, Timeout

from polca_lib.storage.hashing import hash_json

FORMAT_VERSION = 3

_IDENTITY = ("format_version", "stage", "config", "parents")  # fields of a manifest that make up the key
_HOST = re.sub(r"\W", "-", platform.node()) or "unknown"
_HOUR = 3600  # seconds after which a partial file of another machine counts as left behind
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class ArtefactMismatch(ValueError):
    """A folder holds results of other settings than requested."""


class DamagedFile(ValueError):
    """A stored file is truncated, changed or lost."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or all of the new content."""
    if not isinstance(path, Path):  # object stores write whole objects
        path.write_bytes(content)
        return
    # Use a unique name, because another process may write the same file at the same time. It says who writes.
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{uuid.uuid4().hex}.partial")
    delete_partials(path.parent, path.name)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def delete_partials(folder: Path, name: str | None = None) -> None:
    """Delete partial files, of one file or any, of ended processes of this machine or unchanged for an hour."""
    for partial in folder.glob(f".{'*' if name is None else glob.escape(name)}.*partial"):
        *_, host, process, _, _ = ("", "", "", *partial.name.split("."))
        with suppress(OSError):  # another process deletes it, too, or may not
            ended = host == _HOST and process.isdecimal() and not psutil.pid_exists(int(process))
            if ended or time.time() - partial.stat().st_mtime > _HOUR:
                partial.unlink()


def is_read_only(folder: Path) -> bool:
    """Whether this process may not write to a local folder."""
    return isinstance(folder, Path) and folder.exists() and not os.access(folder, os.W_OK)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Replace the OSError of a disk or folder that takes no files or no locks by one that says what to do."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        code = error.errno if isinstance(error, OSError) else errno.ENOSYS
        if code not in _NO_WRITING:
            raise
        raise OSError(
            code,
            f"{os.strerror(code)}: it can't be written or locked. Finished results can be read here; to compute, use a "
            "folder on a disk that takes files and locks, such as a local one, and copy there what is finished",
            str(path),
        ) from error


@dataclass(frozen=True)
class Artefact:
    """A folder of results and the key that identifies its settings and inputs."""

    path: Path
    key: str

    @classmethod
    def open(cls, path: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> Artefact:
        """Open the artefact at ``path``, or create it.

        Args:
            stage: name of the stage that computes it.
            config: the settings it depends on, as JSON values.
            parents: keys of its input artefacts, by stage.

        Raises:
            ArtefactMismatch: the manifest is damaged, or has other settings or another format.
        """
        expected = {"format_version": FORMAT_VERSION, "stage": stage, "config": config, "parents": parents}
        expected = json.loads(json.dumps(expected))  # tuples become lists, as in the manifest
        manifest = path / "manifest.json"
        if not manifest.exists():
            with explained(path):
                path.mkdir(parents=True, exist_ok=True)
                write_atomically(manifest, json.dumps({**expected, "software": software()}, indent=1).encode())
            return cls(path, hash_json(expected))
        try:
            stored = json.loads(manifest.read_text())
            if not isinstance(stored, dict):
                raise ValueError("it holds no JSON object")
        except ValueError as error:
            raise ArtefactMismatch(f"{manifest} is damaged ({error}); delete the folder to recompute it") from None
        # Report the first difference; other software may continue the work.
        for name, have, want in differences({name: stored.get(name) for name in expected}, expected):
            raise ArtefactMismatch(
                f"{path} holds {name} = {have!r}, but {name} = {want!r} was requested; "
                "use another folder, or delete this one to recompute it"
            )
        return cls(path, hash_json(expected))

    @classmethod
    def of_stage(
        cls,
        folder: Path,
        stage: str,
        config: Mapping[str, Any],
        parents: Mapping[str, str],
        later: Mapping[str, Any] | None = None,
    ) -> Artefact:
        """Open or create the artefact at :meth:`path_of`; see :meth:`open`.

        Settings in ``later`` came into the key later: an artefact without them, if there is one, is opened instead.
        """
        if later and not (cls.path_of(folder, stage, config, parents) / "manifest.json").exists():
            config = {**config, **later}
        return cls.open(cls.path_of(folder, stage, config, parents), stage, config, parents)

    @staticmethod
    def path_of(folder: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> Path:
        """Folder of an artefact in ``folder``; its name has the hash of all arguments."""
        return folder / f"{stage}-{hash_json([FORMAT_VERSION, stage, config, parents])[:12]}"

    @property
    def config(self) -> dict[str, Any]:
        """Settings it was made with."""
        return json.loads((self.path / "manifest.json").read_text())["config"]

    @property
    def software(self) -> dict[str, str]:
        """Commit, versions and machine that created this artefact."""
        return json.loads((self.path / "manifest.json").read_text())["software"]

    @property
    def seconds(self) -> float:
        """Wall time spent on this artefact so far, summed over all processes."""
        log = self.path / "seconds.txt"
        return sum(map(float, log.read_text().split())) if log.exists() else 0.0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Lock this artefact during the block, and add the wall time of the block to :attr:`seconds`.

        A second process waits until the first one ends. Object stores have no locks: there, both processes do the
        same work and write the same bytes.
        """
        with self._lock():
            if isinstance(self.path, Path):
                delete_partials(self.path)
            start = time.perf_counter()
            try:
                yield
            finally:
                log = self.path / "seconds.txt"
                before = log.read_bytes() if log.exists() else b""
                write_atomically(log, before + f"{time.perf_counter() - start:.2f}\n".encode())

    def _lock(self) -> AbstractContextManager[object]:
        """Acquire the lock of a local folder; the operating system releases it if this process dies."""
        if not isinstance(self.path, Path):
            return nullcontext()
        lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        with explained(self.path / ".lock"):
            try:
                return lock.acquire(timeout=0)
            except Timeout:
                print(f"another process is at work on {self.path}; waiting for it to end", file=sys.stderr, flush=True)
                return lock.acquire()


def key_of(folder: Path) -> str | None:
    """Key of the artefact in a folder, from its manifest; none without a manifest that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return hash_json({name: manifest[name] for name in _IDENTITY})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def provenance(about: Mapping[str, object], stages: Mapping[str, Artefact]) -> pd.DataFrame:
    """Tabulate ``about``, commit and wall time of each stage, and versions of the first, in a column ``value``."""
    rows = dict(about)
    for stage, artefact in stages.items():
        rows[f"{stage}: commit"] = artefact.software["commit"]
        rows[f"{stage}: wall time"] = f"{artefact.seconds:.0f} s"
    versions = next((artefact.software for artefact in stages.values()), {})
    rows |= {name: value for name, value in versions.items() if name != "commit"}
    return pd.DataFrame({"value": {name: str(value) for name, value in rows.items()}})


@cache
def software() -> dict[str, str]:
    """Commit of the checkout, versions of Python and of numerical libraries, and the machine."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformer-lens", "hdbscan", "numpy", "xarray")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str:
    """Short hash of HEAD, and whether this package has local changes."""
    options = {"cwd": Path(__file__).parents[1], "text": True, "stderr": subprocess.DEVNULL}
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], **options).strip()
        changes = subprocess.check_output(["git", "status", "--porcelain", "."], **options).strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
    return f"{head} with local changes" if changes else head


def differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of each field that differs between two nested dictionaries."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted(have.keys() | want.keys()):
            yield from differences(have.get(key), want.get(key), f"{name}.{key}" if name else key)
    elif have != want:
        yield name, have, want
