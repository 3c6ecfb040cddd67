"""Checkpoints written by other programs: folders of safetensors or ``state_dict`` files."""

import json
import pickle
import re
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoints import Checkpoints, file_sizes, flatten
from polca_lib.storage.huggingface import read_pretrained
from polca_lib.storage.names import NamesDiffer, align, check_expressions, few, read_step, steps_of, without_number

_NESTED = ("model", "state_dict", "model_state_dict", "module", "net", "network")
# Hidden files and states of the optimiser; files of models in several files; formats with a file for each process.
_NO_WEIGHTS = re.compile(
    r"\.|(.*[_.-])?(optim|optimi[sz]er|scheduler|scaler|sampler|rng_state|random_states|training_args)s?(?![a-z])",
    re.IGNORECASE,
)
_ANY_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_BY_PROCESS = re.compile(r"mp_rank_\d|zero_pp_rank_\d|\.distcp$")


@dataclass(eq=False)
class _Folder(Checkpoints):
    """A folder of checkpoints, each a file or a subfolder whose name says the step."""

    path: str | Path
    token_loss: TokenLoss | None
    device: str = "cpu"
    _: KW_ONLY
    pattern: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    _suffixes: ClassVar[tuple[str, ...]] = ()
    _allowed = _index = ""  # for messages; name of the index of a checkpoint in several files

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        check_expressions("rename", self.rename)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is no folder; allowed: a folder that holds checkpoints")
        # Find the checkpoints, also those that can't be read, and their steps.
        entries = sorted(self.path.iterdir())
        if any(_BY_PROCESS.search(path.name) for path in entries):
            self._refuse(self.path)
        found = {path.name: path for path in entries if not _SHARD.search(path.name) and self._is_checkpoint(path)}
        steps, self._aside = steps_of(found, str(self.path), self.pattern)
        if not steps:
            there = few(path.name for path in entries) or "nothing"
            raise ValueError(f"{self.path} holds no checkpoints; allowed: {self._allowed}. It holds {there}")
        self._paths: dict[int, Path] = {}
        for name, step in steps.items():
            path = found[name]
            if step in self._paths:
                raise ValueError(
                    f"{self._paths[step].name} and {name} in {self.path} are both of step {step}; keep one, or set a "
                    "pattern that matches only one"
                )
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is a link to {path.readlink()}, which is missing; restore or delete it"
                )
            if not self._holds_weights(path):
                self._refuse(path)
            self._paths[step] = path
        self._look_for_others([path for path in entries if path.name not in found], found)
        self._aside += ["a model in several files"] * any(_SHARD.search(path.name) for path in entries)
        if self._aside and self.pattern is None:
            warnings.warn(f"left aside in {self.path}: {few(self._aside)}", stacklevel=3)

    def _look_for_others(self, entries: Sequence[Path], found: Mapping[str, Path]) -> None:
        """Refuse checkpoints of another format, named as those found are; leave aside those without weights."""
        alike = {without_number(name) for name in found}
        for path in entries:
            step = read_step(path.name)[0]
            if step is None or step in self._paths or without_number(path.name) not in alike:
                continue
            if self.pattern is not None and not re.search(self.pattern, path.name):
                continue
            files = path.iterdir() if path.is_dir() else [path]
            if any(file.suffix in _ANY_WEIGHTS and not _NO_WEIGHTS.match(file.name) for file in files):
                raise ValueError(
                    f"{path} has its weights in another format than {few(found, 1)}; allowed in one folder: "
                    f"{self._allowed}. Convert it, or leave it out with a pattern"
                )
            self._aside += [f"{path.name}, without weights"] * path.is_dir()

    def _is_checkpoint(self, path: Path) -> bool:
        """Whether a file or folder is a checkpoint, or would be if it could be read."""
        if path.name.startswith("."):
            return False
        if path.is_dir() and not self._holds_weights(path):
            return bool(re.search(r"\d", path.name)) and any(
                _BY_PROCESS.search(file.name) for level in ("*", "*/*") for file in path.glob(level)
            )
        return path.suffix in ("", *self._suffixes) if not path.exists() else self._holds_weights(path)

    def _refuse(self, path: Path) -> None:
        raise ValueError(
            f"{path} has a file for each process (DeepSpeed, Megatron, FSDP); convert it to one file with "
            "zero_to_fp32.py of DeepSpeed, with the converter of Megatron, or, for .distcp, with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch; or leave it out with a pattern"
        )

    def _holds_weights(self, path: Path) -> bool:
        if path.is_dir():
            return (path / self._index).exists() or bool(self._weights(path))
        return path.suffix in self._suffixes and not _NO_WEIGHTS.match(path.name)

    def _weights(self, folder: Path) -> list[Path]:
        """Files of a folder that hold weights."""
        files = sorted(path for path in folder.iterdir() if path.is_file() and self._holds_weights(path))
        return [path for path in files if not _BY_PROCESS.search(path.name)]

    @abstractmethod
    def _load(self, path: Path, *, header: bool) -> Mapping[str, Tensor]:
        """Read the tensors of a file; for a header, without their values if possible."""

    def _files(self, checkpoint: Path) -> list[Path]:
        if not checkpoint.is_dir():
            return [checkpoint]
        # Without an index, the folder must hold a single file.
        index = checkpoint / self._index
        if not index.exists():
            files = self._weights(checkpoint)
            if len(files) != 1:
                names = few(file.name for file in files)
                raise ValueError(
                    f"{checkpoint} has weights in {names}, and no {self._index}; allowed: one, or an index"
                )
            return files
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{index} is damaged ({error})") from None
        # Refuse paths that leave the folder, and missing files.
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {outside[0]!r}; allowed: files beside it")
        if missing := [name for name in names if not (checkpoint / name).exists()]:
            raise FileNotFoundError(f"{index} names {few(missing)}: missing; copy or download what is missing")
        return [checkpoint / name for name in names]

    @property
    def steps(self) -> list[int]:
        return sorted(self._paths)

    def name(self, step: int) -> str:
        return str(self._paths[step])

    def identity(self, step: int) -> str:
        return file_sizes(self._files(self._paths[step]), self.path)

    def theta(self, step: int) -> Float[Tensor, " d"]:
        try:
            return flatten(self, step, self.tensors(step), self.rename)
        except NamesDiffer:
            if (model := self._pretrained(step)) is None:
                raise
        # transformers writes the weights of some models under other names than the model has.
        source = {"pretrained_model_name_or_path": self.name(step), "use_safetensors": ".bin" not in self._suffixes}
        return flatten(self, step, read_pretrained(self.name(step), model, source, self.token_loss))

    def header(self, step: int) -> dict[str, Tensor] | None:
        """Tensors of a checkpoint by names of the model, on device ``meta``: shapes and dtypes without values.

        Nothing is returned for a checkpoint that only transformers can read. Without a model, names are those of the
        checkpoint.

        Raises:
            OSError, ValueError: as :meth:`theta`, if names or shapes do not fit the model.
        """
        tensors = self.tensors(step, header=True)
        if self.token_loss is None:
            return tensors
        try:
            flatten(self, step, tensors, self.rename)
        except NamesDiffer:
            if self._pretrained(step) is None:
                raise
            return None
        return align(tensors, self.token_loss, self.rename)[0]

    def notes(self) -> list[str]:
        """Names that were left aside; buffers that are ignored, and weights that are the model's own, at the start."""
        notes = [f"left aside: {few(self._aside)}"] if self._aside else []
        with suppress(OSError, ValueError):
            aligned, spare = align(self.tensors(self.steps[0], header=True), self.token_loss, self.rename)
            names = self.token_loss.names
            there = {names[name] for name in aligned}
            absent = [name for name in self.token_loss.model.state_dict() if names.get(name, name) not in there]
            notes += [f"ignored in checkpoints: {few(spare)}"] if spare else []
            notes += [f"not in checkpoints, as in the model: {few(absent)}"] if absent else []
        return notes

    def tensors(self, step: int, *, header: bool = False) -> dict[str, Tensor]:
        """Tensors of a checkpoint by the names they have there; for a header, without values on device ``meta``."""
        tensors: dict[str, Tensor] = {}
        for path in self._files(self._paths[step]):
            try:
                tensors |= self._load(path, header=header)
            except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as error:
                raise DamagedFile(
                    f"{path} is damaged, or can't be read ({str(error) or type(error).__name__})"
                ) from None
        return {name: tensor.to("meta") for name, tensor in tensors.items()} if header else tensors

    def _pretrained(self, step: int) -> type | None:
        """Class of the model if transformers has written the checkpoint and can read it."""
        if self.rename or not (self._paths[step] / "config.json").is_file():
            return None
        from transformers import PreTrainedModel

        model = getattr(self.token_loss.model, "_orig_mod", self.token_loss.model)
        return type(model) if isinstance(model, PreTrainedModel) else None


