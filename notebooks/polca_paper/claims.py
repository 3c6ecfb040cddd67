"""The paper's claims about addition, each with the rule by which it is judged.

A claim has a number of the paper, a sentence that the number is cited for, or both. The rules are part of each claim;
they do not look at which study they judge. See :mod:`polca_paper.verdicts` for what becomes of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings
from polca_paper.homogeneity import CARRY_PLACES, IN_PLACES
from polca_paper.saved_study import SavedStudy
from polca_paper.tables import paper_strategies

TOLERANCE = 0.05
"""Of homogeneity, recall, F1 and shares."""

CARRY = 0.8
"""Homogeneity over which a cluster is called a carry cluster, wherever a claim in words needs one."""

Measure = Callable[[SavedStudy], float]


class NotRun(LookupError):
    """A study has no row for what a claim is about."""


class DoesNotApply(NotRun):
    """No study can have such a row: a claim about raw curves does not apply to scaled ones."""


class Sentence(NamedTuple):
    """What a number is cited for."""

    holds: Callable[[SavedStudy], bool] | None  # None if the number is cited for nothing beyond itself
    means: str  # the test in words


@dataclass(frozen=True)
class Claim:
    """One claim of the paper."""

    name: str
    section: str
    text: str
    paper: float | None  # its number, if it has one
    measure: Measure  # ours; NaN if there is nothing to measure
    sentence: Sentence
    page: str = "08_scale"  # where the evidence stands
    tolerance: float = TOLERANCE
    larger_is_stronger: bool | None = None  # None: neither direction is

    def judge(self, study: SavedStudy) -> str:
        """The verdict on one study."""
        try:
            ours = self.measure(study)
            holds = self.sentence.holds and self.sentence.holds(study)
        except DoesNotApply:
            return "does not apply"
        except NotRun:
            return "not run"
        return verdict(self.paper, ours, holds, self.tolerance, self.larger_is_stronger)


def verdict(
    paper: float | None,
    ours: float,
    holds: bool | None,
    tolerance: float = TOLERANCE,
    larger_is_stronger: bool | None = None,
) -> str:
    """The verdict on a number, and on what it is cited for: see :class:`Claim`."""
    holds = None if holds is None else bool(holds)  # numpy's False is not False
    if paper is None:
        return "reproduced" if holds else "not reproduced"
    beyond = ours - paper  # not finite, and so no match, where there is nothing to measure
    matches = abs(beyond) <= tolerance
    if matches and holds is not False:
        return "reproduced"
    stronger = {True: beyond > 0, False: beyond < 0, None: False}[larger_is_stronger]
    if holds and stronger and not matches:
        return "stronger here"
    return "partly" if holds or matches else "not reproduced"


def _table(study: SavedStudy, name: str, **where: object) -> pd.DataFrame:
    """Rows of a table, of the scaling that the study is judged at if there are several.

    Raises:
        NotRun: there are none.
    """
    if not study.has(name):
        raise NotRun(f"study {study.name} has no table {name}")
    rows = study.table(name)
    if "scaling" in rows:
        rows = rows[rows["scaling"] == study.scaling]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if rows.empty:
        raise NotRun(f"study {study.name} has no {where} in table {name}")
    return rows


def _strategy(name: str, column: str = "homogeneity_v3_1") -> Measure:
    def measure(study: SavedStudy) -> float:
        if study.scaling == "unit" and name in ("Fisher", "change in loss"):
            raise DoesNotApply(f"{name} is a rate, and has no final value to be scaled by")
        return float(_table(study, "strategies", trajectory=name)[column].iloc[0])

    return measure


def _basis(kind: str, column: str, beside: str = "hessian") -> Measure:
    """A column of table ``bases``, at second order or else at first order: an order that ``beside`` has, too."""

    def measure(study: SavedStudy) -> float:
        ours, theirs = (_table(study, "bases", basis=name).set_index("order")[column] for name in (kind, beside))
        for order in ("second", "first"):
            if order in ours and order in theirs:
                return float(ours[order])
        raise NotRun(f"study {study.name} has no order on both {kind} and {beside}")

    return measure


def _finest(name: str, column: str, **where: object) -> Measure:
    """A value of a table at the finest cadence."""
    return lambda study: float(_table(study, name, **where).sort_values("cadence")[column].iloc[0])


def _term(column: str) -> Measure:
    return lambda study: float(_table(study, "second_order_term", term="second")[column].iloc[0])


def _dropped(study: SavedStudy) -> float:
    return float(_strategy("POLCA second", "dropped")(study) / study.settings.data.validation_examples / 4)


def _parameters(study: SavedStudy) -> float:
    model = study.settings.model
    if model != RunSettings.from_preset("paper").model:
        raise NotRun(f"study {study.name} has another model than the paper's")
    return float(sum(p.numel() for p in build_model(model, 0).parameters()))


def _tokens(study: SavedStudy, vector: int | None) -> pd.DataFrame:
    """Number of tokens by cluster and skill, of a vector by second order or, with None, of the exact loss."""
    if vector is None and study.scaling != "raw":
        raise DoesNotApply(f"clusters of the exact loss are kept of raw curves, not with scaling {study.scaling}")
    if not study.has_clusters:
        raise NotRun(f"study {study.name} keeps no clusters")
    if vector is None:
        return study.clusters["exact_tokens"].to_pandas()
    counts, kind = study.clusters["tokens"], f"second, {study.scaling}"
    if kind not in counts["kind"] or vector not in counts["vector"]:
        raise NotRun(f"study {study.name} has no clusters of vector {vector} by order and scaling {kind}")
    tokens = counts.sel(kind=kind, vector=vector).to_pandas()
    return tokens[tokens.sum(axis=1) > 0]


def _places(study: SavedStudy, vector: int | None) -> pd.DataFrame:
    """Number of tokens by cluster and place."""
    return _tokens(study, vector).T.groupby(lambda skill: skill.split(",")[0]).sum().T


def _purity_of_place(study: SavedStudy, vector: int | None) -> float:
    """Share of clustered tokens that are of the most frequent place of their cluster; NaN if none is clustered."""
    places = _places(study, vector)
    return float(places.max(axis=1).sum() / places.to_numpy().sum()) if len(places) else float("nan")


def _carry_share(study: SavedStudy, vector: int, place: str | None = None) -> float:
    """Largest share of carry tokens in a cluster that counts by v3's rule; or of those of a place, in any cluster."""
    tokens = _tokens(study, vector)
    carries = tokens[[skill for skill in tokens if skill.endswith(", carry")]]
    wanted = carries if place is None else carries[[f"{place}, carry"]]
    shares = wanted.sum(axis=1) / tokens.sum(axis=1)
    if place is None:
        inside = carries[[skill for skill in carries if skill.split(",")[0] in CARRY_PLACES]]
        shares = shares[inside.sum(axis=1) > IN_PLACES * carries.sum(axis=1)]
    return float(shares.max()) if len(shares) else float("nan")


