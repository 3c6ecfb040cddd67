import collections
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import spacy
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from polca_paper import labeling
from polca_paper.labeling import contexts, label_clusters, simple_by_chance
from polca_paper.tagging import load_pipeline, preceding_tags, tag_texts, tag_tokens, tag_windows
from spacy.language import Language as Pipeline

from polca_lib.method.breakthroughs import mirrored
from polca_lib.method.clustering import DROPPED, OUTLIER, medoid, scale
from polca_lib.report.contexts import nearest
from polca_lib.tasks.tokenization import PAD, encode, pack, train_tokenizer

TAGS = {
    "The": "DET", "the": "DET", "It": "PRON", "'s": "PART", "was": "AUX", "n't": "PART", "ca": "AUX", "café": "NOUN",
    "Łódź": "PROPN", "Smith": "PROPN", "😀": "INTJ", "1911": "NUM", "unsaid": "", **dict.fromkeys(".,()\";'", "PUNCT"),
}  # fmt: skip


@Pipeline.component("tag_by_list")
def tag_by_list(doc):
    for word in doc:
        # White space gets a tag as well, as some pipelines do.
        word.pos_ = TAGS.get(word.text, "VERB")
    return doc


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("spacy") / "by_list"
    nlp = spacy.blank("en")
    nlp.add_pipe("tag_by_list")
    nlp.to_disk(path)
    return load_pipeline(path)


def tags_of(text, pieces, pipeline):
    """Tags of tokens that are given as consecutive pieces of ``text``."""
    assert "".join(pieces) == text
    ends = np.cumsum([len(piece) for piece in pieces], dtype=int)
    return tag_tokens(text, ends - [len(piece) for piece in pieces], ends, tag_texts([text], pipeline)[0]).tolist()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " café", " was", "."], ["DET", "NOUN", "AUX", "PUNCT"]),
        (["The", " ca", "fé", " wa", "s"], ["DET", "NOUN", "NOUN", "AUX", "AUX"]),
        (["Smith", "'s", " café"], ["PROPN", "PART", "NOUN"]),
        # Tokens over two words have the tag of the first.
        (["(", "1911", ").", "\n"], ["PUNCT", "NUM", "PUNCT", "SPACE"]),
        (["Smith's,", " the"], ["PROPN", "DET"]),
        (["Smith", "'s,", " the"], ["PROPN", "PART", "DET"]),
        (["I", " ca", "n", "'t"], ["VERB", "AUX", "PART", "PART"]),
        # White space: newlines, CRLF, spaces alone, before and within words, and spans of paragraphs.
        (["The", "\n\n", "café"], ["DET", "SPACE", "NOUN"]),
        (["The", "\r\n", "café", "\r", "\n", "was"], ["DET", "SPACE", "NOUN", "SPACE", "SPACE", "AUX"]),
        (["  ", "The", " ", " café", " "], ["SPACE", "DET", "SPACE", "NOUN", "SPACE"]),
        (["The", "\n\n  café", ".\n", "The"], ["DET", "NOUN", "PUNCT", "DET"]),
        (["The", "\u00a0", "café", "\u2003", "\t", "was"], ["DET", "SPACE", "NOUN", "SPACE", "SPACE", "AUX"]),
        (["The", "", " café", ""], ["DET", "PAD", "NOUN", "PAD"]),
        ([" unsaid"], ["X"]),
        ([], []),
        (["", ""], ["PAD", "PAD"]),
    ],
)
def test_a_token_has_the_tag_of_the_word_of_its_first_visible_character(pieces, expected, pipeline):
    assert tags_of("".join(pieces), pieces, pipeline) == expected


def test_pieces_of_a_character_have_the_tag_of_its_word(pipeline):
    text = "The Łódź café 😀."
    tokens = encode(train_tokenizer(["nothing of it"], 256), text)
    assert len(tokens.ids) == len(text.encode())
    tags = tag_tokens(text, tokens.starts, tokens.ends, tag_texts([text], pipeline)[0]).tolist()
    byte_tags = [
        *3 * ["DET"], "SPACE", *7 * ["PROPN"], "SPACE", *5 * ["NOUN"], "SPACE", *4 * ["INTJ"], "PUNCT"
    ]  # fmt: skip
    assert tags == byte_tags


WORDS = st.sampled_from(["The", "café", " ", "  ", "\n", "\r\n", "Łódź", "'s", ").", "😀", "\u00a0", "was,"])


@given(st.lists(WORDS, max_size=12).map("".join), st.data())
def test_tags_are_those_found_by_a_look_at_every_character(pipeline, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    spans = list(itertools.pairwise([0, *cuts, len(text)]))
    expected = []
    for start, end in spans:
        visible = [i for i in range(start, end) if not text[i].isspace()]
        tag = "SPACE" if start < end else "PAD"
        if visible:
            line = text.rfind("\n", 0, visible[0]) + 1
            doc = pipeline(text[line:].split("\n")[0])
            tag = next(w.pos_ for w in doc if w.idx <= visible[0] - line < w.idx + len(w))
        expected.append(tag)
    starts, ends = np.array(spans).T
    assert tag_tokens(text, starts, ends, tag_texts([text], pipeline)[0]).tolist() == expected


def test_texts_are_tagged_in_order_with_offsets_and_long_paragraphs_between_words(pipeline, monkeypatch):
    texts = ["The café.\n\nIt was\n", "", "\n", "Smith " * 30 + "Łódź" * 30, "The"]
    whole = [[(w.idx, w.idx + len(w), w.pos_) for w in pipeline(text) if not w.is_space] for text in texts]

    def found():
        words = tag_texts(texts, pipeline)
        assert all((np.diff(one.starts) > 0).all() for one in words)
        return [[w for w in zip(*(part.tolist() for part in one), strict=True) if w[2] != "SPACE"] for one in words]

    assert found() == whole
    monkeypatch.setattr(pipeline, "max_length", 20)
    cut = found()
    assert cut[:3] == whole[:3]
    assert cut[3][:30] == whole[3][:30]
    # A word longer than spaCy takes is cut where it must be.
    starts, ends, _ = np.array(cut[3][30:], dtype=object).T
    assert (starts[0], ends[-1]) == (180, 300)
    assert (starts[1:] == ends[:-1]).all()
    assert 1 < max(ends - starts) <= 20


@pytest.mark.parametrize("span", [(-1, 2), (0, 4)])
def test_a_span_outside_its_text_is_refused(span, pipeline):
    with pytest.raises(ValueError, match=rf"token 1 spans characters {span[0]} to {span[1]}; allowed: 0 to 3"):
        tag_tokens("The", [0, span[0]], [1, span[1]], tag_texts(["The"], pipeline)[0])


def test_pipelines_that_are_not_there_or_tag_nothing_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"'no_such_pipeline'.*python -m spacy download no_such_pipeline.*path"):
        load_pipeline("no_such_pipeline")
    with pytest.raises(ValueError, match=r"elsewhere' is no spaCy pipeline.*python -m spacy download en_core_web_sm"):
        load_pipeline(tmp_path / "elsewhere")
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    nlp.to_disk(tmp_path / "silent")
    with pytest.raises(ValueError, match=r"silent' tags no parts of speech \(its components: sentencizer\).*token.pos"):
        load_pipeline(tmp_path / "silent")


def test_windows_have_the_tags_of_the_whole_articles(pipeline):
    texts = ["The café (1911).\r\n\r\nIt was Smith's, the Łódź.\n\n\nThe café was 😀", "It", "The\n\ncafé was\n" * 4]
    width, tokenizer = 7, train_tokenizer(["The café was It Smith's"] * 3, 265)
    parts, article, expected = ([], []), [], []
    for i, text in enumerate(texts):
        tokens = encode(tokenizer, text)
        tags = tag_tokens(text, tokens.starts, tokens.ends, tag_texts([text], pipeline)[0])
        for part, values in zip(parts, (tokens.starts, tokens.ends), strict=True):
            part.append(pack([values], width, len(text)).windows)
        n = len(parts[0][-1])
        article += n * [i]
        expected.append(np.concatenate([tags, (n * width - len(tags)) * ["PAD"]]).reshape(n, width))
    starts, ends = (np.concatenate(part).astype(np.int32) for part in parts)
    articles = [SimpleNamespace(text=text) for text in texts]
    corpus = SimpleNamespace(starts=starts, ends=ends, article=np.array(article), articles=articles)
    rows = np.random.default_rng(0).permutation(len(starts))
    found = tag_windows(SimpleNamespace(corpus=corpus, rows=rows), pipeline)
    assert found.tolist() == np.concatenate(expected)[rows].tolist()
    assert {"PAD", "SPACE", "DET", "PROPN"} <= set(found.ravel())


def test_preceding_tags_stay_in_their_window():
    windows = np.array([["DET", "NOUN", "AUX", "ADJ", "PAD"], ["X", "VERB", "ADP", "PROPN", "PUNCT"]])
    found = preceding_tags(windows, range(2, 5))
    assert found.columns.tolist() == ["tag", "tag_1", "tag_2", "tag_3"]
    assert found.to_numpy().tolist() == [
        ["AUX", "NOUN", "DET", "PAD"],
        ["ADJ", "AUX", "NOUN", "DET"],
        ["PAD", "ADJ", "AUX", "NOUN"],
        ["ADP", "VERB", "X", "PAD"],
        ["PROPN", "ADP", "VERB", "X"],
        ["PUNCT", "PROPN", "ADP", "VERB"],
    ]
    assert preceding_tags(windows, [0]).to_numpy().tolist() == [["DET", *3 * ["PAD"]], ["X", *3 * ["PAD"]]]


def labelled(*labels):
    return xr.DataArray(
        np.array(labels), dims=("vector", "token"), coords={"vector": [3, 7, 8][: len(labels)]}, name="cluster"
    )


def tag_table(*columns):
    """Tags of the token and of those before it; positions not given are all different."""
    n = len(columns[0])
    rest = [[f"T{i:02}" for i in range(n)]] * (4 - len(columns))
    return pd.DataFrame(dict(zip(["tag", "tag_1", "tag_2", "tag_3"], [*columns, *rest], strict=True)))


#                  cluster 1, ten tokens                       | cluster 2, four          | outliers        | dropped
LABELS = np.array([1] * 10 + [2] * 4 + [OUTLIER] * 4 + [DROPPED] * 2)
TAG = ["NOUN"] * 5 + ["PROPN"] * 3 + ["ADJ", "VERB"] + ["PAD"] * 3 + ["DET"] + ["NOUN"] * 2 + ["ADJ"] * 2 + ["NOUN"] * 2
BEFORE = ["DET"] * 6 + ["ADJ"] * 2 + ["ADP"] * 2 + ["A", "B", "C", "D"] + ["DET", "ADJ", "DET", "ADJ"] + ["DET"] * 2
TEXTS = [" the"] * 4 + ["\n"] * 3 + list("abc") + [PAD] * 3 + ["x"] + ["y"] * 6


def test_labels_and_what_they_say_by_hand():
    one, two = label_clusters(labelled(LABELS)[0], tag_table(TAG, BEFORE), TEXTS).to_dict("records")
    assert (one["vector"], one["cluster"], one["tokens"], two["tokens"]) == (3, 1, 10, 4)
    assert one["label_0"] == "NOUN or PROPN"  # 5 and 3 of 10
    # DET covers 6 of 10, so that one more is needed: of ADJ and ADP, both 2, the first.
    assert one["label_1"] == "DET or ADJ"
    assert one["label_2"].split(" or ") == [f"T{i:02}" for i in range(7)]
    assert one["label"] == "DET or ADJ · [NOUN or PROPN]"
    assert (one["simple"], one["simple_all"], one["simple_positions"]) == (True, False, [0, 1])
    assert one["top_tokens"] == "' the' 40%, '\\n' 30%, 'a' 10%, 'b' 10%, 'c' 10%"
    assert one["top_token_share"] == 0.4
    # Fit: the eight nouns of cluster 1, none of cluster 2, of the outliers two nouns; dropped tokens don't count.
    assert one["inside"] == 8 / 10
    assert one["outside"] == 2 / 8
    assert one["precision"] == 8 / 10
    assert one["lift"] == pytest.approx(0.8 / (10 / 18))
    assert two["label"] == "[PAD]"
    assert two["label_1"] == "A or B or C"
    assert two["simple_positions"] == [0]
    assert (two["inside"], two["outside"], two["precision"], two["lift"]) == (3 / 4, 0, 1, 0.75 / (3 / 18))
    assert two["top_tokens"] == "'<PAD>' 75%, 'x' 25%"


def test_pad_is_not_counted_but_covers_and_matches_itself_alone():
    # PAD 4, NOUN 2, VERB 1 of ten make 70%: two tags besides PAD.
    tag = ["PAD"] * 4 + ["NOUN"] * 2 + ["VERB", "ADJ", "ADV", "DET"] + ["PAD", "X", "NOUN", "NOUN"]
    three = ["PAD"] * 3 + ["NOUN"] * 2 + ["VERB", "ADJ", "ADV", "DET", "X"] + ["PAD"] * 4
    labels = labelled([1] * 10 + [OUTLIER] * 4)
    (row,) = label_clusters(labels, tag_table(tag, three), list("abcdefghijklmn")).to_dict("records")
    assert row["label_0"] == "PAD or NOUN or ADJ"  # of four tags that occur once the first
    assert row["label_1"] == "PAD or NOUN or ADJ or ADV"
    assert row["simple_positions"] == [0]
    assert row["inside"] == 0.7
    assert row["outside"] == 3 / 4


def test_a_label_that_fits_all_alike_has_lift_one_and_one_without_simple_position_fits_all():
    common = label_clusters(labelled([1] * 10 + [OUTLIER] * 10), tag_table(["NOUN"] * 20), ["a"] * 20).iloc[0]
    assert (common["simple"], common["inside"], common["outside"], common["lift"]) == (True, 1, 1, 1)
    none = label_clusters(labelled([1] * 10 + [OUTLIER] * 10), tag_table(list("abcdefghij") * 2), ["a"] * 20).iloc[0]
    assert (none["simple"], none["label"], none["inside"], none["precision"], none["lift"]) == (
        False,
        "[any]",
        1,
        0.5,
        1,
    )
    everything = label_clusters(labelled([1] * 10), tag_table(["NOUN"] * 10), ["a"] * 10).iloc[0]
    assert np.isnan(everything["outside"])


def test_positions_between_and_all_four():
    n = ["NOUN"] * 5
    many = list("abcde")
    labels, texts = labelled([1] * 5), ["a"] * 5
    gap = label_clusters(labels, tag_table(n, many, ["ADP"] * 5), texts).iloc[0]
    assert gap["label"] == "ADP · any · [NOUN]"
    assert label_clusters(labels, tag_table(many, many, many, n), texts).iloc[0]["label"] == "NOUN · any · any · [any]"
    every = label_clusters(labels, tag_table(n, n, n, n), texts).iloc[0]
    assert every["simple_all"]
    assert every["simple_positions"] == [0, 1, 2, 3]
    assert label_clusters(labels, tag_table(many), texts, at_most=4).iloc[0]["simple_all"]
    assert label_clusters(labels, tag_table(many), texts, coverage=0.4).iloc[0]["simple_all"]


