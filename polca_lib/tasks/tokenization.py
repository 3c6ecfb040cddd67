"""Text as tokens: a byte-level BPE tokenizer, the characters of each token, and windows of fixed width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD = "<PAD>"
BYTES = 256
LONGEST = 10_000
"""Characters of a word, or of a run of white space, from which on it is cut to train the tokenizer."""
_CUT = 100  # characters of the pieces
_LONG = re.compile(rf"(\S{{{LONGEST},}}|\s{{{LONGEST},}})")


class Encoded(NamedTuple):
    """Token ids of a text and the characters ``text[start:end]`` of each. Tokens share a character split over them."""

    ids: Int[np.ndarray, " token"]
    starts: Int[np.ndarray, " token"]
    ends: Int[np.ndarray, " token"]


class Packed(NamedTuple):
    """Windows of documents, in order, with the index of their document and the position of their first token in it."""

    windows: Int[np.ndarray, "window width"]
    document: Int[np.ndarray, " window"]
    offset: Int[np.ndarray, " window"]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with ids 0 ... ``vocabulary`` - 1, and PAD with id ``vocabulary``.

    Every text can be encoded and decodes to itself. The same texts give the same tokenizer.

    Args:
        vocabulary: number of tokens without PAD, including one for each of the 256 bytes.

    Raises:
        ValueError: ``vocabulary`` is less than 256, or the texts give fewer tokens.
    """
    if vocabulary < BYTES:
        raise ValueError(f"vocabulary = {vocabulary} has no room for the {BYTES} bytes; allowed: at least {BYTES}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((piece for text in texts for piece in _without_long_words(text)), trainer)
    if (size := tokenizer.get_vocab_size()) < vocabulary:
        raise ValueError(
            f"vocabulary = {vocabulary} is more than the text it is trained on gives: {size} tokens; lower it, or give "
            "the tokenizer more articles"
        )
    tokenizer.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True  # "<PAD>" in an article means these five characters
    return tokenizer


def _without_long_words(text: str) -> Iterator[str]:
    """The text in pieces, with very long words cut: the time of training grows with the square of a word's length."""
    for index, piece in enumerate(_LONG.split(text)):
        # Every second piece is what the expression found.
        width = _CUT if index % 2 else max(1, len(piece))
        yield from (piece[start : start + width] for start in range(0, len(piece), width))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer of :func:`train_tokenizer` that its method ``save`` has written."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # the file does not store this setting
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """Tokens of ``text`` and their characters. A leading space belongs to its token, and no character is left out."""
    encoding = tokenizer.encode(text)
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return Encoded(np.array(encoding.ids, np.int64), starts, ends)


def encode_many(tokenizer: Tokenizer, texts: list[str]) -> list[Int[np.ndarray, " token"]]:
    """Token ids of each text, in parallel. Faster than :func:`encode`, because it computes no characters."""
    return [np.array(encoding.ids, np.int64) for encoding in tokenizer.encode_batch_fast(texts)]


def pack(documents: Iterable[Int[np.ndarray, " token"]], width: int, pad: int) -> Packed:
    """Cut each document into consecutive windows of ``width`` tokens, and fill its last window with ``pad``.

    A window never spans two documents. An empty document gives no window.

    Raises:
        ValueError: ``width`` is less than 1.
    """
    if width < 1:
        raise ValueError(f"width = {width} is too small for a window; allowed: at least 1")
    documents = list(documents)
    # Number of windows of each document, rounded up, and the index of its first window.
    counts = np.array([-(-len(document) // width) for document in documents], np.int64)
    firsts = np.cumsum(counts) - counts
    index = np.repeat(np.arange(len(documents)), counts)
    windows = np.full((counts.sum(), width), pad, np.int64)
    for document, first in zip(documents, firsts, strict=True):
        windows.reshape(-1)[first * width : first * width + len(document)] = document
    return Packed(windows, index, (np.arange(len(index)) - firsts[index]) * width)


def id_type(vocabulary: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds the ids 0 ... ``vocabulary``, little-endian on every machine."""
    return np.dtype("<u2" if vocabulary < 2**16 else "<u4")


class GrowingArray(AbstractContextManager):
    """A new file ``path`` in ``.npy`` format that grows by rows of shape ``row``, for arrays larger than memory."""

    def __init__(self, path: Path, dtype: str | np.dtype, row: tuple[int, ...] = ()):
        self._dtype, self._row, self._length = np.dtype(dtype), row, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Write ``rows`` at the end of the array."""
        if rows.shape[1:] != self._row:
            raise ValueError(f"rows have shape {rows.shape[1:]}; allowed: {self._row}")
        self._file.write(rows.astype(self._dtype).tobytes())
        self._length += len(rows)

    def _write_header(self) -> None:
        """Write the current shape. NumPy pads the header, so a longer first axis fits into the same bytes."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length, *self._row)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def __exit__(self, *_: object) -> None:
        self._write_header()
        self._file.close()
