"""A small generative English: every token has a known construction and part of speech.

It reads like an encyclopaedia of invented people and places. The grammar is context-free: the table :data:`RULES` is
all of it. What a rule can't see, such as the noun that a verb agrees with, is written into the names of its symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from polca_lib.tasks.tokenization import PAD

CONSTRUCTIONS = {
    "clause": "Words in no other construction; the word before them says most.",
    "heading": "Words of a section's title; that an empty line stands before them.",
    "newline": "The end of a title, or the first newline after a paragraph; that a title or a sentence is over.",
    "repeated-newline": "The second newline after a paragraph; that a period, not a title, stands before the first.",
    "name": "First piece of a name; people and places share the first pieces, so no more than that a name is due.",
    "name-piece": "Later pieces of a name; the pieces before, and whether a person or a place is due.",
    "of-phrase": "'of' and the noun phrase after it, but names; that a noun may take it, also that of another 'of'.",
    "appositive": "Comma after a name, and the article and noun that say who or what it is; that this is no list.",
    "appositive-end": "The comma that closes an appositive; that after 'NAME,' came an article, not a name.",
    "list": "Commas and 'and' of a list, and its items but names; that after 'NAME,' came another name.",
    "from-to": "'from', a year after it, and 'to'; that a 'from' is still open.",
    "later-year": "The year after 'from YEAR to'; that it is later than the first.",
    "parenthetical": "Opening bracket and the words after it; whether the name before is a person's or a place's.",
    "bracket-end": "The closing bracket; how many are open, with of-phrases and years since.",
    "agreement": "Finite verb that agrees with the noun or name just before it; that one's number.",
    "attractor": "Finite verb that doesn't; the head of its subject, or that this is a list.",
    "padding": "PAD, which no document has; that the text is over.",
}
"""Which tokens these are, and what must be known to predict them.

Each token has one: the innermost whose rule makes it what it is. Before a verb, brackets are left out of account, and
so is the comma that closes an appositive.
"""

PEOPLE = (
    "ka-lin ka-ri-na mi-ra mi-lo-van be-la be-ron dra-gan dra-go-mi-ra or-lan or-fe-na ta-ro ta-mi-len "
    "ve-sna ve-lis so-ren so-ri-na il-va il-do-ran no-rin no-mi-ra ha-na ha-du-win le-vin le-o-ra"
)
PLACES = (
    "ka-mor ka-ve-land mi-rask mi-vel be-gard be-lo-mar dra-vik dra-ko-burg or-vel or-da ta-msk ta-lin-burg "
    "ve-mor ve-li-ko-gard so-rask so-land il-vik il-ma-vel no-gard no-ve-mar ha-thorp ha-lo-wick le-mor le-no-stad"
)
"""Names, with hyphens between their pieces."""

YEARS = tuple(map(str, range(1805, 2000, 7)))

NOUNS = {
    "RANK": "king kings queen queens duke dukes prince princes baron barons bishop bishops general generals "
    "judge judges mayor mayors painter painters poet poets doctor doctors lawyer lawyers merchant merchants "
    "miller millers sailor sailors singer singers teacher teachers writer writers weaver weavers",
    "SITE": "city cities town towns village villages river rivers valley valleys lake lakes mountain mountains "
    "forest forests field fields garden gardens road roads bridge bridges wall walls gate gates tower towers "
    "castle castles palace palaces church churches temple temples monastery monasteries mill mills mine mines "
    "harbour harbours market markets school schools square squares hill hills library libraries museum museums",
}
"""Countable nouns, each singular with its plural."""

WORDS = {
    "ADJ": "old large small famous empty white red green round narrow quiet early later",
    "ADP": "of in from to by for near",
    "ADV": "now",
    "AUX": "is are was were has have",
    "CCONJ": "and",
    "DET": "the a",
    "NOUN": "salt wool copper silver wine honey timber glass silk amber paper leather cloth marble iron bronze pottery "
    "brother sister pupil friend seat part power history life family death legacy reign youth geography economy "
    "landscape climate origins buildings trade",
    "NUM": "two three four seven",
    "PUNCT": ". , ( )",
    "SPACE": "¶",
    "VERB": "crowned elected buried sent defeated captured followed built restored destroyed held moved known "
    "stand stands lie lies born founded",
}
"""All other words, by universal part of speech; ¶ is a newline."""

RULES = """
DOCUMENT/clause = ~PLACE ~¶/newline ~TEXT:LAND SECTIONS | ~PERSON ~¶/newline ~TEXT:LIFE SECTIONS
SECTIONS        = SECTION SECTION SECTION SECTION | SECTION SECTION SECTION SECTION SECTION
SECTION         = BREAK ~^HEADING:t ~¶/newline ~TEXT:t
BREAK           = ~¶/newline ~¶/repeated-newline
TEXT:t          = PARAGRAPH:t | PARAGRAPH:t BREAK ~PARAGRAPH:t
PARAGRAPH:t     = SENTENCE:t | SENTENCE:t SENTENCE:t
SENTENCE:t      = ^CLAUSE:t ~.