_NUMBER_ALONE = Sentence(None, "nothing beyond the number")


def _more(measure: Measure, than: Measure, means: str) -> Sentence:
    """One measure is over another. What is not there, such as a cluster that v3's rule counts, stands as zero."""
    return Sentence(lambda study: bool(np.nan_to_num(measure(study)) > np.nan_to_num(than(study))), means)


def _over(measure: Measure, least: float, means: str) -> Sentence:
    return Sentence(lambda study: measure(study) > least, means)


def _finds_digits(vector: int | None) -> Sentence:
    means = "over 60% of clustered tokens are of the most frequent place of their cluster, of two places at least"

    def holds(study: SavedStudy) -> bool:
        return bool(_purity_of_place(study, vector) > 0.6 and _places(study, vector).idxmax(axis=1).nunique() >= 2)

    return Sentence(holds, means)


def _no_carry_in_loss() -> Sentence:
    def holds(study: SavedStudy) -> bool:
        row = _table(study, "strategies", trajectory="exact loss").iloc[0]
        return bool(row["clusters"] > 0 and not row["homogeneity_v3_1"] > CARRY)

    return Sentence(holds, "there are clusters, but none, by v3's rule, of which over 80% take a carry")


def _carry_cluster(order: str, rule: str = "v3") -> Sentence:
    """There is a cluster, by a rule, purer than the base rate, and than 95% of shuffles, in place and in digit."""

    def holds(study: SavedStudy) -> bool:
        row = _table(study, "strategies", trajectory=f"POLCA {order}").iloc[0]
        tests = _table(study, "null", order=order, rule=rule)
        return bool(row[f"homogeneity_{rule}_1"] > row["base_rate"] and tests["p"].max() <= 0.05)

    return Sentence(holds, "over the base rate, and beyond chance (p <= 0.05)")


