"""The tokens of a cluster nearest its medoid, and the text around them."""

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.clustering import by_vector, medoid, scale
from polca_lib.method.settings import Scaling
from polca_lib.report.findings import members, shown
from polca_lib.storage.columns import token_table

NEAREST = 10
"""Number of tokens shown per cluster, as in the paper."""

_NEAREST_COLUMNS = {"vector": int, "cluster": int, "rank": int, "token": int, "distance": float}
# First and last token of each part of a context, relative to the target.
_PARTS = {"before": (-16, 0), "target": (0, 1), "after": (1, 9)}


def nearest(
    trajectories: xr.DataArray, labels: xr.DataArray, scaling: Scaling = "raw", n: int = NEAREST
) -> pd.DataFrame:
    """Find the ``n`` tokens of each cluster nearest its medoid, by Euclidean distance of scaled trajectories.

    Args:
        trajectories: clustered trajectories, (step, token) or (step, token, vector).
        labels: (token,) or (vector, token).
        scaling: scaling used for the clustering.

    Returns:
        Rows ``vector``, ``cluster``, ``rank`` (1 is the medoid), ``token`` (index along ``token``) and ``distance``
        from the medoid, in units of the scaled trajectories.
    """
    curves, rows = by_vector(trajectories), []
    for vector, cluster, inside in members(labels):
        # Measure distances from the medoid.
        tokens = np.flatnonzero(inside)
        curve = curves.sel(vector=vector).transpose("token", "step")[tokens]
        values = scale(curve.values.astype(np.float64), scaling)
        centre = medoid(curve, scaling)
        distance = np.linalg.norm(values - values[centre], axis=1)
        # Sort by distance; put the medoid before tokens with the same trajectory.
        order = np.lexsort([tokens, np.arange(len(tokens)) != centre, distance])[:n]
        rows += [(vector, cluster, rank, tokens[i], distance[i]) for rank, i in enumerate(order, 1)]
    return pd.DataFrame(rows, columns=list(_NEAREST_COLUMNS)).astype(_NEAREST_COLUMNS)


def contexts(near: pd.DataFrame, projections: xr.Dataset) -> pd.DataFrame:
    """Add ``before``, ``target`` and ``after`` to rows of :func:`nearest`: the text around each token in its example.

    If ``text`` is missing, or is that of the whole example, ``target`` lists the columns of the token table.
    """
    table, keys = token_table(projections), ["example", "text"]
    if not {*keys} <= {*table} or len(table) > len(table[keys].drop_duplicates()) == table["example"].nunique():
        names = [name for name in dict.fromkeys(("text", *table)) if name in table]
        targets = [", ".join(f"{shown(name)} {shown(table[name][i])}" for name in names) for i in near["token"]]
        return near.assign(before="", target=targets, after="")
    # Sort the tokens by example and position.
    places = pd.DataFrame({"example": table["example"], "position": table.get("position", table.index)})
    order = places.sort_values(["example", "position"], kind="stable").index.to_numpy()
    rank, example, texts = np.argsort(order), places["example"].to_numpy(), table["text"].to_numpy()

    def text(token: int, start: int, stop: int) -> str:
        window = order[max(0, rank[token] + start) : max(0, rank[token] + stop)]
        return "".join(shown(texts[i]) for i in window if example[i] == example[token])

    return near.assign(**{name: [text(token, *bounds) for token in near["token"]] for name, bounds in _PARTS.items()})
