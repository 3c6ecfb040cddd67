"""The paper's claims about addition, each with the rule by which it is judged.

A claim has printed numbers of the paper, a sentence that they are cited for, or both. Numbers of one row of a table are
one claim. The rules are part of each claim; they do not look at which study they judge, nor at how it is read. See
:mod:`polca_paper.verdicts` for what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings
from polca_paper import fit
from polca_paper.saved_study import SavedStudy

SHARE = 0.05
"""Tolerance of shares, where a claim has a number that is not in ``data/paper/printed.csv``."""

CARRY = 0.8
"""Homogeneity over which a cluster is called a carry cluster, wherever a claim in words needs one."""


class NotRun(LookupError):
    """No study has what a claim is about."""


class Evidence:
    """Studies of one training run, read in one way.

    Args:
        studies: a table, and a kind of curve, is taken from the first that has it.
        reading: a value for each of ``polca_paper.fit.CHOICES``.
    """

    def __init__(self, studies: Iterable[SavedStudy], reading: Mapping[str, str]):
        self.studies, self.reading = list(studies), dict(reading)

    @cached_property
    def numbers(self) -> pd.Series:
        """Ours for each printed number. NaN is not run, infinite is run without a cluster to measure."""
        if not self._clustered:
            return pd.Series(dtype=float)
        # In the plain text, orders are compared by Eq. 6 as written. Curves of the sum stand for its curves, not run.
        compared = "second" if self.reading == fit.PLAIN_TEXT else self.reading["order"]
        readings = pd.DataFrame([self.reading, self.reading | {"order": compared}])
        curves, orders = fit.numbers(readings, self.studies).to_numpy()
        printed = _printed()
        return pd.Series(np.where(printed["group"] == "second order", orders, curves), printed.index)

    def number(self, name: str) -> float:
        """Ours for a printed number, or NaN if there is no cluster to measure.

        Raises:
            NotRun: no study has the projections.
        """
        value = self.numbers.get(name, np.nan)
        if np.isnan(value):
            raise NotRun(f"no study of {', '.join(study.name for study in self.studies)} has {name!r}")
        return float(value) if np.isfinite(value) else np.nan

    def clustering(self, source: str, column: str) -> float:
        """A column of table ``clusterings`` for the reading; NaN if there is no cluster to measure.

        Raises:
            NotRun: no study has the projections.
        """
        row = fit.clustering_of(self.reading, self._clustered, source) if self._clustered else None
        if row is None:
            raise NotRun(f"no study of {', '.join(study.name for study in self.studies)} has {source!r}")
        return float(row[column])

    @property
    def _clustered(self) -> list[SavedStudy]:
        return [study for study in self.studies if study.has("clusterings")]

    def table(self, name: str, **where: object) -> pd.DataFrame:
        """Rows of a table of the first study that has some.

        Raises:
            NotRun: none has.
        """
        for study in self.studies:
            if study.has(name):
                rows = study.table(name)
                for column, value in where.items():
                    rows = rows[rows[column] == value]
                if len(rows):
                    return rows
        raise NotRun(f"no study of {', '.join(study.name for study in self.studies)} has {where} in table {name}")


Measure = Callable[[Evidence], float]


class Sentence(NamedTuple):
    """What numbers are cited for."""

    holds: Callable[[Evidence], bool] | None  # None if they are cited for nothing beyond themselves
    means: str  # the test in words


class Judged(NamedTuple):
    """A claim, judged."""

    paper: float  # the first number of the claim, as printed; NaN if it has none
    ours: float
    within: int  # how many of its numbers are within their tolerance
    of: int
    holds: bool | None  # the sentence; None if there is none, or it was not run
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One claim of the paper. Its numbers are named as in ``data/paper/printed.csv``, the most telling one first."""

    name: str
    section: str
    text: str
    sentence: Sentence
    page: str = "08_scale"  # where the evidence stands
    printed: tuple[str, ...] = ()
    measure: Measure | None = None  # ours, where no number is printed; NaN if there is nothing to measure
    paper: float | None = None  # beside ``measure``
    tolerance: float = SHARE
    larger_is_stronger: bool | None = None  # None: neither direction is

    def judge(self, evidence: Evidence) -> Judged:
        """The verdict on the evidence."""
        try:
            paper, ours, within, of = self._numbers(evidence)
            holds = None if self.sentence.holds is None else bool(self.sentence.holds(evidence))
        except NotRun:
            return Judged(np.nan, np.nan, 0, 0, None, "not run")
        matches = None if not of else within > of / 2
        stronger = bool(holds) and {True: ours > paper, False: ours < paper, None: False}[self.larger_is_stronger]
        return Judged(paper, ours, within, of, holds, verdict(matches, holds, stronger))

    def _numbers(self, evidence: Evidence) -> tuple[float, float, int, int]:
        if not self.printed:
            ours = self.measure(evidence) if self.measure else np.nan
            if self.paper is None:
                return np.nan, ours, 0, 0
            return self.paper, ours, int(abs(ours - self.paper) <= self.tolerance), 1
        first, *others = self.printed
        values = {first: evidence.number(first)}  # where the first was not run, the claim was not
        for name in others:
            with suppress(NotRun):
                values[name] = evidence.number(name)
        table, ours = _printed().loc[list(values)], np.array(list(values.values()))
        missed = fit.errors(pd.DataFrame([values]), table.reset_index(drop=True))[0]
        within = int((missed <= 1 / fit.WORST**2).sum())
        row = table.iloc[0]
        paper = row["printed"] if np.isfinite(row["printed"]) else (row["low"] + row["high"]) / 2
        return float(paper), float(ours[0]), within, len(ours)


