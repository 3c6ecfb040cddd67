"""Long vectors: those of a basis as they are stored, and what is exact enough of them to be summed in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

_SLICE = 2**14  # parameters for which all Gaussian vectors are in memory at once


def read_vectors(
    basis: xr.Dataset,
    start: int = 0,
    stop: int | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "block d"]:
    """Vectors ``start`` (from 0) up to, not including, ``stop`` of a basis, in rows; only those are read or made.

    Args:
        basis: as :func:`polca_lib.method.basis.compute_basis` returns it.
        start, stop: rows; to the last one if ``stop`` is not given.
        device, dtype: of the result.
    """
    rows = range(basis.sizes["vector"])[start:stop]
    block = slice(rows.start, rows.stop)
    if "vectors" in basis:
        return torch.from_numpy(basis["vectors"][block].values).to(device, dtype)
    result = torch.zeros(len(rows), basis.attrs["parameters"], device=device, dtype=dtype)
    if "axis" in basis:
        return result.scatter_(1, torch.from_numpy(basis["axis"][block].values).to(device)[:, None], 1)
    mixing = torch.from_numpy(basis["mixing"][block].values)
    for part, gaussians in _slices(basis.attrs["seed"], rows.stop, basis.attrs["parameters"]):
        # One by one, so that a vector is the same to the last bit in whichever block it is read.
        for own, row in enumerate(rows):
            result[own, part] = (mixing[own, : row + 1] @ gaussians[: row + 1]).to(result)
    return result


def inner_products(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """All inner products of two sets of long vectors, summed in float64.

    In float32, torch sums a million squares to four digits or so: too few for lengths, and for the small part of a
    movement that lies along one direction.
    """
    size = max(1, 2**22 // max(len(rows), len(others)))
    chunks = zip(rows.split(size, dim=1), others.split(size, dim=1), strict=True)
    return sum(one.double() @ other.double().T for one, other in chunks)


def gram_error(vectors: Float[Tensor, "vector d"]) -> float:
    """Largest entry of abs(B B^T - I) for vectors in rows: zero for an orthonormal basis."""
    return (inner_products(vectors, vectors) - torch.eye(len(vectors), device=vectors.device)).abs().max().item()


def without(vector: Float[Tensor, " d"], known: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """The part of ``vector`` that is orthogonal to the orthonormal ``known``, which are taken out one by one."""
    rest = vector.clone()
    for one in known:
        rest.sub_(one, alpha=inner_products(one[None], rest[None]).item())
    return rest


def orthogonalise(vector: Float[Tensor, " d"], against: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """Unit vector orthogonal to the orthonormal ``against``: Gram-Schmidt, twice, in float64."""
    rest = without(without(vector.double(), against), against)
    return (rest / rest.norm()).to(vector.dtype)


def gaussian(
    seed: int, index: int, n: int, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, " d"]:
    """The Gaussian vector of this index of a seed, of ``n`` entries."""
    values = np.random.default_rng([seed, index]).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(values).to(device, dtype)


def _slices(seed: int, n: int, d: int) -> Iterator[tuple[slice, Float[Tensor, "n part"]]]:
    """The first ``n`` Gaussian vectors of a seed, a part of their ``d`` entries at a time, in float64."""
    generators = [np.random.default_rng([seed, index]) for index in range(n)]
    for start in range(0, d, _SLICE):
        part = slice(start, min(start + _SLICE, d))
        draws = [g.standard_normal(part.stop - start, dtype=np.float32) for g in generators]
        yield part, torch.from_numpy(np.stack(draws)).double()


def mixing(seed: int, n: int, d: int) -> Float[np.ndarray, "vector gaussian"]:
    """Gram-Schmidt as a lower triangular matrix: its rows make orthonormal vectors of a seed's Gaussian ones."""
    gram = sum(gaussians @ gaussians.T for _, gaussians in _slices(seed, n, d))
    root = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(root, torch.eye(n, dtype=root.dtype), upper=False).numpy()
