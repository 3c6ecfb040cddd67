"""The clusters of English text that the paper shows, as rules on text and parts of speech.

The paper names each cluster by hand (its Figures 6, 10 and 12). Here each name is a rule in code, so that any cluster
can be measured against it. A rule sees one window of tokens, also those after the token that it judges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from polca_lib.tasks.tokenization import PAD
from polca_paper.tagging import SPACE

PHRASE = 8
"""Words of a phrase at most; what stands further from its comma is no longer counted."""

FEWEST = 20
"""Tokens of a set at least, for a verdict about it."""

_FIRST = 5  # words of a sentence-initial phrase at most
_NOUNS = ("NOUN", "PROPN")
_IN_NAME = re.compile("al|bin|d[aeiou]|de[lnr]|della|des|dos|du|e|el|ibn|l[ae]s?|los|und|van|von|y|zu")
_ABBREVIATION = re.compile("Capt|Col|Dr|Gen|Hon|Jr|Lt|Mrs?|Ms|Prof|Rev|Sgt|S[rt]|ca|eds?|etc|fig|no|vol|vs|[A-Z]")
_END = re.compile("[.!?][\"'\u201d\u2019)\\]]*$")  # quotation marks may close after it


class Window:
    """Tokens of a window with what rules read of them.

    Args:
        texts: of the tokens; a token of several that share a character may be empty.
        tags: their parts of speech, see :mod:`polca_paper.tagging`.
    """

    def __init__(self, texts: np.ndarray, tags: np.ndarray):
        self.texts, self.tags = [str(text) for text in texts], np.asarray(tags, str)
        self.shown = [text.strip() for text in self.texts]
        self.pad = np.array([text == PAD for text in self.texts])
        self.newline = np.array(["\n" in text for text in self.texts])

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def continues(self) -> Bool[np.ndarray, " token"]:
        """Whether a token continues the word of the token before it."""
        inside = np.zeros(len(self), bool)
        for i in range(1, len(self)):
            before, text = self.texts[i - 1], self.texts[i]
            letters = text[:1].isalnum() and before[-1:].isalnum() and PAD not in (before, text)
            inside[i] = letters or (text == "" and not self.pad[i])
        return inside

    @cached_property
    def word(self) -> Int[np.ndarray, " token"]:
        """Number of the word of each token."""
        return np.cumsum(~self.continues)

    @cached_property
    def words(self) -> list[str]:
        """The whole word of each token, as far as the window has it."""
        parts = pd.Series(self.texts).groupby(self.word).transform("".join)
        return [text.strip() for text in parts]

    @cached_property
    def starts(self) -> Bool[np.ndarray, " token"]:
        """Whether a token begins a sentence.

        A sentence begins after a newline, and where a capital, a digit or a quotation mark follows a full stop, a
        question mark or an exclamation mark. An initial or an abbreviation ends no sentence. The first token of a
        window may stand anywhere, so it begins none.
        """
        starts = np.zeros(len(self), bool)
        for i in range(1, len(self)):
            text, before = self.shown[i], self.shown[i - 1]
            if not text or self.pad[i] or self.newline[i] or self.continues[i]:
                continue
            opens = text[0].isupper() or text[0].isdigit() or text[0] in "\"'\u201c\u2018(["
            starts[i] = self.newline[i - 1] or (opens and self.texts[i][0].isspace() and self._ends(i - 1, before))
        return starts

    def _ends(self, i: int, text: str) -> bool:
        """Whether token i ends a sentence."""
        if not _END.search(text):
            return False
        word = self.words[i - 1] if i and not text[0].isalnum() else text.rstrip(".")
        return not (text == "." and _ABBREVIATION.fullmatch(word))

    @cached_property
    def sentence(self) -> Int[np.ndarray, " token"]:
        """Number of the sentence of each token; a newline ends one."""
        return np.cumsum(self.starts | self.newline)

    @cached_property
    def stops(self) -> Bool[np.ndarray, " token"]:
        """Tokens that end a phrase, which are punctuation but hyphens and quotation marks, newlines and PAD."""
        marks = [bool(re.search(r"[,.;:!?()\[\]\u2013\u2014]", text)) and not text[:1].isalnum() for text in self.shown]
        return np.array(marks) | self.newline | self.pad

    def phrase(self, start: int) -> range:
        """Tokens from ``start`` to the next that ends a phrase, without it."""
        after = np.flatnonzero(self.stops[start:])
        return range(start, start + int(after[0]) if len(after) else len(self))

    @cached_property
    def commas(self) -> list[int]:
        """Tokens that begin or end with a comma."""
        return [i for i, text in enumerate(self.shown) if text[-1:] == "," or text[:1] == ","]


Mask = Bool[np.ndarray, " token"]


def from_or_to_after_a_clause(window: Window) -> Mask:
    """The words "from" and "to" where the sentence so far has a verb and, after it, a noun."""
    found, sentence, verb, noun = np.zeros(len(window), bool), -1, False, False
    for i, tag in enumerate(window.tags):
        if window.sentence[i] != sentence:
            sentence, verb, noun = window.sentence[i], False, False
        found[i] = noun and window.words[i].lower() in ("from", "to") and not window.continues[i]
        noun = noun or (verb and tag in (*_NOUNS, "PRON", "NUM"))
        verb = verb or tag in ("VERB", "AUX")
    return found


def repeated_newline(window: Window) -> Mask:
    """Newlines that follow a newline, in a token of their own or in the same one."""
    twice = np.array([text.count("\n") > 1 for text in window.texts])
    follows = np.array([False, *window.newline[:-1]]) & window.newline
    return twice | follows


def comma_after_a_bracket(window: Window) -> Mask:
    """Commas right after a closing bracket, in a token of their own or in the same one."""
    found = np.zeros(len(window), bool)
    for i in window.commas:
        text = (window.shown[i - 1][-1:] if i else "") + window.shown[i]
        found[i] = bool(re.search(r"[)\]][\"\u201d\u2019]?,", text))
    return found


def comma_after_a_parenthetical_phrase(window: Window) -> Mask:
    """Commas after a closing bracket, and those that close a phrase which another comma of the sentence opens."""
    found = comma_after_a_bracket(window)
    for opening in window.commas:
        phrase = window.phrase(opening + 1)
        close = phrase.stop
        words = len(set(window.word[phrase.start : phrase.stop]))
        if close < len(window) and close in window.commas and 0 < words <= PHRASE:
            found[close] |= window.sentence[opening] == window.sentence[close]
    return found


def _after_commas(window: Window) -> tuple[Mask, Mask]:
    """Tokens of phrases after a comma: appositive noun phrases, and all other phrases.

    A phrase is appositive if a comma, a colon, a dash or an opening bracket right after a noun opens it, if it begins
    like a noun phrase, names something, has no verb, and is closed by punctuation that no conjunction, and no other
    item of a list, follows.
    """
    appositive, others = (np.zeros(len(window), bool) for _ in range(2))
    tags, earlier = window.tags, False  # whether the phrase before was opened by a comma, and no appositive
    for i in range(1, len(window) - 1):
        text, comma = window.shown[i], i in window.commas
        if not (comma or text[-1:] in tuple(":\u2014\u2013(")) or not text:
            earlier = earlier and not window.stops[i]
            continue
        phrase = window.phrase(i + 1)
        inside = tags[phrase.start : phrase.stop]
        if not len(phrase) or window.word[phrase.stop - 1] - window.word[phrase.start] >= 2 * PHRASE:
            continue
        head = inside[0] in ("DET", *_NOUNS, "ADJ", "NUM") and np.isin(inside, _NOUNS).any()
        plain = not np.isin(inside, ("VERB", "AUX", "CCONJ", "SCONJ", "PRON")).any() and not (inside == "NUM").all()
        closed = phrase.stop < len(window) and not window.pad[phrase.stop]
        following = tags[phrase.stop + 1] if phrase.stop + 1 < len(window) else ""
        listed = following == "CCONJ" or (comma and earlier)
        named = tags[i - 1] in _NOUNS or window.shown[i - 1][-1:] in tuple(')"\u201d')
        # An item of a list is followed by further items: a comma, and a phrase with a conjunction.
        if closed and phrase.stop in window.commas:
            rest = window.phrase(phrase.stop + 1)
            listed |= tags[rest.start : rest.start + 1].tolist() == ["CCONJ"]
            later = tags[rest.start : rest.stop]
            listed |= bool(inside[0] in _NOUNS and not np.isin(later, ("VERB", "AUX")).any() and "CCONJ" in later)
        if head and plain and closed and named and not listed:
            appositive[phrase.start : phrase.stop] = True
        elif comma:
            last = window.word[phrase.start] + PHRASE
            others[[j for j in phrase if window.word[j] < last]] = True
            earlier = True
    return appositive, others & ~appositive


def appositive(window: Window) -> Mask:
    """Tokens of a noun phrase that renames the noun before it: "Anna, a painter from Kyiv, moved"."""
    return _after_commas(window)[0]


def phrase_after_a_comma(window: Window) -> Mask:
    """Tokens of a phrase after a comma that is no appositive, such as an item of a list; its first words."""
    return _after_commas(window)[1]


def foreign_proper_noun(window: Window) -> Mask:
    """Tokens of a name that looks foreign.

    A name is a run of proper nouns, of words tagged as foreign, and of particles such as "de" between them. It looks
    foreign if a letter of it is not in ASCII, or if it has such a particle or a word tagged as foreign.
    """
    found, i = np.zeros(len(window), bool), 0
    capital = np.array([word[:1].isupper() for word in window.words])
    named = (window.tags == "PROPN") | ((window.tags == "X") & capital)
    particle = np.array([bool(_IN_NAME.fullmatch(word)) for word in window.words])
    while i < len(window):
        if not named[i]:
            i += 1
            continue
        end = i
        while end < len(window) and (named[end] or particle[end] or window.continues[end]):
            end += 1
        while end > i and particle[end - 1]:  # no name ends in a particle, and a particle alone is none
            end -= 1
        letters = any(ord(letter) > 127 and letter.isalpha() for letter in "".join(window.texts[i:end]))
        found[i:end] = letters or particle[i:end].any() or (window.tags[i:end] == "X").any()
        i = max(end, i + 1)
    return found


def token_after_a_proper_noun(window: Window) -> Mask:
    """Tokens right after a proper noun that neither continue it nor are proper nouns themselves."""
    follows = np.array([False, *(window.tags[:-1] == "PROPN")])
    return follows & (window.tags != "PROPN") & ~window.continues & ~window.pad


def start_of_a_sentence(window: Window) -> Mask:
    """Tokens of the first word of a sentence."""
    return np.isin(window.word, window.word[window.starts]) & ~window.newline & ~window.pad


def sentence_initial_phrase(window: Window) -> Mask:
    """The first words of a sentence, five at most, up to a verb or to punctuation."""
    found = np.zeros(len(window), bool)
    for start in np.flatnonzero(window.starts):
        for i in range(start, len(window)):
            ended = window.stops[i] and i > start
            if ended or window.tags[i] in ("VERB", "AUX") or window.word[i] >= window.word[start] + _FIRST:
                break
            found[i] = True
    return found


def continuing_a_noun(window: Window) -> Mask:
    """Tokens that continue a noun or a name: further tokens of its word, or its next word."""
    noun = np.isin(window.tags, _NOUNS)
    return noun & np.array([False, *noun[:-1]]) & ~window.stops & (window.tags != SPACE)


def repeated_pad(window: Window) -> Mask:
    """PAD after PAD."""
    return window.pad & np.array([False, *window.pad[:-1]])


DETECTORS: dict[str, tuple[str, Callable[[Window], Mask]]] = {
    "from, to after a clause": ("6, vector 13", from_or_to_after_a_clause),
    "repeated newline": ("6, 12, vectors 13, 16, 23", repeated_newline),
    "comma after a bracket": ("6, vector 13", comma_after_a_bracket),
    "comma after a parenthetical phrase": ("6, vector 13", comma_after_a_parenthetical_phrase),
    "appositive": ("6, vector 23", appositive),
    "phrase after a comma, no appositive": ("6, vector 23", phrase_after_a_comma),
    "foreign proper noun": ("12, vector 16", foreign_proper_noun),
    "token after a proper noun": ("12, vector 16", token_after_a_proper_noun),
    "start of a sentence": ("12, vector 28", start_of_a_sentence),
    "sentence-initial phrase": ("12, vector 28", sentence_initial_phrase),
    "continuing a noun": ("10, exact loss", continuing_a_noun),
    "repeated PAD": ("10, 12, exact loss, vector 28", repeated_pad),
}
"""Each cluster that the paper shows, with its figure and vector, and its rule.