def test_positions_that_are_each_covered_may_fit_no_token_together():
    tags = tag_table(*(["A" if i % 4 != k else f"B{i}" for i in range(4)] for k in range(4)))
    row = label_clusters(labelled([1] * 4), tags, ["a"] * 4).iloc[0]
    assert row["label"] == "A · A · A · [A]"
    assert row["inside"] == 0
    assert np.isnan(row["precision"])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_set_is_the_smallest_that_covers(counts, coverage):
    counts = np.array(counts)
    chosen = labeling._smallest_sets(counts[None], coverage)[0]
    covered = [
        size
        for size in range(1, len(counts) + 1)
        for some in itertools.combinations(counts.tolist(), size)
        if sum(some) * 10 >= round(coverage * 10) * counts.sum()
    ]
    assert chosen.sum() == min(covered)
    assert counts[chosen].sum() * 10 >= round(coverage * 10) * counts.sum()
    assert counts[chosen].min() >= counts[~chosen].max(initial=0)


def test_exactly_seventy_percent_is_enough_whatever_rounding_says():
    for n in range(10, 3000, 10):
        counts = np.array([[7 * n // 10, 3 * n // 10]])
        assert labeling._smallest_sets(counts, 0.7).tolist() == [[True, False]]


def test_no_cluster_gives_an_empty_table_that_can_be_put_beside_others():
    tags = tag_table(TAG, BEFORE)
    some = label_clusters(labelled(LABELS), tags, TEXTS)
    none = label_clusters(labelled([OUTLIER] * 20), tags, TEXTS)
    assert len(none) == 0
    assert none.dtypes.equals(some.dtypes)
    assert none["simple"].sum() == 0
    assert simple_by_chance(labelled([OUTLIER] * 20), tags, draws=3)["simple"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": tag_table(["X"] * 3)}, "tags has 3 rows; allowed: 20"),
        ({"tags": tag_table(TAG).drop(columns="tag_2")}, "no column tag_2"),
        ({"texts": ["a"]}, "texts has 1 rows; allowed: 20"),
        ({"coverage": 0}, "coverage = 0; allowed: above 0, up to 1"),
        ({"at_most": 0}, "at_most = 0; allowed: at least 1"),
    ],
)
def test_labels_of_what_does_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        label_clusters(**{"labels": labelled(LABELS), "tags": tag_table(TAG), "texts": TEXTS, **change})


def is_simple(tags, coverage=0.7, at_most=1):
    """By the paper's words, with a counter: for each position whether at most so many tags besides PAD are needed."""
    positions = []
    for tag in zip(*tags, strict=True):
        covered, needed = 0, []
        for name, count in sorted(collections.Counter(tag).items(), key=lambda item: (-item[1], item[0])):
            if covered >= coverage * len(tag):
                break
            covered += count
            needed.append(name)
        positions.append(len([name for name in needed if name != "PAD"]) <= at_most)
    return positions


def chance_case():
    """Two vectors of nine tokens, clusters of four and three; the second has one dropped."""
    tags = tag_table(list("AAAAABCDE"), list("AAAABCDEF"), ["PAD", "PAD", *"AAABCDE"], list("ABAAADCEF"))
    return labelled([1, 1, 1, 1, 2, 2, 2, OUTLIER, OUTLIER], [OUTLIER, 2, 2, 2, 1, 1, 1, 1, DROPPED]), tags


def test_chance_is_that_of_all_partitions_of_a_small_case():
    labels, tags = chance_case()
    rows = tags.to_numpy().tolist()
    exact, exact_clusters, variance = collections.Counter(), collections.Counter(), collections.Counter()
    for label in labels.values:
        kept = np.flatnonzero(label != DROPPED).tolist()
        ways = []
        for first in itertools.combinations(kept, 4):
            for second in itertools.combinations(sorted(set(kept) - set(first)), 3):
                found = [is_simple([rows[i] for i in part]) for part in (first, second)]
                ways.append([[any(one) for one in found], [all(one) for one in found]])
        for reading, one in zip(("simple", "simple_all"), np.array(ways).transpose(1, 0, 2), strict=True):
            exact[reading] += one.any(axis=1).mean()
            variance[reading] += one.any(axis=1).var()
            exact_clusters[reading] += one.sum(axis=1).mean()
    assert min(variance.values()) > 0.05
    found = simple_by_chance(labels, tags, draws=4000, seed=1, at_most=1)
    for reading, mean in exact.items():
        assert found[reading] == pytest.approx(mean, abs=0.03)
        assert found[f"{reading}_clusters"] == pytest.approx(exact_clusters[reading], abs=0.05)
    assert 0 < found["simple_all"] < found["simple"] < 2


def test_every_draw_is_what_a_plain_loop_says_of_it(monkeypatch):
    labels, tags = chance_case()
    rows, drawn = tags.to_numpy().tolist(), []
    permuted = np.random.Generator.permuted

    class Watched:
        def __init__(self, seed):
            self.own = np.random.Generator(np.random.PCG64(seed))

        def permuted(self, values, axis):
            drawn.append(permuted(self.own, values, axis=axis))
            return drawn[-1]

    monkeypatch.setattr(labeling.np.random, "default_rng", Watched)
    found = simple_by_chance(labels, tags, draws=40, at_most=1)

    def count(partitions):
        """Vectors and clusters with a simple label, by both readings."""
        simple = [[is_simple([rows[i] for i in part]) for part in parts] for parts in partitions]
        each = [[[reading(one) for one in vector] for vector in simple] for reading in (any, all)]
        return [(sum(map(any, one)), sum(map(sum, one))) for one in each]

    real = count([[np.flatnonzero(label == number) for number in (1, 2)] for label in labels.values])
    draws = []
    for i in range(40):
        shuffled = [
            dict(zip(np.flatnonzero(v >= 1), d[i], strict=False)) for v, d in zip(labels.values, drawn, strict=True)
        ]
        own = zip(labels.values, shuffled, strict=True)
        draws.append(count([[[to[j] for j in np.flatnonzero(v == k)] for k in (1, 2)] for v, to in own]))
    for k, reading in enumerate(("simple", "simple_all")):
        vectors, clusters = np.array(draws)[:, k].T
        assert found[reading] == vectors.mean()
        assert found[f"{reading}_clusters"] == clusters.mean()
        assert found[f"{reading}_p"] == (1 + (vectors >= real[k][0]).sum()) / 41


def test_clusters_of_one_tag_are_more_than_chance_and_common_tags_are_not():
    mixed = tag_table(*4 * [list("ABCDEFGH") * 20])
    pure = labelled([1 if i % 8 == 0 else OUTLIER for i in range(160)])
    found = simple_by_chance(pure, mixed, draws=50)
    assert found["simple"] == 0
    assert found["simple_p"] == 1 / 51
    common = simple_by_chance(pure, tag_table(["NOUN"] * 160), draws=50)
    assert (common["simple"], common["simple_all"], common["simple_p"]) == (1, 0, 1)
    assert simple_by_chance(pure, mixed, draws=50).equals(found)
    with pytest.raises(ValueError, match="draws = 0; allowed: at least 1"):
        simple_by_chance(pure, mixed, draws=0)


def trajectories(n=24, vectors=2, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((6, n, vectors)).cumsum(axis=0)
    return xr.DataArray(
        values, dims=("step", "token", "vector"), coords={"step": np.arange(6), "vector": [3, 7, 8][:vectors]}
    )


@pytest.mark.parametrize("scaling", ["raw", "unit", "zscore"])
def test_nearest_begin_with_the_medoid_and_are_those_of_least_distance(scaling):
    curves = trajectories()
    labels = labelled(np.arange(24) % 4 - 1, np.where(np.arange(24) < 3, 1, DROPPED))
    found = nearest(curves, labels, scaling, n=4)
    assert found.groupby(["vector", "cluster"]).size().to_dict() == {(3, 1): 4, (3, 2): 4, (7, 1): 3}
    for (vector, cluster), own in found.groupby(["vector", "cluster"]):
        tokens = np.flatnonzero(labels.sel(vector=vector).values == cluster)
        curve = curves.sel(vector=vector)[:, tokens]
        values = scale(curve.values.T, scaling)
        centre = medoid(curve, scaling)
        expected = sorted(
            (float(np.linalg.norm(one - values[centre])), t) for one, t in zip(values, tokens, strict=True)
        )
        assert own["rank"].tolist() == list(range(1, len(own) + 1))
        assert own["token"].tolist() == [t for _, t in expected[: len(own)]]
        assert own["token"].iloc[0] == tokens[centre]
        np.testing.assert_allclose(own["distance"], [d for d, _ in expected[: len(own)]])


def test_nearest_of_equal_curves_and_of_labels_without_vectors(monkeypatch):
    curves = xr.DataArray(np.tile([0.0, 1, 1, 1, 5], (3, 1)), dims=("step", "token"), coords={"step": [0, 1, 2]})
    found = nearest(curves, xr.DataArray([1, 1, 1, 1, 1], dims="token"), n=3)
    assert found["token"].tolist() == [1, 2, 3]
    assert found["vector"].tolist() == [0, 0, 0]
    assert nearest(curves, xr.DataArray([OUTLIER] * 5, dims="token")).empty
    # Of equal curves the medoid comes first, whichever rounding makes it.
    monkeypatch.setattr("polca_lib.report.contexts.medoid", lambda *_: 3)
    assert nearest(curves, xr.DataArray([1] * 5, dims="token"), n=3)["token"].tolist() == [3, 1, 2]


WINDOWS = np.array([[*"abcdefgh"], ["i", "j", "\n", "k", PAD, PAD, PAD, PAD]], dtype=object)
PLACES = pd.DataFrame({"example": np.repeat([0, 1], 6), "position": np.tile(np.arange(2, 8), 2)})


def test_contexts_stay_in_their_window_and_show_one_pad_of_several():
    near = pd.DataFrame({"vector": 3, "cluster": 1, "rank": [1, 2, 3, 4], "token": [2, 7, 0, 10]})
    found = contexts(near, WINDOWS, PLACES)
    assert found["before"].tolist() == ["abcd", "ij\n", "ab", f"ij\nk{PAD}"]
    assert found["target"].tolist() == ["e", "k", "c", PAD]
    assert found["after"].tolist() == ["fgh", PAD, "defgh", PAD]
    assert found[near.columns.tolist()].equals(near)
    long = np.array([[chr(i) for i in range(100, 150)]], dtype=object)
    (row,) = contexts(near[:1], long, pd.DataFrame({"example": 0, "position": range(25, 30)})).to_dict("records")
    assert row["target"] == chr(127)
    assert len(row["before"] + row["target"] + row["after"]) == 25


def medians(*curves):
    """Curves of the clusters of vector 7."""
    values = np.array(curves)[None]
    return xr.DataArray(
        values,
        dims=("vector", "cluster", "step"),
        coords={"vector": [7], "cluster": 1 + np.arange(len(curves)), "step": np.arange(values.shape[-1])},
    )


TIME = np.linspace(0, 1, 71)
WAVE = np.sin(6 * TIME) - TIME


def test_mirror_images_are_found_and_copies_and_flat_curves_are_not():
    found = mirrored(medians(WAVE, -0.3 * WAVE + 5, 2 * WAVE, np.zeros(71), np.full(71, np.nan)))
    assert found[["vector", "one", "other"]].to_numpy().tolist() == [[7, 1, 2], [7, 2, 3]]
    np.testing.assert_allclose(found["correlation"], -1)
    np.testing.assert_allclose(found["share"], 1)
    np.testing.assert_allclose(found["ratio"], [0.3, 0.15])


def test_straight_lines_in_opposite_directions_are_mirrored():
    found = mirrored(medians(-TIME, TIME))
    assert found["correlation"].tolist() == pytest.approx([-1])
    assert mirrored(medians(-TIME, -2 * TIME)).empty


def test_correlation_and_share_by_hand():
    # Increments (1, -1, 2) and (-1, 1, 1): product -1 -1 +2 = 0; and with (-1, 1, -1): -4.
    assert mirrored(medians([0, 1, 0, 2], [0, -1, 0, 1])).empty
    (row,) = mirrored(medians([0, 1, 0, 2, 3], [0, -1, 0, -1, 0]), threshold=-0.1).to_dict("records")
    # Increments (1, -1, 2, 1) and (-1, 1, -1, 1): product -3; three of four steps are opposed.
    assert row["correlation"] == pytest.approx(-3 / (7 * 4) ** 0.5)
    assert row["share"] == pytest.approx((4 / 5 + 3 / 4) / 2)
    assert row["ratio"] == pytest.approx(4 / 5)


def test_small_movement_is_no_mirror_unless_asked_for():
    curves = medians(WAVE, -0.05 * WAVE)
    assert mirrored(curves).empty
    assert len(mirrored(curves, at_least=0.04)) == 1


def test_noise_mirrors_nothing_and_a_wide_window_brings_out_what_noise_hides():
    rng = np.random.default_rng(0)
    assert mirrored(medians(*rng.standard_normal((40, 71)).cumsum(axis=1))).empty
    hidden = medians(WAVE + 0.1 * rng.standard_normal(71), -WAVE + 0.1 * rng.standard_normal(71))
    assert mirrored(hidden).empty
    assert len(mirrored(hidden, window=10)) == 1


def test_pairs_are_of_one_vector_and_nothing_gives_an_empty_table():
    both = xr.concat([medians(WAVE, WAVE), medians(-WAVE, -WAVE).assign_coords(vector=[9])], dim="vector")
    found = mirrored(both)
    assert found.empty
    assert found.dtypes.equals(mirrored(medians(WAVE, -WAVE)).dtypes)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0}, {"threshold": -1.1}, {"at_least": 0}, {"at_least": 2}, {"window": 0}, {"window": 71}]
)
def test_settings_of_mirrors_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}; allowed"):
        mirrored(medians(WAVE, -WAVE), **wrong)


