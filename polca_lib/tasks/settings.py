"""Settings of a run of the paper's tasks: those of any analysis, and its data, model and training.

The presets stand in ``presets.toml``. Settings are immutable, and each stage is keyed by those it depends
on (see :mod:`polca_lib.tasks.run`).
"""

from __future__ import annotations

import ast
import difflib
import itertools
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from polca_lib.analysis.settings import AnalysisSettings
from polca_lib.derivatives.strategy import Precision
from polca_lib.method.settings import Section
from polca_lib.tasks.grammar import VOCABULARY

TaskName = Literal["addition", "grammar", "wikipedia"]
PRESET_NAMES = ("smoke", "laptop", "paper")

_PRESETS = tomllib.loads((files("polca_lib.tasks") / "presets.toml").read_text(encoding="utf-8"))
_LAYERS = {"addition": ("addition",), "grammar": ("english", "grammar"), "wikipedia": ("english", "wikipedia")}


class DataSettings(Section):
    """Sample sizes, in examples: sums with four answer tokens each, or windows of text."""

    validation_examples: int = Field(gt=0, description="examples whose tokens are decomposed")
    hessian_examples: int = Field(gt=0, description="examples of the loss whose Hessian gives the basis")


class CorpusSettings(Section):
    """Where the text of task ``wikipedia`` comes from; the other tasks make their own data."""

    source: str = Field(
        "", description="file, folder or 'hub'; the environment variable POLCA_WIKIPEDIA, or else the hub, if empty"
    )
    articles: int | None = Field(None, gt=0, description="training articles to take; all if not given")
    tokenizer_articles: int = Field(10_000, gt=0, description="of those the tokenizer is trained on the first so many")
    skip_damaged: bool = Field(False, description="skip what can't be read of the corpus, with a warning")


class ModelSettings(Section):
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


class TrainingSettings(Section):
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


class RunSettings(AnalysisSettings):
    """A whole run. Build one with :meth:`from_preset`."""

    preset: str
    task: TaskName = "addition"
    device: str = "cpu"
    data: DataSettings
    corpus: CorpusSettings = CorpusSettings()
    model: ModelSettings
    training: TrainingSettings

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
        for name, value, choices in (("task", task, _LAYERS), ("preset", preset, PRESET_NAMES)):
            if value not in choices:
                raise ValueError(f"{name} = {value!r} is unknown; allowed: {', '.join(choices)}")
        settings: dict[str, Any] = {"preset": preset, "corpus": {}, "model": {}}
        for layer, level in itertools.product(_LAYERS[task], ("common", preset)):
            for section, values in _PRESETS[layer].get(level, {}).items():
                settings[section] = {**settings.get(section, {}), **values}
        if task == "grammar":
            settings["model"] |= dict.fromkeys(("d_vocab", "d_vocab_out"), len(VOCABULARY))
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
    def _order_has_its_curvature(self) -> Self:
        """Pages show every order that a run's projections allow: here ``clustering.order`` is where they begin."""
        return self

    @model_validator(mode="after")
    def _basis_is_born_in_training(self) -> Self:
        basis, steps = self.basis, self.training.steps
        if basis.every is None:
            return self
        self._check_multiple("basis.every", basis.every)
        if basis.every > steps:
            raise ValueError(
                f"basis.every = {basis.every} is past the end of training; allowed: at most training.steps = {steps}"
            )
        births = steps // basis.every
        if basis.n_vectors is not None and basis.n_vectors > births * basis.k:
            raise ValueError(
                f"basis.n_vectors = {basis.n_vectors} is more than basis checkpoints x k = "
                f"{births} x {basis.k} = {births * basis.k}; lower it, or raise basis.k, or lower basis.every"
            )
        if basis.kind == "trajectory" and self.n_vectors > births:
            raise ValueError(
                f"basis.kind = 'trajectory' finds at most {births} directions in {births + 1} checkpoints; "
                f"{self.n_vectors} were asked for; lower basis.k, basis.every"
            )
        return self

    @model_validator(mode="after")
    def _cadences_fit(self) -> Self:
        self._check_multiple("training.state_every", self.training.state_every)
        window = self.clustering.breakthrough_window
        if window is not None:
            self._check_multiple("clustering.breakthrough_window", window)
            if 2 * window > self.training.steps:
                raise ValueError(
                    f"clustering.breakthrough_window = {window} needs as many steps on either side; "
                    f"allowed: at most half of training.steps = {self.training.steps}"
                )
        self.chosen(self.training.checkpoint_steps)
        return self

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        sample, examples = self.projection.curvature_examples, self.data.validation_examples
        if sample is not None and sample > examples:
            raise ValueError(
                f"projection.curvature_examples = {sample} is more than data.validation_examples = "
                f"{examples}; allowed: at most that, or none for all"
            )
        tokens, size = self.targets_per_example * examples, self.clustering.min_cluster_size
        if size is not None and tokens < 2 * size:
            raise ValueError(
                f"data.validation_examples = {examples} gives {tokens} tokens, too few "
                f"for HDBSCAN with clustering.min_cluster_size = {size}; "
                f"allowed: at least {-(-2 * size // self.targets_per_example)} examples"
            )
        return self

    def _check_multiple(self, name: str, value: int) -> None:
        cadence = self.training.checkpoint_every
        if value % cadence:
            raise ValueError(
                f"{name} = {value} is not a multiple of training.checkpoint_every = {cadence}; "
                f"allowed: {cadence}, {2 * cadence}, {3 * cadence}, ..."
            )

    @property
    def targets_per_example(self) -> int:
        """Tokens of an example that carry loss, four digits, or all of a window but its first two."""
        return 4 if self.task == "addition" else self.model.n_ctx - 2

    @property
    def basis_steps(self) -> list[int]:
        """Basis checkpoints t = 1 ... T of Algorithm 1, in training order."""
        return self.basis.births(self.training.checkpoint_steps)

    @property
    def n_vectors(self) -> int:
        """Number of basis vectors."""
        return self.basis.resolved(self.training.checkpoint_steps).n_vectors


def field_names() -> list[str]:
    """All parameters of a run by dotted name, as :meth:`RunSettings.from_preset` takes them."""
    names: list[str] = []
    for name, field in RunSettings.model_fields.items():
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
