"""The rules for the paper's clusters, on sentences tagged by hand.

A token is written text/TAG, with a space before it unless it begins with "~". "¶" is a newline; "*" marks what the
rule must find, and only that.
"""

import numpy as np
import pandas as pd
import pytest
from polca_paper.detectors import DETECTORS, Window, detect, verdict

from polca_lib.tasks.tokenization import PAD


def read(line):
    texts, tags, marks = [], [], []
    for item in line.split():
        text, _, tag = item.removeprefix("*").rpartition("/")
        glued = text.startswith("~")
        text = text.removeprefix("~").replace("¶", "\n")
        texts.append(text if glued or text[0] == "\n" or text == PAD else f" {text}")
        tags.append(tag)
        marks.append(item.startswith("*"))
    return np.array(texts, object), np.array(tags), marks


HE_WENT = "He/PRON went/VERB"
ANNA = "Anna/PROPN ~,/PUNCT"
CASES = {
    "from, to after a clause": [
        f"{HE_WENT} home/NOUN *from/ADP Rome/PROPN *to/ADP Paris/PROPN ~./PUNCT",
        "She/PRON wanted/VERB a/DET boat/NOUN *to/PART sail/VERB",
        f"{HE_WENT} to/ADP Rome/PROPN ~./PUNCT From/ADP there/ADV he/PRON wrote/VERB",
        "The/DET road/NOUN from/ADP Rome/PROPN to/ADP Paris/PROPN is/AUX long/ADJ",
        f"{HE_WENT} home/NOUN ~./PUNCT From/ADP Rome/PROPN",
        f"{HE_WENT} home/NOUN ~¶/SPACE to/ADP do/VERB",
        f"{HE_WENT} home/NOUN together/ADV and/CCONJ ~t/X ~o/X",  # "to" is no word of its own in "and" + "to"
    ],
    "repeated newline": [
        "end/NOUN ~./PUNCT ~¶/SPACE *~¶/SPACE Next/ADJ",
        "end/NOUN ~./PUNCT *~¶¶/SPACE Next/ADJ",
        "end/NOUN ~./PUNCT ~¶/SPACE Next/ADJ ~¶/SPACE",
        "end/NOUN ~./PUNCT ~¶/SPACE *~¶/SPACE *~¶/SPACE Next/ADJ",
    ],
    "comma after a bracket": [
        "Rome/PROPN (/PUNCT ~Italy/PROPN ~)/PUNCT *~,/PUNCT a/DET city/NOUN",
        "Rome/PROPN (/PUNCT ~Italy/PROPN *~),/PUNCT a/DET city/NOUN",
        "Rome/PROPN ~,/PUNCT a/DET city/NOUN (/PUNCT ~large/ADJ ~)/PUNCT ~./PUNCT",
    ],
    "comma after a parenthetical phrase": [
        "India/PROPN and/CCONJ China/PROPN ~,/PUNCT followed/VERB by/ADP the/DET Philippines/PROPN *~,/PUNCT and/CCONJ",
        "Rome/PROPN (/PUNCT ~Italy/PROPN *~),/PUNCT a/DET city/NOUN *~,/PUNCT fell/VERB",
        "In/ADP 1913/NUM ~,/PUNCT he/PRON left/VERB ~./PUNCT",
        "In/ADP 1913/NUM ~,/PUNCT he/PRON left/VERB ~./PUNCT Then/ADV ~,/PUNCT he/PRON came/VERB",
        # Nine words are no phrase any more.
        "So/ADV ~,/PUNCT " + "a/DET " * 9 + "~,/PUNCT he/PRON",
    ],
    "appositive": [
        f"{ANNA} *a/DET *painter/NOUN *of/ADP *note/NOUN ~,/PUNCT moved/VERB",
        "The/DET Tin/PROPN Woodman/PROPN ~:/PUNCT *A/DET *Faithful/ADJ *Story/NOUN ~./PUNCT",
        f"{ANNA} Maria/PROPN ~,/PUNCT and/CCONJ Joan/PROPN left/VERB",
        f"{ANNA} Maria/PROPN and/CCONJ Joan/PROPN ~./PUNCT",
        f"{ANNA} Maria/PROPN ~,/PUNCT Eve/PROPN and/CCONJ Joan/PROPN ~./PUNCT",
        f"{ANNA} who/PRON painted/VERB ~,/PUNCT moved/VERB",
        f"{HE_WENT} ~,/PUNCT a/DET painter/NOUN ~,/PUNCT to/ADP Rome/PROPN",
        f"{ANNA} a/DET painter/NOUN of/ADP",  # the window ends before the phrase does
    ],
    "phrase after a comma, no appositive": [
        f"{ANNA} a/DET painter/NOUN ~,/PUNCT *moved/VERB *to/ADP *Rome/PROPN ~./PUNCT",
        f"{ANNA} *Maria/PROPN ~,/PUNCT *and/CCONJ *Joan/PROPN ~./PUNCT",
        "In/ADP 1880/NUM ~,/PUNCT *R/PROPN ~ydberg/PROPN".replace("~ydberg", "*~ydberg"),
        "Anna/PROPN moved/VERB ~./PUNCT She/PRON died/VERB",
    ],
    "foreign proper noun": [
        "in/ADP *Ł/PROPN *~ódź/PROPN ~,/PUNCT Poland/PROPN",
        "Frida/PROPN ~,/PUNCT *Frunza/PROPN *de/ADP *Lima/PROPN left/VERB",
        "She/PRON saw/VERB *Cayetano/X *Heredia/PROPN",
        "the/DET café/NOUN of/ADP Anna/PROPN Smith/PROPN de/ADP facto/ADV",
        "came/VERB de/PROPN ~./PUNCT",  # a particle alone, tagged as a name, is none
    ],
    "token after a proper noun": [
        "Martin/PROPN *~,/PUNCT Wade/PROPN *and/CCONJ Joan/PROPN *~'s/PART dog/NOUN",
        "New/PROPN York/PROPN *is/AUX big/ADJ",
        "Ro/PROPN ~me/PROPN *fell/VERB",
        f"Rome/PROPN {PAD}/PAD {PAD}/PAD",
    ],
    "start of a sentence": [
        "left/VERB ~./PUNCT *The/DET end/NOUN ~./PUNCT ~¶/SPACE *An/PROPN *~nika/PROPN sang/VERB",
        "J/PROPN ~./PUNCT R/PROPN ~./PUNCT Smith/PROPN met/VERB Dr/PROPN ~./PUNCT Who/PROPN",
        "version/NOUN 3/NUM ~./PUNCT ~5/NUM of/ADP it/PRON",
        f'said/VERB ~."/PUNCT *He/PRON left/VERB {PAD}/PAD',
    ],
    "sentence-initial phrase": [
        "left/VERB ~./PUNCT *The/DET *innermost/ADJ *such/ADJ *sail/NOUN fell/VERB",
        "left/VERB ~./PUNCT *In/ADP *1913/NUM ~,/PUNCT it/PRON",
        "left/VERB ~./PUNCT *A/DET *b/NOUN *c/NOUN *d/NOUN *e/NOUN f/NOUN",
        "The/DET end/NOUN of/ADP it/PRON",  # a window may begin within a sentence
    ],
    "continuing a noun": [
        "the/DET settle/NOUN *~ment/NOUN in/ADP New/PROPN *York/PROPN was/AUX set/VERB ~tled/VERB",
        "Eve/PROPN ~./PUNCT Anna/PROPN ~,/PUNCT Maria/PROPN",
    ],
    "repeated PAD": [f"end/NOUN ~./PUNCT {PAD}/PAD *{PAD}/PAD *{PAD}/PAD", "end/NOUN ~¶/SPACE ~¶/SPACE"],
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in CASES.items() for line in lines])
def test_a_rule_finds_what_is_marked_and_nothing_else(name, line):
    texts, tags, marks = read(line)
    found = DETECTORS[name][1](Window(texts, tags))
    assert [t for t, f in zip(texts, found, strict=True) if f] == [t for t, m in zip(texts, marks, strict=True) if m]
    assert found.tolist() == marks