class SafetensorsFolder(_Folder):
    """Safetensors files named by step, or subfolders with ``model.safetensors`` or a sharded ``.index.json``.

    The step is the number after ``step``, ``global_step`` or ``iter`` in the name of a file or subfolder, else the only
    number. Names of parameters may differ from the model's by wrappers, see :func:`polca_lib.storage.names.align`.

    Args:
        token_loss, device: see :class:`polca_lib.storage.checkpoints.Checkpoints`.
        pattern: regular expression to search in each file or folder name; its only group is the step.
        rename: regular expressions and replacements that turn names of parameters into those of the model, such as
            ``{"^backbone[.]": ""}``. A parameter whose name becomes empty is left out.

    Raises:
        FileNotFoundError: the folder is missing, or a link leads nowhere.
        ValueError: the folder holds no checkpoints, it is not clear which number is the step, two have the same step, a
            setting is not allowed, or the format is not supported.
    """

    _allowed = "files step-500.safetensors, or folders checkpoint-500 with model.safetensors or its index"
    _suffixes = (".safetensors",)
    _index = "model.safetensors.index.json"

    def _load(self, path: Path, *, header: bool) -> Mapping[str, Tensor]:
        if not header:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: part.get_shape() for name, part in slices.items()}
            # An empty slice has the dtype; a single number can't be sliced.
            return {
                name: slices[name][:0].new_empty(shape, device="meta") if shape else file.get_tensor(name)
                for name, shape in shapes.items()
            }


