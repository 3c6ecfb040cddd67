"""A small generative English. The construction and the part of speech of every token are known.

The text reads like an encyclopaedia of invented people and places. The grammar is context-free: words, rules and their
notation are in ``grammar.toml``. The names of symbols carry what a context-free rule can't see, such as the number of
the noun that a verb agrees with.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from polca_lib.tasks.tokenization import PAD

_DATA = tomllib.loads((files("polca_lib.tasks") / "grammar.toml").read_text(encoding="utf-8"))
PEOPLE, PLACES, RULES = (_DATA[name] for name in ("people", "places", "rules"))
NOUNS, WORDS = _DATA["nouns"], _DATA["words"]
YEARS = tuple(map(str, range(1805, 2000, 7)))
CONSTRUCTIONS: dict[str, str] = _DATA["constructions"]
"""Which tokens each construction has, and what a model must know to predict them."""


class Document(NamedTuple):
    """Tokens of one document: indices into ``VOCABULARY``, ``TAGS`` and the keys of ``CONSTRUCTIONS``."""

    ids: Int[np.ndarray, " token"]
    tags: Int[np.ndarray, " token"]
    constructions: Int[np.ndarray, " token"]


def document(rng: np.random.Generator) -> Document:
    """Generate a text with a title and four or five sections from ``rng``, mostly 160 to 370 tokens long."""
    # Draw uniform numbers in blocks of 512, because single draws are slow.
    uniform = chain.from_iterable(iter(lambda: rng.random(512).tolist(), None))
    # Expand the leftmost symbol until only words are left.
    words, stack = [], [_START]
    while stack:
        code = stack.pop()
        if code < 0:
            words.append(~code)
        else:
            alternatives = _ALTERNATIVES[code]
            stack += alternatives[int(next(uniform) * len(alternatives))]
    return Document(*np.ascontiguousarray(_LABELS[words].T))


class _Symbol(NamedTuple):
    """A word or symbol in a rule, with the properties that the rule gives it."""

    name: str
    construction: str = ""
    glued: bool = False
    capital: bool = False

    @classmethod
    def parse(cls, text: str, rule_construction: str) -> _Symbol:
        name, _, construction = text.partition("/")
        return cls(name.lstrip("~^"), construction or rule_construction, "~" in name, "^" in name)

    @property
    def text(self) -> str:
        word = self.name.replace("¶", "\n")
        return " " * (not self.glued) + (word.capitalize() if self.capital else word)


_Rules = dict[str, list[list[_Symbol]]]


def _read_rules() -> _Rules:
    """Alternatives of each symbol, each repeated as often as its weight says."""
    # Replace the variables :t, :n and :m by each of their values.
    lines: list[str] = []
    for topic in ("LIFE", "PAST", "LAND"):
        for number, opposite in (("SG", "PL"), ("PL", "SG")):
            text = RULES.replace(":t", f":{topic}").replace(":n", f":{number}").replace(":m", f":{opposite}")
            lines += text.splitlines()
    # Add the rules that follow from the lists of names, years and nouns.
    for symbol, names in (("PERSON", PEOPLE), ("PLACE", PLACES)):
        for first, *rest in (name.split("-") for name in names.split()):
            lines.append(f"{symbol} = ^{first}/name " + " ".join(f"~{piece}/name-piece" for piece in rest))
    lines.append(f"YEAR = {' | '.join(YEARS)}")
    lines.append(f"SPAN/from-to = {' | '.join(f'from {a} to {b}/later-year' for a, b in combinations(YEARS, 2))}")
    for symbol, nouns in NOUNS.items():
        lines += [f"{symbol}:{number} = {' | '.join(nouns.split()[i::2])}" for i, number in enumerate(("SG", "PL"))]
    # Parse each line once: a line without variables has several copies.
    rules: _Rules = {}
    for line in dict.fromkeys(filter(None, lines)):
        left, right = map(str.strip, line.split("="))
        left, _, construction = left.partition("/")
        for alternative in right.split("|"):
            body, _, weight = alternative.partition("*")
            symbols = [_Symbol.parse(text, construction) for text in body.split()]
            rules.setdefault(left, []).extend([symbols] * int(weight or 1))
    return rules


def _compile(rules: _Rules, start: str) -> tuple[list[_Symbol], list[list[list[int]]], int]:
    """Words, alternatives and start as codes: n >= 0 is a symbol, n < 0 is word ~n."""
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
            # The first child takes spacing and capital of the symbol, and each child takes its construction by default.
            first = first._replace(glued=first.glued or symbol.glued, capital=first.capital or symbol.capital)
            children = [c._replace(construction=c.construction or symbol.construction) for c in (first, *rest)]
            # Alternatives are reversed, because document() puts them on a stack.
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
"""Text of each token, including its leading space. The last one is PAD, which no document contains."""

_LABELS: Int[np.ndarray, "word 3"] = np.array(
    [(VOCABULARY.index(w.text), TAGS.index(_TAG[w.name]), [*CONSTRUCTIONS].index(w.construction)) for w in _WORDS]
)
