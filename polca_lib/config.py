"""Validated configuration of a run; the presets stand in :mod:`polca_lib.presets`.

A configuration is immutable, and each stage of the pipeline is keyed by the sections it depends on (see
:mod:`polca_lib.pipeline`).
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from polca_lib.presets import PRESETS

Order = Literal["first", "second", "exact", "trapezoid"]
Scaling = Literal["raw", "unit", "zscore"]
BasisKind = Literal["hessian", "shuffled", "final", "trajectory", "random", "parameters"]
OF_HESSIAN: tuple[BasisKind, ...] = ("hessian", "shuffled", "final")
Mode = Literal["auto", "forward", "reverse"]
Precision = Literal["float32", "bfloat16"]
TaskName = Literal["addition", "grammar", "wikipedia"]
PRESET_NAMES = tuple(PRESETS["addition"])


class Section(BaseModel):
    """One immutable group of settings; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Sample sizes, in examples: sums with four answer tokens each, or windows of text."""

    validation_examples: int = Field(gt=0, description="examples whose tokens are decomposed")
    hessian_examples: int = Field(gt=0, description="examples of the loss whose Hessian gives the basis")


class CorpusConfig(Section):
    """Where the text of task ``wikipedia`` comes from; the other tasks make their own data."""

    source: str = Field(
        "", description="file, folder or 'hub'; the environment variable POLCA_WIKIPEDIA, or else the hub, if empty"
    )
    articles: int | None = Field(None, gt=0, description="training articles to take; all if not given")
    tokenizer_articles: int = Field(10_000, gt=0, description="of those the tokenizer is trained on the first so many")
    skip_damaged: bool = Field(False, description="skip what can't be read of the corpus, with a warning")


class ModelConfig(Section):
    """Decoder-only transformer; the defaults are the paper's arithmetic model."""

    n_layers: int = Field(3, gt=0)
    d_model: int = Field(512, gt=0)
    n_heads: int = Field(4, gt=0)
    d_mlp: int = Field(2048, gt=0)
    n_ctx: int = Field(12, gt=0)
    d_vocab: int = Field(12, gt=0)
    d_vocab_out: int = Field(10, gt=0)
    activation: Literal["gelu", "relu", "gelu_new"] = "gelu"

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model}; "
                f"allowed: {_divisors(self.d_model)}"
            )
        return self


