"""The paper's claims about addition, our number for each, and the verdict that follows from a rule stated beforehand.

Verdicts, for a number p of the paper, ours x, and a tolerance:

- *reproduced*: x is within the tolerance of p; or, for a claim in words, what it says holds.
- *stronger here*: x is beyond p in the direction of the claim by more than the tolerance.
- *partly*: x misses p, but what the number is cited for still holds; each claim says what that is.
- *not reproduced*: neither;
- *not run*: the study has no such number.

The rules are part of each claim. They do not look at which study they judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from polca_lib.reproduce import Kept
from polca_lib.tables import PAPER, paper_strategies

TOLERANCE = 0.05
"""Of homogeneity, recall, F1 and shares."""


Measure = Callable[[Kept], float]


class NotRun(LookupError):
    """A study has no row for what a claim is about."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper."""

    name: str
    section: str
    text: str
    paper: float | None  # its number, if it has one
    measure: Measure  # ours; NaN if there is nothing to measure
    holds: Callable[[Kept], bool]  # does what the number is cited for hold?
    means: str  # what that is, in words
    page: str  # where the evidence stands
    tolerance: float = TOLERANCE
    larger_is_stronger: bool | None = None  # None: neither direction is

    def judge(self, kept: Kept) -> str:
        """The verdict on one study."""
        try:
            ours, holds = self.measure(kept), self.holds(kept)
        except NotRun:
            return "not run"
        if self.paper is None:
            return "reproduced" if holds else "not reproduced"
        if not np.isfinite(ours):
            return "not reproduced"
        beyond = ours - self.paper
        if abs(beyond) <= self.tolerance:
            return "reproduced"
        if holds and self.larger_is_stronger is not None and (beyond > 0) == self.larger_is_stronger:
            return "stronger here"
        return "partly" if holds else "not reproduced"


def _row(kept: Kept, table: str, **where: object) -> pd.Series:
    rows = kept.table(table)
    for name, value in where.items():
        rows = rows[rows[name] == value]
    if rows.empty:
        raise NotRun(f"study {kept.name} has no {where} in table {table}")
    return rows.iloc[0]


def _strategy(name: str, column: str = "homogeneity_v3_1") -> Measure:
    return lambda kept: float(_row(kept, "strategies", scaling="raw", trajectory=name)[column])


def _basis(kind: str, column: str = "homogeneity_v3_1") -> Measure:
    def measure(kept: Kept) -> float:
        rows = kept.table("bases")
        rows = rows[(rows["basis"] == kind) & (rows["scaling"] == "raw")]
        # The paper's order where the study has it; for other bases of a large run it has first order alone.
        for order in ("second", "first"):
            if len(found := rows[rows["order"] == order]):
                return float(found.iloc[0][column])
        raise NotRun(f"study {kept.name} has no {kind} basis")

    return measure


def _p(order: str, scaling: str = "raw", rule: str = "v3", within: str = "place") -> Measure:
    return lambda kept: float(_row(kept, "null", order=order, scaling=scaling, rule=rule, within=within)["p"])


def _significant(order: str) -> Callable[[Kept], bool]:
    def holds(kept: Kept) -> bool:
        own = _row(kept, "strategies", scaling="raw", trajectory=f"POLCA {order}")
        return bool(own["homogeneity_v3_1"] > own["base_rate"]) and _p(order)(kept) <= 0.05

    return holds


def _term(column: str) -> Measure:
    return lambda kept: float(_row(kept, "second_order_term", term="second")[column])


def _tokens(kept: Kept, vector: int, order: str) -> pd.DataFrame:
    """Number of tokens by cluster and skill; no rows if the basis has no such vector."""
    own = kept.clusters["tokens"].sel(kind=f"{order}, raw")
    if vector not in own["vector"]:
        return pd.DataFrame(columns=own["skill"].values)
    return own.sel(vector=vector).to_pandas()


def _purity_of_place(kept: Kept, vector: int, order: str = "second") -> float:
    """Largest mean share of one place in the clusters of a vector, weighted by tokens."""
    tokens = _tokens(kept, vector, order)
    tokens = tokens.T.groupby(lambda skill: skill.split(",")[0]).sum().T
    total = tokens.to_numpy().sum()
    return float(tokens.max(axis=1).sum() / total) if total else float("nan")


def _carry_share(kept: Kept, vector: int, place: str | None = None, order: str = "second") -> float:
    """Largest share of carry tokens (of one place) in a cluster of a vector."""
    tokens = _tokens(kept, vector, order)
    tokens = tokens[tokens.sum(axis=1) > 0]
    if tokens.empty:
        return float("nan")
    carries = [s for s in tokens if s.endswith(", carry") and (place is None or s.startswith(place))]
    return float((tokens[carries].sum(axis=1) / tokens.sum(axis=1)).max())