_HIDDEN = "share of clusters with a hidden breakthrough"


def _table_3() -> list[Claim]:
    """Homogeneity, recall, F1 and hidden breakthroughs of each kind of trajectory."""
    claims = []
    ours, exact_hidden = _strategy("POLCA second"), _strategy("exact loss", "hidden")
    for name, printed in paper_strategies().drop(index=["random", "shuffled"]).iterrows():
        polca, hidden = name.startswith("POLCA"), _strategy(name, "hidden")
        purer = _more(ours, _strategy(name), "POLCA of second order finds a purer carry cluster")
        pure = _carry_cluster(name.split()[1]) if polca else purer
        # Name, text, column of the paper's table, column of ours, sentence, whether larger is stronger.
        text = f"largest homogeneity of {name} clusters"
        rows = [("homogeneity", text, "homogeneity_1", "homogeneity_v3_1", pure, True if polca else None)]
        rows += [(m, f"{m} of it", f"{m}_1", f"{m}_v3_1", _NUMBER_ALONE, None) for m in ("recall", "f1")]
        if name == "POLCA second":
            for rank, which in ((2, "second"), (3, "third")):
                column = f"homogeneity_v3_{rank}"
                carry = _over(_strategy(name, column), CARRY, f"over {CARRY:.0%} of its tokens take a carry")
                text = f"homogeneity of the {which} best cluster"
                rows.append((f"{which} best", text, f"homogeneity_{rank}", column, carry, True))
        if polca or name == "Fisher":
            share = _more(hidden, exact_hidden, "a larger share than that of exact loss clusters")
        else:
            share = _more(_strategy("POLCA second", "hidden"), hidden, "a smaller share than that of POLCA clusters")
        rows.append(("hidden", _HIDDEN, "hidden", "hidden", share, None))
        for what, text, paper, column, sentence, larger in rows:
            claim = Claim(
                f"{name}: {what}", "D, Table 3 (v3)", text, printed[paper], _strategy(name, column), sentence,
                larger_is_stronger=larger,
            )  # fmt: skip
            claims.append(claim)
    return claims


def _table_3_v1() -> list[Claim]:
    """The first version of the table, where any cluster counts."""
    rows, printed = [], paper_strategies()
    polca = _strategy("POLCA second", "homogeneity_v1_1")
    for name in ("exact loss", "Fisher", "POLCA second"):
        ours = _strategy(name, "homogeneity_v1_1")
        purer = _more(polca, ours, "POLCA of second order finds a purer cluster")
        sentence = _carry_cluster("second", rule="v1") if name == "POLCA second" else purer
        rows.append((name, "homogeneity", f"largest homogeneity of {name} clusters, whatever cluster it is", sentence))
    rows += [("exact loss", measure, f"{measure} of it", _NUMBER_ALONE) for measure in ("recall", "f1")]
    claims = []
    for name, measure, text, sentence in rows:
        paper, ours = printed.loc[name, f"{measure}_1"], _strategy(name, f"{measure}_v1_1")
        claims.append(Claim(f"{name}: {measure}, v1", "D, Table 3 (v1)", text, paper, ours, sentence))
    return claims