def verdict(matches: bool | None, holds: bool | None, stronger: bool = False) -> str:
    """The verdict on the numbers of a claim (whether they match; None if it has none) and on its sentence."""
    if holds is False and matches is None:
        return "not reproduced"
    if matches is not False and holds is not False:
        return "reproduced"
    if holds and stronger:
        return "stronger here"
    return "partly" if holds or matches else "not reproduced"


@cache
def _printed() -> pd.DataFrame:
    return fit.printed_numbers().set_index("number", drop=False)


def _row(source: str, *measures: str) -> tuple[str, ...]:
    """Printed numbers of a kind of curves; F1 follows from homogeneity and recall."""
    rows = _printed()
    rows = rows[(rows["source"] == source) & rows["measure"].isin(measures) & (rows["half"] != "follows")]
    return tuple(rows["number"])


def _hidden(source: str) -> str:
    return f"{source}: hidden"


def _homogeneity(source: str) -> str:
    return f"{source}: homogeneity 1"


def _more(ours: str, theirs: str, means: str) -> Sentence:
    """One number is over another. What is not there, such as a cluster that a rule counts, stands as zero."""
    return Sentence(lambda e: bool(np.nan_to_num(e.number(ours)) > np.nan_to_num(e.number(theirs))), means)


def _over(number: str, least: float, means: str) -> Sentence:
    return Sentence(lambda e: e.number(number) > least, means)


def _measured_over(measure: Measure, least: float, means: str) -> Sentence:
    return Sentence(lambda e: bool(measure(e) > least), means)


def _digits(source: str) -> Measure:
    return lambda e: e.clustering(source, "digits")


def _beyond_chance(source: str) -> Sentence:
    def holds(evidence: Evidence) -> bool:
        order = "first" if source == "POLCA first" else evidence.reading["order"]
        # The second-order term over the number of tokens is a hundred-thousandth of a curve: clusters are the same.
        order = "first" if order == fit.SUMMED else order
        where = {"order": order, "scaling": evidence.reading["scaling"], "rule": evidence.reading["rule"]}
        pure = np.nan_to_num(evidence.number(_homogeneity(source))) > CARRY
        # The larger p of shuffling carries within places, and within places and digits.
        return bool(pure and evidence.table("null", **where)["p"].max() <= 0.05)

    return Sentence(holds, f"over {CARRY:.0%} carries in it, beyond chance in place and digit (p ≤ 0.05)")


def _no_carry_in_loss(evidence: Evidence) -> bool:
    clusters = evidence.clustering("exact loss", "clusters")
    return bool(clusters > 0 and not evidence.number(_homogeneity("exact loss")) > CARRY)


def _parameters(evidence: Evidence) -> float:
    paper = RunSettings.from_preset("paper").model
    model = next((s.settings.model for s in evidence.studies if s.settings.model == paper), None)
    if model is None:
        raise NotRun("no study has the paper's model")
    return float(sum(p.numel() for p in build_model(model, 0).parameters()))


def _movement(evidence: Evidence) -> float:
    rows = evidence.table("completeness", basis="hessian", order="first")
    return float(rows.sort_values("cadence")["movement_share"].iloc[0])


def _small_error(evidence: Evidence) -> bool:
    row = evidence.table("second_order_term", term="second").iloc[0]
    return bool(row["rms_true"] > row["rmse"])


_PURITY = ("homogeneity", "recall")


def _purer_than(source: str, section: str, text: str, name: str = "") -> Claim:
    purer, beyond = _more(_homogeneity("POLCA"), _homogeneity(source), "a purer cluster"), _beyond_chance("POLCA")
    means = f"{purer.means} on the Hessian basis, and {beyond.means}"
    sentence = Sentence(lambda e: purer.holds(e) and beyond.holds(e), means)
    return Claim(name or f"purer than {source}", section, text, sentence, printed=_row(source, *_PURITY))


