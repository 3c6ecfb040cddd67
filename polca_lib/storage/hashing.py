"""SHA-256 of settings, files, tensors and tables, as hexadecimal text; they identify and verify results."""

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
    """Hash ``value`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Hash the bytes of a local or remote file; ``"missing"`` if it does not exist."""
    if not path.exists():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """Hash names and bytes of tensors; with ``about`` also that, dtypes and shapes (since version 0.3)."""
    digest = hashlib.sha256(b"" if about is None else json.dumps([*about.items()]).encode())
    for name in sorted(tensors):
        kind = "" if about is None else f" {tensors[name].dtype} {tuple(tensors[name].shape)}"
        digest.update(f"{name}{kind}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def hash_vector(vector: Tensor) -> str:
    """Hash the bytes of one tensor."""
    return hashlib.sha256(_bytes(vector)).hexdigest()


def hash_batch(batch: Any) -> str:
    """Hash structure, dtypes, shapes and bytes of all tensors of a nested batch, and what else it holds."""
    leaves, structure = pytree.tree_flatten(batch)
    digest = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        tensor = isinstance(leaf, Tensor)
        digest.update((f"{leaf.dtype} {tuple(leaf.shape)}" if tensor else repr(leaf)).encode())
        digest.update(_bytes(leaf) if tensor else b"")
    return digest.hexdigest()


def hash_table(table: pd.DataFrame) -> str:
    """Hash a table as CSV without its index."""
    return hashlib.sha256(table.to_csv(index=False).encode("utf-8", "surrogatepass")).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """View the values as bytes, in C order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