def _dropped(kept: Kept) -> float:
    return float(_strategy("POLCA second", "dropped")(kept) / kept.settings["data.validation_examples"] / 4)


def _agreement(column: str) -> Measure:
    def measure(kept: Kept) -> float:
        table = kept.table("agreement")
        return float(table[table["order"] == "second"].sort_values("cadence").iloc[0][column])

    return measure


def _final_closure(column: str, order: str = "first") -> Measure:
    def measure(kept: Kept) -> float:
        table = kept.table("closure")
        own = table[(table["basis"] == "hessian") & (table["order"] == order)]
        return float(own.sort_values("cadence").iloc[0][column])

    return measure


def _exact_place_share(kept: Kept) -> float:
    """Share of tokens in the exact loss clusters that belong to the most frequent place of their cluster."""
    tokens = kept.clusters["exact_tokens"].to_pandas()
    tokens = tokens.T.groupby(lambda skill: skill.split(",")[0]).sum().T
    return float(tokens.max(axis=1).sum() / tokens.to_numpy().sum())


def _parameters(kept: Kept) -> float:
    own = kept.settings
    layers, d, mlp = (own[f"model.{name}"] for name in ("n_layers", "d_model", "d_mlp"))
    block = 4 * d * d + 4 * d + 2 * d * mlp + mlp + d + 4 * d
    ends = own["model.d_vocab"] * d + own["model.n_ctx"] * d + 2 * d + (d + 1) * own["model.d_vocab_out"]
    return float(layers * block + ends)


_SCALE, _CLOSURE = "08_scale", "09_closure"


def _more(one: Measure, other: Measure) -> Callable[[Kept], bool]:
    """Is one measure over another? What is not there, such as a cluster that v3's rule counts, stands as zero."""
    return lambda kept: bool(np.nan_to_num(one(kept)) > np.nan_to_num(other(kept)))


def _over(measure: Measure, least: float) -> Callable[[Kept], bool]:
    return lambda kept: measure(kept) > least


def _never(_: Kept) -> bool:
    """For numbers that are cited for nothing beyond themselves."""
    return False


def _table_3() -> list[Claim]:
    """Homogeneity, recall, F1 and hidden breakthroughs of each kind of trajectory."""
    claims, section = [], "D, Table 3 (v3)"
    ours, exact = _strategy("POLCA second"), _strategy("exact loss", "hidden")
    for name, printed in paper_strategies().iterrows():
        if name.startswith("POLCA"):
            holds, means = _significant(name.split()[1]), "beyond the base rate, and beyond chance (p <= 0.05)"
        else:
            holds, means = _more(ours, _strategy(name)), "POLCA of second order finds a purer carry cluster"
        text = f"largest homogeneity of {name} clusters"
        own = (_strategy(name), holds, means, _SCALE, TOLERANCE, True if name.startswith("POLCA") else None)
        claims.append(Claim(f"{name}: homogeneity", section, text, printed["homogeneity_1"], *own))
        for measure in ("recall", "f1"):
            own = (_strategy(name, f"{measure}_v3_1"), _never, "nothing beyond the number", _SCALE)
            claims.append(Claim(f"{name}: {measure}", section, f"{measure} of it", printed[f"{measure}_1"], *own))
        hidden = _strategy(name, "hidden")
        if name.startswith("POLCA") or name == "Fisher":
            own = (hidden, _more(hidden, exact), "a larger share than that of exact loss clusters", _SCALE)
        else:
            more = _more(_strategy("POLCA second", "hidden"), hidden)
            own = (hidden, more, "a smaller share than that of POLCA clusters", _SCALE)
        text = "share of clusters with a hidden breakthrough"
        claims.append(Claim(f"{name}: hidden", section, text, printed["hidden"], *own))
    return claims


