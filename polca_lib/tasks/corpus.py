"""Articles of Wikipedia, read one by one from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from polca_lib.storage.documents import KINDS, checked, ends_with, read_records

HUB = "hf://datasets/legacy-datasets/wikipedia@97a0b052c326b45fb68593a14972d9eed884cd17"
"""Dump of March 2022 on the Hugging Face hub, at the revision that stores it as Parquet."""
HUB_CONFIGS = tuple(f"20220301.{language}" for language in ("en", "de", "fr", "frr", "it", "simple"))
_FIELDS = ("title", "text")
VALIDATION_ONE_IN = 50
REPORTED = 5  # damaged records that a warning names


class Article(NamedTuple):
    """One article. ``url`` is empty if the source has none."""

    title: str
    text: str
    url: str


class DamagedCorpus(ValueError):
    """A record of a corpus can't be read."""


# The position of each record in its file, and the article or a description of the damage.
Records = Iterator[tuple[str, Article | str]]


def is_validation(article: Article) -> bool:
    """Whether the article is for validation: one in 50, by the SHA-256 of its title alone."""
    digest = hashlib.sha256(article.title.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def read_articles(
    source: str | Path, *, skip_damaged: bool = False, damaged: list[str] | None = None
) -> Iterator[Article]:
    """Articles in the order of the source. Only one of them is in memory at a time.

    Args:
        source: a file (see :data:`polca_lib.storage.documents.KINDS`) with fields ``title``, ``text`` and optionally
            ``url``; a folder of such files, read by name; or ``"hub"`` or ``"hub:20220301.simple"`` for a dump on the
            hub. The dump is downloaded as it is read. A local folder called "hub" is ``"./hub"``.
        skip_damaged: leave out damaged records, with one warning at the end.
        damaged: list to which a description of each damaged record is appended.

    Raises:
        ValueError: the source does not exist or can't be read.
        DamagedCorpus: a record is damaged; the message names the file and the line or row, counted from 1.
        ConnectionError: the hub can't be reached.
    """
    if config := hub_config(source):
        parts = [(f"{HUB}/data/{config}", _read_hub(config))]
    else:
        files = _files(Path(source))
        parts = [(str(file), _read_file(file)) for file in files]
    return _undamaged(parts, skip_damaged, [] if damaged is None else damaged)


def hub_config(source: str | Path) -> str | None:
    """Configuration of the hub that ``source`` names, or None if it is a path.

    Raises:
        ValueError: the hub has no such configuration.
    """
    if not isinstance(source, str) or source.partition(":")[0] != "hub":
        return None
    config = source.partition(":")[2] or HUB_CONFIGS[0]
    if config not in HUB_CONFIGS:
        raise ValueError(f"source = {source!r}: the hub has no {config!r}; allowed: {', '.join(HUB_CONFIGS)}")
    return config


def _undamaged(parts: list[tuple[str, Records]], skip_damaged: bool, damaged: list[str]) -> Iterator[Article]:
    """Articles of all files. Damaged records raise an error, or are collected and reported at the end."""
    try:
        for name, records in parts:
            for position, record in records:
                if isinstance(record, Article):
                    yield record
                elif skip_damaged:
                    damaged.append(f"{name}, {position}: {record}")
                else:
                    raise DamagedCorpus(
                        f"{name}, {position}: {record}; repair it, or leave out all damaged records with "
                        "skip_damaged=True (in a run: corpus.skip_damaged)"
                    )
    finally:
        # This also runs when the caller closes the generator early.
        if damaged:
            more = f"; and {len(damaged) - REPORTED} more" if len(damaged) > REPORTED else ""
            text = f"damaged records left out: {len(damaged)} ({'; '.join(damaged[:REPORTED])}{more})"
            warnings.warn(text, stacklevel=2)


def _files(source: Path) -> list[Path]:
    """The file, or all readable files of the folder by name."""
    # Some systems leave files "._name" in a folder.
    files = sorted(path for path in source.iterdir() if path.name[0] != ".") if source.is_dir() else [source]
    readable = [path for path in files if ends_with(path, KINDS)]
    if not (source.exists() and readable):
        problem = "a folder with no file" if source.is_dir() else "a file of no kind"
        raise ValueError(
            f"source = '{source}' is {problem + ' that can be read' if source.exists() else 'not there'}; "
            f"allowed: {', '.join(KINDS)}, a folder of such files, or 'hub'"
        )
    return readable


def _read_file(path: Path) -> Records:
    for position, record in read_records(path, _FIELDS, ["url"]):
        yield position, _article(record)


def _read_hub(config: str) -> Records:
    from datasets import load_dataset  # takes seconds

    # The file names are given, because datasets >= 4 refuses the repository's old loading script.
    files = f"{HUB}/data/{config}/train-*.parquet"
    try:
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _article(checked(lambda row=row: row, _FIELDS))
    except Exception as error:  # datasets, fsspec and the network raise errors of many types
        raise ConnectionError(
            f"{files} can't be read from the hub ({type(error).__name__}: {error}); try again, "
            "or download the files and give the path of a file or folder as source (in a run: corpus.source)"
        ) from error


def _article(record: Mapping[str, Any] | str) -> Article | str:
    """The article of a record, or the description of its damage."""
    if isinstance(record, str):
        return record
    url = record.get("url")
    return Article(record["title"], record["text"], url if isinstance(url, str) else "")
