"""Checkpoints of a training run: one safetensors file per step, with a checksum inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile, write_atomically
from polca_lib.storage.hashing import hash_tensors, hash_vector


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as safetensors, with the SHA-256 of their bytes in the metadata."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, save(tensors, metadata={"sha256": hash_tensors(tensors)}))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is truncated, or its bytes are not those that were written.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(f"{path} is damaged ({error}); delete it to have it recomputed") from None
    if checksum != hash_tensors(tensors):
        raise DamagedFile(f"{path} is damaged (its checksum does not match); delete it to have it recomputed")
    return {name: t.to(device) for name, t in tensors.items()}


class Checkpoints(Protocol):
    """Checkpoints of one model, wherever they lie."""

    token_loss: TokenLoss
    device: str

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in training order."""

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``, on ``device``; the caller may change it."""

    def name(self, step: int) -> str:
        """What messages call the checkpoint at ``step``."""

    def identity(self, step: int) -> str:
        """Fingerprint of the checkpoint at ``step`` that needs no reading of it all."""


class CheckpointFolder:
    """Checkpoints ``step-00000020.safetensors`` of one model in a folder.

    Args:
        path: the folder.
        token_loss: of the model, which gives the order and shapes of the parameters.
        device: where parameter vectors are put.
    """

    def __init__(self, path: Path, token_loss: TokenLoss, device: str = "cpu"):
        self.path, self.token_loss, self.device = path, token_loss, device

    def file(self, step: int) -> Path:
        """Path of the checkpoint at ``step``."""
        return self.path / f"step-{step:08d}.safetensors"

    def name(self, step: int) -> str:
        """Path of the checkpoint at ``step``."""
        return str(self.file(step))

    def identity(self, step: int) -> str:
        """Name and size of the file at ``step``; its checksum is inside."""
        return f"{self.file(step).name}: {self.file(step).stat().st_size}"

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in training order."""
        found = (re.fullmatch(r"step-(\d{8})\.safetensors", p.name) for p in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Store the parameters at ``step``."""
        save_tensors(self.file(step), parameters)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``.

        Raises:
            FileNotFoundError, DamagedFile: see :func:`load_tensors`.
            ValueError: the checkpoint is of another model.
        """
        try:
            return self.token_loss.flatten(load_tensors(self.file(step), self.device))
        except DamagedFile:
            raise
        except ValueError as error:
            raise ValueError(f"{self.file(step)} is a checkpoint of another model: {error}") from None


@dataclass(frozen=True)
class ChecksummedCheckpoints:
    """Checkpoints whose checksums are kept when they are first read: what changes afterwards is refused."""

    inner: Checkpoints
    folder: Path

    @property
    def token_loss(self) -> TokenLoss:
        """Of the model."""
        return self.inner.token_loss

    @property
    def device(self) -> str:
        """Where parameter vectors are put."""
        return self.inner.device

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in training order."""
        return self.inner.steps

    def name(self, step: int) -> str:
        """What messages call the checkpoint at ``step``."""
        return self.inner.name(step)

    def identity(self, step: int) -> str:
        """Fingerprint of the checkpoint at ``step`` that needs no reading of it all."""
        return self.inner.identity(step)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``.

        Raises:
            DamagedFile: it is not what it was when it was first read.
        """
        theta = self.inner.theta(step)
        digest = hash_vector(theta)
        kept = self.folder / f"{step:012d}.sha256"
        if not kept.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, digest.encode())
        elif kept.read_bytes() != digest.encode():
            raise DamagedFile(
                f"{self.name(step)} is not what it was when it was first read (its checksum does not match); put it "
                f"back, or use another folder than {self.folder.parent} for what it is now"
            )
        return theta
