"""What results are keyed and checked by: SHA-256 of settings, files, tensors and tables, as hexadecimal text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def hash_json(value: Any) -> str:
    """Of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Of the bytes of a file, local or in an object store; ``"missing"`` if there is none."""
    if not path.exists():
        return "missing"
    if not isinstance(path, Path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes of tensors, in alphabetical order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def hash_vector(vector: Tensor) -> str:
    """Of the bytes of one tensor."""
    return hashlib.sha256(_bytes(vector)).hexdigest()


def hash_batch(batch: Any) -> str:
    """Of all tensors of a batch, their dtypes and shapes, and how they are nested."""
    leaves, nest = pytree.tree_flatten(batch)
    digest = hashlib.sha256(str(nest).encode())
    for leaf in leaves:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        digest.update(_bytes(leaf))
    return digest.hexdigest()


def hash_table(table: pd.DataFrame) -> str:
    """Of a table as CSV, without its index."""
    return hashlib.sha256(table.to_csv(index=False).encode("utf-8", "surrogatepass")).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
