"""Checkpoints that others wrote: folders of safetensors, or of ``state_dict`` files."""

from __future__ import annotations

import json
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile

_NESTED = ("model", "state_dict", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt")


class _Folder(ABC):
    """Checkpoints in a folder, each a file, or a folder of its own; the last number in the name is the step."""

    def __init__(self, path: str | Path, token_loss: TokenLoss, device: str = "cpu", *, pattern: str | None = None):
        self.path, self.token_loss, self.device = Path(path), token_loss, device
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no folder; allowed: one that holds checkpoints")
        if pattern is not None and re.compile(pattern).groups != 1:
            raise ValueError(f"pattern = {pattern!r} has {re.compile(pattern).groups} groups; allowed: one, the step")
        self._places: dict[int, Path] = {}
        for place in sorted(self.path.iterdir()):
            if not self._holds_weights(place):
                continue
            found = re.search(pattern, place.name) if pattern else re.search(r"(\d+)\D*$", place.stem)
            if found is None:
                if pattern:  # which says what a checkpoint is
                    continue
                raise ValueError(
                    f"{place} has no step in its name; allowed: names that end in it, such as step-500, or a pattern"
                )
            step = int(found[1])
            if step in self._places:
                raise ValueError(
                    f"{self._places[step].name} and {place.name} in {self.path} are both of step {step}; keep one, or "
                    "give a pattern that tells them apart"
                )
            self._places[step] = place
        if not self._places:
            raise ValueError(f"{self.path} holds no checkpoints; allowed: {self._allowed}")

    _allowed: str

    @abstractmethod
    def _holds_weights(self, place: Path) -> bool: ...

    @abstractmethod
    def _read(self, place: Path) -> Mapping[str, Tensor]: ...

    @abstractmethod
    def _files(self, place: Path) -> list[Path]: ...

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in training order."""
        return sorted(self._places)

    def name(self, step: int) -> str:
        """Path of the checkpoint at ``step``."""
        return str(self._places[step])

    def identity(self, step: int) -> str:
        """Names and sizes of the files of the checkpoint at ``step``."""
        files = self._files(self._places[step])
        return "; ".join(f"{file.relative_to(self.path)}: {file.stat().st_size}" for file in files)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``.

        Raises:
            DamagedFile: the file can't be read.
            ValueError: the checkpoint is of another model, or holds something else than tensors.
        """
        tensors = _unwrapped(self._read(self._places[step]))
        try:
            return self.token_loss.flatten(tensors).to(self.device)
        except ValueError as error:
            raise ValueError(f"{self.name(step)} does not fit the model: {error}") from None


class SafetensorsFolder(_Folder):
    """Safetensors files named by step, or folders with ``model.safetensors`` or a sharded ``.index.json``.

    Args:
        path: the folder.
        token_loss: of the model.
        device: where parameter vectors are put.
        pattern: regular expression, searched in the name of a file or folder; its one group is the step. Without one
            the last number in the name is.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no checkpoints, one without a step, or two of the same.
    """

    _allowed = "files step-500.safetensors, or folders checkpoint-500 with model.safetensors or its index"

    def _holds_weights(self, place: Path) -> bool:
        return place.suffix == ".safetensors" or (place.is_dir() and any(place.glob("*.safetensors*")))

    def _files(self, place: Path) -> list[Path]:
        if place.is_file():
            return [place]
        index = place / "model.safetensors.index.json"
        if not index.exists():
            files = sorted(place.glob("*.safetensors"))
            if len(files) != 1:
                raise ValueError(
                    f"{place} has {len(files)} safetensors files and no index; allowed: one file, or an index"
                )
            return files
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{index} is damaged ({error})") from None
        if odd := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {odd[0]!r}; allowed: files beside it")
        return [place / name for name in names]

    def _read(self, place: Path) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in self._files(place):
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise DamagedFile(f"{path} is damaged, or can't be read ({error})") from None
        return found


class StateDictFolder(_Folder):
    """Files that ``torch.save`` made of a ``state_dict``; nothing but tensors and plain values is ever loaded of them.

    Args:
        path: the folder, with files .pt, .pth, .bin or .ckpt.
        token_loss: of the model.
        device: where parameter vectors are put.
        pattern: see :class:`SafetensorsFolder`.
        key: under which the ``state_dict`` lies in its file; ``model``, ``state_dict`` and ``model_state_dict`` are
            found without.

    Raises:
        FileNotFoundError, ValueError: see :class:`SafetensorsFolder`.
    """

    _allowed = f"files that end in {', '.join(_STATE_DICTS)}"

    def __init__(
        self,
        path: str | Path,
        token_loss: TokenLoss,
        device: str = "cpu",
        *,
        pattern: str | None = None,
        key: str | None = None,
    ):
        super().__init__(path, token_loss, device, pattern=pattern)
        self._key = key

    def _holds_weights(self, place: Path) -> bool:
        return place.is_file() and place.suffix in _STATE_DICTS

    def _files(self, place: Path) -> list[Path]:
        return [place]

    def _read(self, place: Path) -> Mapping[str, Tensor]:
        try:
            content: Any = torch.load(place, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            told = str(error).strip().splitlines()
            reason = next((line.strip() for line in told if "Unsupported" in line or "GLOBAL" in line), told[0])
            raise ValueError(
                f"{place} holds more than tensors and plain values ({reason}), and loading that could run any code; "
                "save model.state_dict() alone, or convert it to safetensors where you trust it"
            ) from None
        except (RuntimeError, EOFError, OSError, KeyError) as error:
            raise DamagedFile(f"{place} is damaged, or can't be read ({error})") from None
        if self._key is not None:
            if not isinstance(content, Mapping) or self._key not in content:
                has = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
                raise ValueError(f"{place} has nothing under key = {self._key!r}; it has {has}")
            content = content[self._key]
        elif isinstance(content, Mapping):
            content = next((content[k] for k in _NESTED if isinstance(content.get(k), Mapping)), content)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{place} holds no state_dict, tensors by name; say under which key it lies")
        return content


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names as the model has them, without what wrappers put before."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors
