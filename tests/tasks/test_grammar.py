"""The grammar against its own text: what a label says is read off the words again, with other means."""

import re
from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from polca_lib.tasks import grammar
from polca_lib.tasks.grammar import CONSTRUCTIONS, NOUNS, PAD, TAGS, VOCABULARY, WORDS, YEARS, document

PEOPLE, PLACES = (
    {name.replace("-", "").capitalize() for name in names.split()} for names in (grammar.PEOPLE, grammar.PLACES)
)
NUMBER = {word: i % 2 for words in NOUNS.values() for i, word in enumerate(words.split())}  # 0 singular, 1 plural
VERBS = {"was": 0, "were": 1, "is": 0, "are": 1, "has": 0, "have": 1, "stands": 0, "stand": 1, "lies": 0, "lie": 1}

NAME = rf"(?:{'|'.join(sorted(PEOPLE | PLACES, key=len, reverse=True))})\b"
HEADING = re.compile(r"\n\n([^\n.]+)\n(?!\n)")
PHRASE = rf"the \w+(?: of (?:the \w+|{NAME}))*"


class Token(NamedTuple):
    text: str
    tag: str
    construction: str
    start: int  # of its characters without space, in the text of the document


def read(one):
    """Text of a document, and its tokens."""
    names, text, tokens = tuple(CONSTRUCTIONS), "", []
    for i, tag, construction in zip(*one, strict=True):
        word = VOCABULARY[i]
        tokens.append(Token(word, TAGS[tag], names[construction], len(text) + word.startswith(" ")))
        text += word
    return text, tokens


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [read(document(rng)) for _ in range(400)]


@pytest.fixture(scope="module")
def tokens(documents):
    return [token for _, tokens in documents for token in tokens]


def starts(tokens, *constructions):
    return {token.start for token in tokens if token.construction in constructions}


def without_brackets(text):
    """The text with all that is in brackets blanked out, so that every character stays where it is."""
    while "(" in text:
        text = re.sub(r" \([^()]*\)", lambda match: "_" * len(match[0]), text)
    return text


def sentences(text):
    """Each sentence without brackets and period, and where in ``text`` each of its characters stands."""
    blanked = without_brackets(text)
    places = [i for i, character in enumerate(blanked) if character != "_"]
    for match in re.finditer(r"[A-Z][^.\n]*(?=\.)", blanked.replace("_", "")):
        yield match[0], places[match.start() : match.end()]


def test_the_same_state_gives_the_same_document_and_the_next_is_another():
    one, same = np.random.default_rng(3), np.random.default_rng(3)
    first = document(one)
    assert all((a == b).all() for a, b in zip(first, document(same), strict=True))
    second = document(one)
    assert all((a == b).all() for a, b in zip(second, document(same), strict=True))
    assert first.ids.tolist() != second.ids.tolist()
    assert first.ids.tolist() != document(np.random.default_rng(4)).ids.tolist()


def test_a_document_is_three_arrays_of_one_length_which_is_that_of_an_article(documents):
    one = document(np.random.default_rng(0))
    assert {part.shape for part in one} == {(len(one.ids),)}
    assert {part.dtype for part in one} == {np.dtype(np.int64)}
    lengths = [len(tokens) for _, tokens in documents]
    assert 100 < min(lengths) < 150
    assert 230 < np.mean(lengths) < 290
    assert np.mean([150 <= length <= 400 for length in lengths]) > 0.9


def test_every_token_of_the_vocabulary_occurs_but_pad_which_is_last(tokens):
    assert VOCABULARY[-1] == PAD
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert {token.text for token in tokens} == set(VOCABULARY[:-1])


def test_every_listed_word_and_year_and_name_occurs(documents):
    found = set(re.findall(r"\w+|[.,()]", " ".join(text for text, _ in documents)))
    listed = " ".join([*NOUNS.values(), *WORDS.values()]).replace("¶", "").split()
    assert {word for word in found if word[0].islower() or not word[0].isalpha()} <= {*listed, *YEARS}
    assert {*listed, *YEARS} <= {word.lower() for word in found}
    assert found >= PEOPLE | PLACES


def test_text_is_readable_english(documents):
    for text, _ in documents:
        assert not re.search(r"  | [.,)\n]|\( |\n | $|\n$", text)
        assert re.fullmatch(r"[A-Z][^\n]*(?:\n\n?[A-Z][^\n]*)*\.", text)
        for sentence, _ in sentences(text):
            assert re.match(rf"The \w+|{NAME}", sentence)


def test_a_token_has_one_tag_which_is_that_of_its_word(tokens):
    tags = defaultdict(set)
    for token in tokens:
        tags[token.text].add(token.tag)
    assert all(len(found) == 1 for found in tags.values())
    known = {
        "The": "DET", " the": "DET", " of": "ADP", "from": "ADP", " to": "ADP", " was": "AUX", " have": "AUX",
        " stands": "VERB", "born": "VERB", " and": "CCONJ", ",": "PUNCT", " (": "PUNCT", "\n": "SPACE", " king": "NOUN",
        " libraries": "NOUN", "History": "NOUN", " two": "NUM", "Early": "ADJ", "now": "ADV",
    }  # fmt: skip
    assert {text: tags[text] for text in known} == {text: {tag} for text, tag in known.items()}
    assert {token.tag for token in tokens} | {"PAD"} == set(TAGS)
    for token in tokens:
        assert (token.tag == "PROPN") == (token.construction in ("name", "name-piece"))
        if token.text.strip() in NUMBER:
            assert token.tag == "NOUN"
        if token.text.strip().isdigit():
            assert token.tag == "NUM"


