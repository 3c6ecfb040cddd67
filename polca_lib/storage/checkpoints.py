"""What every source of checkpoints offers, and the format that this library writes: safetensors with a checksum.

Checkpoints that others wrote are read in :mod:`polca_lib.storage.checkpoint_folders` and
:mod:`polca_lib.storage.huggingface`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Protocol

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile, explained, write_atomically
from polca_lib.storage.hashing import hash_tensors, hash_vector
from polca_lib.storage.names import align


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **about: object) -> None:
    """Write tensors atomically as safetensors, with a SHA-256 of them and what they are ``about``, such as a step."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    record = {name: str(value) for name, value in about.items()}
    record["sha256"] = hash_tensors(tensors, record)
    # One entry of metadata, because safetensors writes several in no fixed order.
    write_atomically(path, save(tensors, metadata={"polca": json.dumps(record)}))


def load_tensors(path: Path, device: str = "cpu", **about: object) -> dict[str, Tensor]:
    """Read the tensors that :func:`save_tensors` wrote, and verify their checksum.

    Args:
        about: what the tensors must be about. Files of version 0.2 and earlier do not say it.

    Raises:
        FileNotFoundError: the file is missing.
        DamagedFile: the file is truncated, its content has changed, or it belongs to another step.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(f"{path} is damaged ({error}); delete it to recompute it") from None
    try:
        record = dict(json.loads(metadata.get("polca", "{}")))
    except (ValueError, TypeError):
        record = {}
    older = metadata.keys() == {"sha256"} and metadata["sha256"] == hash_tensors(tensors)
    if not older and record.pop("sha256", None) != hash_tensors(tensors, record):
        raise DamagedFile(f"{path} is damaged (its checksum does not match); delete it to recompute it")
    for name, value in () if older else about.items():
        if record.get(name) != str(value):
            raise DamagedFile(
                f"{path} holds {name} {record.get(name)}, but {name} {value} belongs there: were files exchanged? Put "
                "them back, or delete it to recompute it"
            )
    return {name: t.to(device) for name, t in tensors.items()}


class Checkpoints(Protocol):
    """Checkpoints of one model, wherever they are stored.

    Args:
        token_loss: loss of the model; it defines the order and shapes of the parameters.
        device: device of the parameter vectors.
    """

    token_loss: TokenLoss
    device: str

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Read the flat parameter vector at ``step`` to ``device``; the caller may modify it.

        Raises:
            OSError: the checkpoint is missing, or its download fails.
            DamagedFile: the checkpoint can't be read, or its checksum does not match.
            ValueError: the checkpoint does not fit the model.
        """

    def name(self, step: int) -> str:
        """Path of the checkpoint, or its repository and revision, for messages."""

    def identity(self, step: int) -> str:
        """Fingerprint of the checkpoint that is cheap to compute: file names and sizes, or a commit."""

    def at_hand(self, step: int) -> bool:
        """Whether :meth:`theta` only reads a file: nothing is downloaded or trained."""
        return True

    def header(self, step: int) -> Mapping[str, Tensor] | None:
        """Names, shapes and dtypes of a checkpoint, on device ``meta``; None if they can only be read with values."""
        return None

    def notes(self) -> list[str]:
        """What was left aside or ignored in reading, for the provenance of the results."""
        return []


def flatten(
    checkpoints: Checkpoints, step: int, tensors: Mapping[str, Tensor], rename: Mapping[str, str] | None = None
) -> Float[Tensor, " d"]:
    """Flatten the tensors of a checkpoint, see :func:`polca_lib.storage.names.align`; errors name the checkpoint."""
    try:
        aligned, _ = align(tensors, checkpoints.token_loss, rename)
        theta = checkpoints.token_loss.flatten(aligned).detach()
        return theta if theta.is_meta else theta.to(checkpoints.device)
    except ValueError as error:
        raise type(error)(f"{checkpoints.name(step)} does not fit the model: {error}") from None


def file_sizes(files: Iterable[Path], folder: Path) -> str:
    """List paths relative to ``folder`` and sizes in bytes, as in ``a: 8; b: 16``."""
    return "; ".join(f"{file.relative_to(folder)}: {file.stat().st_size}" for file in files)


class CheckpointFolder(Checkpoints):
    """Checkpoints ``step-00000020.safetensors`` of one model in a folder."""

    def __init__(self, path: Path, token_loss: TokenLoss, device: str = "cpu"):
        self.path, self.token_loss, self.device = path, token_loss, device

    def file(self, step: int) -> Path:
        """Path of the checkpoint at ``step``."""
        return self.path / f"step-{step:08d}.safetensors"

    def name(self, step: int) -> str:
        return str(self.file(step))

    def identity(self, step: int) -> str:
        return file_sizes([self.file(step)], self.path)

    @property
    def steps(self) -> list[int]:
        matches = (re.fullmatch(r"step-(\d{8})\.safetensors", path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Store the parameters at ``step``."""
        save_tensors(self.file(step), parameters, step=step)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        return flatten(self, step, load_tensors(self.file(step), self.device, step=step))


@dataclass(frozen=True)
class ChecksummedCheckpoints(Checkpoints):
    """Checkpoints whose SHA-256 is stored in ``folder`` on the first read and verified on every later read."""

    inner: Checkpoints
    folder: Path

    token_loss = property(attrgetter("inner.token_loss"))
    device = property(attrgetter("inner.device"))
    steps = property(attrgetter("inner.steps"))
    name = property(attrgetter("inner.name"))
    identity = property(attrgetter("inner.identity"))

    def at_hand(self, step: int) -> bool:
        # Checkpoints that others wrote may lack the method.
        return not hasattr(self.inner, "at_hand") or self.inner.at_hand(step)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        theta = self.inner.theta(step)
        digest = hash_vector(theta)
        path = self._path(step)
        if not path.exists():
            with explained(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, digest.encode())
        elif path.read_bytes() != digest.encode():
            raise DamagedFile(
                f"{self.name(step)} is not what it was when it was first read (its checksum does not match); restore "
                f"it, or use another folder than {self.folder.parent} for the new content"
            )
        return theta

    def notes(self) -> list[str]:
        """See :meth:`Checkpoints.notes`; equal checkpoints are noted, too."""
        equal = [f"the same weights at steps {', '.join(map(str, steps))}" for steps in self.duplicates()]
        return [*getattr(self.inner, "notes", list)(), *equal]

    def duplicates(self) -> list[list[int]]:
        """Groups of steps with the same weights, among the checkpoints that were read so far."""
        groups: dict[str, list[int]] = {}
        for step in self.steps:
            if digest := self._digest(step):
                groups.setdefault(digest, []).append(step)
        return [steps for steps in groups.values() if len(steps) > 1]

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:012d}.sha256"

    def _digest(self, step: int) -> str | None:
        """Checksum of the weights at ``step``; none before the first read."""
        path = self._path(step)
        return path.read_text().split("\n")[0] if path.exists() else None
