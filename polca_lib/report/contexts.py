"""The tokens of a cluster nearest its medoid, and the text around them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.clustering import by_vector, medoid, scale
from polca_lib.method.settings import Scaling
from polca_lib.report.findings import shown

NEAREST = 10
"""Tokens of a cluster that are shown, those nearest its medoid, as in the paper."""

_NEAREST_COLUMNS = {"vector": int, "cluster": int, "rank": int, "token": int, "distance": float}
_BEFORE, _AFTER = 16, 8  # tokens of a context


def nearest(
    trajectories: xr.DataArray, labels: xr.DataArray, scaling: Scaling = "raw", n: int = NEAREST
) -> pd.DataFrame:
    """The ``n`` tokens of each cluster nearest its medoid, as HDBSCAN sees their trajectories.

    Args:
        trajectories: what was clustered, (step, token) or (step, token, vector).
        labels: (token,) or (vector, token).
        scaling: as the clustering saw the trajectories.
        n: tokens of each cluster; fewer if it has fewer.

    Returns:
        Rows ``vector``, ``cluster``, ``rank`` (from 1, which is the medoid), ``token`` (index along ``token``) and
        ``distance`` from the medoid, in units of the scaled trajectories.
    """
    curves, rows = by_vector(trajectories), []
    for one in by_vector(labels):
        own = curves.sel(vector=one["vector"]).transpose("token", "step")
        for number in range(1, one.values.max(initial=0) + 1):
            tokens = np.flatnonzero(one.values == number)
            values = scale(own.values[tokens].astype(np.float64), scaling)
            centre = medoid(own[tokens], scaling)
            distance = np.linalg.norm(values - values[centre], axis=1)
            # Others may lie on the very same point: the medoid still comes first.
            order = np.lexsort([tokens, np.arange(len(tokens)) != centre, distance])[:n]
            for rank, i in enumerate(order, 1):
                rows.append((int(one["vector"]), number, rank, tokens[i], distance[i]))
    return pd.DataFrame(rows, columns=list(_NEAREST_COLUMNS)).astype(_NEAREST_COLUMNS)


def contexts(near: pd.DataFrame, projections: xr.Dataset) -> pd.DataFrame:
    """Add ``before``, ``target`` and ``after`` to rows of :func:`nearest`: the text around each token.

    Text is of the same example. Without a column ``text``, ``target`` lists the other columns of the token table.
    """
    coords = {n: c.values for n, c in projections.coords.items() if c.dims == ("token",)}
    if not {"text", "example"} <= coords.keys():
        names = [n for n in coords if n != "token"]
        told = [", ".join(f"{shown(n)} {shown(coords[n][token])}" for n in names) for token in near["token"]]
        return near.assign(before="", target=told, after="")
    places = pd.DataFrame({"example": coords["example"], "position": coords.get("position", coords["token"])})
    order = places.sort_values(["example", "position"], kind="stable").index.to_numpy()
    rank, example = np.argsort(order), places["example"].to_numpy()
    rows: dict[str, list[str]] = {"before": [], "target": [], "after": []}
    for token in near["token"]:
        at = rank[token]
        for name, start, stop in (
            ("before", at - _BEFORE, at),
            ("target", at, at + 1),
            ("after", at + 1, at + 1 + _AFTER),
        ):
            some = [i for i in order[max(0, start) : max(0, stop)] if example[i] == example[token]]
            rows[name].append("".join(shown(coords["text"][i]) for i in some))
    return near.assign(**rows)