def test_every_construction_is_over_two_percent_of_all_tokens_and_padding_is_for_windows(tokens):
    shares = Counter(token.construction for token in tokens)
    assert set(shares) == set(CONSTRUCTIONS) - {"padding"}
    assert min(shares.values()) / len(tokens) > 0.02
    assert max(shares.values()) / len(tokens) < 0.25


def test_brackets_balance_nest_and_are_labelled(documents):
    depths = Counter()
    for _, tokens in documents:
        depth = 0
        for token in tokens:
            assert (token.construction == "bracket-end") == (token.text == ")")
            depth += token.text == " ("
            depths[depth] += token.text == " ("
            if token.text == " (":
                assert token.construction == "parenthetical"
            if depth == 0:
                assert token.construction not in ("parenthetical", "bracket-end")
            else:
                assert token.construction in (
                    "parenthetical", "bracket-end", "name", "name-piece", "of-phrase", "from-to", "later-year",
                )  # fmt: skip
                assert token.text not in (".", ",", "\n")
            depth -= token.text == ")"
            assert depth >= 0
        assert depth == 0
    assert depths[1] > depths[2] > 20
    assert depths[3] > 0


def test_what_is_in_brackets_fits_the_name_before(documents):
    first_words = defaultdict(set)
    for text, _ in documents:
        for name, word in re.findall(rf"({NAME}) \((\w+)", text):
            first_words[name in PEOPLE].add(word)
    assert first_words == {
        True: {"born", "from", "brother", "sister", "pupil", "friend"},
        False: {"founded", "empty", "now", "the"},
    }


def test_from_has_its_to_between_two_places_or_from_a_year_to_a_later_one(documents):
    kinds = Counter()
    for text, tokens in documents:
        later, ends = set(), set()
        for match in re.finditer(rf"\bfrom (\d+|{NAME}) (to) (\d+|{NAME})", text):
            one, _, other = match.groups()
            ends |= {match.start(), match.start(2)}
            if one.isdigit():
                assert int(one) < int(other)
                ends.add(match.start(1))
                later.add(match.start(3))
            else:
                assert {one, other} <= PLACES
            kinds[one.isdigit()] += 1
        assert len(re.findall(r"\bfrom\b", text)) == len(re.findall(r"\bto\b", text))
        assert starts(tokens, "from-to") == ends
        assert starts(tokens, "later-year") == later
        assert {token.start for token in tokens if token.text.strip() in ("from", "to")} <= ends
    assert min(kinds.values()) > 200


def test_second_year_is_any_later_one(documents):
    followers = defaultdict(set)
    for text, _ in documents:
        for one, other in re.findall(r"from (\d+) to (\d+)", text):
            followers[one].add(other)
    assert set(followers) == set(YEARS[:-1])
    assert np.mean([len(followers[year]) / (len(YEARS) - 1 - i) for i, year in enumerate(YEARS[:-1])]) > 0.9


def test_a_title_ends_with_one_newline_a_paragraph_with_two(documents):
    for text, tokens in documents:
        newlines = {match.start() for match in re.finditer("\n", text)}
        repeated = {match.end() - 1 for match in re.finditer("\n\n", text)}
        assert starts(tokens, "repeated-newline") == repeated
        assert starts(tokens, "newline") == newlines - repeated
        title, text_below = text.split("\n", 1)
        assert title in PEOPLE | PLACES
        assert len(HEADING.findall(text)) in (4, 5)
        assert all(line.endswith(".") for line in HEADING.sub("\n\n", text_below).split("\n\n"))
        words = {
            heading.start(1) + word.start()
            for heading in HEADING.finditer(text)
            for word in re.finditer(r"\w+", heading[1])
        }
        assert starts(tokens, "heading") == words


def test_a_section_is_about_what_its_heading_says(documents):
    sites = "|".join(NOUNS["SITE"].split())
    for text, _ in documents:
        _, *parts = HEADING.split(text)
        for heading, body in zip(parts[::2], parts[1::2], strict=True):
            verbs = set(re.findall(r"\w+", body)) & set(VERBS)
            present = re.match("Geography|Economy|Landscape|Climate|Trade", heading)
            assert verbs <= (set(VERBS) - {"was", "were"} if present else {"was", "were"})
            if re.match("Early life|Later life|Family|Death|Reign|Youth", heading):
                assert not re.search(rf"The (?:{sites})\b", body)


