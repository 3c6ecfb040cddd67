"""What a cluster of text tokens is: its label, how much that says, and the tokens nearest its medoid in context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Int

from polca_lib.method.clustering import DROPPED, by_vector
from polca_lib.report.findings import members
from polca_lib.report.labels import quoted, write_label
from polca_lib.tasks.tokenization import PAD
from polca_paper.tagging import PAD as PAD_TAG

READINGS = ("simple", "simple_words", "simple_all")
"""What a simple label may mean, see :func:`label_clusters`."""

WORDS = {
    "ADJ": "adjective", "ADP": "preposition", "ADV": "adverb", "AUX": "auxiliary", "CCONJ": "conjunction",
    "DET": "determiner", "INTJ": "interjection", "NOUN": "noun", "NUM": "number", "PART": "particle",
    "PRON": "pronoun", "PROPN": "proper noun", "PUNCT": "punctuation", "SCONJ": "subordinating conjunction",
    "SPACE": "white space", "SYM": "symbol", "VERB": "verb", "X": "foreign or other word",
}  # fmt: skip
"""Parts of speech as labels name them."""

_BEFORE, _AFTER = 16, 8  # tokens of a context around its target: a few words of an article, and no more of it
_TOP = 5  # token texts that are listed
_TAGS = ["tag", "tag_1", "tag_2", "tag_3"]
_COLUMNS = {
    "vector": int, "cluster": int, "tokens": int, "label": object,
    **{f"label_{back}": object for back in range(len(_TAGS))},
    "simple": bool, "simple_words": bool, "simple_all": bool, "simple_positions": object,
    "top_tokens": object, "top_token_share": float,
    "inside": float, "outside": float, "precision": float, "lift": float,
}  # fmt: skip


def label_clusters(
    labels: xr.DataArray, tags: pd.DataFrame, texts: Sequence[str], *, coverage: float = 0.7, at_most: int = 2
) -> pd.DataFrame:
    """Label each cluster by parts of speech, as the paper does, and measure how much the label says (PAPER section 4).

    The label has four positions: the token and the three before it. At each it is the smallest set of tags that covers
    70% of the cluster. Tags are taken by falling share, those of equal share in alphabetical order. A position is
    simple if it needs at most two tags; PAD is a tag like others, but is not counted. The paper does not say whether
    one position must be simple or all four. The default reading, ``simple``, asks for one: the paper's own label "Token
    after proper noun" (Figure 12) speaks of no more. ``simple_words`` asks for one with another tag than PAD,
    ``simple_all`` for all four.

    A label as such says little: at 70%, half of the kept tokens may fit it, too. So it is also read as a pattern, which
    a token fits if it has one of the tags at each simple position. PAD fits PAD alone. Without any simple position all
    tokens fit.

    Args:
        labels: (token,) or (vector, token), from :func:`polca_lib.method.clustering.cluster_tokens`.
        tags: a row per token, from :func:`polca_paper.tagging.preceding_tags`.
        texts: of each token.
        coverage: share of the cluster that a set of tags must cover.
        at_most: tags of a simple position.

    Returns:
        One row per cluster: ``vector``, ``cluster``, ``tokens``; ``label``, the simple positions in the order of the
        text, the token itself in brackets, "any" for a position that is not simple ("ADP · any · [NOUN or PROPN]");
        ``label_0`` (of the token) to ``label_3`` (of the third before it), simple or not, by falling share; the three
        ``READINGS``; ``simple_positions`` (0 is the token); ``top_tokens`` with their shares; ``top_token_share`` of
        the first. Of the pattern: ``inside``, the share of the cluster's tokens that fit, which is also its recall;
        ``outside``, the same of the vector's kept tokens that are not in the cluster, NaN if there are none;
        ``precision``, the share of the kept tokens that fit which lie in the cluster; ``lift``, ``inside`` by the share
        of all kept tokens that fit: 1 if the label fits all alike.

    Raises:
        ValueError: tags or texts that are not one per token, or a setting out of range.
    """
    names, codes = _encode(labels, tags, coverage, at_most)
    check_length(labels, texts, "texts")
    words, word = np.unique(np.array([repr(str(text)) for text in texts], object), return_inverse=True)
    rows = []
    for vector in by_vector(labels):
        label = vector.values
        kept, clustered = label != DROPPED, np.flatnonzero(label >= 1)
        counts = _count_tags(codes, clustered[None], label[clustered] - 1, len(names))[0]
        sets = _smallest_sets(counts, coverage)
        few, readings = _simple(sets, names, at_most)
        for i in range(len(counts)):
            inside, simple = label == i + 1, few[i]
            described = [_text(names, *position) for position in zip(counts[i], sets[i], strict=True)]
            matches = [tag_set[code] for tag_set, code in zip(sets[i][simple], codes[simple], strict=True)]
            fits = np.broadcast_to(np.logical_and.reduce(matches), label.shape)
            recall, fitting, others = fits[inside].mean(), fits[kept], kept & ~inside
            occurs = np.bincount(word[inside], minlength=len(words)) / inside.sum()
            top = np.argsort(-occurs, kind="stable")[: min(_TOP, (occurs > 0).sum())]
            rows.append(
                {
                    "vector": int(vector["vector"]),
                    "cluster": i + 1,
                    "tokens": int(inside.sum()),
                    "label": _template(described, simple),
                    **{f"label_{back}": text for back, text in enumerate(described)},
                    **{reading: of_cluster[i] for reading, of_cluster in readings.items()},
                    "simple_positions": np.flatnonzero(simple).tolist(),
                    "top_tokens": ", ".join(f"{words[j]} {occurs[j]:.0%}" for j in top),
                    "top_token_share": occurs.max(),
                    "inside": recall,
                    "outside": fits[others].mean() if others.any() else np.nan,
                    "precision": inside[kept][fitting].mean() if fitting.any() else np.nan,
                    "lift": recall / fitting.mean() if fitting.any() else np.nan,
                }
            )
    # Types are given, so that a table without any row can be put beside others.
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def phrases(texts: Sequence[str], before: Sequence[str], tags: pd.DataFrame, **others: np.ndarray) -> dict:
    """What each token is, as phrases for :func:`polca_lib.report.labels.write_label`.

    Args:
        texts, before: of each token, and of the one before it.
        tags: from :func:`polca_paper.tagging.preceding_tags`.
        others: further columns, such as the construction.
    """
    text, previous = (np.array([quoted(str(value)) for value in values], object) for values in (texts, before))
    tag, one = (tags[name].map(lambda name: WORDS.get(name, name)).to_numpy(object) for name in ("tag", "tag_1"))
    pairs = {"pair": text + " after " + previous, "tags": tag + " after " + one}
    pairs |= {"after": text + " after " + one, "following": tag + " after " + previous}
    return {**others, "text": text, **pairs, "tag": tag}


def written_labels(
    labels: xr.DataArray, columns: Mapping[str, np.ndarray], sets: Mapping[str, Bool[np.ndarray, " token"]]
) -> pd.DataFrame:
    """The label of each cluster as a person would write it, ``name``, and whether it says anything, ``named``."""
    kept = by_vector(labels) != DROPPED
    rows = [write_label(inside, kept.sel(vector=v).values, columns, sets)[:2] for v, _, inside in members(labels)]
    return pd.DataFrame(rows, columns=["name", "named"])


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

    Clusters keep their sizes. Their tokens are drawn, without replacement, from the kept tokens of the same vector. A
    token keeps its four tags together. Each vector is drawn by itself.

    Args:
        labels, tags, coverage, at_most: as in :func:`label_clusters`.
        draws: number of random partitions.
        seed: of these.

    Returns:
        For each of the ``READINGS``: under its name the mean number of vectors that have such a cluster;
        ``..._clusters``, the mean number of such clusters; ``..._p``, the share of draws, the real labels included,
        with at least as many such vectors as the real ones.

    Raises:
        ValueError: tags that are not one per token, or a setting out of range.
    """
    names, codes = _encode(labels, tags, coverage, at_most)
    if draws < 1:
        raise ValueError(f"draws = {draws}; allowed: at least 1")
    rng = np.random.default_rng(seed)
    # The first row is the real one.
    vectors, clusters = (pd.DataFrame(0, range(draws + 1), list(READINGS)) for _ in range(2))
    for vector in by_vector(labels):
        label = vector.values
        kept, clustered = (np.flatnonzero(chosen).astype(np.int32) for chosen in (label != DROPPED, label >= 1))
        drawn = rng.permuted(np.tile(kept, (draws, 1)), axis=1)[:, : len(clustered)]
        counts = _count_tags(codes, np.concatenate([clustered[None], drawn]), label[clustered] - 1, len(names))
        _, readings = _simple(_smallest_sets(counts, coverage), names, at_most)
        for reading, of_cluster in readings.items():
            vectors[reading] += of_cluster.any(axis=-1)
            clusters[reading] += of_cluster.sum(axis=-1)
    p = (vectors >= vectors.iloc[0]).mean()
    means = [vectors[1:].mean(), clusters[1:].mean().add_suffix("_clusters"), p.add_suffix("_p")]
    return pd.concat(means).astype(float)


