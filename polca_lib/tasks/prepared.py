"""A corpus on disk: tokenizer, windows of tokens for training and validation, and where each of these stands."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tqdm import tqdm

from polca_lib.storage.artefacts import Artefact, DamagedFile, write_atomically
from polca_lib.storage.hashing import hash_file, hash_json
from polca_lib.storage.progress import progress
from polca_lib.tasks.corpus import VALIDATION_ONE_IN, Article, hub_config, is_validation, read_articles
from polca_lib.tasks.tokenization import (
    GrowingArray,
    encode,
    encode_many,
    id_type,
    load_tokenizer,
    pack,
    train_tokenizer,
)

ARRAYS = ("train", "validation", "article", "starts", "ends")
FILES = ("tokenizer.json", "articles.jsonl", *(f"{name}.npy" for name in ARRAYS))
BATCH_CHARACTERS = 2_000_000
"""Text that is encoded at once; it takes about 100 times as many bytes."""


class Counts(NamedTuple):
    """Sizes of a corpus. Tokens are those of articles, without PAD."""

    articles: int
    tokens: int
    validation_articles: int
    validation_tokens: int
    damaged: int = 0


@dataclass(frozen=True)
class PreparedCorpus:
    """What :func:`prepare_corpus` makes; arrays stay on disk until they are read."""

    folder: Path
    source: str
    """Where the articles come from, as a reader would say it, a file name, or the hub's configuration."""
    checksum: str
    """SHA-256 over tokenizer, windows, articles and counts. It says what a corpus is, wherever it lies."""
    counts: Counts
    tokenizer: Tokenizer
    train: Int[np.ndarray, "window width"]
    validation: Int[np.ndarray, "validation_window width"]
    article: Int[np.ndarray, " validation_window"]
    """Index in :attr:`articles` of the one a validation window is cut from."""
    starts: Int[np.ndarray, "validation_window width"]
    """Where in the text of its article a token starts, in characters; PAD stands at the end, and is empty."""
    ends: Int[np.ndarray, "validation_window width"]
    """Where it ends; see :class:`polca_lib.tasks.tokenization.Encoded`."""

    @property
    def pad(self) -> int:
        """Id of PAD, the last one."""
        return self.tokenizer.get_vocab_size() - 1

    def spans(self, window: int) -> tuple[Int[np.ndarray, " width"], Int[np.ndarray, " width"]]:
        """Where the tokens of a validation window start and end in the text of its article, in characters."""
        return self.starts[window], self.ends[window]

    @cached_property
    def articles(self) -> list[Article]:
        """Validation articles, in the order of the source."""
        return list(read_articles(self.folder / "articles.jsonl"))


