"""The paper's claims about addition, each with the rule by which it is judged.

A claim has a number of the paper, a sentence that the number is cited for, or both. The rules are part of each claim;
they do not look at which study they judge. See :mod:`polca_paper.verdicts` for what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from polca_lib.tasks.settings import RunSettings
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
    """Nor could it: a claim about curves as they are says nothing of scaled ones."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper."""

    name: str
    section: str
    text: str
    paper: float | None  # its number, if it has one
    measure: Measure  # ours; NaN if there is nothing to measure
    holds: Callable[[SavedStudy], bool] | None  # the sentence; None if the number is cited for nothing beyond itself
    means: str  # what that is, in words
    page: str  # where the evidence stands
    tolerance: float = TOLERANCE
    larger_is_stronger: bool | None = None  # None: neither direction is

    def judge(self, kept: SavedStudy) -> str:
        """The verdict on one study."""
        try:
            ours = self.measure(kept)
            holds = None if self.holds is None else self.holds(kept)
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
    beyond = ours - paper  # not finite, and hence no match, where there is nothing to measure
    matches = abs(beyond) <= tolerance
    if matches and holds is not False:
        return "reproduced"
    stronger = {True: beyond > 0, False: beyond < 0, None: False}[larger_is_stronger]
    if holds and stronger and not matches:
        return "stronger here"
    return "partly" if holds or matches else "not reproduced"


def _table(kept: SavedStudy, name: str, **where: object) -> pd.DataFrame:
    """Rows of a table, of the scaling that the study is judged at if there are several.

    Raises:
        NotRun: there are none.
    """
    if not kept.has(name):
        raise NotRun(f"study {kept.name} has no table {name}")
    rows = kept.table(name)
    if "scaling" in rows:
        rows = rows[rows["scaling"] == kept.scaling]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if rows.empty:
        raise NotRun(f"study {kept.name} has no {where} in table {name}")
    return rows


def _row(kept: SavedStudy, name: str, **where: object) -> pd.Series:
    return _table(kept, name, **where).iloc[0]


def _strategy(name: str, column: str = "homogeneity_v3_1") -> Measure:
    def measure(kept: SavedStudy) -> float:
        if kept.scaling == "unit" and name in ("Fisher", "change in loss"):
            raise DoesNotApply(f"{name} is a rate, and has no final value to be scaled by")
        return float(_row(kept, "strategies", trajectory=name)[column])

    return measure


def _basis(kind: str, column: str = "homogeneity_v3_1", beside: str = "hessian") -> Measure:
    """On curves of the paper's order, or of the first that the basis ``beside`` it has, too."""

    def measure(kept: SavedStudy) -> float:
        rows = {name: _table(kept, "bases", basis=name).set_index("order") for name in (kind, beside)}
        for order in ("second", "first"):
            if all(order in own.index for own in rows.values()):
                return float(rows[kind].loc[order, column])
        raise NotRun(f"study {kept.name} has no order on both {kind} and {beside}")

    return measure


def _carry_cluster(order: str, rule: str = "v3") -> Callable[[SavedStudy], bool]:
    """Is there a cluster, by a rule, purer than the base rate, and than 95% of shuffles, in place and in digit?"""

    def holds(kept: SavedStudy) -> bool:
        own = _row(kept, "strategies", trajectory=f"POLCA {order}")
        tests = _table(kept, "null", order=order, rule=rule)
        return bool(own[f"homogeneity_{rule}_1"] > own["base_rate"] and tests["p"].max() <= 0.05)

    return holds


def _term(column: str) -> Measure:
    return lambda kept: float(_row(kept, "second_order_term", term="second")[column])


def _tokens(kept: SavedStudy, vector: int, order: str) -> pd.DataFrame:
    """Number of tokens by cluster and skill."""
    if not kept.has_clusters:
        raise NotRun(f"study {kept.name} keeps no clusters")
    own = kept.clusters["tokens"]
    kind = f"{order}, {kept.scaling}"
    if kind not in own["kind"] or vector not in own["vector"]:
        raise NotRun(f"study {kept.name} has no clusters of vector {vector} by order and scaling {kind}")
    tokens = own.sel(kind=kind, vector=vector).to_pandas()
    return tokens[tokens.sum(axis=1) > 0]