# fmt: off
CLAIMS: tuple[Claim, ...] = (
    Claim("hidden breakthroughs", "4.2, D (v3)",
          "along single directions there are breakthroughs after the loss seems to have converged",
          _more(_hidden("POLCA"), _hidden("exact loss"), "a larger share than among clusters of the exact loss"),
          printed=(_hidden("POLCA"), _hidden("POLCA first"), _hidden("exact loss"), _hidden("change in loss"))),
    Claim("carry clusters", "D, Table 3", "POLCA finds clusters of tokens that take a carry", _beyond_chance("POLCA"),
          "10_chance", printed=_row("POLCA", *_PURITY), larger_is_stronger=True),
    Claim("carry clusters by first order", "D, Table 3 (v3)", "POLCA of first order finds them, too",
          _beyond_chance("POLCA first"), "10_chance", printed=_row("POLCA first", *_PURITY), larger_is_stronger=True),
    Claim("digits in the loss", "4.2, Figure 3",
          "clusters of the exact loss recover the places of the digits to a substantial degree",
          _measured_over(_digits("exact loss"), 0.6,
                         "over 60% of clustered tokens are of the most frequent place of their cluster"),
          measure=_digits("exact loss")),
    Claim("carry not in the loss", "4.2, Table 3", "clusters of the exact loss find no carry",
          Sentence(_no_carry_in_loss, f"there are clusters, but none of which over {CARRY:.0%} take a carry"),
          printed=_row("exact loss", *_PURITY)),
    _purer_than("change in loss", "D, Table 3 (v3)", "nor do those of its change", "carry not in the change in loss"),
    _purer_than("Fisher", "D, Table 3", "POLCA finds purer clusters than Fisher information along its vectors"),
    _purer_than("LCA", "D, Table 3 (v3)", "and than loss change allocation to single parameters"),
    _purer_than("random", "E, Table 4", "clusters on the Hessian basis are purer than along random directions"),
    _purer_than("shuffled", "E, Table 4", "and than on a Hessian basis of shuffled checkpoints"),
    Claim("hidden, other curves", "D and E, Tables 3 and 4 (v3)",
          "a smaller share of the clusters of Fisher information and of LCA has hidden breakthroughs",
          Sentence(lambda e: bool(e.number(_hidden("POLCA")) > max(
              np.nan_to_num(e.number(_hidden(s))) for s in ("Fisher", "LCA"))), "smaller than POLCA's share"),
          printed=(_hidden("Fisher"), _hidden("LCA"))),
    Claim("hidden, other bases", "E, Table 4 (v3)", "nor do random directions have as many",
          _more(_hidden("POLCA"), _hidden("random"), "a smaller share along random directions"),
          printed=(_hidden("random"), _hidden("shuffled"))),
    Claim("vector 1: digits", "4.2, Figure 4", "clusters of the first vector recover the places of the digits",
          _measured_over(_digits("POLCA"), 0.6,
                         "over 60% of clustered tokens are of the most frequent place of their cluster"),
          measure=_digits("POLCA")),
    Claim("vector 2: carry", "4.2, Figure 4", "a cluster of the second vector is the carry skill",
          _over("vector 2: homogeneity", CARRY, f"over {CARRY:.0%} of its tokens take a carry"),
          printed=("vector 2: homogeneity",), larger_is_stronger=True),
    Claim("vector 3: carry in the 1000s", "G, Figure 9", "the third vector recovers the carry in the 1000s place",
          _over("vector 3: carry in the 1000s", CARRY,
                f"a cluster of which over {CARRY:.0%} take a carry in the 1000s place"),
          printed=("vector 3: carry in the 1000s",)),
    Claim("orders agree", "F, Table 5", "first- and second-order trajectories are very similar",
          Sentence(lambda e: e.number("second order: 1 - cosine") < 0.05, "mean cosine over 0.95"), "09_completeness",
          printed=("second order: 1 - cosine", "second order: L2")),
    Claim("second-order term", "C (v3)", "the approximate second-order term is near the true one",
          Sentence(_small_error, "its error is smaller than the term itself (root mean square)"), "09_completeness",
          printed=("second order: RMSE of the term",), larger_is_stronger=False),
    Claim("most of the movement", "3.1", "a basis is sought that captures most of the movement (an aim)",
          _measured_over(_movement, 0.5, "over half of the squared movement between checkpoints lies in it"),
          "09_completeness", measure=_movement),
    Claim("tokens dropped", "4.1 (v3)", "along a vector whose mean falls, nearly half of the tokens rise",
          _over("POLCA: dropped", 0.25, "over a quarter"), printed=("POLCA: dropped",)),
    Claim("parameters", "B, Table 1", "number of parameters", Sentence(None, "nothing beyond the number"),
          "02_training", measure=_parameters, paper=9475594, tolerance=0),
)
# fmt: on