class TrainingConfig(Section):
    """Optimiser and schedule of the paper's Table 1, and how often weights are kept."""

    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    warmup_steps: int = Field(100, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Precision = Field(
        "float32", description="of matrix products in training (autocast); weights stay float32"
    )
    checkpoint_every: int = Field(20, gt=0, description="steps between checkpoints (the POLCA cadence)")
    state_every: int = Field(500, gt=0, description="steps between full states to resume from")

    @model_validator(mode="after")
    def _cadence_divides_steps(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas = {self.betas}; allowed: two numbers from 0 up to, not including, 1")
        if self.steps % self.checkpoint_every:
            raise ValueError(
                f"training.checkpoint_every = {self.checkpoint_every} does not divide "
                f"training.steps = {self.steps}; allowed: {_divisors(self.steps)}"
            )
        return self

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps with a checkpoint, step 0 included."""
        return list(range(0, self.steps + 1, self.checkpoint_every))


class DirectionsConfig(Section):
    """How the orthonormal basis is found (Algorithm 1 of the paper) and its ablations."""

    kind: BasisKind = "hessian"
    k: int = Field(1, ge=1, description="eigenvectors taken per basis checkpoint")
    n_vectors: int | None = Field(None, ge=1, description="stop after so many vectors; all if not given")
    which: Literal["largest", "magnitude"] = "largest"
    tolerance: float = Field(0.01, gt=0, lt=1, description="relative residual at which Lanczos stops")
    max_products: int = Field(60, ge=2, description="Hessian-vector products per checkpoint at most")

    @model_validator(mode="after")
    def _products_suffice(self) -> Self:
        if self.max_products < self.k:
            raise ValueError(
                f"basis.max_products = {self.max_products} can't give basis.k = {self.k} eigenvectors; "
                f"allowed: at least {self.k}"
            )
        return self


class BasisConfig(DirectionsConfig):
    """The basis of a run of the paper's tasks."""

    every: int = Field(200, gt=0, description="steps between basis checkpoints")
    targets: Literal["answer", "all"] = Field("answer", description="tokens whose mean loss the Hessian is of")


class ProjectionConfig(Section):
    """What is measured at every checkpoint."""

    curvature: bool = Field(True, description="also b^T H(x) b, which orders 'second' and 'exact' need")
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


class ClusteringConfig(Section):
    """HDBSCAN and what it is given (v3 Table 4)."""

    order: Order = "second"
    scaling: Scaling = "raw"
    falls_by: Literal["final", "trend"] = Field("final", description="what says that a trajectory falls")
    min_cluster_size: int = Field(150, ge=2)
    min_samples_divisor: int = Field(15, ge=1, description="min_samples = tokens / this")
    min_samples_from: Literal["kept", "all"] = "kept"
    selection: Literal["eom", "leaf"] = "eom"
    breakthrough_window: int = Field(100, gt=0, description="D of v3 Eq. 9, in steps")
    hidden_after: int | None = Field(
        None, ge=0, description="tau of v3 Eq. 10, in steps; measured on the loss curve if not given"
    )


class RunConfig(Section):
    """A whole run. Build one with :meth:`from_preset`."""

    preset: str
    task: TaskName = "addition"
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "cpu"
    memory: int | None = Field(
        None, gt=0, description="bytes a stage may take; half of what the device has free if not given"
    )
    data: DataConfig
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig
    training: TrainingConfig
    basis: BasisConfig
    projection: ProjectionConfig
    clustering: ClusteringConfig

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """Settings of ``preset`` with single fields replaced.

        Args:
            preset: ``smoke``, ``laptop`` or ``paper``.
            overrides: ``seed=1``, ``task="grammar"``, or a field of a section by its dotted name, as in
                ``**{"basis.kind": "random"}``.

        Raises:
            ValueError: an unknown preset, task or field, or a value that is not allowed
                (pydantic's ``ValidationError``, which names the field and the value).
        """
        task = overrides.get("task", "addition")
        for name, value, choices in (("task", task, PRESETS), ("preset", preset, PRESET_NAMES)):
            if value not in choices:
                raise ValueError(f"{name} = {value!r} is unknown; allowed: {', '.join(choices)}")
        settings: dict[str, Any] = {"preset": preset, "corpus": {}}
        for source in (PRESETS[task]["paper"], PRESETS[task][preset]):
            for section, values in source.items():
                settings[section] = {**settings.get(section, {}), **values}
        allowed = field_names()
        for name, value in overrides.items():
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"unknown parameter {name!r}{hint}; allowed: {', '.join(allowed)}")
            section, _, field = name.rpartition(".")
            (settings[section] if section else settings)[field] = value
        return cls.model_validate(settings)

    @field_validator("device")
    @classmethod
    def _device_is_there(cls, value: str) -> str:
        available = ["cpu"]
        available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        available += ["cuda"] if torch.cuda.is_available() else []
        if value not in available:
            raise ValueError(f"device = {value!r} is not on this machine; allowed: {', '.join(available)}")
        return value

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        cadence, basis, clustering = self.training.checkpoint_every, self.basis, self.clustering
        for name, value in (
            ("basis.every", basis.every),
            ("clustering.breakthrough_window", clustering.breakthrough_window),
            ("training.state_every", self.training.state_every),
        ):
            if value % cadence:
                raise ValueError(
                    f"{name} = {value} is not a multiple of training.checkpoint_every = {cadence}; "
                    f"allowed: {cadence}, {2 * cadence}, {3 * cadence}, ..."
                )
        if 2 * clustering.breakthrough_window > self.training.steps:
            raise ValueError(
                f"clustering.breakthrough_window = {clustering.breakthrough_window} needs as many "
                f"steps on either side; allowed: at most half of training.steps = {self.training.steps}"
            )
        if basis.every > self.training.steps:
            raise ValueError(
                f"basis.every = {basis.every} is past the end of training; "
                f"allowed: at most training.steps = {self.training.steps}"
            )
        available = self.training.steps // basis.every * basis.k
        if basis.n_vectors is not None and basis.n_vectors > available:
            raise ValueError(
                f"basis.n_vectors = {basis.n_vectors} is more than basis checkpoints x k = "
                f"{available // basis.k} x {basis.k} = {available}; lower it, or raise basis.k, "
                "or lower basis.every"
            )
        if basis.kind == "trajectory" and self.n_vectors > len(self.basis_steps):
            raise ValueError(
                f"basis.kind = 'trajectory' finds at most {len(self.basis_steps)} directions in "
                f"{len(self.basis_steps) + 1} checkpoints; {self.n_vectors} were asked for; lower basis.k, basis.every"
            )
        sample = self.projection.curvature_examples
        if sample is not None and sample > self.data.validation_examples:
            raise ValueError(
                f"projection.curvature_examples = {sample} is more than data.validation_examples = "
                f"{self.data.validation_examples}; allowed: at most that, or none for all"
            )
        tokens = self.targets_per_example * self.data.validation_examples
        if tokens < 2 * clustering.min_cluster_size:
            raise ValueError(
                f"data.validation_examples = {self.data.validation_examples} gives {tokens} tokens, too few "
                f"for HDBSCAN with clustering.min_cluster_size = {clustering.min_cluster_size}; "
                f"allowed: at least {-(-2 * clustering.min_cluster_size // self.targets_per_example)} examples"
            )
        return self

    @property
    def targets_per_example(self) -> int:
        """Tokens of an example that carry loss, four digits, or all of a window but its first two."""
        return 4 if self.task == "addition" else self.model.n_ctx - 2

    @property
    def basis_steps(self) -> list[int]:
        """Steps at which basis vectors are born, in training order (t = 1 ... T of Algorithm 1)."""
        return list(range(self.basis.every, self.training.steps + 1, self.basis.every))

    @property
    def n_vectors(self) -> int:
        """Number of basis vectors."""
        return self.basis.n_vectors or len(self.basis_steps) * self.basis.k


def field_names() -> list[str]:
    """All parameters of a run by dotted name, as :meth:`RunConfig.from_preset` takes them."""
    names: list[str] = []
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += [f"{name}.{inner}" for inner in field.annotation.model_fields]
        elif name != "preset":
            names.append(name)
    return names


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` from a command line: values are Python literals, or else text."""
    found = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