def _places(tokens: pd.DataFrame) -> pd.DataFrame:
    """Number of tokens by cluster and place."""
    return tokens.T.groupby(lambda skill: skill.split(",")[0]).sum().T


def _purity_of_place(kept: SavedStudy, vector: int, order: str = "second") -> float:
    """Share of clustered tokens that are of the most frequent place of their cluster; NaN if none is clustered."""
    places = _places(_tokens(kept, vector, order))
    return float(places.max(axis=1).sum() / places.to_numpy().sum()) if len(places) else float("nan")


def _finds_digits(kept: SavedStudy, vector: int) -> bool:
    places = _places(_tokens(kept, vector, "second"))
    return bool(_purity_of_place(kept, vector) > 0.6 and places.idxmax(axis=1).nunique() >= 2)


def _carry_share(kept: SavedStudy, vector: int, *, v3: bool, place: str | None = None, order: str = "second") -> float:
    """Largest share of carry tokens (of one place) in a cluster of a vector; NaN if no cluster counts."""
    tokens = _tokens(kept, vector, order)
    carries = tokens[[skill for skill in tokens if skill.endswith(", carry")]]
    inside = carries[[skill for skill in carries if skill.split(",")[0] in ("10s", "100s")]].sum(axis=1)
    counts = inside > 0.85 * carries.sum(axis=1) if v3 else tokens.sum(axis=1) > 0
    wanted = carries if place is None else carries[[f"{place}, carry"]]
    shares = (wanted.sum(axis=1) / tokens.sum(axis=1))[counts]
    return float(shares.max()) if len(shares) else float("nan")


def _dropped(kept: SavedStudy) -> float:
    return float(_strategy("POLCA second", "dropped")(kept) / kept.settings.data.validation_examples / 4)


def _agreement(column: str) -> Measure:
    return lambda kept: float(_table(kept, "agreement", order="second").sort_values("cadence").iloc[0][column])


def _completeness(column: str, order: str = "first") -> Measure:
    rows = {"basis": "hessian", "order": order}
    return lambda kept: float(_table(kept, "completeness", **rows).sort_values("cadence").iloc[0][column])


def _exact_tokens(kept: SavedStudy) -> pd.DataFrame:
    if kept.scaling != "raw":
        raise DoesNotApply(f"clusters of the exact loss are kept of raw curves, not with scaling {kept.scaling}")
    if not kept.has_clusters:
        raise NotRun(f"study {kept.name} keeps no clusters")
    return kept.clusters["exact_tokens"].to_pandas()


def _exact_place_share(kept: SavedStudy) -> float:
    """Share of tokens in the exact loss clusters that belong to the most frequent place of their cluster."""
    places = _places(_exact_tokens(kept))
    return float(places.max(axis=1).sum() / places.to_numpy().sum())


def _finds_digits_in_loss(kept: SavedStudy) -> bool:
    places = _places(_exact_tokens(kept))
    return bool(_exact_place_share(kept) > 0.6 and places.idxmax(axis=1).nunique() >= 2)


def _no_carry_in_loss(kept: SavedStudy) -> bool:
    """There are clusters, and none that v3's rule counts is a carry cluster."""
    own = _row(kept, "strategies", trajectory="exact loss")
    return bool(own["clusters"] > 0 and not own["homogeneity_v3_1"] > CARRY)


def _parameters(kept: SavedStudy) -> float:
    own = kept.settings.model
    paper = RunSettings.from_preset("paper").model
    if own != paper:
        raise NotRun(f"study {kept.name} has another model than the paper's")
    layers, d, mlp = (getattr(own, name) for name in ("n_layers", "d_model", "d_mlp"))
    block = 4 * d * d + 4 * d + 2 * d * mlp + mlp + d + 4 * d
    ends = own.d_vocab * d + own.n_ctx * d + 2 * d + (d + 1) * own.d_vocab_out
    return float(layers * block + ends)


_SCALE, _COMPLETENESS = "08_scale", "09_completeness"


def _more(one: Measure, other: Measure) -> Callable[[SavedStudy], bool]:
    """Is one measure over another? What is not there, such as a cluster that v3's rule counts, stands as zero."""
    return lambda kept: bool(np.nan_to_num(one(kept)) > np.nan_to_num(other(kept)))


def _over(measure: Measure, least: float) -> Callable[[SavedStudy], bool]:
    return lambda kept: measure(kept) > least