HEADING:LIFE/heading = early life | later life | family | death and legacy | reign | youth
HEADING:PAST/heading = history | early history | later history | origins | old buildings
HEADING:LAND/heading = geography | economy | landscape | climate and landscape | trade and economy

CLAUSE:LIFE = PERSON-WAS in power SPAN *3 | PERSON-WAS CROWNED in YEAR | PERSON-WAS buried in TOWN
CLAUSE:LIFE = PERSON-WAS sent ROUTE | PERSON-WAS DEFEATED by AGENT in YEAR | PERSON-WAS followed by AGENT SPAN
CLAUSE:PAST = SITE-WAS BUILT SPAN *3 | SITE-WAS BUILT in YEAR | SITE-WAS moved ROUTE
CLAUSE:PAST = SITE-WAS DESTROYED by AGENT in YEAR | SITE-WAS held by AGENT SPAN
CLAUSE:LAND = SITE-STANDS near TOWN *3 | SITE-IS ADJECTIVE *3 | SITE-IS known for GOODS *2
CLAUSE:LAND = SITE-HAS a SITE:SG | SITE-HAS NUMBER SITE:PL

PERSON-WAS  = PERSON-NEAR:n WAS:n/agreement  | PERSON-FAR:n WAS:n/attractor
SITE-WAS    = SITE-NEAR:n WAS:n/agreement    | SITE-FAR:n WAS:n/attractor
SITE-IS     = SITE-NEAR:n IS:n/agreement     | SITE-FAR:n IS:n/attractor
SITE-HAS    = SITE-NEAR:n HAS:n/agreement    | SITE-FAR:n HAS:n/attractor
SITE-STANDS = SITE-NEAR:n STANDS:n/agreement | SITE-FAR:n STANDS:n/attractor

PERSON-NEAR:SG = PERSON NOTE:PERSON *2 | SOMEONE APPOSITIVE:PERSON:SG *7
PERSON-NEAR:n  = the RANK:n *2 | the RANK:n CHAIN:n
PERSON-FAR:SG  = SOMEONE APPOSITIVE:PERSON:PL *3
PERSON-FAR:PL  = LIST
PERSON-FAR:n   = the RANK:n CHAIN:m
SITE-NEAR:SG   = PLACE NOTE:PLACE *2 | TOWN APPOSITIVE:PLACE:SG *7
SITE-NEAR:n    = the SITE:n *2 | the SITE:n CHAIN:n
SITE-FAR:SG    = TOWN APPOSITIVE:PLACE:PL *3
SITE-FAR:n     = the SITE:n CHAIN:m

CHAIN:SG/of-phrase = of PLACE *6
CHAIN:n/of-phrase  = of the NOUN:n *8 | of the NOUN:n CHAIN:n | of the NOUN:m CHAIN:n
CHAIN              = CHAIN:n
NOUN:n             = RANK:n | SITE:n *2

SOMEONE = PERSON | PERSON NOTE:PERSON
TOWN    = PLACE | PLACE NOTE:PLACE *2
AGENT   = SOMEONE APPOSITIVE:PERSON:n *3 | LIST

