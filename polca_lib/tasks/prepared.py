"""A corpus on disk: a tokenizer, windows of tokens, and the position of each validation token in its article."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tqdm import tqdm

from polca_lib.storage.artefacts import Artefact, DamagedFile, explained, write_atomically
from polca_lib.storage.hashing import hash_file, hash_json
from polca_lib.storage.progress import progress
from polca_lib.tasks import tokenization
from polca_lib.tasks.corpus import VALIDATION_ONE_IN, Article, hub_config, is_validation, read_articles
from polca_lib.tasks.tokenization import GrowingArray, encode, encode_many, pack, train_tokenizer

ARRAYS = ("train", "validation", "article", "starts", "ends")
FILES = ("tokenizer.json", "articles.jsonl", *(f"{name}.npy" for name in ARRAYS))
BATCH_CHARACTERS = 2_000_000  # encoded at once, with about 100 bytes of memory per character


class Counts(NamedTuple):
    """Sizes of a corpus. PAD does not count as a token."""

    articles: int
    tokens: int
    validation_articles: int
    validation_tokens: int
    damaged: int = 0


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus written by :func:`prepare_corpus`. The arrays are memory-mapped files."""

    folder: Path
    source: str
    """Name of the file or folder that the articles come from, or ``hub:`` and its configuration."""
    checksum: str
    """SHA-256 of tokenizer, windows, articles and counts. It does not depend on the folder."""
    counts: Counts
    tokenizer: Tokenizer
    train: Int[np.ndarray, "window width"]
    validation: Int[np.ndarray, "validation_window width"]
    article: Int[np.ndarray, " validation_window"]
    """Index in :attr:`articles` of the article that a validation window comes from."""
    starts: Int[np.ndarray, "validation_window width"]
    ends: Int[np.ndarray, "validation_window width"]
    """Characters of each token, ``text[start:end]`` in its article. PAD is an empty span at the end of the text."""

    @property
    def pad(self) -> int:
        """Id of PAD, the last id."""
        return self.tokenizer.get_vocab_size() - 1

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
    """Prepare a corpus in ``folder``, or load it from there without reading the source.

    The folder appears only when the corpus is complete; an interrupted preparation starts again. If several processes
    ask for the same corpus, one of them prepares it and the others wait.

    Args:
        folder: folder of this corpus alone.
        source: see :func:`polca_lib.tasks.corpus.read_articles`.
        vocabulary: number of tokens without PAD.
        width: tokens per window.
        articles: number of training articles; all if None. Validation articles met before the last one are added.
        tokenizer_articles: number of training articles that train the tokenizer. They are held in memory.
        skip_damaged: leave out damaged records, with a warning.

    Raises:
        ArtefactMismatch: the folder was prepared with other settings.
        DamagedFile: a file in the folder is missing or changed.
        ValueError: a setting is out of range, or the source has too little text for the settings.
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
    with ExitStack() as stack:
        # Wait for other processes. The system releases the lock when a process ends, even if it is killed.
        lock = os.open(folder.parent, os.O_RDONLY)
        stack.callback(os.close, lock)
        with explained(folder.parent):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # Work in a partial folder, which a killed process may have left. Only a complete one gets the final name.
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            with Artefact.open(partial, "corpus", settings, {}).at_work():
                _fill(partial, source, settings)
            partial.replace(folder)
    if not (folder / "manifest.json").exists():
        raise DamagedFile(f"{folder} is no prepared corpus: it has no manifest.json; use another folder, or delete it")
    Artefact.open(folder, "corpus", settings, {})
    return _load(folder, f"hub:{config}" if config else Path(source).name)


def _fill(folder: Path, source: str | Path, settings: Mapping[str, Any]) -> None:
    """Read the source once, and write all files of the corpus."""
    articles, width = settings["articles"], settings["width"]
    damaged: list[str] = []
    with closing(read_articles(source, skip_damaged=settings["skip_damaged"], damaged=damaged)) as source_reader:
        if len(first := list(islice(source_reader, 2))) < 2:
            raise ValueError(f"source = '{source}' has {len(first)} articles; allowed: 2 or more; give a larger source")
        reader = chain(first, source_reader)
        # The first articles train the tokenizer. They stay in memory, because they must be encoded too.
        stream = _take(reader, articles or math.inf)
        head = _take(stream, settings["tokenizer_articles"])
        head = list(progress(head, desc="articles for the tokenizer", unit="article"))
        texts = (article.text for article in head if not is_validation(article))
        tokenizer = train_tokenizer(texts, settings["vocabulary"])
        tokenizer.save(str(folder / "tokenizer.json"))
        with progress(desc="corpus", unit="article", total=articles) as bar:
            counts = _write_windows(folder, chain(head, stream), tokenizer, width, bar)
    counts = counts._replace(damaged=len(damaged))
    if articles is not None and counts.articles < articles:
        raise ValueError(
            f"articles = {articles} is more than source = '{source}' gives: {counts.articles} for training; "
            f"allowed: at most {counts.articles}, or None for all"
        )
    if not counts.validation_tokens:
        raise ValueError(
            f"none of the {counts.articles} articles read from source = '{source}' is for validation (about one in "
            f"{VALIDATION_ONE_IN} is); raise articles, or give a larger source"
        )
    contents = {"counts": counts._asdict(), "files": {name: hash_file(folder / name) for name in FILES}}
    record = {**contents, "checksum": hash_json(contents)}
    write_atomically(folder / "contents.json", json.dumps(record, indent=1).encode())


def _write_windows(folder: Path, articles: Iterable[Article], tokenizer: Tokenizer, width: int, bar: tqdm) -> Counts:
    """Encode the articles batch by batch, and append their windows to the arrays."""
    pad = tokenizer.get_vocab_size() - 1
    ids, characters = (tokenization.id_type(pad), (width,)), ("<i4", (width,))
    kinds = dict(zip(ARRAYS, (ids, ids, ("<i8", ()), characters, characters), strict=True))
    counts = dict.fromkeys(Counts._fields, 0)
    with ExitStack() as stack:
        arrays = {name: stack.enter_context(GrowingArray(folder / f"{name}.npy", *kinds[name])) for name in ARRAYS}
        texts = stack.enter_context((folder / "articles.jsonl").open("w"))
        for batch in _batches(articles):
            training = [article.text for article in batch if not is_validation(article)]
            documents = encode_many(tokenizer, training)
            arrays["train"].append(pack(documents, width, pad).windows)
            counts["articles"] += len(training)
            counts["tokens"] += sum(map(len, documents))
            bar.update(len(training))
            for article in filter(is_validation, batch):
                encoded, end = encode(tokenizer, article.text), len(article.text)
                windows = pack([encoded.ids], width, pad).windows
                arrays["validation"].append(windows)
                arrays["article"].append(np.full(len(windows), counts["validation_articles"]))
                arrays["starts"].append(pack([encoded.starts], width, end).windows)
                arrays["ends"].append(pack([encoded.ends], width, end).windows)
                texts.write(json.dumps(article._asdict()) + "\n")
                counts["validation_articles"] += 1
                counts["validation_tokens"] += len(encoded.ids)
    return Counts(**counts)


def _take(articles: Iterable[Article], n: float) -> Iterator[Article]:
    """Articles up to and including training article number ``n``."""
    for article in articles:
        yield article
        n -= not is_validation(article)
        if n == 0:
            return


def _batches(articles: Iterable[Article]) -> Iterator[list[Article]]:
    """Consecutive articles in batches of about ``BATCH_CHARACTERS``."""
    characters = 0

    def number(article: Article) -> int:
        nonlocal characters
        characters += len(article.text)
        return characters // BATCH_CHARACTERS

    return (list(batch) for _, batch in groupby(articles, number))


def _load(folder: Path, source: str) -> PreparedCorpus:
    """Check every file of the corpus against its checksum, and open it."""
    advice = f"delete {folder} to prepare the corpus again"
    try:
        contents = json.loads((folder / "contents.json").read_text())
        checksum = contents.pop("checksum")
        counts, files = Counts(**contents["counts"]), contents["files"]
        if hash_json(contents) != checksum:
            raise ValueError("its checksum does not match")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFile(f"{folder / 'contents.json'} is damaged ({error}); {advice}") from None
    for name in FILES:
        if (digest := hash_file(folder / name)) != files[name]:
            problem = "missing" if digest == "missing" else "damaged (its checksum does not match)"
            raise DamagedFile(f"{folder / name} is {problem}; {advice}")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    tokenizer = tokenization.load_tokenizer(folder / "tokenizer.json")
    return PreparedCorpus(folder, source, checksum, counts, tokenizer, **arrays)
