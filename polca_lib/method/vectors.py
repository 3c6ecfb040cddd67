"""Vectors in parameter space: reading a basis, and inner products and projections in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

_SLICE = 2**14  # entries of all Gaussian vectors that are in memory at once


def read_vectors(
    basis: xr.Dataset,
    start: int = 0,
    stop: int | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "block d"]:
    """Rows ``start`` (from 0) to ``stop`` (excluded) of the basis B; only these are read from disk or computed.

    Args:
        basis: as :func:`polca_lib.method.basis.compute_basis` returns it.
        start, stop: range of rows; to the end if ``stop`` is not given.
        device, dtype: of the result.
    """
    rows = range(basis.sizes["vector"])[start:stop]
    block = slice(rows.start, rows.stop)
    # Stored vectors.
    if "vectors" in basis:
        return torch.from_numpy(basis["vectors"][block].values).to(device, dtype)
    result = torch.zeros(len(rows), basis.attrs["parameters"], device=device, dtype=dtype)
    # Axes of single parameters.
    if "axis" in basis:
        return result.scatter_(1, torch.from_numpy(basis["axis"][block].values).to(device)[:, None], 1)
    # Random vectors: B = L^-1 G, see mixing().
    mixing = torch.from_numpy(basis["mixing"][block].values)
    for part, gaussians in _slices(basis.attrs["seed"], rows.stop, basis.attrs["parameters"]):
        # One row at a time, so that a vector has the same bits in whichever block it is read.
        for index, row in enumerate(rows):
            result[index, part] = (mixing[index, : row + 1] @ gaussians[: row + 1]).to(result)
    return result


def inner_products(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """<a_i, b_j> for all rows of two sets of vectors, summed in float64.

    In float32, torch sums a million squares to about four digits: too few for lengths, and for the small part of a
    movement that lies along a single direction.
    """
    size = max(1, 2**22 // max(len(rows), len(others)))
    chunks = zip(rows.split(size, dim=1), others.split(size, dim=1), strict=True)
    return sum(left.double() @ right.double().T for left, right in chunks)


def gram_error(vectors: Float[Tensor, "vector d"]) -> float:
    """max abs(B B^T - I) for vectors in rows: zero for an orthonormal basis."""
    return (inner_products(vectors, vectors) - torch.eye(len(vectors), device=vectors.device)).abs().max().item()


def without(vector: Float[Tensor, " d"], known: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """P v = v - sum_k <b_k, v> b_k, for orthonormal ``known`` b_k: the part of ``vector`` orthogonal to them."""
    rest = vector.clone()
    for direction in known:
        rest.sub_(direction, alpha=inner_products(direction[None], rest[None]).item())
    return rest


def orthogonalise(vector: Float[Tensor, " d"], against: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    """P v / norm(P v), the unit vector orthogonal to the orthonormal ``against``, by Gram-Schmidt in float64.

    Gram-Schmidt runs twice, because once leaves rounding errors of the size of the removed part.
    """
    rest = without(without(vector.double(), against), against)
    return (rest / rest.norm()).to(vector.dtype)


def gaussian(
    seed: int, index: int, n: int, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, " d"]:
    """Standard normal vector of ``n`` entries, fixed by ``seed`` and ``index``."""
    values = np.random.default_rng([seed, index]).standard_normal(n, dtype=np.float32)
    return torch.from_numpy(values).to(device, dtype)


def _slices(seed: int, n: int, d: int) -> Iterator[tuple[slice, Float[Tensor, "n part"]]]:
    """The first ``n`` Gaussian vectors of a seed in float64, a slice of their ``d`` entries at a time."""
    generators = [np.random.default_rng([seed, index]) for index in range(n)]
    for start in range(0, d, _SLICE):
        part = slice(start, min(start + _SLICE, d))
        draws = [g.standard_normal(part.stop - start, dtype=np.float32) for g in generators]
        yield part, torch.from_numpy(np.stack(draws)).double()


def mixing(seed: int, n: int, d: int) -> Float[np.ndarray, "vector gaussian"]:
    """L^-1 for the Cholesky factor L of G G^T: its rows combine Gaussian vectors G into orthonormal ones."""
    # G G^T = L L^T.
    gram = sum(gaussians @ gaussians.T for _, gaussians in _slices(seed, n, d))
    factor = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(factor, torch.eye(n, dtype=factor.dtype), upper=False).numpy()
