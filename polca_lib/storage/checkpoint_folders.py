"""Checkpoints written by other programs: folders of safetensors or ``state_dict`` files."""

import json
import pickle
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoints import Checkpoints, file_sizes, flatten

_NESTED = ("model", "state_dict", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(eq=False)
class _Folder(Checkpoints):
    """A folder of checkpoints, each a file or a subfolder; the last number in the name is the step."""

    path: str | Path
    token_loss: TokenLoss
    device: str = "cpu"
    _: KW_ONLY
    pattern: str | None = None
    _allowed = ""

    def __post_init__(self) -> None:
        self.path, pattern = Path(self.path), self.pattern
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no folder; allowed: a folder that holds checkpoints")
        if pattern is not None and (groups := re.compile(pattern).groups) != 1:
            raise ValueError(f"pattern = {pattern!r} has {groups} groups; allowed: one, the step")
        self._paths: dict[int, Path] = {}
        for checkpoint in filter(self._holds_weights, sorted(self.path.iterdir())):
            # Read the step from the name. A pattern also selects checkpoints: skip the names it does not match.
            match = re.search(pattern, checkpoint.name) if pattern else re.search(r"(\d+)\D*$", checkpoint.stem)
            if match is None and pattern:
                continue
            if match is None:
                raise ValueError(f"{checkpoint} has no step in its name; allowed: names such as step-500, or a pattern")
            # Refuse two checkpoints of the same step.
            step = int(match[1])
            if step in self._paths:
                raise ValueError(
                    f"{self._paths[step].name} and {checkpoint.name} in {self.path} are both of step {step}; keep one, "
                    "or set a pattern that matches only one"
                )
            self._paths[step] = checkpoint
        if not self._paths:
            raise ValueError(f"{self.path} holds no checkpoints; allowed: {self._allowed}")

    @abstractmethod
    def _holds_weights(self, path: Path) -> bool: ...

    @abstractmethod
    def _load(self, path: Path) -> Mapping[str, Tensor]: ...

    def _files(self, checkpoint: Path) -> list[Path]:
        return [checkpoint]

    @property
    def steps(self) -> list[int]:
        return sorted(self._paths)

    def name(self, step: int) -> str:
        return str(self._paths[step])

    def identity(self, step: int) -> str:
        return file_sizes(self._files(self._paths[step]), self.path)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        tensors: dict[str, Tensor] = {}
        for path in self._files(self._paths[step]):
            try:
                tensors |= self._load(path)
            except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as error:
                raise DamagedFile(f"{path} is damaged, or can't be read ({error})") from None
        return flatten(self, step, _unwrapped(tensors))


class SafetensorsFolder(_Folder):
    """Safetensors files named by step, or subfolders with ``model.safetensors`` or a sharded ``.index.json``.

    Args:
        token_loss, device: see :class:`polca_lib.storage.checkpoints.Checkpoints`.
        pattern: regular expression to search in each file or folder name; its only group is the step. By default, the
            last number in the name is the step.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: the folder holds no checkpoints, a checkpoint without a step, or two of the same step.
    """

    _allowed = "files step-500.safetensors, or folders checkpoint-500 with model.safetensors or its index"

    def _holds_weights(self, path: Path) -> bool:
        return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors*")))

    def _files(self, checkpoint: Path) -> list[Path]:
        if checkpoint.is_file():
            return [checkpoint]
        # Without an index, the folder must hold a single file.
        index = checkpoint / "model.safetensors.index.json"
        if not index.exists():
            files = sorted(checkpoint.glob("*.safetensors"))
            if len(files) != 1:
                raise ValueError(
                    f"{checkpoint} has {len(files)} safetensors files and no index; allowed: one file, or an index"
                )
            return files
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{index} is damaged ({error})") from None
        # Refuse paths that leave the folder.
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {outside[0]!r}; allowed: files beside it")
        return [checkpoint / name for name in names]

    _load = staticmethod(load_file)


@dataclass(eq=False)
class StateDictFolder(_Folder):
    """Files .pt, .pth, .bin or .ckpt with a ``state_dict``; only tensors and plain values are loaded.

    Args:
        token_loss, device, pattern: see :class:`SafetensorsFolder`.
        key: key of the ``state_dict`` in its file; not needed for ``model``, ``state_dict`` and ``model_state_dict``.

    Raises:
        FileNotFoundError, ValueError: see :class:`SafetensorsFolder`.
    """

    _allowed = f"files that end in {', '.join(_STATE_DICTS)}"

    key: str | None = None

    def _holds_weights(self, path: Path) -> bool:
        return path.is_file() and path.suffix in _STATE_DICTS

    def _load(self, path: Path) -> Mapping[str, Tensor]:
        # Load without running pickled code.
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            lines = str(error).strip().splitlines()
            reason = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
            raise ValueError(
                f"{path} holds more than tensors and plain values ({reason}), and loading that could run any "
                "code; save model.state_dict() alone, or convert it to safetensors where you trust it"
            ) from None
        # Find the state_dict in the content.
        if self.key is not None:
            if not isinstance(content, Mapping) or self.key not in content:
                keys = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
                raise ValueError(f"{path} has nothing under key = {self.key!r}; it has {keys}")
            content = content[self.key]
        elif isinstance(content, Mapping):
            content = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds no state_dict, tensors by name; say under which key it is stored")
        return content


def _unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove the prefixes of wrappers from the names, so that they are those of the model."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors
