"""What a run found, in tables: its clusters, what each is made of, when it breaks through, and all of it in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.breakthroughs import mark_hidden
from polca_lib.method.clustering import DROPPED, by_vector, is_decreasing
from polca_lib.method.decomposition import completeness
from polca_lib.method.settings import ClusteringSettings

_LONGEST = 80  # characters of a value that are shown
_TOP = 5  # values that say what a cluster is made of
_KINDS = 50  # values that a column may have and still say what a token is

# Columns that say where a token is, or are of vectors.
_PLACES = ("token", "example", "position", "step", "vector")


@dataclass(frozen=True, eq=False)
class Findings:
    """What a run found; each table is made when first asked for.

    Args:
        projections: from :func:`polca_lib.analysis.projections.project_runs`.
        curves: projected loss, (step, token, vector), in nats, from
            :func:`polca_lib.method.decomposition.projected_loss`.
        labels: (vector, token), from :func:`polca_lib.method.clustering.cluster_tokens`.
        clustering: its settings; they say the order, too.
        hidden_after: tau, in steps; none if nothing can be hidden.
    """

    projections: xr.Dataset
    curves: xr.DataArray
    labels: xr.DataArray
    clustering: ClusteringSettings
    hidden_after: int | None = None

    @cached_property
    def completeness(self) -> xr.Dataset:
        """True loss change, and what projected losses add up to."""
        return completeness(self.projections, self.clustering.order)

    @cached_property
    def clusters(self) -> pd.DataFrame:
        """A row per cluster, those hidden first, then the largest.

        Columns ``vector``, ``cluster``, ``tokens`` (how many), ``fall`` (mean projected loss at the end, nats),
        ``made_of`` (its most frequent texts, and values of the column that sets it apart most),
        ``breakthrough`` (mean step of the sharpest drop's start; NaN with too few checkpoints for the window) and
        ``hidden`` (whether the mean loss had gone flat by then, v3 Eq. 10).
        """
        columns, rows = _kinds_of(self.projections), []
        ends = by_vector(self.curves.isel(step=-1))
        for one in by_vector(self.labels):
            kept, end = one.values != DROPPED, ends.sel(vector=one["vector"]).values
            for number in range(1, int(one.max(initial=0) if one.size else 0) + 1):
                inside = one.values == number
                rows.append(
                    {
                        "vector": int(one["vector"]),
                        "cluster": number,
                        "tokens": int(inside.sum()),
                        "fall": float(end[inside].mean()),
                        "made_of": _made_of(columns, inside, kept),
                    }
                )
        table = pd.DataFrame(rows, columns=["vector", "cluster", "tokens", "fall", "made_of"])
        after = int(self.projections["step"][-1]) if self.hidden_after is None else self.hidden_after
        try:
            table = mark_hidden(table, self.labels, self.curves, self.clustering.breakthrough_window, after)
        except ValueError:  # too few checkpoints for the window
            table = table.assign(breakthrough=np.nan, hidden=False)
        table["hidden"] = table["hidden"].astype(bool)
        return table.sort_values(["hidden", "tokens"], ascending=False, kind="stable").reset_index(drop=True)

    @cached_property
    def vectors(self) -> pd.DataFrame:
        """A row per vector.

        Columns ``vector``, ``birth_step``, ``eigenvalue``, ``change`` (of the mean projected loss, nats), ``falls``,
        and how many tokens were ``dropped`` and ``clustered``, in how many ``clusters``.
        """
        mean, each = self.curves.mean("token"), by_vector(self.labels)
        table = pd.DataFrame({"vector": self.curves["vector"].values})
        for name in ("birth_step", "eigenvalue"):
            table[name] = self.projections[name].values if name in self.projections.coords else np.nan
        table["change"] = mean.isel(step=-1).values
        table["falls"] = is_decreasing(mean, self.clustering.falls_by).values
        table["dropped"] = (each == DROPPED).sum("token").values
        table["clustered"] = (each >= 1).sum("token").values
        table["clusters"] = each.max("token").clip(0).values
        return table

    def summary(self) -> dict[str, Any]:
        """All of it as JSON values.

        Returns:
            ``tokens``, ``vectors``, ``checkpoints``, ``first_step``, ``last_step``, ``loss_start``, ``loss_end``
            (nats), ``order``, ``scaling``, ``hidden_after``; ``claimed`` (share of the loss change that projected
            losses add up to), ``inside`` (that the movement inside the basis delivers; none if not measured),
            ``correlation`` (of claimed with true, over tokens); ``vectors_falling``, ``vectors_with_clusters``,
            ``clusters``, ``hidden_breakthroughs``; and ``breakthroughs``, a dictionary for each cluster.
        """
        found, clusters = self.completeness.attrs, self.clusters
        loss, steps = self.projections["loss"].mean("token").values, self.projections["step"].values
        return {
            "tokens": self.projections.sizes["token"],
            "vectors": self.projections.sizes["vector"],
            "checkpoints": len(steps),
            "first_step": int(steps[0]),
            "last_step": int(steps[-1]),
            "loss_start": _number(loss[0]),
            "loss_end": _number(loss[-1]),
            "order": self.clustering.order,
            "scaling": self.clustering.scaling,
            "hidden_after": self.hidden_after,
            "claimed": _number(found["share"]),
            "inside": _number(found.get("share_inside")),
            "correlation": _number(found["correlation"]),
            "vectors_falling": int(self.vectors["falls"].sum()),
            "vectors_with_clusters": int(clusters["vector"].nunique()),
            "clusters": len(clusters),
            "hidden_breakthroughs": int(clusters["hidden"].sum()),
            "breakthroughs": [{k: _plain(v) for k, v in row.items()} for row in clusters.to_dict("records")],
        }


def shown(value: object) -> str:
    """A value as text that can be shown: cut, and without characters that are no text."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
    clean = "".join(sign if sign in "\n\t" or (sign.isprintable() or sign.isspace()) else "\ufffd" for sign in text)
    return clean.encode("utf-8", "replace").decode()


def _kinds_of(projections: xr.Dataset) -> dict[str, np.ndarray]:
    """Columns of the token table that may say what a token is: the text, and what has few values."""
    found = {}
    for name, coordinate in projections.coords.items():
        if coordinate.dims != ("token",) or name in _PLACES:
            continue
        values = np.array([shown(value) for value in coordinate.values.tolist()], dtype=object)
        if name == "text" or len(set(values)) <= _KINDS:
            found[str(name)] = values
    return found


def _made_of(columns: Mapping[str, np.ndarray], inside: np.ndarray, kept: np.ndarray) -> str:
    """The most frequent values in a cluster: of the text, and of the column that sets it apart most."""
    told, best = {}, (0.0, "")
    for name, values in columns.items():
        shares = pd.Series(values[inside]).value_counts(normalize=True)
        base = pd.Series(values[kept]).value_counts(normalize=True)
        told[name] = ", ".join(f"{value!r} {share:.0%}" for value, share in shares.head(_TOP).items())
        apart = float((shares - base.reindex(shares.index).fillna(0)).max())
        if name != "text" and apart > best[0]:
            best = apart, name
    names = [name for name in ("text", best[1]) if name in told]
    return "; ".join(told[name] if name == "text" else f"{shown(name)}: {told[name]}" for name in names)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return _number(value) if isinstance(value, float) else value
