"""What a cluster of text tokens is: its label, how much that says, and the tokens nearest its medoid in context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Int

from polca_lib.method.clustering import DROPPED, by_vector
from polca_lib.tasks.tokenization import PAD
from polca_paper.tagging import PAD as PAD_TAG

MOST_TOKENS = 25
"""Longest context that is shown, a few words of an article, and no more of it."""

_TAGS = ["tag", "tag_1", "tag_2", "tag_3"]
_LABELS = {
    "vector": int, "cluster": int, "tokens": int, "label": object,
    **{f"label_{back}": object for back in range(len(_TAGS))},
    "simple": bool, "simple_words": bool, "simple_all": bool, "simple_positions": object,
    "top_tokens": object, "top_token_share": float,
    "inside": float, "outside": float, "precision": float, "lift": float,
}  # fmt: skip


def label_clusters(
    labels: xr.DataArray,
    tags: pd.DataFrame,
    texts: Sequence[str],
    *,
    coverage: float = 0.7,
    at_most: int = 2,
    top: int = 5,
) -> pd.DataFrame:
    """Label each cluster by parts of speech, as the paper does, and measure how much the label says (PAPER section 4).

    The label has four positions: the token and the three before it. At each it is the smallest set of tags that covers
    70% of the cluster: tags are taken by falling share, those of equal share in alphabetical order. A position is
    simple if it needs at most two tags; PAD is a tag like others, but is not counted. The paper does not say whether
    one position must be simple or all four. One is the default reading, ``simple``, for one is all that the paper's
    label "Token after proper noun" (Figure 12) speaks of. ``simple_all`` asks for all four.

    A label as such says little: at 70%, half of the kept tokens may fit it, too. So it is also read as a pattern, which
    a token fits if it has one of the tags at each simple position. PAD fits PAD alone. Without any simple position all
    tokens fit.

    Args:
        labels: (token,) or (vector, token), from :func:`polca_lib.method.clustering.cluster_tokens`.
        tags: a row per token, from :func:`polca_paper.tagging.preceding_tags`.
        texts: of each token.
        coverage: share of the cluster that a set of tags must cover.
        at_most: tags of a simple position.
        top: number of token texts to list.

    Returns:
        One row per cluster: ``vector``, ``cluster``, ``tokens``; ``label``, which has simple positions in the order of
        the text, the token itself in brackets, "any" for a position that is not simple ("ADP · any · [NOUN or PROPN]");
        ``label_0`` (of the token) to ``label_3`` (of the third before it), simple or not, by falling share; ``simple``,
        ``simple_words`` (a simple position has another tag than PAD), ``simple_all``, ``simple_positions`` (0 is the
        token); ``top_tokens`` with their shares, and
        ``top_token_share`` of the first. Of the pattern: ``inside``, share of the cluster's tokens that fit (that is
        also its recall); ``outside``, the same of the vector's kept tokens that are not in the cluster, NaN if there
        are none; ``precision``, share of the kept tokens that fit which lie in the cluster; ``lift``, ``inside`` by
        the share of all kept tokens that fit: 1 if the label fits all alike.

    Raises:
        ValueError: tags or texts that are not one per token, or a setting out of range.
    """
    names, codes = _encode(labels, tags, coverage, at_most)
    _check_length(labels, texts, "texts")
    words, word = np.unique(np.array([repr(str(text)) for text in texts], object), return_inverse=True)
    rows = []
    for one in by_vector(labels):
        label = one.values
        kept, clustered = label != DROPPED, np.flatnonzero(label >= 1)
        counts = _count_tags(codes, clustered[None], label[clustered] - 1, len(names))[0]
        sets = _smallest_sets(counts, coverage)
        simple = _is_simple(sets, names, at_most)
        for number in range(1, len(counts) + 1):
            inside, own, few = label == number, sets[number - 1], simple[number - 1]
            described = [_names(names, *both) for both in zip(counts[number - 1], own, strict=True)]
            fits = np.logical_and.reduce([chosen[code] for chosen, code in zip(own[few], codes[few], strict=True)])
            fits = np.broadcast_to(fits, label.shape)
            total, hits = (fits & kept).sum(), (fits & inside).sum()
            others = kept & ~inside
            occurs = np.bincount(word[inside], minlength=len(words))
            first = np.argsort(-occurs, kind="stable")[: min(top, (occurs > 0).sum())]
            rows.append(
                {
                    "vector": int(one["vector"]),
                    "cluster": number,
                    "tokens": int(inside.sum()),
                    "label": _template(described, few),
                    **{f"label_{back}": text for back, text in enumerate(described)},
                    "simple": few.any(),
                    "simple_words": _says_words(own, few, names).any(),
                    "simple_all": few.all(),
                    "simple_positions": np.flatnonzero(few).tolist(),
                    "top_tokens": ", ".join(f"{words[i]} {occurs[i] / inside.sum():.0%}" for i in first),
                    "top_token_share": occurs.max() / inside.sum(),
                    "inside": hits / inside.sum(),
                    "outside": fits[others].mean() if others.any() else np.nan,
                    "precision": hits / total if total else np.nan,
                    "lift": hits / inside.sum() / (total / kept.sum()) if total else np.nan,
                }
            )
    return _table(rows, _LABELS)


def simple_by_chance(
    labels: xr.DataArray,
    tags: pd.DataFrame,
    draws: int = 200,
    seed: int = 0,
    *,
    coverage: float = 0.7,
    at_most: int = 2,
) -> pd.Series:
    """How many vectors would have a cluster with a simple label if clusters were drawn at random.

    Clusters keep their sizes; their tokens are drawn, without replacement, from the kept tokens of the same vector. A
    token keeps its four tags together. Vectors are drawn each by itself.

    Args:
        labels, tags, coverage, at_most: as in :func:`label_clusters`.
        draws: number of random partitions.
        seed: of these.

    Returns:
        For each reading of "simple" (``simple``, ``simple_words``, ``simple_all``): mean number of vectors that have
        such a cluster, under the reading's name; ``..._clusters``, mean number of such clusters; ``..._p``, share of
        draws, the real labels included, with at least as many such vectors as the real ones.

    Raises:
        ValueError: tags that are not one per token, or a setting out of range.
    """
    names, codes = _encode(labels, tags, coverage, at_most)
    if draws < 1:
        raise ValueError(f"draws = {draws}; allowed: at least 1")
    rng = np.random.default_rng(seed)
    # The first row of each is the real one.
    vectors, clusters = (
        {reading: np.zeros(draws + 1, int) for reading in ("simple", "simple_words", "simple_all")}
        for _ in ("vectors", "clusters")
    )
    for one in by_vector(labels):
        label = one.values
        kept = np.flatnonzero(label != DROPPED).astype(np.int32)
        clustered = np.flatnonzero(label >= 1).astype(np.int32)
        drawn = rng.permuted(np.tile(kept, (draws, 1)), axis=1)[:, : len(clustered)]
        counts = _count_tags(codes, np.concatenate([clustered[None], drawn]), label[clustered] - 1, len(names))
        sets = _smallest_sets(counts, coverage)
        simple = _is_simple(sets, names, at_most)
        readings = {"simple": simple.any(axis=-1), "simple_all": simple.all(axis=-1)}
        readings["simple_words"] = _says_words(sets, simple, names).any(axis=-1)
        for reading, found in readings.items():
            vectors[reading] += found.any(axis=-1)
            clusters[reading] += found.sum(axis=-1)
    rows = {}
    for reading, counted in vectors.items():
        rows[reading] = counted[1:].mean()
        rows[f"{reading}_clusters"] = clusters[reading][1:].mean()
        rows[f"{reading}_p"] = (counted >= counted[0]).mean()
    return pd.Series(rows, dtype=float)


def contexts(
    near: pd.DataFrame, texts: np.ndarray, tokens: pd.DataFrame, *, before: int = 16, after: int = 8
) -> pd.DataFrame:
    """Add the text around each token of ``near``: ``before``, ``target`` and ``after``, within its window.

    Args:
        near: from :func:`nearest`.
        texts: (window, width) strings.
        tokens: a row per token, in the order of ``near["token"]``'s index: ``example`` (window), ``position`` in it.
        before, after: tokens to show. Several PAD in a row are shown as one.

    Raises:
        ValueError: a negative number of tokens, or more than ``MOST_TOKENS`` with the target.
    """
    if min(before, after) < 0 or before + 1 + after > MOST_TOKENS:
        raise ValueError(
            f"before = {before} and after = {after}; allowed: not negative, at most {MOST_TOKENS - 1} together"
        )
    own = tokens.iloc[near["token"].to_numpy()]
    places = list(zip(own["example"], own["position"], strict=True))
    return near.assign(
        before=[_join(texts[i, max(0, j - before) : j]) for i, j in places],
        target=[texts[i, j] for i, j in places],
        after=[_join(texts[i, j + 1 : j + 1 + after]) for i, j in places],
    )


def _check_length(labels: xr.DataArray, values: Sequence[object] | pd.DataFrame, name: str) -> None:
    if len(values) != labels.sizes["token"]:
        raise ValueError(
            f"{name} has {len(values)} rows; allowed: {labels.sizes['token']}, one for each token of labels"
        )


def _encode(
    labels: xr.DataArray, tags: pd.DataFrame, coverage: float, at_most: int
) -> tuple[np.ndarray, Int[np.ndarray, "position token"]]:
    """Tags in alphabetical order, and the index of that of each token at each position."""
    _check_length(labels, tags, "tags")
    if missing := [name for name in _TAGS if name not in tags]:
        raise ValueError(f"tags have no column {', '.join(missing)}; allowed: a table of tagging.preceding_tags")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage = {coverage}; allowed: above 0, up to 1")
    if at_most < 1:
        raise ValueError(f"at_most = {at_most}; allowed: at least 1")
    names, codes = np.unique(tags[_TAGS].to_numpy(str), return_inverse=True)
    return names, codes.reshape(len(tags), len(_TAGS)).T


def _count_tags(
    codes: Int[np.ndarray, "position token"],
    tokens: Int[np.ndarray, "draw taken"],
    cluster: Int[np.ndarray, " taken"],
    n_tags: int,
) -> Int[np.ndarray, "draw cluster position tag"]:
    """How often each tag occurs at each position in clusters whose tokens are ``tokens``, of every draw."""
    shape = (len(tokens), cluster.max(initial=-1) + 1, n_tags)
    cell = (np.arange(shape[0])[:, None] * shape[1] + cluster) * n_tags
    counts = [np.bincount((cell + code[tokens]).ravel(), minlength=np.prod(shape)).reshape(shape) for code in codes]
    return np.stack(counts, axis=2)


def _smallest_sets(counts: Int[np.ndarray, "*rest tag"], coverage: float) -> Bool[np.ndarray, "*rest tag"]:
    """Which tags are in the smallest set that covers so much; of equally frequent ones the first is taken."""
    order = np.argsort(-counts, axis=-1, kind="stable")
    falling = np.take_along_axis(counts, order, axis=-1)
    # A tag is needed if those before it don't do. Counts are whole, so that a little less than the bound is rounding.
    needed = falling.cumsum(axis=-1) - falling < coverage * counts.sum(axis=-1, keepdims=True) - 1e-6
    sets = np.empty_like(needed)
    np.put_along_axis(sets, order, needed, axis=-1)
    return sets


def _is_simple(sets: Bool[np.ndarray, "*rest tag"], names: np.ndarray, at_most: int) -> Bool[np.ndarray, "*rest"]:
    return (sets & (names != PAD_TAG)).sum(axis=-1) <= at_most


def _says_words(
    sets: Bool[np.ndarray, "*rest tag"], simple: Bool[np.ndarray, "*rest"], names: np.ndarray
) -> Bool[np.ndarray, "*rest"]:
    """Positions that are simple and say more than PAD."""
    return simple & (sets & (names != PAD_TAG)).any(axis=-1)


def _names(names: np.ndarray, counts: Int[np.ndarray, " tag"], chosen: Bool[np.ndarray, " tag"]) -> str:
    """Chosen tags by falling count, as text."""
    return " or ".join(names[i] for i in np.argsort(-counts, kind="stable") if chosen[i])


def _template(described: list[str], simple: Bool[np.ndarray, " position"]) -> str:
    """Positions in the order of the text, from the first simple one to the token itself."""
    shown = [text if few else "any" for text, few in zip(described, simple, strict=True)]
    last = max(np.flatnonzero(simple), default=0)
    return " · ".join([*shown[last:0:-1], f"[{shown[0]}]"])


def _join(texts: np.ndarray) -> str:
    """Tokens as one text; of several PAD in a row one."""
    return "".join(text for i, text in enumerate(texts) if text != PAD or i == 0 or texts[i - 1] != PAD)


def _table(rows: list, types: dict[str, type]) -> pd.DataFrame:
    """Rows as a table whose columns have these types, also without any row, so that tables can be put together."""
    return pd.DataFrame(rows, columns=list(types)).astype(types)
