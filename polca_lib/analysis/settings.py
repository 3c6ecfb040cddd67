"""Settings of an analysis of somebody's own training run, in Python or in a TOML file.

A file can't run code, except by naming a module and a function of it, under ``code.setup``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from upath import UPath

from polca_lib.analysis.engine import EngineName
from polca_lib.derivatives.strategy import Mode, Precision
from polca_lib.method.settings import BasisKind, BasisSettings, ClusteringSettings, Section, few

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ProjectionSettings(Section):
    """What is measured at every checkpoint."""

    curvature: bool = Field(False, description="also b^T H(x) b, which orders 'second' and 'exact' need")
    curvature_examples: int | None = Field(
        None, ge=1, description="examples it is measured on; all if not given. A sample is enough for 'second'"
    )
    mode: Mode = Field("auto", description="of differentiation; 'auto' takes the one with fewer operations")
    precision: Precision = Field("float32", description="of the operands of products with the basis")
    inside_loss: bool = Field(
        True, description="also the loss after the movement inside the basis; takes all vectors at each checkpoint"
    )

    @property
    def curvature_of_all(self) -> bool:
        """Whether curvature is measured on all tokens; gradients are then by-products of the same forward mode."""
        return self.curvature and self.curvature_examples is None

    @model_validator(mode="after")
    def _mode_gives_curvature(self) -> Self:
        if self.curvature_of_all and self.mode == "reverse":
            raise ValueError(
                "projection.mode = 'reverse' gives no second derivatives; allowed with projection.curvature: "
                "'auto', 'forward'"
            )
        return self


class AnalysisSettings(Section):
    """All that an analysis can be told; the defaults need nothing."""

    seed: int = Field(0, ge=0, lt=2**31)
    memory: int | None = Field(
        None, gt=0, description="bytes each worker may take; half of what the device has free if not given"
    )
    threads: int | None = Field(None, gt=0, description="of torch, for each worker; torch's own number if not given")
    steps: tuple[int, ...] | None = Field(None, description="checkpoints to use; all if not given")
    basis: BasisSettings = BasisSettings()
    projection: ProjectionSettings = ProjectionSettings()
    clustering: ClusteringSettings = ClusteringSettings()

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_in_words(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?i?B)\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError(f"memory = {value!r}; allowed: a number of bytes, or text such as '8 GiB' or '500 MB'")
        return int(float(match[1]) * _UNITS[match[2].upper()])

    @model_validator(mode="after")
    def _order_has_its_curvature(self) -> Self:
        order, projection = self.clustering.order, self.projection
        if order in ("second", "exact") and not projection.curvature:
            raise ValueError(
                f"clustering.order = {order!r} needs projection.curvature = true; allowed without: first, trapezoid"
            )
        if order == "exact" and not projection.curvature_of_all:
            raise ValueError(
                "clustering.order = 'exact' needs the curvature of all tokens; leave projection.curvature_examples out"
            )
        return self

    def chosen(self, available: Sequence[int]) -> list[int]:
        """Steps of the checkpoints to use, in training order.

        Raises:
            ValueError: a step without a checkpoint, or fewer than two.
        """
        steps = list(available) if self.steps is None else sorted(set(self.steps))
        if missing := [step for step in steps if step not in set(available)]:
            raise ValueError(f"steps names {missing[0]}, which has no checkpoint; allowed: {few(available)}")
        if len(steps) < 2:
            raise ValueError(f"steps gives {len(steps)} checkpoints; allowed: 2 or more, for there must be a change")
        return steps


class Code(Section):
    """The one place where a file names code."""

    setup: str = Field(
        description="module:function, which returns a polca_lib.Subject; looked for beside the file first"
    )
    arguments: dict[str, Any] = Field({}, description="keywords for the function")

    @field_validator("setup")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError(f"code.setup = {value!r}; allowed: module:function, such as 'my_run:setup'")
        return value


class Source(Section):
    """Where the checkpoints are; paths are relative to the file."""

    kind: Literal["safetensors", "state_dict", "huggingface"]
    path: str = Field(description="a folder; or a repository of the Hugging Face hub, such as EleutherAI/pythia-70m")
    pattern: str | None = Field(None, description="regular expression whose one group is the step, in file names")
    key: str | None = Field(None, description="under which a state_dict lies in its file; found if usual")
    revisions: tuple[str, ...] | None = Field(None, description="of the hub; all that name a step if not given")
    stage: str | None = Field(None, description="of training, where revisions name several")
    keep: bool = Field(True, description="what was downloaded; else it is dropped after use")


class EngineSettings(Section):
    """Who carries out the tasks."""

    name: EngineName = "in-process"
    workers: int | None = Field(None, gt=0)
    address: str | None = None


class RunFile(AnalysisSettings):
    """A TOML file for the command ``polca``."""

    folder: str = Field(description="of results: a path, relative to the file, or a URL that fsspec knows")
    title: str = "POLCA"
    device: str = "cpu"
    code: Code
    checkpoints: Source
    beside: tuple[BasisKind, ...] = Field(
        (), description="other bases, such as random, that are projected in the same pass and clustered, as controls"
    )
    engine: EngineSettings = EngineSettings()
    _file: Path = PrivateAttr(default=Path("polca.toml"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no TOML, or a setting is missing, unknown or not allowed; all of them are named.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; polca init writes one to begin with")
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML: {error}") from None
        try:
            about = cls.model_validate(settings)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc'])) or 'settings'}: {_told(one)}" for one in error.errors()]
            raise ValueError(f"{path} has settings that are not allowed:\n  " + "\n  ".join(told)) from None
        about._file = path.resolve()
        return about

    @property
    def file(self) -> Path:
        """Where it was read."""
        return self._file

    @property
    def results(self) -> Path:
        """The folder of results."""
        return UPath(self.folder) if "://" in self.folder else UPath(self.file.parent / self.folder)

    @property
    def settings(self) -> AnalysisSettings:
        """Those that :class:`polca_lib.analysis.stages.Analysis` takes."""
        return AnalysisSettings.model_validate({name: getattr(self, name) for name in AnalysisSettings.model_fields})


def _told(error: Any) -> str:
    given = error["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return error["msg"].removeprefix("Value error, ") + shown