def _table_3() -> list[Claim]:
    """Homogeneity, recall, F1 and hidden breakthroughs of each kind of trajectory."""
    claims, section = [], "D, Table 3 (v3)"
    ours, exact = _strategy("POLCA second"), _strategy("exact loss", "hidden")
    for name, printed in paper_strategies().iterrows():
        if name.startswith("POLCA"):
            holds, means = _carry_cluster(name.split()[1]), "over the base rate, and beyond chance (p <= 0.05)"
        else:
            holds, means = _more(ours, _strategy(name)), "POLCA of second order finds a purer carry cluster"
        text = f"largest homogeneity of {name} clusters"
        own = (_strategy(name), holds, means, _SCALE, TOLERANCE, True if name.startswith("POLCA") else None)
        claims.append(Claim(f"{name}: homogeneity", section, text, printed["homogeneity_1"], *own))
        for measure in ("recall", "f1"):
            own = (_strategy(name, f"{measure}_v3_1"), None, "nothing beyond the number", _SCALE)
            claims.append(Claim(f"{name}: {measure}", section, f"{measure} of it", printed[f"{measure}_1"], *own))
        if name == "POLCA second":
            for rank, which in ((2, "second"), (3, "third")):
                best = _strategy(name, f"homogeneity_v3_{rank}")
                holds, means = _over(best, CARRY), f"over {CARRY:.0%} of its tokens take a carry"
                text, own = f"homogeneity of the {which} best cluster", (best, holds, means, _SCALE, TOLERANCE, True)
                claims.append(Claim(f"{name}: {which} best", section, text, printed[f"homogeneity_{rank}"], *own))
        hidden = _strategy(name, "hidden")
        if name.startswith("POLCA") or name == "Fisher":
            own = (hidden, _more(hidden, exact), "a larger share than that of exact loss clusters", _SCALE)
        else:
            more = _more(_strategy("POLCA second", "hidden"), hidden)
            own = (hidden, more, "a smaller share than that of POLCA clusters", _SCALE)
        text = "share of clusters with a hidden breakthrough"
        claims.append(Claim(f"{name}: hidden", section, text, printed["hidden"], *own))
    return claims


def _table_3_v1() -> list[Claim]:
    """The first version of the table, where any cluster counts."""
    claims, printed, section = [], paper_strategies()["homogeneity_1"], "D, Table 3 (v1)"
    polca = _strategy("POLCA second", "homogeneity_v1_1")
    for name in ("exact loss", "Fisher", "POLCA second"):
        own = _strategy(name, "homogeneity_v1_1")
        if name == "POLCA second":
            holds, means = _carry_cluster("second", rule="v1"), "over the base rate, and beyond chance (p <= 0.05)"
        else:
            holds, means = _more(polca, own), "POLCA of second order finds a purer cluster"
        text = f"largest homogeneity of {name} clusters, whatever cluster it is"
        claims.append(Claim(f"{name}: homogeneity, v1", section, text, printed[name], own, holds, means, _SCALE))
    for measure in ("recall", "f1"):
        own = _strategy("exact loss", f"{measure}_v1_1")
        number = paper_strategies().loc["exact loss", f"{measure}_1"]
        own = (number, own, None, "nothing beyond the number", _SCALE)
        claims.append(Claim(f"exact loss: {measure}, v1", section, f"{measure} of it", *own))
    return claims