def test_a_label_is_written_from_texts_and_tags_of_two_tokens_and_from_sets():
    n = 60
    texts, before = np.full(n, " x", object), np.full(n, " y", object)
    texts[:30], before[:20] = ",", ")"
    tags = tag_table(["PUNCT"] * 30 + ["NOUN"] * 30, ["PUNCT"] * 20 + ["VERB"] * 40)
    labels = labelled([1] * 20 + [OUTLIER] * 40)
    columns = labeling.phrases(texts, before, tags, construction=np.full(n, "list", object))
    (row,) = labeling.written_labels(labels, columns, {}).to_dict("records")
    assert row == {"name": "“,” after “)”, 100% of the cluster, nowhere else", "named": True}
    sets = {"comma after a bracket": np.arange(n) < 20}
    assert labeling.written_labels(labels, columns, sets)["name"][0].startswith("comma after a bracket, 100%")
    # A noun after a verb is told by tags, where texts are all different.
    texts = np.array([f" w{i}" for i in range(n)], object)
    tags = tag_table(["NOUN"] * 20 + ["NOUN"] * 20 + ["VERB"] * 20, ["VERB"] * 20 + ["DET"] * 40)
    (row,) = labeling.written_labels(labels, labeling.phrases(texts, texts, tags), {}).to_dict("records")
    assert row["name"] == "noun after verb, 100% of the cluster, nowhere else"
    (row,) = labeling.written_labels(labelled([1] * n), columns, {}).to_dict("records")
    assert (row["named"], row["name"]) == (False, "mixed: list 100%")


def test_contexts_are_marked_in_one_line_and_backticks_of_the_text_do_not_mark():
    rows = pd.DataFrame({"before": ["a`b\r\n", ""], "target": ["\n", " c"], "after": ["", " d"]})
    assert labeling.marked(rows).tolist() == ["a'b⏎`⏎`", "` c` d"]
