"""Documents in files: JSON lines, JSON, Parquet or plain text."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

_NO_TEXT = (".csv", ".tsv", ".zst", ".zip", ".bz2", ".tar", ".arrow", ".feather", ".npy", ".bin", ".pt", ".xlsx")
LINES = (".jsonl", ".ndjson", ".json")
KINDS = (*LINES, *(f"{kind}{end}" for kind in LINES for end in (".gz", ".xz")), ".parquet")
"""Endings of files with fields; the case does not matter."""

# The position of each record in its file, and the record or a description of the damage.
Records = Iterator[tuple[str, dict[str, Any] | str]]


def ends_with(path: Path, endings: Sequence[str]) -> bool:
    """Whether a file name has one of ``endings``, in capitals or not."""
    return path.name.lower().endswith(tuple(endings))


def read_records(path: Path, fields: Sequence[str], optional: Sequence[str] = ()) -> Records:
    """Records of a file, one by one, as dictionaries with text under each of ``fields``.

    Lines of JSON, a list of objects in ``.json``, rows of Parquet, and lines of plain text (as field ``text``) are
    records; a file with any other ending is plain text. A byte order mark and blank lines of JSON files are skipped. A
    record that can't be read, or lacks a field, is a description of the damage instead. Positions count from 1.

    Args:
        optional: fields that Parquet files are also read for.

    Raises:
        ValueError: the ending of the file is unknown.
        ImportError: Parquet needs pyarrow.
    """
    if ends_with(path, _NO_TEXT):
        raise ValueError(f"{path} can't be read; allowed: {', '.join(KINDS)}, or plain text such as .txt")
    if ends_with(path, [".parquet"]):
        yield from _rows(path, fields, optional)
    elif ends_with(path, KINDS):
        yield from _json_lines(path, fields)
    else:
        yield from _text_lines(path)


def checked(load: Callable[[], Any], fields: Sequence[str]) -> dict[str, Any] | str:
    """Load one record and check its fields; return the record or a description of the damage."""
    try:
        record = load()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    if not isinstance(record, dict):
        return f"it is not an object with {' and '.join(fields)}, but of type {type(record).__name__}"
    for field in fields:
        if field not in record:
            return f"it has no {field}, but {', '.join(record) or 'nothing'}"
        if not isinstance(value := record[field], str):
            return f"its {field} is not text, but of type {type(value).__name__}"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"its {field} has half a surrogate pair, which is not a character ({error.reason})"
    return record


def _open(path: Path) -> IO[bytes]:
    """Open a file, compressed or not."""
    if ends_with(path, [".xz"]):
        return lzma.open(path)
    return gzip.open(path) if ends_with(path, [".gz"]) else path.open("rb")


def _text_lines(path: Path) -> Records:
    """Lines of plain text, with their line ends."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield f"line {number}", checked(lambda line=line, encoding=encoding: {"text": line.decode(encoding)}, ())


def _json_lines(path: Path, fields: Sequence[str]) -> Records:
    """Objects of JSON, one a line or in one list."""
    number, may_be_a_list = 0, ends_with(path, (".json", ".json.gz", ".json.xz"))
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if may_be_a_list and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    yield from _json_list(line + file.read(), fields)
                    return
                may_be_a_list = may_be_a_list and not line.strip()  # only the first line that is not blank tells
                if line.strip():
                    yield f"line {number}", checked(lambda line=line: json.loads(line.decode("utf-8-sig")), fields)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            yield f"line {number + 1} and all after it", f"the compressed data are cut off or damaged ({error})"


def _json_list(content: bytes, fields: Sequence[str]) -> Records:
    """Objects of one list."""
    try:
        items = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield "all of it", f"it is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        return
    except (ValueError, RecursionError) as error:
        yield "all of it", f"it is not JSON ({error})"
        return
    for number, item in enumerate(items, 1):
        yield f"item {number}", checked(lambda item=item: item, fields)


def _rows(path: Path, fields: Sequence[str], optional: Sequence[str]) -> Records:
    """Rows of Parquet."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(f"{path} is Parquet, which needs pyarrow; install polca-lib[paper]") from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in fields if name not in names]:
                yield "all rows", f"there is no column {' and no column '.join(missing)}, but {', '.join(names)}"
                return
            columns = [name for name in (*fields, *optional) if name in names]
            batches = file.iter_batches(64, columns=columns)
            rows = (batch.slice(i, 1) for batch in batches for i in range(len(batch)))
            for number, row in enumerate(rows, 1):
                yield f"row {number}", checked(lambda row=row: row.to_pylist()[0], fields)
    except (pa.ArrowException, OSError) as error:
        yield f"row {number + 1} and all after it", f"the file is not Parquet, cut off or damaged ({error})"