Two of the paper's labels can be read in two ways, so they have two rules. "Comma after parenthetical phrase" stands
above contexts in which commas enclose the phrase. "Sentence-initial phrase" is more than a first word.
"""


def detect(texts: np.ndarray, tags: np.ndarray, tokens: pd.DataFrame) -> pd.DataFrame:
    """Which tokens each rule finds.

    Args:
        texts, tags: of all tokens of the windows, (window, width).
        tokens: a row per token that is analysed: ``example`` (window) and ``position`` in it.

    Returns:
        A row per token, a column of truth values per rule.

    Raises:
        ValueError: tags that are not one per text, or tokens without a place.
    """
    if np.shape(texts) != np.shape(tags):
        raise ValueError(f"tags have shape {np.shape(tags)}; allowed: {np.shape(texts)}, that of texts")
    if missing := {"example", "position"} - {*tokens}:
        raise ValueError(f"tokens have no column {', '.join(sorted(missing))}; allowed: a table of the run's tokens")
    windows = [Window(*pair) for pair in zip(texts, tags, strict=True)]
    places = (tokens["example"].to_numpy(), tokens["position"].to_numpy())
    return pd.DataFrame(
        {name: np.stack([rule(window) for window in windows])[places] for name, (_, rule) in DETECTORS.items()}
    )


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a cluster of the paper is found; the rule was fixed before any table was looked at.

    - ``found``: half of the best cluster is of this kind (precision), at least twice its share of the kept tokens
      (lift), more than chance gives to as many clusters (p at most 0.01), and more than the text of the tokens gives
      (p_text at most 0.01), unless the text decides (free is 0).
    - ``partly``: a quarter of the cluster, twice its share, more than chance.
    - ``not``: anything else; ``too few``: the sample has fewer than 20 tokens of this kind.

    Args:
        row: of :func:`polca_paper.english.paper_clusters`.
    """
    if row["known"] < FEWEST:
        return "too few"
    if not (row["precision"] >= 0.25 and row["lift"] >= 2 and row["p"] <= 0.01):
        return "not"
    beyond_text = row["free"] == 0 or row["p_text"] <= 0.01
    return "found" if row["precision"] >= 0.5 and beyond_text else "partly"
