"""Settings of the method: which basis, and how trajectories are clustered. The paper's values stand in the presets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Order = Literal["first", "second", "exact", "trapezoid"]
Scaling = Literal["raw", "unit", "maximum", "zscore"]
BasisKind = Literal["hessian", "shuffled", "final", "trajectory", "random", "parameters"]
Solver = Literal["lanczos", "cola"]

HESSIAN_KINDS: tuple[BasisKind, ...] = ("hessian", "shuffled", "final")
"""Kinds of basis that are made of eigenvectors of the Hessian."""

TOLERANCE, FORMER_TOLERANCE = 1e-3, 0.01
"""Relative residual at which Lanczos stops if none is given, and up to version 0.2. Bases made with the latter open."""

_VECTORS = 10  # of a basis, if nothing says how many


def unknown_name(name: str, allowed: Iterable[str]) -> str:
    """Say that ``name`` is none of ``allowed``, which of them is nearest, and all of them."""
    hint = "".join(f" (did you mean {near!r}?)" for near in get_close_matches(name, allowed, n=1))
    return f"unknown parameter {name!r}{hint}; allowed: {', '.join(allowed)}"


class Section(BaseModel):
    """One immutable group of settings; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def stated(self, *later: str, exclude: Sequence[str] = ()) -> dict[str, object]:
        """Settings as JSON values, which stages are keyed by.

        Args:
            later: fields that came into the library later. They are left out at their defaults, so that results made
                before keep their keys.
            exclude: fields that results do not depend on.
        """
        values = self.model_dump(mode="json", exclude=set(exclude))
        return {n: v for n, v in values.items() if n not in later or v != type(self).model_fields[n].default}


class BasisSettings(Section):
    """How the orthonormal basis is found (Algorithm 1), or one of those it is compared with."""

    kind: BasisKind = "hessian"
    k: int = Field(1, ge=1, description="eigenvectors taken per basis checkpoint")
    n_vectors: int | None = Field(
        None, ge=1, description="stop after so many vectors; if not given, all that 'every' gives, or 10"
    )
    every: int | None = Field(
        None,
        gt=0,
        description="basis checkpoints at multiples of this that have one; evenly spread over checkpoints if not given",
    )
    steps: tuple[int, ...] | None = Field(None, description="basis checkpoints, instead of 'every'")
    targets: Literal["answer", "all"] = Field(
        "answer", description="tokens of whose mean loss the Hessian is: those analysed, or those of the Hessian loss"
    )
    which: Literal["largest", "magnitude"] = "largest"
    solver: Solver = Field("lanczos", description="of the eigenproblem: this library's Lanczos, or CoLA's")
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="relative residual at which Lanczos stops; 0.001 if not given"
    )
    max_products: int = Field(60, ge=2, description="Hessian-vector products per checkpoint at most")

    @model_validator(mode="after")
    def _products_suffice(self) -> Self:
        if self.max_products < self.k:
            raise ValueError(
                f"basis.max_products = {self.max_products} can't give basis.k = {self.k} eigenvectors; "
                f"allowed: at least {self.k}"
            )
        if self.every is not None and self.steps is not None:
            raise ValueError(f"basis.every = {self.every} and basis.steps are both given; allowed: one of them")
        return self

    def resolved(self, available: Sequence[int]) -> Self:
        """The same with the number of vectors and the tolerance filled in.

        Args:
            available: steps that have a checkpoint, in training order.
        """
        if self.tolerance is None:
            return self.model_copy(update={"tolerance": TOLERANCE}).resolved(available)
        if self.n_vectors is not None:
            return self
        n_vectors = _VECTORS if self.every is None else len(self._multiples(available)) * self.k
        if n_vectors == 0:
            raise ValueError(
                f"basis.every = {self.every} has no checkpoint; allowed: steps that divide some of "
                f"{few_steps(available)}"
            )
        return self.model_copy(update={"n_vectors": n_vectors})

    def births(self, available: Sequence[int]) -> list[int]:
        """Basis checkpoints t = 1 ... T of Algorithm 1, in training order.

        Args:
            available: steps that have a checkpoint, in training order.

        Raises:
            ValueError: a step without a checkpoint, or too few checkpoints for so many vectors.
        """
        n_vectors = self.resolved(available).n_vectors
        needed = n_vectors if self.kind == "trajectory" else math.ceil(n_vectors / self.k)
        if self.every is None and self.kind in ("random", "parameters", "final"):
            return [available[-1]] * needed
        if self.steps is not None:
            if missing := [step for step in self.steps if step not in available]:
                raise ValueError(
                    f"basis.steps names {missing[0]}, which has no checkpoint; allowed: {few_steps(available)}"
                )
            steps = sorted(self.steps)
        elif self.every is not None:
            steps = self._multiples(available)
        else:
            steps = list(available[1:])
            if self.kind != "trajectory" and len(steps) >= needed:
                steps = [steps[math.ceil(len(steps) * i / needed) - 1] for i in range(1, needed + 1)]
        if len(steps) < needed and self.kind == "trajectory":
            raise ValueError(
                f"basis.kind = 'trajectory' finds at most {len(steps)} directions in {len(steps) + 1} checkpoints; "
                f"{n_vectors} were asked for; lower basis.n_vectors, basis.k or basis.every"
            )
        if len(steps) < needed:
            raise ValueError(
                f"basis.n_vectors = {n_vectors} needs {needed} checkpoints after the first with basis.k = "
                f"{self.k}, but there are {len(steps)}; lower basis.n_vectors, or raise basis.k"
            )
        return steps

    def _multiples(self, available: Sequence[int]) -> list[int]:
        return [step for step in available[1:] if step % self.every == 0]


