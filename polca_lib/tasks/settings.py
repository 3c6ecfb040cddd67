"""Settings of a run of the paper's tasks: the settings of an analysis, and those of data, model and training.

The presets are in ``presets.toml``. Settings are immutable, because the keys of stages contain them.
"""

from __future__ import annotations

import ast
import itertools
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from importlib.resources import files
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from polca_lib.analysis.settings import AnalysisSettings
from polca_lib.derivatives.memory import checked_device
from polca_lib.derivatives.strategy import Precision
from polca_lib.method.settings import Section, check_window, few_steps, unknown_name
from polca_lib.tasks.grammar import VOCABULARY

TaskName = Literal["addition", "grammar", "wikipedia"]
PRESET_NAMES = ("smoke", "laptop", "paper")

_PRESETS = tomllib.loads((files("polca_lib.tasks") / "presets.toml").read_text(encoding="utf-8"))
_LAYERS = {"addition": ("addition",), "grammar": ("english", "grammar"), "wikipedia": ("english", "wikipedia")}


class DataSettings(Section):
    """Sample sizes in examples. An example is a sum with four answer tokens, or a window of text."""

    validation_examples: int = Field(gt=0, description="examples whose tokens are decomposed")
    hessian_examples: int = Field(gt=0, description="examples whose mean loss gives the Hessian")


class CorpusSettings(Section):
    """Text of the task ``wikipedia``. The other tasks generate their data."""

    source: str = Field("", description="file, folder or 'hub'; if empty, POLCA_WIKIPEDIA or else the hub")
    articles: int | None = Field(None, gt=0, description="number of training articles; all if not given")
    tokenizer_articles: int = Field(10_000, gt=0, description="training articles that the tokenizer is trained on")
    skip_damaged: bool = Field(False, description="leave out damaged records of the corpus, with a warning")


class LanguageSettings(Section):
    """Targets of the tasks of text."""

    predict_pad: bool = Field(True, description="PAD is predicted, too, as in the paper; if not, it is no token")


class ModelSettings(Section):
    """Decoder-only transformer. The defaults are the paper's arithmetic model."""

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
        _check_divisor("model.n_heads", self.n_heads, "model.d_model", self.d_model)
        return self


