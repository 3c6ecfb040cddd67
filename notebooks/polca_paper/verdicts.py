"""Our numbers for each of the paper's claims, and the verdict, by one reading of the paper.

- *reproduced*: most of our numbers are within their tolerance of the paper's, and what they are cited for holds;
- *stronger here*: the first number is beyond the paper's in the direction of the claim, and what it is cited for
  holds;
- *partly*: one of the two: the numbers are missed, but the sentence holds; or the other way round;
- *not reproduced*: neither;
- *not run*: the studies have no such number.

Where the paper has no number, the sentence decides alone. Where a study finds no cluster that could be measured, the
number is missed. The rules stand with the claims, in :mod:`polca_paper.claims`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from polca_lib.method.settings import FORMER_TOLERANCE, TOLERANCE
from polca_lib.storage.artefacts import differences
from polca_lib.tasks.settings import RunSettings
from polca_paper import fit
from polca_paper.claims import CLAIMS, SHARE, Claim, Evidence, verdict
from polca_paper.saved_study import SavedStudy

WHOLE = ("paper-whole", "paper-0")
"""Studies at the paper's size, by which the reading is chosen."""

COARSE = "paper-whole-random"
"""The same run on random directions and single parameters, with a fifth of the checkpoints; it chooses no reading."""

JUDGED: dict[str, Sequence[Sequence[str]]] = {"paper": [(*WHOLE, COARSE)]}
"""Studies that the verdicts of the repository are on, by scale and seed."""

COLUMNS = [
    "claim", "section", "reading", "scale", "paper", "ours", "low", "high", "within", "of", "seeds", "studies",
    "device", "verdict",
]  # fmt: skip
"""Of ``data/paper/verdicts.csv``."""

ENGLISH = "wikipedia-laptop-0"
"""Study that the paper's counts about English are compared with."""

PAPER_ENGLISH = {"vectors": 30, "kept": 26, "simple_label": 22, "tokens": 12_600, "dropped_mean": 6655.5}
"""Counts of section 5 and v3. ``kept`` counts vectors whose mean falls, ``dropped_mean`` tokens per vector."""

# From the most favourable to the least.
_VERDICTS = ["not run", "reproduced", "stronger here", "partly", "not reproduced"]


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