APPOSITIVE:PERSON:SG/appositive = ~, the RANK:SG ~,/appositive-end *2
APPOSITIVE:PERSON:n/appositive  = ~, the RANK:SG CHAIN:n ~,/appositive-end
APPOSITIVE:PLACE:SG/appositive  = ~, the SITE:SG ~,/appositive-end *2
APPOSITIVE:PLACE:n/appositive   = ~, the SITE:SG CHAIN:n ~,/appositive-end

LIST/list  = PERSON ~, PERSON and ITEM *4 | PERSON ~, PERSON ~, PERSON and ITEM
ITEM       = PERSON | the RANK:SG CHAIN:SG *2
GOODS/list = GOOD ~, GOOD and GOOD | GOOD ~, GOOD ~, GOOD and GOOD

ROUTE/from-to = from PLACE to TOWN

NOTE:PERSON/parenthetical = ( ~born in YEAR ~)/bracket-end | ( ~SPAN ~)/bracket-end
NOTE:PERSON/parenthetical = ( ~RELATIVE of PERSON NOTE:PERSON ~)/bracket-end
NOTE:PLACE/parenthetical  = ( ~founded in YEAR ~)/bracket-end | ( ~empty SPAN ~)/bracket-end
NOTE:PLACE/parenthetical  = ( ~now part of PLACE ~)/bracket-end | ( ~the seat CHAIN SPAN ~)/bracket-end

WAS:SG    = was
WAS:PL    = were
IS:SG     = is
IS:PL     = are
HAS:SG    = has
HAS:PL    = have
STANDS:SG = stands | lies
STANDS:PL = stand | lie
CROWNED   = crowned | elected
DEFEATED  = defeated | captured
BUILT     = built | restored
DESTROYED = destroyed | captured
RELATIVE  = brother | sister | pupil | friend
GOOD      = salt | wool | copper | silver | wine | honey | timber | glass | silk | amber | paper | leather
GOOD      = cloth | marble | iron | bronze | pottery
ADJECTIVE = old | large | small | famous | empty | white | red | green | round | narrow | quiet
NUMBER    = two | three | four | seven
"""
"""A symbol is in capitals, ``|`` stands between its alternatives, and ``*3`` makes one three times as likely.

