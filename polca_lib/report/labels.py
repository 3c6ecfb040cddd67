"""What a cluster is, in one line as a person would write it, and how much that says."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool

HALF, TWICE = 0.5, 2.0
"""A label fits at least half of its cluster, and at least twice as often as outside."""

_SPACE = {"\n": "⏎", "\r": "⏎", "\t": "⇥"}
_GAIN = 0.1  # by which "a or b" must be better than "a"


class Label(NamedTuple):
    """A label, and the share of tokens that it fits in the cluster and outside, among those that were clustered."""

    text: str
    fits: bool  # whether it says something; if not, the text lists what is most frequent
    inside: float
    outside: float


def write_label(
    inside: Bool[np.ndarray, " token"],
    kept: Bool[np.ndarray, " token"],
    columns: Mapping[str, np.ndarray],
    sets: Mapping[str, Bool[np.ndarray, " token"]] | None = None,
) -> Label:
    """The phrase that tells a cluster best from the other tokens: the largest share inside less share outside.

    Candidates are the most frequent value of each column, that value or the next, and the sets. A phrase that fits
    everything tells nothing: one counts only if it fits half of the cluster, and twice as often as outside.

    Args:
        inside: which tokens are in the cluster.
        kept: which were clustered, those inside and others.
        columns: phrases that say what each token is, such as its text, or its part of speech; empty for none.
        sets: which tokens a phrase fits, by phrase.

    Returns:
        Such as "comma after a bracket, 78% of the cluster, 9 times as often as outside", or "mixed: “the” 12%, ...".
    """
    others, best, largest = kept & ~inside, None, 0.0
    candidates = [(phrase, fits, 0.0) for phrase, fits in (sets or {}).items()]
    for values in columns.values():
        top = [value for value in pd.Series(values[inside]).value_counts().index if value][:2]
        candidates += [(value, values == value, 0.0) for value in top[:1]]
        if len(top) > 1:
            candidates.append((" or ".join(top), np.isin(values, top), _GAIN))
    for phrase, fits, price in candidates:
        share = fits[inside].mean()
        outside = fits[others].mean() if others.any() else share  # without others nothing is told apart
        if share >= HALF and share >= TWICE * outside and share - outside - price > largest:
            best, largest = Label(phrase, True, float(share), float(outside)), share - outside - price
    if best is None:
        shares = pd.Series(next(iter(columns.values()), inside)[inside]).value_counts(normalize=True).head(3)
        listed = ", ".join(f"{value} {share:.0%}" for value, share in shares.items()) if columns else "no column tells"
        return Label(f"mixed: {listed}", False, np.nan, np.nan)
    ratio = best.inside / best.outside if best.outside else np.inf
    often = "nowhere else" if ratio == np.inf else f"{ratio:,.0f} times as often as outside"
    return best._replace(text=f"{best.text}, {best.inside:.0%} of the cluster, {often}")


def quoted(text: str) -> str:
    """A token between quotation marks, with a sign for white space: “the”, “⏎”."""
    seen = text.strip() or "".join(_SPACE.get(sign, "␣") for sign in text)
    return f"“{seen}”"


def after(texts: np.ndarray, example: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Each phrase with the one before it in its example: "“,” after “)”"; empty where none is known."""
    at = {place: i for i, place in enumerate(zip(example.tolist(), position.tolist(), strict=True))}
    before = [at.get((e, p - 1)) for e, p in zip(example.tolist(), position.tolist(), strict=True)]
    pairs = zip(texts, before, strict=True)
    return np.array([f"{text} after {texts[i]}" if i is not None else "" for text, i in pairs], object)