def test_every_rule_has_cases_that_fit_and_that_do_not():
    assert set(CASES) == set(DETECTORS)
    for name, lines in CASES.items():
        marked = [any(read(line)[2]) for line in lines]
        assert any(marked), name
        assert not all(marked), name


def test_tokens_are_found_at_their_places_and_windows_do_not_mix():
    first, second = (read(line) for line in ("a/X ~./PUNCT ~¶/SPACE", "~¶/SPACE b/X ~./PUNCT"))
    texts, tags = (np.stack([first[i], second[i]]) for i in (0, 1))
    tokens = pd.DataFrame({"example": [1, 0, 1], "position": [0, 2, 2]})
    found = detect(texts, tags, tokens)
    assert list(found) == list(DETECTORS)
    assert not found.to_numpy().any()
    texts[1, 1] = "\n"
    tokens = pd.DataFrame({"example": [1, 1], "position": [1, 0]})
    assert detect(texts, tags, tokens)["repeated newline"].tolist() == [True, False]


def test_tags_of_another_shape_and_tokens_without_places_are_refused():
    texts, tags, _ = read("a/X b/X")
    with pytest.raises(ValueError, match=r"tags have shape \(1, 1\); allowed: \(1, 2\)"):
        detect(texts[None], tags[None, :1], pd.DataFrame())
    with pytest.raises(ValueError, match="tokens have no column example, position; allowed: a table of the run's"):
        detect(texts[None], tags[None], pd.DataFrame())


FOUND = {"known": 50, "precision": 0.5, "lift": 2.0, "p": 0.01, "p_text": 0.01, "free": 0.4}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "found"),
        ({"free": 0, "p_text": 1.0}, "found"),
        ({"p_text": 0.02}, "partly"),
        ({"precision": 0.49}, "partly"),
        ({"precision": 0.24}, "not"),
        ({"precision": float("nan"), "lift": float("nan")}, "not"),
        ({"lift": 1.9}, "not"),
        ({"p": 0.02}, "not"),
        ({"known": 19}, "too few"),
    ],
)
def test_the_verdict_follows_its_rule(change, expected):
    assert verdict({**FOUND, **change}) == expected
