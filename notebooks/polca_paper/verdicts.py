"""Our number for each of the paper's claims, and the verdict.

- *reproduced*: our number is within the tolerance of the paper's, and the sentence it is cited for holds;
- *stronger here*: our number is beyond the paper's in the direction of the claim, and the sentence holds;
- *partly*: one of the two: the number is missed, but the sentence holds; or the other way round;
- *not reproduced*: neither;
- *not run*: the study has no such number;
- *does not apply*: nor can it have one, as for a claim about raw curves when others are judged.

Where the paper has no number, the sentence decides alone. Where the study finds no cluster that could be measured, the
number is missed. The rules stand with the claims, in :mod:`polca_paper.claims`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from polca_lib.method.settings import FORMER_TOLERANCE, TOLERANCE
from polca_lib.storage.artefacts import differences
from polca_lib.tasks.settings import RunSettings
from polca_paper.claims import CLAIMS, Claim, NotRun, verdict
from polca_paper.saved_study import SavedStudy

JUDGED = ("paper-0", "paper-bases", "laptop-0", "laptop-1", "laptop-2")
"""Studies that the verdicts of the repository are on."""

COLUMNS = ["claim", "section", "paper", "ours", "low", "high", "seeds", "preset", "device", "verdict"]
"""Of ``data/paper/verdicts.csv``."""

ENGLISH = "wikipedia-large"
"""Study that the paper's counts about English are compared with."""

PAPER_ENGLISH = {"vectors": 30, "kept": 26, "simple_label": 22, "tokens": 12_600, "dropped_mean": 6655.5}
"""Counts of section 5 and v3. ``kept`` counts vectors whose mean falls, ``dropped_mean`` tokens per vector."""

# From the most favourable to the least.
_VERDICTS = ["does not apply", "not run", "reproduced", "stronger here", "partly", "not reproduced"]


def _measured(claim: Claim, study: SavedStudy) -> float:
    try:
        return claim.measure(study)
    except NotRun:
        return float("nan")


def scale_of(study: SavedStudy) -> str:
    """The preset, and what of the run differs from it, seed and device apart."""
    settings = study.settings
    preset = RunSettings.from_preset(settings.preset, task=settings.task)
    changes = differences(preset.model_dump(mode="json"), settings.model_dump(mode="json"))
    apart = {"seed", "device", "memory"}
    if preset.basis.tolerance is None and settings.basis.tolerance in (TOLERANCE, FORMER_TOLERANCE):
        apart.add("basis.tolerance")  # the default of its version
    parts = [f"{name} = {ours}" for name, _, ours in changes if name not in apart]
    return "; ".join([settings.preset, *parts])


def judge(studies: Iterable[SavedStudy], claims: Iterable[Claim] = CLAIMS) -> pd.DataFrame:
    """Verdict on each claim, by scale: studies that differ in seed alone are judged together.

    Returns:
        Rows ``claim``, ``section``, ``text``, ``paper``, ``ours`` (median), ``low``, ``high``, ``seeds``, ``preset``
        (see :func:`scale_of`), ``device``, ``verdict`` (the most frequent; of equally many the least favourable),
        ``each`` (how many seeds have which verdict), ``measured`` (number of seeds with a number; median and range are
        theirs), ``cited_for``, ``page`` and ``studies``, their names.
    """
    by_scale: dict[str, list[SavedStudy]] = {}
    for study in studies:
        by_scale.setdefault(scale_of(study), []).append(study)
    rows = []
    for claim in claims:
        for scale, group in by_scale.items():
            values = np.array([_measured(claim, study) for study in group], float)
            verdicts = [claim.judge(study) for study in group]
            finite = values[np.isfinite(values)]
            low, ours, high = np.quantile(finite, [0, 0.5, 1]) if len(finite) else (np.nan,) * 3
            row = {"claim": claim.name, "section": claim.section, "text": claim.text, "paper": claim.paper}
            row |= {"ours": ours, "low": low, "high": high, "seeds": len(group), "preset": scale}
            row["device"] = ", ".join(dict.fromkeys(study.device for study in group))
            row["verdict"] = max(_VERDICTS, key=lambda v: (verdicts.count(v), _VERDICTS.index(v)))
            row["each"] = ", ".join(f"{verdicts.count(v)} {v}" for v in _VERDICTS if v in verdicts)
            row |= {"measured": len(finite), "cited_for": claim.sentence.means, "page": claim.page}
            rows.append({**row, "studies": ", ".join(study.name for study in group)})
    return pd.DataFrame(rows)


