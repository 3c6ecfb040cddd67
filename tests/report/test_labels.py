"""Labels of clusters: by hand, and that one which says nothing is not shown as one."""

import numpy as np

from polca_lib.report.labels import after, quoted, write_label

KEPT = np.arange(100) < 90


def first(n):
    return np.arange(100) < n


def test_the_label_is_what_tells_the_cluster_from_the_rest_with_its_share_and_contrast():
    inside = first(20)
    text = np.where(first(16), "“,”", "“of”").astype(object)
    text[20:27] = "“,”"  # 7 of the 70 kept outside; those from 90 on do not count
    text[90:] = "“,”"
    tag = np.full(100, "noun", object)
    label = write_label(inside, KEPT, {"tag": tag, "text": text})
    assert label.text == "“,”, 80% of the cluster, 8 times as often as outside"
    assert (label.fits, label.inside, label.outside) == (True, 0.8, 0.1)
    better = write_label(inside, KEPT, {"text": text}, {"comma after a bracket": first(18)})
    assert better.text == "comma after a bracket, 90% of the cluster, nowhere else"


def test_two_values_are_named_if_one_is_not_enough():
    text = np.full(100, "“x”", object)
    text[:10], text[10:19] = "“the”", "“a”"
    assert write_label(first(20), KEPT, {"text": text}).text.startswith("“the” or “a”, 95% of the cluster")
    text[:18], text[18] = "“the”", "“a”"
    assert write_label(first(20), KEPT, {"text": text}).text.startswith("“the”, 90% of the cluster")


def test_what_fits_everything_or_too_little_is_no_label():
    everywhere = {"tag": np.full(100, "noun", object)}
    label = write_label(first(20), KEPT, everywhere)
    assert (label.text, label.fits) == ("mixed: noun 100%", False)
    words = np.array([f"w{i % 10}" for i in range(100)], object)
    assert write_label(first(20), KEPT, {"text": words}).text == "mixed: w0 10%, w1 10%, w2 10%"
    assert write_label(first(20), KEPT, {}).text == "mixed: no column tells"
    # A cluster of all tokens that were clustered has nothing that it could be told from.
    assert write_label(KEPT, KEPT, everywhere).text == "mixed: noun 100%"


def test_tokens_are_quoted_and_known_with_the_one_before_in_their_example():
    assert [quoted(text) for text in (" the", "\n\n", " ", "<PAD>")] == ["“the”", "“⏎⏎”", "“␣”", "“<PAD>”"]
    example, position = np.array([0, 0, 1, 1]), np.array([4, 3, 3, 5])
    assert after(np.array(list("abcd"), object), example, position).tolist() == ["a after b", "", "", ""]