def _table_4() -> list[Claim]:
    """Homogeneity and hidden breakthroughs on each basis."""
    claims = []
    for kind, homogeneity, hidden in (("random", 0.902, 0.031), ("shuffled", 0.856, 0.304)):
        for name, column, printed in (("homogeneity", "homogeneity_v3_1", homogeneity), ("hidden", "hidden", hidden)):
            less = _more(_basis("hessian", column), _basis(kind, column))
            text = {"homogeneity": "largest homogeneity", "hidden": "share of clusters with a hidden breakthrough"}[
                name
            ]
            own = (_basis(kind, column), less, "less than on the Hessian basis", _SCALE)
            claims.append(Claim(f"{kind} basis: {name}", "E, Table 4 (v3)", text, printed, *own))
    return claims


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="parameters",
        section="B, Table 1",
        text="number of parameters",
        paper=9475594,
        measure=_parameters,
        holds=_never,
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
        holds=_over(_exact_place_share, 0.6),
        means="over 60% of clustered tokens are of the most frequent place of their cluster (by lot: 25%)",
        page=_SCALE,
    ),
    Claim(
        name="carry not in the loss",
        section="4.2, Figure 3",
        text="exact loss clusters find no carry",
        paper=None,
        measure=_strategy("exact loss", "homogeneity_v1_1"),
        holds=lambda kept: not _strategy("exact loss", "homogeneity_v1_1")(kept) > 0.9,
        means="no cluster with over 90% of carry tokens, by v1's rule",
        page=_SCALE,
    ),
    Claim(
        name="vector 1: digits",
        section="4.2, Figure 4",
        text="the first vector recovers the digit skill",
        paper=None,
        measure=lambda kept: _purity_of_place(kept, 1),
        holds=lambda kept: _purity_of_place(kept, 1) > 0.6,
        means="over 60% of clustered tokens are of the most frequent place of their cluster",
        page=_SCALE,
    ),
    Claim(
        name="vector 2: carry",
        section="4.2, Figure 4",
        text="a cluster of the second vector is the carry skill",
        paper=0.903,
        measure=lambda kept: _carry_share(kept, 2),
        holds=lambda kept: _carry_share(kept, 2) > 0.8,
        means="over 80% of its tokens take a carry",
        page=_SCALE,
    ),
    Claim(
        name="vector 3: carry in the 1000s",
        section="G, Figure 9",
        text="the third vector recovers the carry in the 1000s place",
        paper=None,
        measure=lambda kept: _carry_share(kept, 3, "1000s"),
        holds=lambda kept: _carry_share(kept, 3, "1000s") > 0.8,
        means="a cluster of which over 80% take a carry in the 1000s place",
        page=_SCALE,
    ),
    Claim(
        name="most of the movement",
        section="3.1",
        text="the basis captures most of the movement during optimisation",
        paper=None,
        measure=_final_closure("movement_share"),
        holds=_over(_final_closure("movement_share"), 0.5),
        means="over half of the squared movement between checkpoints lies in it",
        page=_CLOSURE,
    ),
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
        page=_CLOSURE,
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
        page=_CLOSURE,
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
        page=_CLOSURE,
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


def _measured(claim: Claim, kept: Kept) -> float:
    try:
        return claim.measure(kept)
    except NotRun:
        return float("nan")


def judge(studies: Iterable[Kept], claims: Iterable[Claim] = CLAIMS) -> pd.DataFrame:
    """Verdict on each claim, by preset.

    Returns:
        Rows ``claim``, ``section``, ``text``, ``paper``, ``ours`` (median), ``low``, ``high``, ``seeds``, ``preset``,
        ``device``, ``verdict`` (the most frequent; of equally many the less favourable), ``cited_for`` and ``page``.
    """
    by_preset: dict[str, list[Kept]] = {}
    for kept in studies:
        by_preset.setdefault(str(kept.settings["preset"]), []).append(kept)
    rows = []
    severity = ["not run", "reproduced", "stronger here", "partly", "not reproduced"]
    for claim in claims:
        for preset, group in by_preset.items():
            values = np.array([_measured(claim, kept) for kept in group], float)
            verdicts = [claim.judge(kept) for kept in group]
            verdict = max(severity, key=lambda v: (verdicts.count(v), severity.index(v)))
            finite = values[np.isfinite(values)]
            low, ours, high = np.quantile(finite, [0, 0.5, 1]) if len(finite) else (np.nan,) * 3
            row = {"claim": claim.name, "section": claim.section, "text": claim.text, "paper": claim.paper}
            row |= {"ours": ours, "low": low, "high": high, "seeds": len(group), "preset": preset}
            row |= {"device": group[0].settings["device"], "verdict": verdict}
            rows.append({**row, "cited_for": claim.means, "page": claim.page})
    return pd.DataFrame(rows)


JUDGED = ("paper-0", "laptop-0", "laptop-1", "laptop-2")
"""Studies that the verdicts of the repository are on."""

COLUMNS = ["claim", "section", "paper", "ours", "low", "high", "seeds", "preset", "device", "verdict"]
"""Of ``data/paper/verdicts.csv``."""


def main() -> None:
    """Judge every claim by the studies named, and write ``data/paper/verdicts.csv``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("studies", nargs="*", default=JUDGED, help="folders in data/addition; default: %(default)s")
    parser.add_argument("--output", type=Path, default=PAPER / "verdicts.csv")
    arguments = parser.parse_args()
    try:
        verdicts = judge([Kept(name) for name in arguments.studies])
    except FileNotFoundError as error:
        parser.error(str(error))
    arguments.output.write_text(verdicts[COLUMNS].to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