def test_names_are_spelled_as_listed_and_first_pieces_do_not_tell_them_apart(documents, tokens):
    for text, tokens_ in documents:
        found = {match.start() for match in re.finditer(NAME, text)}
        assert starts(tokens_, "name") == found
        for match in re.finditer(NAME, text):
            inside = [token for token in tokens_ if match.start() <= token.start < match.end()]
            assert "".join(token.text for token in inside).strip() == match[0]
            assert [token.construction for token in inside] == ["name", *["name-piece"] * (len(inside) - 1)]
            assert 2 <= len(inside) <= 4
        assert len(starts(tokens_, "name-piece")) == sum(
            len([token for token in tokens_ if match.start() < token.start < match.end()])
            for match in re.finditer(NAME, text)
        )
    followers = defaultdict(set)
    for token, after in pairwise(tokens):
        if token.construction == "name":
            followers[token.text.strip()].add(after.text)
    assert all(len(pieces) >= 3 for pieces in followers.values())
    assert all({name[: len(first)] for name in kind} >= {first} for first in followers for kind in (PEOPLE, PLACES))


def test_appositives_are_closed_by_a_comma_and_lists_by_and(documents):
    for text, tokens in documents:
        opened, closed, listed = set(), set(), set()
        for sentence, places in sentences(text):
            for match in re.finditer(rf"{NAME}(,) (the) (\w+)(?: of (?:the \w+|{NAME}))*(,)", sentence):
                opened |= {places[match.start(i)] for i in (1, 2, 3)}
                closed.add(places[match.start(4)])
            for match in re.finditer(rf"(?:{NAME}, )+{NAME} and (?:{NAME}|{PHRASE})", sentence):
                own = re.finditer(r",|\band\b|\bthe \w+", re.sub(r" of .*", "", match[0]))
                listed |= {places[match.start() + word.start()] for word in own}
                if last := re.search(r"and the (\w+)", match[0]):
                    listed.add(places[match.start() + last.start(1)])
            for match in re.finditer(r"known for (.*)", sentence):
                assert re.fullmatch(r"\w+(, \w+){1,2} and \w+", match[1])
                listed |= {places[match.start(1) + word.start()] for word in re.finditer(r",|\w+", match[1])}
        assert starts(tokens, "appositive") == opened
        assert starts(tokens, "appositive-end") == closed
        assert starts(tokens, "list") == listed
        assert {token.start for token in tokens if token.text == ","} <= opened | closed | listed


def test_verbs_agree_with_the_head_of_their_subject_and_attractors_are_marked(documents):
    found = Counter()
    for text, tokens in documents:
        expected = {"agreement": set(), "attractor": set()}
        for sentence, places in sentences(text):
            verb = next(match for match in re.finditer(r"\w+", sentence) if match[0] in VERBS)
            subject = sentence[: verb.start()].strip()
            words = [word for word in re.findall(rf"{NAME}|\w+", subject) if word in NUMBER or re.fullmatch(NAME, word)]
            nouns = [NUMBER.get(word, 0) for word in words]
            number = 1 if " and " in subject else nouns[0]
            assert VERBS[verb[0]] == number
            kind = "agreement" if nouns[-1] == number else "attractor"
            expected[kind].add(places[verb.start()])
            found[kind, number] += 1
        for kind, places in expected.items():
            assert starts(tokens, kind) == places
    assert min(found[kind, number] for kind in ("agreement", "attractor") for number in (0, 1)) > 200


def test_of_phrases_nest_and_deeper_ones_are_rarer(documents):
    depths = Counter()
    for text, tokens in documents:
        of_phrases = set()
        for match in re.finditer(rf"\bof (?:the \w+|{NAME})(?: of (?:the \w+|{NAME}))*", text):
            if re.search(r"(?:part|brother|sister|pupil|friend) $", text[: match.start()]):
                continue  # these belong to what is in brackets
            depths[match[0].count("of ")] += 1
            own = re.sub(NAME, lambda name: "." * len(name[0]), match[0])
            of_phrases |= {match.start() + word.start() for word in re.finditer(r"\w+", own)}
        assert starts(tokens, "of-phrase") == of_phrases
    assert depths[1] > 3 * depths[2] > 0
    assert depths[2] > 3 * depths[3] > 0


@pytest.mark.parametrize(
    ("construction", "width"),
    [("repeated-newline", 1), ("bracket-end", 2), ("attractor", 2), ("appositive-end", 3)],
)
def test_the_last_tokens_alone_do_not_tell_that_a_construction_is_due(tokens, construction, width):
    """After the same ``width`` tokens there also comes another token, of another construction."""
    followers = defaultdict(Counter)
    for i in range(width, len(tokens)):
        context = tuple(token.text for token in tokens[i - width : i])
        followers[context][tokens[i].construction == construction] += 1
    both = [seen for seen in followers.values() if seen[True] and seen[False]]
    assert sum(seen[True] for seen in both) > 0.3 * sum(seen[True] for seen in followers.values())


def test_appositive_and_list_begin_alike(documents):
    """The mirrored pair: after the same 'NAME,' there comes an article or a name, and both are common."""
    after = defaultdict(Counter)
    for text, _ in documents:
        for name, word in re.findall(rf"({NAME}), (the|{NAME})", text):
            after[name][word == "the"] += 1
    assert all(after[name][True] > 3 and after[name][False] > 3 for name in PEOPLE)
