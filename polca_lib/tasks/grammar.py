"""A small generative English: every token has a known construction and part of speech.

It reads like an encyclopaedia of invented people and places. The grammar is context-free; words and rules stand in
``grammar.toml``, with their notation. What a rule can't see, such as the noun that a verb agrees with, is written into
the names of its symbols.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from polca_lib.tasks.tokenization import PAD

_DATA = tomllib.loads((files("polca_lib.tasks") / "grammar.toml").read_text(encoding="utf-8"))
PEOPLE, PLACES, RULES = (_DATA[name] for name in ("people", "places", "rules"))
NOUNS, WORDS = _DATA["nouns"], _DATA["words"]
YEARS = tuple(map(str, range(1805, 2000, 7)))
CONSTRUCTIONS: dict[str, str] = _DATA["constructions"]
"""Which tokens these are, and what must be known to predict them."""


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
