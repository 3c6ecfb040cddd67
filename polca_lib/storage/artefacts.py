"""Results on disk: each knows what it was made from, and half-made ones resume.

An artefact is a folder with a ``manifest.json`` that holds the configuration of its stage and the keys of
the artefacts it came from. Arrays that are computed piece by piece lie in a
:class:`polca_lib.storage.pieces.PieceStore`.

Paths may be local, or of anything that ``upath`` (fsspec) knows, such as ``s3://bucket/run``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from polca_lib.storage.hashing import hash_json

FORMAT_VERSION = 3


class ArtefactMismatch(ValueError):
    """A folder holds something else than what was asked for."""


class DamagedFile(ValueError):
    """A stored file is truncated, changed or lost."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a later run, sees all of it or nothing."""
    if not isinstance(path, Path):  # an object store writes whole objects or none
        path.write_bytes(content)
        return
    # Of a name of its own, for another process may write the same file at the same time.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
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
        return cls(path, hash_json(wanted))

    @classmethod
    def of_stage(cls, folder: Path, stage: str, config: Mapping[str, Any], parents: Mapping[str, str]) -> Artefact:
        """Open, or start, the artefact of a stage in ``folder``, named by the hash of all that it depends on."""
        name = hash_json([FORMAT_VERSION, stage, config, parents])[:12]
        return cls.open(folder / f"{stage}-{name}", stage, config, parents)

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
    def at_work(self) -> Iterator[None]:
        """Keep other processes from this artefact, and add the wall time of the block to :attr:`seconds`.

        A second process waits until the first is done, or has died. Object stores know no locks: there two processes
        do the same work twice, and write the same bytes.
        """
        with self._locked():
            if isinstance(self.path, Path):
                for left in self.path.glob(".*.partial"):  # by processes that were killed
                    left.unlink(missing_ok=True)
            start = time.perf_counter()
            try:
                yield
            finally:
                log = self.path / "seconds.txt"
                before = log.read_bytes() if log.exists() else b""
                write_atomically(log, before + f"{time.perf_counter() - start:.2f}\n".encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not isinstance(self.path, Path):
            yield
            return
        # The system lets go of it when the process dies: no clock and no process number is asked.
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is at work on {self.path}; waiting for it to end", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def provenance(about: Mapping[str, object], stages: Mapping[str, Artefact]) -> pd.DataFrame:
    """What made results, a column ``value``: ``about`` them, and commit, time and versions of each stage computed."""
    rows = dict(about)
    for stage, artefact in stages.items():
        rows[f"{stage}: commit"] = artefact.software["commit"]
        rows[f"{stage}: wall time"] = f"{artefact.seconds:.0f} s"
    for artefact in [*stages.values()][:1]:
        rows |= {name: value for name, value in artefact.software.items() if name != "commit"}
    return pd.DataFrame({"value": {name: str(value) for name, value in rows.items()}})


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
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
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