def prepare_corpus(
    folder: Path,
    source: str | Path,
    *,
    vocabulary: int,
    width: int,
    articles: int | None,
    tokenizer_articles: int,
    skip_damaged: bool = False,
) -> PreparedCorpus:
    """Prepare a corpus in ``folder``, or load the one that is there without a look at the source.

    The folder appears at once, when all is done: work that was stopped starts anew. Of several processes that want
    the same corpus one prepares it, and the others wait.

    Args:
        folder: of the corpus.
        source: see :func:`polca_lib.tasks.corpus.read_articles`; it is read once.
        vocabulary: number of tokens without PAD.
        width: of a window, in tokens.
        articles: training articles to take; all if not given. Validation articles are those met on the way.
        tokenizer_articles: of the training articles the tokenizer is trained on the first so many; they are held in
            memory meanwhile.
        skip_damaged: leave out what can't be read, with a warning.

    Raises:
        ArtefactMismatch: the folder was prepared with other settings; names the first one.
        DamagedFile: a file in the folder is lost or changed; names it.
        ValueError: a setting out of range, or a source that gives too little for the settings; see also
            :func:`~polca_lib.tasks.corpus.read_articles` and :func:`~polca_lib.tasks.tokenization.train_tokenizer`.
    """
    for name, value in (("width", width), ("articles", articles), ("tokenizer_articles", tokenizer_articles)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; allowed: at least 1")
    config = hub_config(source)
    settings = {
        "source": f"hub:{config}" if config else str(Path(source).resolve()),
        "vocabulary": vocabulary,
        "width": width,
        "articles": articles,
        "tokenizer_articles": tokenizer_articles,
        "skip_damaged": skip_damaged,
    }
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                artefact = Artefact.open(partial, "corpus", settings, {})
                with artefact.at_work():
                    _fill(partial, source, vocabulary, width, articles, tokenizer_articles, skip_damaged)
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    if not (folder / "manifest.json").exists():
        raise DamagedFile(f"{folder} is no prepared corpus: it has no manifest.json; use another folder, or delete it")
    Artefact.open(folder, "corpus", settings, {})
    return _load(folder, f"hub:{config}" if config else Path(source).name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep out other processes; the lock goes with the process that holds it, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fill(
    folder: Path,
    source: str | Path,
    vocabulary: int,
    width: int,
    articles: int | None,
    tokenizer_articles: int,
    skip_damaged: bool,
) -> None:
    damaged: list[str] = []
    with closing(read_articles(source, skip_damaged=skip_damaged, damaged=damaged)) as reader:
        stream = _take(reader, articles)
        head = list(progress(_take(stream, tokenizer_articles), desc="articles for the tokenizer", unit="article"))
        tokenizer = train_tokenizer((article.text for article in head if not is_validation(article)), vocabulary)
        tokenizer.save(str(folder / "tokenizer.json"))
        with progress(desc="corpus", unit="article", total=articles) as bar:
            counts = _write_windows(folder, chain(head, stream), tokenizer, width, bar)
    counts = counts._replace(damaged=len(damaged))
    if articles is not None and counts.articles < articles:
        raise ValueError(
            f"articles = {articles} is more than source = '{source}' gives: {counts.articles} for training; "
            "allowed: at most that, or none for all"
        )
    if not counts.validation_tokens:
        raise ValueError(
            f"none of the {counts.articles} articles read from source = '{source}' is for validation, where about one "
            f"in {VALIDATION_ONE_IN} is; raise articles, or give a larger source"
        )
    files = {name: hash_file(folder / name) for name in FILES}
    contents = {"counts": counts._asdict(), "files": files}
    record = {**contents, "checksum": hash_json(contents)}
    write_atomically(folder / "contents.json", json.dumps(record, indent=1).encode())


def _write_windows(folder: Path, articles: Iterable[Article], tokenizer: Tokenizer, width: int, bar: tqdm) -> Counts:
    pad = tokenizer.get_vocab_size() - 1
    n_articles = n_tokens = n_validation = n_validation_tokens = 0
    with ExitStack() as stack:
        ids, row = id_type(pad), (width,)
        kinds = {"train": (ids, row), "validation": (ids, row), "article": ("<i8", ()), "starts": ("<i4", row)}
        kinds["ends"] = kinds["starts"]
        arrays = {name: stack.enter_context(GrowingArray(folder / f"{name}.npy", *kinds[name])) for name in ARRAYS}
        texts = stack.enter_context((folder / "articles.jsonl").open("w"))
        for batch in _batches(articles):
            training = [article.text for article in batch if not is_validation(article)]
            documents = encode_many(tokenizer, training)
            arrays["train"].append(pack(documents, width, pad).windows)
            n_articles += len(training)
            n_tokens += sum(map(len, documents))
            bar.update(len(training))
            for article in filter(is_validation, batch):
                encoded, end = encode(tokenizer, article.text), len(article.text)
                windows = pack([encoded.ids], width, pad).windows
                arrays["validation"].append(windows)
                arrays["article"].append(np.full(len(windows), n_validation))
                arrays["starts"].append(pack([encoded.starts], width, end).windows)
                arrays["ends"].append(pack([encoded.ends], width, end).windows)
                texts.write(json.dumps(article._asdict()) + "\n")
                n_validation += 1
                n_validation_tokens += len(encoded.ids)
    return Counts(n_articles, n_tokens, n_validation, n_validation_tokens)


def _take(articles: Iterable[Article], n: int | None) -> Iterator[Article]:
    """Articles up to the ``n``-th of training, and none after it."""
    for article in articles:
        yield article
        if n is not None and not is_validation(article):
            n -= 1
            if n == 0:
                return


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    batch: list[Article] = []
    size = 0
    for article in articles:
        batch.append(article)
        size += len(article.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load(folder: Path, source: str) -> PreparedCorpus:
    advice = f"delete {folder} to prepare the corpus anew"
    try:
        contents = json.loads((folder / "contents.json").read_text())
        checksum = contents.pop("checksum")
        counts, files = Counts(**contents["counts"]), contents["files"]
        if hash_json(contents) != checksum:
            raise ValueError("its checksum is another")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFile(f"{folder / 'contents.json'} is damaged ({error}); {advice}") from None
    for name in FILES:
        path = folder / name
        if not path.exists():
            raise DamagedFile(f"{path} is missing; {advice}")
        if hash_file(path) != files[name]:
            raise DamagedFile(f"{path} is damaged: its checksum is another than when it was written; {advice}")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return PreparedCorpus(folder, source, checksum, counts, load_tokenizer(folder / "tokenizer.json"), **arrays)
