"""Settings of an analysis of somebody's own training run, in Python or in a TOML file.

A file can't run code, except by naming a module and a function of it, under ``code.setup``.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from upath import UPath

from polca_lib.config import ClusteringConfig, DirectionsConfig, Order, ProjectionConfig, Scaling, Section
from polca_lib.engine import EngineName

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class OwnBasis(DirectionsConfig):
    """The basis, born at checkpoints of the run."""

    n_vectors: int = Field(10, ge=1)
    steps: tuple[int, ...] | None = Field(
        None, description="basis checkpoints; if not given, as many as are needed, evenly spread (trajectory: all)"
    )

    def births(self, available: Sequence[int]) -> list[int]:
        """Basis checkpoints, in training order.

        Raises:
            ValueError: a step without a checkpoint, or too few checkpoints for so many vectors.
        """
        needed = math.ceil(self.n_vectors / self.k)
        if self.kind in ("random", "parameters", "final"):
            return [available[-1]] * needed
        if self.steps is not None:
            if missing := [step for step in self.steps if step not in available]:
                raise ValueError(f"basis.steps names {missing[0]}, which has no checkpoint; allowed: {_few(available)}")
            steps = sorted(self.steps)
        else:
            steps = list(available[1:])
            if self.kind != "trajectory" and len(steps) >= needed:
                steps = [steps[math.ceil(len(steps) * i / needed) - 1] for i in range(1, needed + 1)]
        if len(steps) < needed:
            raise ValueError(
                f"basis.n_vectors = {self.n_vectors} needs {needed} checkpoints after the first with basis.k = "
                f"{self.k}, but there are {len(steps)}; lower basis.n_vectors, or raise basis.k"
            )
        return steps


class OwnProjection(ProjectionConfig):
    """What is measured at every checkpoint; no curvature if it isn't asked for."""

    curvature: bool = Field(False, description="also b^T H(x) b, which orders 'second' and 'exact' need")


class OwnClustering(ClusteringConfig):
    """HDBSCAN and what it is given; what is not given follows from the run.

    The paper's own order and scaling are ``second`` and ``raw``. The defaults here need no curvature and divide by
    nothing that may vanish: trajectories by the trapezoid rule, told apart by their shape alone.
    """

    order: Order = "trapezoid"
    scaling: Scaling = "zscore"
    min_cluster_size: int | None = Field(None, ge=2, description="3% of the tokens, as in the paper, if not given")
    breakthrough_window: int | None = Field(
        None, gt=0, description="D of v3 Eq. 9, in steps; a twentieth of the training if not given"
    )

    def resolved(self, tokens: int, steps: Sequence[int]) -> ClusteringConfig:
        """The same with nothing left open.

        Args:
            tokens: how many are decomposed.
            steps: of the checkpoints.
        """
        settings = self.model_dump()
        if self.min_cluster_size is None:
            settings["min_cluster_size"] = max(5, round(0.03 * tokens))
        if self.breakthrough_window is None:
            gaps = {b - a for a, b in itertools.pairwise(steps)}
            cadence = gaps.pop() if len(gaps) == 1 else 1
            settings["breakthrough_window"] = cadence * max(1, round((steps[-1] - steps[0]) / 20 / cadence))
        return ClusteringConfig.model_validate(settings)


class AnalysisSettings(Section):
    """All that an analysis can be told; the defaults need nothing."""

    seed: int = Field(0, ge=0, lt=2**31)
    memory: int | None = Field(
        None, gt=0, description="bytes each worker may take; half of what the device has free if not given"
    )
    threads: int | None = Field(None, gt=0, description="of torch, for each worker; torch's own number if not given")
    steps: tuple[int, ...] | None = Field(None, description="checkpoints to use; all if not given")
    basis: OwnBasis = Field(default_factory=OwnBasis)
    projection: OwnProjection = Field(default_factory=OwnProjection)
    clustering: OwnClustering = Field(default_factory=OwnClustering)

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
            raise ValueError(f"steps names {missing[0]}, which has no checkpoint; allowed: {_few(available)}")
        if len(steps) < 2:
            raise ValueError(f"steps gives {len(steps)} checkpoints; allowed: 2 or more, for there must be a change")
        return steps


class Code(Section):
    """The one place where a file names code."""

    setup: str = Field(
        description="module:function, which returns a polca_lib.token_loss.Subject; looked for beside the file first"
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


class EngineConfig(Section):
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
    engine: EngineConfig = Field(default_factory=EngineConfig)

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
            return cls.model_validate(settings)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, one['loc'])) or 'settings'}: {_told(one)}" for one in error.errors()]
            raise ValueError(f"{path} has settings that are not allowed:\n  " + "\n  ".join(told)) from None

    def place(self, file: Path) -> Path:
        """The folder of results of this file."""
        return UPath(self.folder) if "://" in self.folder else UPath(file.resolve().parent / self.folder)

    @property
    def settings(self) -> AnalysisSettings:
        """Those that :class:`polca_lib.analysis.Analysis` takes."""
        return AnalysisSettings.model_validate({name: getattr(self, name) for name in AnalysisSettings.model_fields})


def _told(error: Any) -> str:
    given = error["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return error["msg"].removeprefix("Value error, ") + shown


def _few(steps: Sequence[int]) -> str:
    """Steps as text, those in the middle left out."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]])