``~`` puts no space before a word, and ``^`` makes its first letter a capital; a symbol hands them on to its first word.
After "/" stands the construction, of one word or symbol, or of all in a rule; where there is none, it is that of the
rule the symbol is used in. ``:n`` is singular and plural in turn, ``:m`` the other, ``:t`` each kind of section. Lines
of the same symbol add up. The lists above give the other rules.
"""


class Document(NamedTuple):
    """Tokens of one document, in order."""

    ids: Int[np.ndarray, " token"]
    """Index into ``VOCABULARY``."""
    tags: Int[np.ndarray, " token"]
    """Index into ``TAGS``."""
    constructions: Int[np.ndarray, " token"]
    """Index into the keys of :data:`CONSTRUCTIONS`."""


def document(rng: np.random.Generator) -> Document:
    """A text with a title and four or five sections, mostly of 160 to 370 tokens in all.

    The same state of ``rng`` gives the same document; numbers are taken from it in blocks.
    """
    uniform, words, stack = _uniform(rng), [], [_START]
    while stack:
        code = stack.pop()
        if code < 0:
            words.append(~code)
        else:
            alternatives = _ALTERNATIVES[code]
            stack += alternatives[int(next(uniform) * len(alternatives))]
    return Document(*np.ascontiguousarray(_LABELS[words].T))


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(512).tolist()


class _Symbol(NamedTuple):
    """A word or symbol of the grammar, and what is passed on to it from where it is used."""

    name: str
    construction: str = ""
    glued: bool = False
    capital: bool = False

    @classmethod
    def parse(cls, text: str) -> _Symbol:
        name, _, construction = text.partition("/")
        return cls(name.lstrip("~^"), construction, "~" in name, "^" in name)

    @property
    def text(self) -> str:
        word = self.name.replace("¶", "\n")
        return " " * (not self.glued) + (word.capitalize() if self.capital else word)


_Rules = dict[str, list[list[_Symbol]]]


def _read_rules() -> _Rules:
    """Alternatives of each symbol, each as often as its weight says."""
    lines: dict[str, None] = {}
    for topic in ("LIFE", "PAST", "LAND"):
        for one, other in (("SG", "PL"), ("PL", "SG")):
            text = RULES.replace(":t", f":{topic}").replace(":n", f":{one}").replace(":m", f":{other}")
            lines |= dict.fromkeys(filter(None, text.splitlines()))  # what has no variants is there once
    lines |= dict.fromkeys(_lexical_rules())
    rules: _Rules = {}
    for line in lines:
        left, right = map(str.strip, line.split("="))
        left, _, construction = left.partition("/")
        for alternative in right.split("|"):
            body, _, weight = alternative.partition("*")
            symbols = [_Symbol.parse(text) for text in body.split()]
            symbols = [one._replace(construction=one.construction or construction) for one in symbols]
            rules.setdefault(left, []).extend([symbols] * int(weight or 1))
    return rules


def _lexical_rules() -> Iterator[str]:
    """Rules that follow from the lists of names, years and nouns."""
    for symbol, names in (("PERSON", PEOPLE), ("PLACE", PLACES)):
        for name in names.split():
            first, *rest = name.split("-")
            yield f"{symbol} = ^{first}/name " + " ".join(f"~{piece}/name-piece" for piece in rest)
    yield f"YEAR = {' | '.join(YEARS)}"
    yield f"SPAN/from-to = {' | '.join(f'from {a} to {b}/later-year' for a, b in combinations(YEARS, 2))}"
    for symbol, nouns in NOUNS.items():
        yield f"{symbol}:SG = {' | '.join(nouns.split()[::2])}"
        yield f"{symbol}:PL = {' | '.join(nouns.split()[1::2])}"


def _compile(rules: _Rules, start: str) -> tuple[list[_Symbol], list[list[list[int]]], int]:
    """Words, alternatives and start as numbers: n >= 0 is a symbol, n < 0 is word ~n.

    Only what can be reached from ``start`` is there. An alternative is reversed, to go on a stack as it is.
    """
    codes: dict[_Symbol, int] = {}
    words: list[_Symbol] = []
    alternatives: list[list[list[int]]] = []

    def encode(symbol: _Symbol) -> int:
        if symbol in codes:
            return codes[symbol]
        if not symbol.name.isupper():
            words.append(symbol)
            return codes.setdefault(symbol, ~(len(words) - 1))
        code = codes[symbol] = len(alternatives)
        alternatives.append([])
        for first, *rest in rules[symbol.name]:
            first = first._replace(glued=first.glued or symbol.glued, capital=first.capital or symbol.capital)
            children = [one._replace(construction=one.construction or symbol.construction) for one in (first, *rest)]
            alternatives[code].append([encode(child) for child in reversed(children)])
        return code

    return words, alternatives, encode(_Symbol(start))


_TAG = (
    {word: tag for tag, words in WORDS.items() for word in words.split()}
    | dict.fromkeys(" ".join(NOUNS.values()).split(), "NOUN")
    | dict.fromkeys(YEARS, "NUM")
    | dict.fromkeys(f"{PEOPLE} {PLACES}".replace("-", " ").split(), "PROPN")
)
_WORDS, _ALTERNATIVES, _START = _compile(_read_rules(), "DOCUMENT")

TAGS = (*sorted(set(_TAG.values())), "PAD")
VOCABULARY = (*sorted({word.text for word in _WORDS}), PAD)
"""Text of each token, with its space; joined they are readable English. The last is PAD, which no document has."""

_NAMES = tuple(CONSTRUCTIONS)
_LABELS: Int[np.ndarray, "word 3"] = np.array(
    [(VOCABULARY.index(one.text), TAGS.index(_TAG[one.name]), _NAMES.index(one.construction)) for one in _WORDS]
)
