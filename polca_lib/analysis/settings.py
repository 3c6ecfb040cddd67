"""Settings of an analysis of any training run, in Python or in a TOML file.

A file can only run code by naming a function under ``code.setup``, and that function may be any: run only files that
you trust.
"""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from upath import UPath

from polca_lib.analysis.engine import EngineName
from polca_lib.derivatives.strategy import Mode, Precision
from polca_lib.method.settings import BasisKind, BasisSettings, ClusteringSettings, Section, few_steps, unknown_name

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ProjectionSettings(Section):
    """Quantities to measure at each checkpoint."""

    curvature: bool = Field(False, description="measure b^T H(x) b, which orders 'second' and 'exact' need")
    curvature_examples: int | None = Field(
        None, ge=1, description="examples to measure curvature on; all if not given; a sample is enough for 'second'"
    )
    mode: Mode = Field("auto", description="mode of differentiation; 'auto' picks the one with fewer operations")
    precision: Precision = Field(
        "float32", description="precision of operands in products with the basis; 'auto' is bfloat16 where that pays"
    )
    inside_loss: bool = Field(
        True, description="measure the loss after the movement inside the basis; reads all vectors at each checkpoint"
    )
    storage: Literal["float32", "float16"] = Field(
        "float32", description="precision of derivatives on disk; 'float16' halves the files, see product_error"
    )

    @property
    def curvature_of_all(self) -> bool:
        """Whether to measure curvature on all tokens; the same pass in forward mode then gives the gradients."""
        return self.curvature and self.curvature_examples is None

    def differentiation(self, order: int) -> dict[str, Any]:
        """Keywords of :func:`polca_lib.derivatives.strategy.choose`; second derivatives need forward mode."""
        return {"order": order, "mode": self.mode if order == 1 else "forward", "precision": self.precision}

    @model_validator(mode="after")
    def _mode_gives_curvature(self) -> Self:
        if self.curvature_of_all and self.mode == "reverse":
            raise ValueError(
                "projection.mode = 'reverse' gives no second derivatives; allowed with projection.curvature: "
                "'auto', 'forward'"
            )
        return self


class AnalysisSettings(Section):
    """Settings of an analysis; the defaults work for any run."""

    seed: int = Field(0, ge=0, lt=2**31)
    memory: int | None = Field(
        None, gt=0, description="bytes for each worker; half of the free memory of the device if not given"
    )
    threads: int | None = Field(None, gt=0, description="torch threads of each worker; torch's default if not given")
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
                "clustering.order = 'exact' needs the curvature of all tokens; remove projection.curvature_examples"
            )
        return self

    def chosen(self, available: Sequence[int]) -> list[int]:
        """Steps of the checkpoints to use, in training order.

        Args:
            available: steps that have a checkpoint, in training order.

        Raises:
            ValueError: a step has no checkpoint, or there are fewer than two steps.
        """
        steps = list(available) if self.steps is None else sorted(set(self.steps))
        if missing := [step for step in steps if step not in set(available)]:
            raise ValueError(f"steps names {missing[0]}, which has no checkpoint; allowed: {few_steps(available)}")
        if len(steps) < 2:
            raise ValueError(f"steps gives {len(steps)} checkpoints; allowed: 2 or more, to measure a change")
        return steps


class Code(Section):
    """The function that returns model, loss and data."""

    setup: str = Field(description="module:function that returns a polca_lib.Subject; modules beside the file go first")
    arguments: dict[str, Any] = Field({}, description="keyword arguments of the function; paths as in the rest")

    @field_validator("setup")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError(f"code.setup = {value!r}; allowed: module:function, such as 'my_run:setup'")
        return value


class Source(Section):
    """Location of the checkpoints; paths are relative to the file."""

    kind: Literal["safetensors", "state_dict", "huggingface"]
    path: str = Field(description="a folder, or a repository on the Hugging Face hub such as EleutherAI/pythia-70m")
    pattern: str | None = Field(None, description="regular expression for names, with one group: the step")
    rename: dict[str, str] = Field({}, description="regular expressions and replacements for names of parameters")
    key: str | None = Field(None, description="key of the state_dict in its file; common keys are found without it")
    revisions: tuple[str, ...] | None = Field(None, description="revisions to use; all that name a step if not given")
    stage: str | None = Field(None, description="training stage, if revisions name several")
    keep: bool = Field(True, description="keep downloaded files after use")


class EngineSettings(Section):
    """Where tasks run."""

    name: EngineName = "in-process"
    workers: int | None = Field(None, gt=0)
    address: str | None = None


class RunFile(AnalysisSettings):
    """A TOML file for the command ``polca``."""

    folder: str = Field(description="folder of results: a path relative to the file, or a URL that fsspec supports")
    title: str = "POLCA"
    device: str = "cpu"
    code: Code
    checkpoints: Source
    beside: tuple[BasisKind, ...] = Field((), description="control bases, such as random, to project in the same pass")
    engine: EngineSettings = EngineSettings()
    _file: Path = PrivateAttr(default=Path("polca.toml"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is not TOML, or settings are missing, unknown or not allowed; the message names all of them.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; polca init writes an example")
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}; correct the syntax") from None
        try:
            run_file = cls.model_validate(settings)
        except ValidationError as error:
            lines = [f"{path} has settings that are not allowed:"]
            for problem in error.errors():
                name, given = ".".join(map(str, problem["loc"])) or "settings", problem["input"]
                message = problem["msg"].removeprefix("Value error, ")
                if problem["type"] == "extra_forbidden":
                    *sections, unknown = problem["loc"]
                    section = reduce(lambda part, inner: part.model_fields[inner].annotation, sections, cls)
                    message = unknown_name(unknown, section.model_fields)
                shown = "" if isinstance(given, dict) else f" (given: {given!r})"
                lines.append(f"  {name}: {message}{shown}")
            raise ValueError("\n".join(lines)) from None
        run_file._file = path.resolve()
        if path.is_symlink():
            warnings.warn(f"{path} is a link; paths in it are relative to {run_file._file.parent}", stacklevel=2)
        return run_file

    @property
    def file(self) -> Path:
        """Path of the file; if it is a link, of the file that it links to."""
        return self._file

    @property
    def results(self) -> Path:
        """The folder of results."""
        return UPath(self.folder) if "://" in self.folder else UPath(self.file.parent / self.folder)

    @property
    def settings(self) -> AnalysisSettings:
        """The settings of :class:`polca_lib.analysis.analysis.Analysis`."""
        return AnalysisSettings.model_validate({name: getattr(self, name) for name in AnalysisSettings.model_fields})