def contexts(near: pd.DataFrame, texts: np.ndarray, tokens: pd.DataFrame) -> pd.DataFrame:
    """Add the text around each token of ``near``: ``before``, ``target`` and ``after``, within its window.

    Args:
        near: from :func:`polca_lib.report.contexts.nearest`.
        texts: (window, width) strings. Several PAD in a row are shown as one.
        tokens: a row per token, in the order of ``near["token"]``'s index: ``example`` (window), ``position`` in it.
    """
    rows = tokens.iloc[near["token"].to_numpy()]
    places = list(zip(rows["example"], rows["position"], strict=True))
    return near.assign(
        before=[_join(texts[i, max(0, j - _BEFORE) : j]) for i, j in places],
        target=[texts[i, j] for i, j in places],
        after=[_join(texts[i, j + 1 : j + 1 + _AFTER]) for i, j in places],
    )


def marked(contexts: pd.DataFrame) -> pd.Series:
    """Contexts as one text for a table, the target between backticks, newlines as ⏎."""
    before, target, after = (
        contexts[part].astype(str).str.replace("`", "'").str.replace(r"\r?\n", "⏎", regex=True)
        for part in ("before", "target", "after")
    )
    return before + "`" + target + "`" + after


def check_length(labels: xr.DataArray, values: Sequence[object] | pd.DataFrame, name: str) -> None:
    """Refuse values that are not one per token of labels."""
    n = labels.sizes["token"]
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} rows; allowed: {n}, one for each token of labels")