class TrainingSettings(Section):
    """Optimiser and schedule (PAPER Table 1), and how often weights are saved."""

    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    warmup_steps: int = Field(100, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    precision: Precision = Field("float32", description="of matrix products (autocast); weights stay float32")
    checkpoints: Literal["even", "log"] | tuple[int, ...] = Field(
        "even", description="steps of checkpoints: every 'checkpoint_every', spaced as their logarithm, or these"
    )
    checkpoint_every: int = Field(20, gt=0, description="steps between even checkpoints (the POLCA cadence)")
    n_checkpoints: int | None = Field(
        None, ge=2, description="of 'log' checkpoints; if not given, as many as 'checkpoint_every' gives"
    )
    state_every: int = Field(500, gt=0, description="steps between full states, from which training resumes")

    @model_validator(mode="after")
    def _checkpoints_fit_steps(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas = {self.betas}; allowed: two numbers of at least 0 and less than 1")
        if isinstance(listed := self.checkpoints, tuple):
            wrong = [f": {b} follows {a}" for a, b in itertools.pairwise(listed) if b <= a]
            if wrong or (*listed[:1], *listed[-1:]) != (0, self.steps):
                raise ValueError(
                    f"training.checkpoints = {few_steps(listed)}{''.join(wrong[:1])}; allowed: 'even', 'log', or "
                    f"increasing steps from 0 to training.steps = {self.steps}"
                )
        elif self.n_checkpoints is None:
            _check_divisor("training.checkpoint_every", self.checkpoint_every, "training.steps", self.steps)
        if self.n_checkpoints is not None and (listed != "log" or self.n_checkpoints > self.steps + 1):
            raise ValueError(
                f"training.n_checkpoints = {self.n_checkpoints}; allowed: None, or with training.checkpoints = 'log' "
                f"2 to training.steps + 1 = {self.steps + 1}"
            )
        return self

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint, from 0 to ``steps``.

        With n ``log`` checkpoints, s_0 = 0, s_1 = 1 and s_{i+1} = max(s_i + 1, s_i (steps / s_i)^(1 / (n - 1 - i))),
        rounded: one after another at the start, where a logarithm leaves no room, then each the same factor later.
        """
        if isinstance(self.checkpoints, tuple):
            return list(self.checkpoints)
        if self.checkpoints == "even":
            return list(range(0, self.steps + 1, self.checkpoint_every))
        count = self.n_checkpoints or self.steps // self.checkpoint_every + 1
        found = [0, 1] if count > 2 else [0]
        for left in range(count - len(found), 0, -1):
            last = found[-1]
            found.append(max(last + 1, round(last * (self.steps / last) ** (1 / left))) if last else self.steps)
        return found

    @property
    def key(self) -> dict[str, object]:
        """What checkpoints depend on, as JSON values; of those that are not even, the steps themselves."""
        later = ("checkpoints", "n_checkpoints")
        if self.checkpoints == "even":
            return self.stated(*later, exclude=["state_every"])
        return {
            **self.stated(exclude=["state_every", "checkpoint_every", *later]),
            "checkpoints": self.checkpoint_steps,
        }


class RunSettings(AnalysisSettings):
    """All settings of a run. :meth:`from_preset` builds them."""

    preset: str
    task: TaskName = "addition"
    device: str = "cpu"
    data: DataSettings
    corpus: CorpusSettings = CorpusSettings()
    language: LanguageSettings = LanguageSettings()
    model: ModelSettings
    training: TrainingSettings

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """Settings of ``preset`` with some fields replaced.

        Args:
            preset: ``smoke``, ``laptop`` or ``paper``.
            overrides: fields by name, such as ``seed=1`` or ``**{"basis.kind": "random"}``.

        Raises:
            ValueError: a preset, task or field is unknown, or a value is not allowed (pydantic's ``ValidationError``).
        """
        task = overrides.get("task", "addition")
        for name, value, choices in (("task", task, _LAYERS), ("preset", preset, PRESET_NAMES)):
            if value not in choices:
                raise ValueError(f"{name} = {value!r} is unknown; allowed: {', '.join(choices)}")
        # Later layers replace single fields of earlier ones.
        settings: dict[str, Any] = {"preset": preset, "corpus": {}, "language": {}, "model": {}}
        for layer, level in itertools.product(_LAYERS[task], ("common", preset)):
            for section, values in _PRESETS[layer].get(level, {}).items():
                settings[section] = {**settings.get(section, {}), **values}
        if task == "grammar":
            settings["model"] |= dict.fromkeys(("d_vocab", "d_vocab_out"), len(VOCABULARY))
        allowed = field_names()
        for name, value in overrides.items():
            if name not in allowed:
                raise ValueError(unknown_name(name, allowed))
            section, _, field = name.rpartition(".")
            (settings[section] if section else settings)[field] = value
        return cls.model_validate(settings)

    @field_validator("device")
    @classmethod
    def _device_exists(cls, value: str) -> str:
        return checked_device(value)

    @model_validator(mode="after")
    def _order_has_its_curvature(self) -> Self:
        """Drop this check of an analysis. Pages show each order that the projections allow, whatever is set here."""
        return self

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        basis, training, examples = self.basis, self.training, self.data.validation_examples
        window, size = self.clustering.breakthrough_window, self.clustering.min_cluster_size
        if self.task == "addition" and not self.language.predict_pad:
            raise ValueError("language.predict_pad = False is for text; task = 'addition' has no PAD; remove it")
        # Basis vectors need checkpoints at their steps; even ones also set the grid of states and windows.
        cadence, even = training.checkpoint_every, training.checkpoints == "even"
        steps = {"basis.every": basis.every, "training.state_every": training.state_every}
        for name, value in {**steps, "clustering.breakthrough_window": window}.items():
            if even and value is not None and value % cadence:
                raise ValueError(
                    f"{name} = {value} is not a multiple of training.checkpoint_every = {cadence}; "
                    f"allowed: {cadence}, {2 * cadence}, {3 * cadence}, ..."
                )
        self.chosen(training.checkpoint_steps)
        # The window has two halves of breakthrough_window steps (v3 Eq. 9).
        for name, value, limit_name, limit in (
            ("basis.every", basis.every, "training.steps", training.steps),
            ("clustering.breakthrough_window", window, "training.steps / 2", training.steps // 2),
            ("projection.curvature_examples", self.projection.curvature_examples, "data.validation_examples", examples),
        ):
            if value is not None and value > limit:
                raise ValueError(f"{name} = {value} is too large; allowed: at most {limit_name} = {limit}")
        if basis.every is not None:
            multiples, available = range(basis.every, training.steps + 1, basis.every), training.checkpoint_steps
            if missing := [step for step in multiples if step not in available]:
                raise ValueError(
                    f"basis.every = {basis.every} needs a checkpoint at step {missing[0]}, but they are at "
                    f"{few_steps(available)}; allowed: None, with basis.n_vectors, or name checkpoints in basis.steps"
                )
            _ = self.basis_steps  # refuses more vectors than the basis checkpoints give
        if window is not None and not even:
            check_window(window, training.checkpoint_steps, "clustering.breakthrough_window")
        # HDBSCAN needs enough tokens for two clusters.
        tokens = self.targets_per_example * examples
        if size is not None and tokens < 2 * size:
            raise ValueError(
                f"data.validation_examples = {examples} gives {tokens} tokens, too few for clustering.min_cluster_size "
                f"= {size}; allowed: at least {-(-2 * size // self.targets_per_example)} examples"
            )
        return self

    @property
    def targets_per_example(self) -> int:
        """Target tokens of an example, four digits of a sum, or all but two of a window, less any PAD left out."""
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
    """Names of all parameters that :meth:`RunSettings.from_preset` takes, with dots for fields of sections."""
    names: list[str] = []
    for name, field in RunSettings.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        names += [f"{name}.{inner}" for inner in section] if section else [name]
    return [name for name in names if name != "preset"]


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs of a command line. A value that is no Python literal is text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        values[name] = value
        with suppress(SyntaxError, ValueError):
            values[name] = ast.literal_eval(value)
    return values


def _check_divisor(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Refuse a divisor that does not divide the value."""
    if value % divisor:
        allowed = ", ".join(str(i) for i in range(1, value + 1) if value % i == 0)
        raise ValueError(f"{divisor_name} = {divisor} does not divide {name} = {value}; allowed: {allowed}")