def first_run(*scales: pd.DataFrame) -> pd.DataFrame:
    """For each claim the row of the first scale that ran it, or else the row of the first scale.

    Args:
        scales: from :func:`judge`, of one scale each, with the same claims in the same order.
    """
    first, *rest = (rows.reset_index(drop=True) for rows in scales)
    for rows in rest:
        lacking = (first["verdict"] == "not run") & (rows["verdict"] != "not run")
        first = first.where(~lacking, rows)
    return first


def english_counts(study: SavedStudy, kind: str = "POLCA second, raw") -> dict[str, object]:
    """Our numbers beside ``PAPER_ENGLISH``: what ``data/paper/english_counts.json`` holds.

    Args:
        study: of Wikipedia.
        kind: of trajectory; the default is the paper's.
    """
    row = study.table("counts").set_index("kind").loc[kind]
    names = [*PAPER_ENGLISH, "simple_by_chance", "clustered", "clusters", "outliers_mean"]
    about = {"kind": kind, "preset": scale_of(study), "seed": study.settings.seed, "device": study.device}
    about |= {name: study.provenance["stages"][name] for name in ("corpus", "tags")}
    about["commit"] = study.provenance["tables"]["counts"]["commit"]
    return {**{name: row[name].item() for name in names}, **about, "study": study.name, "paper": PAPER_ENGLISH}


def judge_english(study: SavedStudy, kind: str = "POLCA second, raw") -> pd.DataFrame:
    """Verdict on each claim of section 5 by one study of Wikipedia.

    Numbers are shares, of the vectors of the basis, of the kept ones, or of all tokens, so that a study with fewer can
    be judged; the rules are the same as for addition.

    Args:
        study: of Wikipedia.
        kind: of trajectory; the default is the paper's.

    Returns:
        Rows ``claim``, ``paper`` and ``ours`` (NaN where the paper has no number), ``holds`` (what it is cited for, or
        the claim itself) and ``verdict``.
    """
    row, exact = (study.table("counts").set_index("kind").loc[name] for name in (kind, "exact loss, raw"))
    labels, pairs = (table[table["kind"] == kind] for table in (study.table("labels"), study.table("mirrored")))
    simple = labels[labels["simple"]]
    contrast = float((simple["inside"] / simple["outside"]).median())
    newline = ((labels["label_0"] == "SPACE") & (labels["inside"] > labels["outside"])).sum()
    paper, falling, mirrored = PAPER_ENGLISH, max(1, row["kept"]), len(pairs)
    claims = [
        ("vectors whose mean falls, share", paper["kept"] / paper["vectors"], row["kept"] / row["vectors"], None, None),
        ("of those a simply labelled cluster, share; beyond chance", paper["simple_label"] / paper["kept"],
         row["simple_label"] / falling, row["simple_p"] <= 0.05, True),
        ("the same, labels of nothing but PAD apart; beyond chance", None, row["simple_words"] / falling,
         row["simple_words_p"] <= 0.05, None),
        ("tokens dropped, share", paper["dropped_mean"] / paper["tokens"], row["dropped_mean"] / row["tokens"], None,
         None),
        ("simple labels fit twice as often inside as outside, at the median", None, contrast, contrast >= 2, None),
        ("there are clusters of newlines", None, newline, newline > 0, None),
        ("there are clusters that mirror each other", None, mirrored, mirrored > 0, None),
        ("some clusters have hidden breakthroughs, share", None, row["hidden"], row["hidden"] > 0, None),
        ("clusters of the exact loss have none, share", None, exact["hidden"], exact["hidden"] == 0, None),
    ]  # fmt: skip
    table = pd.DataFrame(claims, columns=["claim", "paper", "ours", "holds", "larger_is_stronger"])
    verdicts = [verdict(*numbers, larger_is_stronger=larger) for _, *numbers, larger in claims]
    return table.drop(columns="larger_is_stronger").assign(verdict=verdicts)