def scored_readings(studies: Iterable[SavedStudy]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Readings of the paper, closest to its printed numbers first, and what each gives for the printed numbers.

    Readings that the studies have not run in full, for want of an order, are left out.
    """
    readings = fit.all_readings()
    ours = fit.numbers(readings, studies)
    scored = fit.score(readings, ours, fit.printed_numbers()).dropna(subset="distance")
    return scored, ours.loc[scored.index]


def reading_of(row: pd.Series) -> dict[str, str]:
    """The choices of a row of a table of readings."""
    return {name: str(row[name]) for name in fit.CHOICES}


def kept_readings(scored: pd.DataFrame, ours: pd.DataFrame, closest: int = 40) -> pd.DataFrame:
    """What ``data/paper/readings.csv`` holds: a row for each reading and printed number.

    Of the closest readings, of those that differ from the closest in one choice, and of the paper's plain text. All
    others are arithmetic on tables ``clusterings``.
    """
    choices = list(fit.CHOICES)
    differ = (scored[choices] != scored[choices].iloc[0]).sum(axis=1)
    plain = (scored[choices] == pd.Series(fit.PLAIN_TEXT)[choices]).all(axis=1)
    chosen = scored[(np.arange(len(scored)) < closest) | (differ == 1) | plain]
    printed = fit.printed_numbers()
    error = pd.DataFrame(fit.errors(ours, printed), index=ours.index, columns=printed["number"])
    rows = chosen[choices].assign(rank=np.flatnonzero(scored.index.isin(chosen.index)) + 1)
    parts = [
        rows.assign(
            number=row.number, half=row.half, printed=row.printed, low=row.low, high=row.high,
            ours=ours.loc[chosen.index, row.number], distance=error.loc[chosen.index, row.number],
        )
        for row in printed.itertuples()
    ]  # fmt: skip
    return pd.concat(parts).sort_values("rank", kind="stable")


def judge(
    studies: Mapping[str, Sequence[Sequence[SavedStudy]]],
    readings: Mapping[str, Mapping[str, str]],
    claims: Iterable[Claim] = CLAIMS,
) -> pd.DataFrame:
    """Verdict on each claim, by reading and by scale.

    Args:
        studies: for each scale, those of each seed.
        readings: by name, a value for each of ``polca_paper.fit.CHOICES``.
        claims: to judge.

    Returns:
        Rows ``claim``, ``section``, ``text``, ``reading``, ``scale``, ``paper`` and ``ours`` (the first number of the
        claim; the median over seeds), ``low``, ``high``, ``within`` (how many of its numbers are within their
        tolerance, at the first seed) and ``of``, ``seeds``, ``studies``, ``device``, ``verdict`` (the most frequent; of
        equally many the least favourable), ``each`` (how many seeds have which verdict), ``cited_for`` and ``page``.
    """
    rows = []
    for name, reading in readings.items():
        for scale, seeds in studies.items():
            evidence = [Evidence(group, reading) for group in seeds]
            used = [study for group in seeds for study in group]
            about = {"reading": name, "scale": scale, "seeds": len(seeds)}
            about |= {"studies": ", ".join(study.name for study in used)}
            about |= {"device": ", ".join(dict.fromkeys(study.device for study in used))}
            for claim in claims:
                judged = [claim.judge(each) for each in evidence]
                verdicts = [each.verdict for each in judged]
                values = np.array([each.ours for each in judged], float)
                finite = values[np.isfinite(values)]
                low, ours, high = np.quantile(finite, [0, 0.5, 1]) if len(finite) else (np.nan,) * 3
                row = {"claim": claim.name, "section": claim.section, "text": claim.text, **about}
                row |= {"paper": judged[0].paper, "ours": ours, "low": low, "high": high}
                row |= {"within": judged[0].within, "of": judged[0].of}
                row["verdict"] = max(_VERDICTS, key=lambda v: (verdicts.count(v), _VERDICTS.index(v)))
                row["each"] = ", ".join(f"{verdicts.count(v)} {v}" for v in _VERDICTS if v in verdicts)
                rows.append({**row, "cited_for": claim.sentence.means, "page": claim.page})
    return pd.DataFrame(rows)


def english_counts(study: SavedStudy, kind: str = "POLCA second, raw") -> dict[str, object]:
    """Our numbers beside ``PAPER_ENGLISH``: what ``data/paper/english_counts.json`` holds.

    Args:
        study: of Wikipedia.
        kind: of trajectory; the default is the paper's.
    """
    row = study.table("counts").set_index("kind").loc[kind]
    names = [*PAPER_ENGLISH, "simple_by_chance", "clustered", "simple_words", "clusters", "outliers_mean"]
    spacing = study.table("spacing")
    about = {"reading": kind, "preset": scale_of(study), "seed": study.settings.seed, "device": study.device}
    about |= {name: study.provenance["stages"][name] for name in ("corpus", "tags")}
    about["commit"] = study.provenance["tables"]["counts"]["commit"]
    about["largest_share_between_checkpoints"] = float(spacing.loc[spacing["judged"], "share"].max())
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
        the claim itself) and ``verdict``; a claim about clusters of the exact loss is not run where there are none.
    """
    row, exact = (study.table("counts").set_index("kind").loc[name] for name in (kind, "exact loss, raw"))
    labels, pairs = (table[table["kind"] == kind] for table in (study.table("labels"), study.table("mirrored")))
    simple = labels[labels["simple"]]
    contrast = float((simple["inside"] / simple["outside"]).median())
    newline = ((labels["label_0"] == "SPACE") & (labels["inside"] > labels["outside"])).sum()
    paper, falling, mirrored = PAPER_ENGLISH, max(1, row["kept"]), len(pairs)
    claims = [
        ("directions whose mean falls, share", paper["kept"] / paper["vectors"], row["kept"] / row["vectors"], None,
         None),
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
    verdicts = []
    for claim, number, ours, holds, larger in claims:
        matches = None if number is None else bool(abs(ours - number) <= SHARE)
        stronger = bool(larger and holds and ours > number)
        judged = verdict(matches, None if holds is None else bool(holds), stronger)
        verdicts.append(
            "not run" if claim.startswith("clusters of the exact loss") and not exact["clusters"] else judged
        )
    table = pd.DataFrame(claims, columns=["claim", "paper", "ours", "holds", "larger_is_stronger"])
    return table.drop(columns="larger_is_stronger").assign(verdict=verdicts)
