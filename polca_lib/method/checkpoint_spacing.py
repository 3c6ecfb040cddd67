"""Whether checkpoints can see what is learned, or whether it happens between two of them.

What is learned between two neighbours is one step of every curve, and curves that differ in nothing else can't be told
apart. So this is the first thing to look at in a run.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Shaped

MOST = 0.1  # share of its loss drop that a frequent kind must stay below between two neighbouring checkpoints
FREQUENT = 0.01, 10  # share and number of the tokens that a frequent kind has at least
LEAST_DROP = 0.1  # nats that the loss of a kind must fall by to be judged: shares of less are mostly noise


def largest_shares(losses: xr.DataArray, kinds: Shaped[np.ndarray, " token"]) -> pd.DataFrame:
    """max_t [m_k(t) - m_k(t+1)] / [m_k(0) - min_s m_k(s)]: largest share of its loss drop that kind k makes at once.

    m_k(t) is the mean loss at checkpoint t of the tokens of kind k, and t+1 is the next checkpoint.

    Args:
        losses: exact loss in nats, (step, token).
        kinds: what each token is, such as its text or part of speech.

    Returns:
        One row per kind, largest share first: ``tokens`` (how many), ``drop`` (the denominator, nats), ``share`` (NaN
        if the loss never falls), ``start`` and ``end`` (steps of the two checkpoints), and ``judged``, whether the kind
        is frequent and its loss falls by ``LEAST_DROP``.

    Raises:
        ValueError: fewer than two checkpoints, or another number of kinds than of tokens.
    """
    steps, values = losses["step"].values, losses.transpose("token", "step").values.astype(np.float64)
    if len(steps) < 2:
        raise ValueError(f"losses has {len(steps)} checkpoints; allowed: 2 or more, to measure a drop")
    if len(kinds) != len(values):
        raise ValueError(f"kinds has {len(kinds)} values; allowed: {len(values)}, one for each token of losses")
    groups = pd.DataFrame(values).groupby(np.asarray(kinds), sort=False)
    means, tokens = groups.mean(), groups.size()
    falls, drop = -np.diff(means.values, axis=1), means.values[:, 0] - means.values.min(axis=1)
    where = falls.argmax(axis=1)
    share = falls.max(axis=1) / np.where(drop > 0, drop, np.nan)
    frequent = tokens.values >= max(FREQUENT[0] * len(values), FREQUENT[1])
    table = pd.DataFrame({"tokens": tokens.rename_axis("kind"), "drop": drop, "share": share})
    table = table.assign(start=steps[where], end=steps[where + 1], judged=frequent & (drop >= LEAST_DROP))
    return table.sort_values("share", ascending=False, kind="stable")


def is_fit(shares: pd.DataFrame) -> bool:
    """Whether the share of every judged kind is below ``MOST``; false if no kind can be judged.

    Args:
        shares: from :func:`largest_shares`.
    """
    judged = shares[shares["judged"]]
    return bool(len(judged) and (judged["share"] < MOST).all())


def advice(shares: pd.DataFrame) -> str:
    """One sentence: which kind makes the largest share of its loss drop at once, where, and what to do.

    Args:
        shares: from :func:`largest_shares`.
    """
    judged = shares[shares["judged"]]
    if judged.empty:
        return f"not judged: the loss of no frequent kind of token falls by {LEAST_DROP} nats"
    kind, worst = judged["share"].idxmax(), judged.loc[judged["share"].idxmax()]
    kind = " ".join(str(kind).split())  # on one line
    whose = "make {:.0%} of their" if kind == "all tokens" else "makes {:.0%} of its"
    told = f"{kind} {whose.format(worst['share'])} loss drop between steps {worst['start']} and {worst['end']}"
    if is_fit(shares):
        return f"fit for POLCA: {told}, the largest share of a frequent kind"
    return f"not fit for POLCA: {told} (allowed: below {MOST:.0%}); save more checkpoints there, or train more slowly"