def _table_4() -> list[Claim]:
    """Homogeneity and hidden breakthroughs on each basis."""
    texts = {"homogeneity": "largest homogeneity", "hidden": _HIDDEN}
    claims = []
    printed = paper_strategies()
    for kind, name in itertools.product(("random", "shuffled"), ("homogeneity", "hidden", "recall", "f1")):
        paper = printed.loc[kind, name if name == "hidden" else f"{name}_1"]
        column = name if name == "hidden" else f"{name}_v3_1"
        ours, hessian = _basis(kind, column), _basis("hessian", column, beside=kind)
        sentence = _more(hessian, ours, "less than on the Hessian basis") if name in texts else _NUMBER_ALONE
        text = texts.get(name, f"{name} of its purest cluster")
        claims.append(Claim(f"{kind} basis: {name}", "E, Table 4 (v3)", text, paper, ours, sentence))
    return claims


_LOSS_PLACES, _FIRST_PLACES = (partial(_purity_of_place, vector=vector) for vector in (None, 1))
_CARRY_2, _CARRY_3 = partial(_carry_share, vector=2), partial(_carry_share, vector=3, place="1000s")
_MOVEMENT = _finest("completeness", "movement_share", basis="hessian", order="first")
_COSINE, _L2 = (_finest("agreement", column, order="second") for column in ("cosine", "l2"))
_SIMILAR = _over(_COSINE, 0.95, "mean cosine over 0.95")
_SMALL = _more(_term("rms_true"), _term("rmse"), "smaller than the term itself (root mean square)")
_SOME_DROPPED = Sentence(lambda study: 0.25 < _dropped(study) < 0.75, "between a quarter and three quarters")

# fmt: off
CLAIMS: tuple[Claim, ...] = (
    Claim("parameters", "B, Table 1", "number of parameters", 9475594, _parameters, _NUMBER_ALONE, "02_training",
          tolerance=0),
    Claim("digits in the loss", "4.2, Figure 3",
          "exact loss clusters recover the digit places to a substantial degree", None, _LOSS_PLACES,
          _finds_digits(None)),
    Claim("carry not in the loss", "4.2, Figure 3",
          "exact loss clusters find no carry", None, _strategy("exact loss"), _no_carry_in_loss()),
    Claim("vector 1: digits", "4.2, Figure 4",
          "the first vector recovers the digit skill", None, _FIRST_PLACES, _finds_digits(1)),
    Claim("vector 2: carry", "4.2, Figure 4",
          "a cluster of the second vector is the carry skill", 0.903, _CARRY_2,
          _over(_CARRY_2, CARRY, "by v3's rule, over 80% of its tokens take a carry")),
    Claim("vector 3: carry in the 1000s", "G, Figure 9",
          "the third vector recovers the carry in the 1000s place", None, _CARRY_3,
          _over(_CARRY_3, CARRY, "a cluster of which over 80% take a carry in the 1000s place")),
    Claim("most of the movement", "3.1",
          "what is sought is a basis that captures most of the movement during optimisation", None, _MOVEMENT,
          _over(_MOVEMENT, 0.5, "over half of the squared movement between checkpoints lies in it"), "09_completeness"),
    *_table_3_v1(),
    *_table_3(),
    *_table_4(),
    Claim("first and second order: cosine", "F, Table 5",
          "first- and second-order trajectories are very similar", 0.99987, _COSINE, _SIMILAR, "09_completeness",
          tolerance=0.005),
    Claim("first and second order: L2", "F, Table 5",
          "L2 distance of first- and second-order trajectories", 5.4891e-4, _L2, _SIMILAR, "09_completeness",
          tolerance=5e-4),
    Claim("second-order term", "C (v3)",
          "RMSE of the approximate against the true second-order term", 0.145, _term("rmse"), _SMALL,
          "09_completeness", larger_is_stronger=False),
    Claim("tokens dropped", "4.1 (v3)",
          "share of tokens dropped per vector (2360.8 of 5000)", 2360.8 / 5000, _dropped, _SOME_DROPPED),
)
# fmt: on