def _table_4() -> list[Claim]:
    """Homogeneity and hidden breakthroughs on each basis."""
    claims = []
    for kind, homogeneity, recall, f1, hidden in (
        ("random", 0.902, 0.655, 0.759, 0.031),
        ("shuffled", 0.856, 0.699, 0.769, 0.304),
    ):
        for name, column, printed in (("homogeneity", "homogeneity_v3_1", homogeneity), ("hidden", "hidden", hidden)):
            less = _more(_basis("hessian", column, beside=kind), _basis(kind, column))
            text = {"homogeneity": "largest homogeneity", "hidden": "share of clusters with a hidden breakthrough"}[
                name
            ]
            own = (_basis(kind, column), less, "less than on the Hessian basis", _SCALE)
            claims.append(Claim(f"{kind} basis: {name}", "E, Table 4 (v3)", text, printed, *own))
        for name, printed in (("recall", recall), ("f1", f1)):
            own = (printed, _basis(kind, f"{name}_v3_1"), None, "nothing beyond the number", _SCALE)
            claims.append(Claim(f"{kind} basis: {name}", "E, Table 4 (v3)", f"{name} of its purest cluster", *own))
    return claims


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="parameters",
        section="B, Table 1",
        text="number of parameters",
        paper=9475594,
        measure=_parameters,
        holds=None,
        means="nothing beyond the number",
        page="02_training",
        tolerance=0,
    ),
    Claim(
        name="digits in the loss",
        section="4.2, Figure 3",
        text="exact loss clusters recover the digit places to a substantial degree",
        paper=None,
        measure=_exact_place_share,
        holds=_finds_digits_in_loss,
        means="over 60% of clustered tokens are of the most frequent place of their cluster, of two places at least",
        page=_SCALE,
    ),
    Claim(
        name="carry not in the loss",
        section="4.2, Figure 3",
        text="exact loss clusters find no carry",
        paper=None,
        measure=_strategy("exact loss"),
        holds=_no_carry_in_loss,
        means="there are clusters, but none, by v3's rule, of which over 80% take a carry",
        page=_SCALE,
    ),
    Claim(
        name="vector 1: digits",
        section="4.2, Figure 4",
        text="the first vector recovers the digit skill",
        paper=None,
        measure=lambda kept: _purity_of_place(kept, 1),
        holds=lambda kept: _finds_digits(kept, 1),
        means="over 60% of clustered tokens are of the most frequent place of their cluster, of two places at least",
        page=_SCALE,
    ),
    Claim(
        name="vector 2: carry",
        section="4.2, Figure 4",
        text="a cluster of the second vector is the carry skill",
        paper=0.903,
        measure=lambda kept: _carry_share(kept, 2, v3=True),
        holds=lambda kept: _carry_share(kept, 2, v3=True) > CARRY,
        means="by v3's rule, over 80% of its tokens take a carry",
        page=_SCALE,
    ),
    Claim(
        name="vector 3: carry in the 1000s",
        section="G, Figure 9",
        text="the third vector recovers the carry in the 1000s place",
        paper=None,
        measure=lambda kept: _carry_share(kept, 3, v3=False, place="1000s"),
        holds=lambda kept: _carry_share(kept, 3, v3=False, place="1000s") > CARRY,
        means="a cluster of which over 80% take a carry in the 1000s place",
        page=_SCALE,
    ),
    Claim(
        name="most of the movement",
        section="3.1",
        text="what is sought is a basis that captures most of the movement during optimisation",
        paper=None,
        measure=_completeness("movement_share"),
        holds=_over(_completeness("movement_share"), 0.5),
        means="over half of the squared movement between checkpoints lies in it",
        page=_COMPLETENESS,
    ),
    *_table_3_v1(),
    *_table_3(),
    *_table_4(),
    Claim(
        name="first and second order: cosine",
        section="F, Table 5",
        text="first- and second-order trajectories are very similar",
        paper=0.99987,
        measure=_agreement("cosine"),
        holds=_over(_agreement("cosine"), 0.95),
        means="mean cosine over 0.95",
        page=_COMPLETENESS,
        tolerance=0.005,
    ),
    Claim(
        name="first and second order: L2",
        section="F, Table 5",
        text="L2 distance of first- and second-order trajectories",
        paper=5.4891e-4,
        measure=_agreement("l2"),
        holds=_over(_agreement("cosine"), 0.95),
        means="mean cosine over 0.95",
        page=_COMPLETENESS,
        tolerance=5e-4,
    ),
    Claim(
        name="second-order term",
        section="C (v3)",
        text="RMSE of the approximate against the true second-order term",
        paper=0.145,
        measure=_term("rmse"),
        holds=_more(_term("rms_true"), _term("rmse")),
        means="smaller than the term itself (root mean square)",
        page=_COMPLETENESS,
        larger_is_stronger=False,
    ),
    Claim(
        name="tokens dropped",
        section="4.1 (v3)",
        text="share of tokens dropped per vector (2360.8 of 5000)",
        paper=2360.8 / 5000,
        measure=_dropped,
        holds=lambda kept: 0.25 < _dropped(kept) < 0.75,
        means="between a quarter and three quarters",
        page=_SCALE,
    ),
)
