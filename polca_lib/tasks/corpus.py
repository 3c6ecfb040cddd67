"""Articles of Wikipedia, read one by one from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import lzma
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

HUB = "hf://datasets/legacy-datasets/wikipedia@97a0b052c326b45fb68593a14972d9eed884cd17"
"""Dump of March 2022 on the Hugging Face hub, at the revision that stores it as Parquet."""
HUB_CONFIGS = tuple(f"20220301.{language}" for language in ("en", "de", "fr", "frr", "it", "simple"))
VALIDATION_ONE_IN = 50
REPORTED = 5
"""Damaged records that a warning names."""


class Article(NamedTuple):
    """One article; ``url`` is empty if the source gives none."""

    title: str
    text: str
    url: str


class DamagedCorpus(ValueError):
    """A record of a corpus can't be read."""


def is_validation(article: Article) -> bool:
    """Whether an article is kept for validation: one in 50, by a hash of its title.

    So the choice depends neither on the order of the articles nor on how many are read, and two articles of one
    title are never on different sides.
    """
    digest = hashlib.sha256(article.title.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def read_articles(
    source: str | Path, *, skip_damaged: bool = False, damaged: list[str] | None = None
) -> Iterator[Article]:
    """Articles in the order of the source, one in memory at a time.

    Args:
        source: a file ``.jsonl``, ``.jsonl.xz`` or ``.parquet`` whose records have ``title`` and ``text`` (and
            ``url``, if they like; the rest is ignored); a folder of such files, taken by name; or ``"hub"``, or
            ``"hub:20220301.simple"``, for the dump of March 2022, of which only what is read is downloaded. A
            file or folder of that name is ``"./hub"``.
        skip_damaged: leave out what can't be read, and warn once, at the end.
        damaged: a list to which what was left out is added, in words.

    Raises:
        ValueError: a source that isn't there, or is of no kind that can be read.
        DamagedCorpus: a record that can't be read; names the file and the line or row, counted from 1.
        ConnectionError: the hub can't be reached.
    """
    if config := hub_config(source):
        parts = [(f"{HUB}/data/{config}", _read_hub(config))]
    else:
        parts = [(str(path), _reader(path)(path)) for path in _files(Path(source))]
    return _sound(parts, skip_damaged, [] if damaged is None else damaged)


def hub_config(source: str | Path) -> str | None:
    """Configuration of the hub that ``source`` means, or nothing if it is a path.

    Raises:
        ValueError: the hub has no such configuration.
    """
    if not isinstance(source, str) or source.partition(":")[0] != "hub":
        return None
    config = source.partition(":")[2] or HUB_CONFIGS[0]
    if config not in HUB_CONFIGS:
        raise ValueError(f"source = {source!r}: the hub has no {config!r}; allowed: {', '.join(HUB_CONFIGS)}")
    return config


# A record as its place in the file and either the article or, in words, what is wrong with it.
Records = Iterator[tuple[str, Article | str]]


def _sound(parts: list[tuple[str, Records]], skip_damaged: bool, damaged: list[str]) -> Iterator[Article]:
    try:
        for name, records in parts:
            for place, found in records:
                if isinstance(found, Article):
                    yield found
                elif skip_damaged:
                    damaged.append(f"{name}, {place}: {found}")
                else:
                    raise DamagedCorpus(
                        f"{name}, {place}: {found}; mend it, or leave out all that is damaged with skip_damaged=True "
                        "(in a run: corpus.skip_damaged)"
                    )
    finally:
        # Also when the caller has enough and closes the generator.
        if damaged:
            more = f"; and {len(damaged) - REPORTED} more" if len(damaged) > REPORTED else ""
            text = f"damaged records left out: {len(damaged)} ({'; '.join(damaged[:REPORTED])}{more})"
            warnings.warn(text, stacklevel=2)


def _files(source: Path) -> list[Path]:
    kinds = ", ".join(READERS)
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if _reader(path) and not path.name.startswith("."))
        if not files:
            raise ValueError(f"source = '{source}' is a folder with no file that can be read; allowed: {kinds}")
        return files
    if not source.exists():
        raise ValueError(
            f"source = '{source}' is not there; allowed: a file ({kinds}), a folder of such files, or 'hub'"
        )
    if not _reader(source):
        raise ValueError(f"source = '{source}' is a file of no kind that can be read; allowed: {kinds}")
    return [source]


def _reader(path: Path) -> Callable[[Path], Records] | None:
    return next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)


def _read_lines(path: Path) -> Records:
    number = 0
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _article(lambda line=line: json.loads(line.decode("utf-8-sig")))
        except (EOFError, lzma.LZMAError) as error:
            yield f"line {number + 1} and all after it", f"the compressed data are cut off or damaged ({error})"


def _read_parquet(path: Path) -> Records:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in ("title", "text") if name not in names]:
                yield "all rows", f"there is no column {' and no column '.join(missing)}, but {', '.join(names)}"
                return
            for batch in file.iter_batches(64, columns=[name for name in Article._fields if name in names]):
                for row in range(len(batch)):
                    number += 1
                    yield f"row {number}", _article(lambda row=row, batch=batch: batch.slice(row, 1).to_pylist()[0])
    except (pa.ArrowException, OSError) as error:
        yield f"row {number + 1} and all after it", f"the file is no Parquet, cut off or damaged ({error})"


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_lines,
    ".jsonl.xz": _read_lines,
    ".parquet": _read_parquet,
}


def _read_hub(config: str) -> Records:
    from datasets import load_dataset  # takes seconds

    # By the names of its files: the repository has an old script too, and datasets from 4 on refuses one that has.
    files = f"{HUB}/data/{config}/train-*.parquet"
    try:
        rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _article(lambda row=row: row)
    except Exception as error:  # each layer below has its own
        raise ConnectionError(
            f"{files} can't be read from the hub ({type(error).__name__}: {error}); try again, "
            "or get the files by other means and give the path of a file or folder as source (in a run: corpus.source)"
        ) from error


def _article(load: Callable[[], Any]) -> Article | str:
    try:
        record = load()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    if not isinstance(record, dict):
        return f"it is no object with title and text, but of type {type(record).__name__}"
    for field in ("title", "text"):
        if field not in record:
            return f"it has no {field}, but {', '.join(record) or 'nothing'}"
        if not isinstance(value := record[field], str):
            return f"its {field} is no text, but of type {type(value).__name__}"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"its {field} has half a surrogate pair, which is no character ({error.reason})"
    url = record.get("url")
    return Article(record["title"], record["text"], url if isinstance(url, str) else "")
