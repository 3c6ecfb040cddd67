"""Text as tokens: a byte-level BPE tokenizer, where each token stands in the text, and windows of fixed width."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD = "<PAD>"
BYTES = 256


class Encoded(NamedTuple):
    """Token ids of a text and the characters each token is made of: ``text[start:end]``.

    A character of several bytes may be split over several tokens: each of them has the whole character.
    """

    ids: Int[np.ndarray, " token"]
    starts: Int[np.ndarray, " token"]
    ends: Int[np.ndarray, " token"]


class Packed(NamedTuple):
    """Documents cut into windows, in order."""

    windows: Int[np.ndarray, "window width"]
    document: Int[np.ndarray, " window"]
    """Index of the document a window is cut from."""
    offset: Int[np.ndarray, " window"]
    """Where in its document the first token of a window stands, in tokens."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with ids 0 ... ``vocabulary`` - 1, and PAD with id ``vocabulary``.

    Any text can be written in it, and decodes to itself: no space is put in front, no newline or accent is changed.
    The same texts give the same tokenizer.

    Args:
        texts: what it is trained on.
        vocabulary: number of tokens without PAD; the 256 bytes are among them.

    Raises:
        ValueError: a vocabulary under 256, or texts too small to give so many tokens.
    """
    if vocabulary < BYTES:
        raise ValueError(f"vocabulary = {vocabulary} has no room for the {BYTES} bytes; allowed: at least {BYTES}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocabulary:
        raise ValueError(
            f"vocabulary = {vocabulary} is more than the text it is trained on gives: {found} tokens; "
            f"lower it, or train the tokenizer on more articles"
        )
    tokenizer.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    return _literal(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of :func:`train_tokenizer`, saved by its method ``save``."""
    return _literal(Tokenizer.from_file(str(path)))


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    # An article that happens to contain "<PAD>" means these five characters. The setting isn't saved with a tokenizer.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """Tokens of ``text`` and the characters they are made of; a leading space belongs to its token.

    The spans cover the text from start to end, without a gap. ``tokenizer`` is one of :func:`train_tokenizer`.
    """
    encoding = tokenizer.encode(text)
    # Each letter of a byte-level token stands for one byte, and a character begins at each byte that is no
    # continuation (10xxxxxx) of another.
    ends = np.cumsum([len(token) for token in encoding.tokens], dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
    begins = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    character = np.cumsum(begins) - 1
    return Encoded(np.array(encoding.ids, np.int64), character[starts], character[ends - 1] + 1)


def encode_many(tokenizer: Tokenizer, texts: list[str]) -> list[Int[np.ndarray, " token"]]:
    """Token ids of each text; in parallel, and faster than :func:`encode`, for it does not say where they stand."""
    return [np.array(encoding.ids, np.int64) for encoding in tokenizer.encode_batch_fast(texts)]


def pack(documents: Iterable[Int[np.ndarray, " token"]], width: int, pad: int) -> Packed:
    """Cut each document into consecutive windows of ``width`` tokens, the last one filled with ``pad``.

    A window never spans two documents, and an empty document gives none.

    Raises:
        ValueError: a width under 1.
    """
    if width < 1:
        raise ValueError(f"width = {width} is no width of a window; allowed: at least 1")
    documents = list(documents)
    counts = np.array([-(-len(document) // width) for document in documents], np.int64)
    firsts = np.cumsum(counts) - counts
    index = np.repeat(np.arange(len(documents)), counts)
    windows = np.full((counts.sum(), width), pad, np.int64)
    for document, first in zip(documents, firsts, strict=True):
        windows.reshape(-1)[first * width : first * width + len(document)] = document
    return Packed(windows, index, (np.arange(len(index)) - firsts[index]) * width)


def id_type(vocabulary: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds the ids 0 ... ``vocabulary``; little-endian on every machine."""
    return np.dtype("<u2" if vocabulary < 2**16 else "<u4")


class GrowingArray:
    """An ``.npy`` file to which rows are appended, so that no more than these need be in memory.

    Args:
        path: of the file; what is there is overwritten.
        dtype: of the numbers.
        row: shape of a row.
    """

    def __init__(self, path: Path, dtype: str | np.dtype, row: tuple[int, ...] = ()):
        self._dtype, self._row, self._length = np.dtype(dtype), row, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Write ``rows`` after those that are there."""
        if rows.shape[1:] != self._row:
            raise ValueError(f"rows have shape {rows.shape[1:]}; allowed: {self._row}")
        self._file.write(rows.astype(self._dtype).tobytes())
        self._length += len(rows)

    def _write_header(self) -> None:
        # NumPy leaves room in a header for the first axis to grow, so that it can be written again in its place.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length, *self._row)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write_header()
        self._file.close()