@dataclass(eq=False)
class StateDictFolder(_Folder):
    """Files .pt, .pth, .bin or .ckpt with a ``state_dict``, or subfolders with one; only plain values are loaded.

    Args:
        token_loss, device, pattern, rename: see :class:`SafetensorsFolder`.
        key: key of the ``state_dict`` in its file, such as ``ema`` or ``ema.weights``; not needed for ``model``,
            ``state_dict``, ``model_state_dict``, ``module``, ``net`` and ``network``.

    Raises:
        FileNotFoundError, ValueError: see :class:`SafetensorsFolder`.
    """

    _allowed = (
        "files that end in .pt, .pth, .bin or .ckpt, or folders checkpoint-500 with pytorch_model.bin or its index"
    )
    _suffixes = (".pt", ".pth", ".bin", ".ckpt")
    _index = "pytorch_model.bin.index.json"

    key: str | None = None

    def _load(self, path: Path, *, header: bool) -> Mapping[str, Tensor]:
        # Load without running pickled code. A header maps the file into memory, which old formats do not allow.
        mapped = header and zipfile.is_zipfile(path)
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            lines = str(error).strip().splitlines()
            reason = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
            raise ValueError(
                f"{path} holds more than tensors and plain values ({reason}), and loading that could run any "
                "code; save model.state_dict() alone, or convert it to safetensors where you trust it"
            ) from None
        # Find the state_dict in the content.
        whole = isinstance(content, Mapping) and self.key in content
        for key in [] if self.key is None else [self.key] if whole else self.key.split("."):
            if not isinstance(content, Mapping) or key not in content:
                keys = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
                raise ValueError(f"{path} has nothing under key = {self.key!r}; it has {keys}")
            content = content[key]
        while isinstance(content, Mapping) and (keys := [key for key in _NESTED if _has_tensors(content.get(key))]):
            if len(keys) > 1:
                raise ValueError(f"{path} holds weights under {' and '.join(keys)}; say which with key")
            content = content[keys[0]]
        if isinstance(content, Mapping):  # modules may store anything as extra state
            extra = {name: torch.empty(0) for name in content if str(name).endswith("_extra_state")}
            content = {**content, **extra}
        items = content.items() if isinstance(content, Mapping) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
            raise ValueError(f"{path} holds no state_dict, tensors by name; say under which key it is stored")
        return content


def _has_tensors(content: Any) -> bool:
    """Whether a mapping holds tensors, or mappings that do."""
    values = content.values() if isinstance(content, Mapping) else ()
    return any(isinstance(value, Tensor) or _has_tensors(value) for value in values)