def _encode(
    labels: xr.DataArray, tags: pd.DataFrame, coverage: float, at_most: int
) -> tuple[np.ndarray, Int[np.ndarray, "position token"]]:
    """Tags in alphabetical order, and the index of the tag of each token at each position."""
    check_length(labels, tags, "tags")
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
    # A tag is needed if those before it do not cover enough. Counts are whole, so a little below the bound is rounding.
    needed = falling.cumsum(axis=-1) - falling < coverage * counts.sum(axis=-1, keepdims=True) - 1e-6
    sets = np.empty_like(needed)
    np.put_along_axis(sets, order, needed, axis=-1)
    return sets


def _simple(
    sets: Bool[np.ndarray, "*rest position tag"], names: np.ndarray, at_most: int
) -> tuple[Bool[np.ndarray, "*rest position"], dict[str, Bool[np.ndarray, "*rest"]]]:
    """Which positions need few tags, and by reading whether the label is simple."""
    counted = (sets & (names != PAD_TAG)).sum(axis=-1)
    few = counted <= at_most
    readings = few.any(axis=-1), (few & (counted > 0)).any(axis=-1), few.all(axis=-1)
    return few, dict(zip(READINGS, readings, strict=True))


def _text(names: np.ndarray, counts: Int[np.ndarray, " tag"], chosen: Bool[np.ndarray, " tag"]) -> str:
    """Chosen tags by falling count."""
    return " or ".join(names[i] for i in np.argsort(-counts, kind="stable") if chosen[i])


def _template(described: list[str], simple: Bool[np.ndarray, " position"]) -> str:
    """Positions in the order of the text, from the first simple one to the token itself."""
    shown = [text if few else "any" for text, few in zip(described, simple, strict=True)]
    last = max(np.flatnonzero(simple), default=0)
    return " · ".join([*shown[last:0:-1], f"[{shown[0]}]"])


def _join(texts: np.ndarray) -> str:
    """Tokens as one text; of several PAD in a row one."""
    return "".join(text for i, text in enumerate(texts) if text != PAD or i == 0 or texts[i - 1] != PAD)