class ClusteringSettings(Section):
    """HDBSCAN and what it is given (v3 Table 4); what is not given follows from the run.

    The paper's own order and scaling are ``second`` and ``raw``. The defaults here need no curvature and divide by
    nothing that may vanish: trajectories by the trapezoid rule, told apart by their shape alone.
    """

    order: Order = "trapezoid"
    scaling: Scaling = "zscore"
    falls_by: Literal["final", "trend"] = Field("final", description="what says that a trajectory falls")
    min_cluster_size: int | None = Field(None, ge=2, description="3% of the tokens, as in the paper, if not given")
    min_samples_divisor: int = Field(15, ge=1, description="min_samples = tokens / this")
    min_samples_from: Literal["kept", "all"] = "kept"
    selection: Literal["eom", "leaf"] = "eom"
    breakthrough_window: int | None = Field(
        None, gt=0, description="D of v3 Eq. 9, in steps; a twentieth of the training if not given"
    )
    hidden_after: int | None = Field(
        None, ge=0, description="tau of v3 Eq. 10, in steps; measured on the loss curve if not given"
    )

    def check(self, steps: Sequence[int], tokens: int | None = None) -> None:
        """Refuse settings that no run of this length can meet.

        Args:
            steps: of the checkpoints.
            tokens: how many are decomposed, if it is known.

        Raises:
            ValueError: a setting is given that does not fit.
        """
        if self.breakthrough_window is not None:
            check_window(self.breakthrough_window, steps, "clustering.breakthrough_window")
        limits = {"hidden_after": (steps[-1], "last step"), "min_cluster_size": (tokens, "number of tokens")}
        for name, (most, meaning) in limits.items():
            value = getattr(self, name)
            if value is not None and most is not None and value > most:
                raise ValueError(f"clustering.{name} = {value}; allowed: at most {most}, the {meaning} of this run")

    def resolved(self, tokens: int, steps: Sequence[int]) -> Self:
        """The same with ``min_cluster_size`` and ``breakthrough_window`` filled in.

        Args:
            tokens: how many are decomposed.
            steps: of the checkpoints.
        """
        update: dict[str, int] = {}
        if self.min_cluster_size is None:
            update["min_cluster_size"] = max(5, round(0.03 * tokens))
        if self.breakthrough_window is None:
            gaps = {int(b - a) for a, b in itertools.pairwise(steps)}
            cadence = gaps.pop() if len(gaps) == 1 else 1
            update["breakthrough_window"] = cadence * max(1, round((steps[-1] - steps[0]) / 20 / cadence))
        return self.model_copy(update=update)


def check_window(window: int, steps: Sequence[int], name: str = "window") -> None:
    """Refuse a window D of v3 Eq. 9 that checkpoints at these steps can't have.

    Raises:
        ValueError: D is not a multiple of a constant cadence, or no checkpoint has D steps on both sides.
    """
    gaps = {int(b - a) for a, b in itertools.pairwise(steps)}
    cadence = min(gaps) if len(gaps) == 1 else 1
    if window < 1 or window % cadence:
        raise ValueError(f"{name} = {window} is not a multiple of the cadence of {cadence} steps")
    longest = max(min(int(step - steps[0]), int(steps[-1] - step)) for step in steps)
    if window > longest:
        raise ValueError(
            f"{name} = {window} needs {2 * window} steps of training, but there are {int(steps[-1] - steps[0])}; "
            f"allowed: at most {longest}"
        )


def check_n_vectors(n_vectors: int, n_parameters: int) -> None:
    """Refuse more vectors than parameters: they can't all be orthogonal."""
    if n_vectors > n_parameters:
        raise ValueError(f"basis.n_vectors = {n_vectors}; allowed: 1 to {n_parameters}, the number of parameters")


def few_steps(steps: Sequence[int]) -> str:
    """Steps as text for a message, those in the middle left out."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]])
