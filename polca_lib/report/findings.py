"""Tables of the results of a run: its clusters, their composition, their breakthroughs, and a summary."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from polca_lib.method.breakthroughs import mark_hidden
from polca_lib.method.checkpoint_spacing import advice, is_fit, largest_shares
from polca_lib.method.clustering import DROPPED, by_vector, cluster_tokens, is_decreasing, moves
from polca_lib.method.decomposition import completeness, loss_change
from polca_lib.method.settings import ClusteringSettings
from polca_lib.report.labels import after, quoted, write_label
from polca_lib.storage.columns import token_table

_LONGEST = 80  # characters of a displayed value
_TOP = 5  # displayed values per column of a cluster
_KINDS = 50  # most values of a column that describes tokens
PLACES = ("example", "position")  # columns that do not describe tokens


@dataclass(frozen=True, eq=False)
class Findings:
    """Results of a run; each table is computed on first access.

    Args:
        projections: from :func:`polca_lib.analysis.workers.project_runs`.
        curves: projected loss, (step, token, vector), in nats, from
            :func:`polca_lib.method.decomposition.projected_loss`.
        labels: (vector, token), from :func:`polca_lib.method.clustering.cluster_tokens`.
        clustering: settings of the clustering, with the order of the projected loss.
        hidden_after: tau, in steps; None if no breakthrough can be hidden.
    """

    projections: xr.Dataset
    curves: xr.DataArray
    labels: xr.DataArray
    clustering: ClusteringSettings
    hidden_after: int | None = None

    @cached_property
    def completeness(self) -> xr.Dataset:
        """True loss change and the sum of the projected losses."""
        return completeness(self.projections, self.clustering.order)

    @cached_property
    def spacing(self) -> pd.DataFrame:
        """Whether checkpoints see what each kind of token learns, see :func:`checkpoint_spacing`."""
        return checkpoint_spacing(self.projections)

    @cached_property
    def loss_clusters(self) -> xr.DataArray:
        """Clusters of the change in exact loss, the baseline that needs no basis, (token,)."""
        settings = self.clustering.model_copy(update={"scaling": "zscore"})
        return cluster_tokens(loss_change(self.projections), settings, only_falling=False)

    @cached_property
    def clusters(self) -> pd.DataFrame:
        """One row per cluster, hidden breakthroughs first, then by size.

        Columns ``vector``, ``cluster``, ``tokens`` (how many), ``fall`` (mean projected loss at the end, nats),
        ``label`` (see :func:`polca_lib.report.labels.write_label`), ``labelled`` (whether the label tells it apart),
        ``told_by_loss`` (the largest F1, 2 n_both / (n_one + n_other), with a cluster of ``loss_clusters``: 1 if the
        change in loss gives the same cluster without any basis), ``made_of`` (most frequent texts, and values of the
        most distinctive column), and ``breakthrough`` (NaN with too few checkpoints for the window), ``hidden`` and
        ``late`` of :func:`polca_lib.method.breakthroughs.mark_hidden`.
        """
        columns, ends, rows = _kinds_of(self.projections), by_vector(self.curves.isel(step=-1)), []
        kept, phrases = by_vector(self.labels) != DROPPED, _phrases(columns, token_table(self.projections))
        by_loss = [tokens for *_, tokens in members(self.loss_clusters)]
        for vector, cluster, inside in members(self.labels):
            fall = float(ends.sel(vector=vector).values[inside].mean())
            along = kept.sel(vector=vector).values
            label = write_label(inside, along, phrases)
            told = max((2 * (inside & own).sum() / (inside.sum() + own.sum()) for own in by_loss), default=0)
            made_of = _made_of(columns, inside, along)
            rows.append((vector, cluster, int(inside.sum()), fall, label.text, label.fits, float(told), made_of))
        names = ["vector", "cluster", "tokens", "fall", "label", "labelled", "told_by_loss", "made_of"]
        table = pd.DataFrame(rows, columns=names)
        after = int(self.projections["step"][-1]) if self.hidden_after is None else self.hidden_after
        try:
            table = mark_hidden(table, self.labels, self.curves, self.clustering.breakthrough_window, after)
        except ValueError as error:  # too few checkpoints for the window, or it does not fit their cadence
            warnings.warn(f"breakthroughs are left out: clustering.breakthrough_{error}", stacklevel=2)
            table = table.assign(breakthrough=np.nan, hidden=False, late=np.nan)
        table["hidden"] = table["hidden"].astype(bool)
        return table.sort_values(["hidden", "tokens"], ascending=False, kind="stable").reset_index(drop=True)

    @cached_property
    def vectors(self) -> pd.DataFrame:
        """One row per vector.

        Columns ``vector``, ``birth_step``, ``eigenvalue``, ``change`` (of the mean projected loss, nats), ``falls``,
        and the numbers of tokens ``still`` (without movement, see :func:`polca_lib.method.clustering.moves`),
        ``dropped`` (these and those that do not fall) and ``clustered``, and of ``clusters``.
        """
        mean, labels = self.curves.mean("token"), by_vector(self.labels)
        table = pd.DataFrame({"vector": self.curves["vector"].values})
        for name in ("birth_step", "eigenvalue"):
            table[name] = self.projections[name].values if name in self.projections.coords else np.nan
        return table.assign(
            change=mean.isel(step=-1).values,
            falls=is_decreasing(mean, self.clustering.falls_by).values,
            still=(~by_vector(moves(self.curves))).sum("token").values,
            dropped=(labels == DROPPED).sum("token").values,
            clustered=(labels >= 1).sum("token").values,
            clusters=labels.max("token").clip(0).values,
        )

    def summary(self) -> dict[str, Any]:
        """Summarise the results as JSON values.

        Returns:
            ``tokens``, ``vectors``, ``checkpoints``, ``first_step``, ``last_step``, ``loss_start``, ``loss_end``
            (nats), ``order``, ``scaling``, ``hidden_after``; ``checkpoints_fit``, ``checkpoints_advice`` and
            ``largest_share_between_checkpoints`` (of judged kinds; None without any), see
            :mod:`polca_lib.method.checkpoint_spacing`; ``claimed`` (sum of the projected losses divided by the true
            change), ``inside`` (share of the true change after movement inside the basis; None if not measured),
            ``correlation`` (of both sums over tokens); ``still`` (curves of a token along a vector that do not move);
            ``vectors_falling``, ``vectors_with_clusters``, ``clusters``, ``hidden_breakthroughs``; and
            ``breakthroughs``, a dictionary for each cluster.
        """
        shares, clusters, spacing = self.completeness.attrs, self.clusters, self.spacing
        loss, steps = self.projections["loss"].mean("token").values, self.projections["step"].values
        return {
            "tokens": self.projections.sizes["token"],
            "vectors": self.projections.sizes["vector"],
            "checkpoints": len(steps),
            "first_step": int(steps[0]),
            "last_step": int(steps[-1]),
            "loss_start": _plain(loss[0]),
            "loss_end": _plain(loss[-1]),
            "order": self.clustering.order,
            "scaling": self.clustering.scaling,
            "hidden_after": self.hidden_after,
            "checkpoints_fit": is_fit(spacing),
            "checkpoints_advice": advice(spacing),
            "largest_share_between_checkpoints": _plain(spacing["share"][spacing["judged"]].max()),
            "claimed": _plain(shares["share"]),
            "inside": _plain(shares.get("share_inside")),
            "correlation": _plain(shares["correlation"]),
            "still": int(self.vectors["still"].sum()),
            "vectors_falling": int(self.vectors["falls"].sum()),
            "vectors_with_clusters": int(clusters["vector"].nunique()),
            "clusters": len(clusters),
            "hidden_breakthroughs": int(clusters["hidden"].sum()),
            "breakthroughs": [{k: _plain(v) for k, v in row.items()} for row in clusters.to_dict("records")],
        }


def checkpoint_spacing(projections: xr.Dataset) -> pd.DataFrame:
    """Table of :func:`polca_lib.method.checkpoint_spacing.largest_shares` for all tokens, and for each kind of token.

    Kinds are the texts, and the values of columns with few values.
    """
    phrases = _phrases(_kinds_of(projections), pd.DataFrame())
    kinds = [np.full(projections.sizes["token"], "all tokens", object), *phrases.values()]
    tables = [largest_shares(projections["loss"], each) for each in kinds]
    return pd.concat(tables).sort_values("share", ascending=False, kind="stable")


def members(labels: xr.DataArray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield vector, number and token mask of each cluster in ``labels``, (token,) or (vector, token)."""
    for row in by_vector(labels):
        for number in np.unique(row.values[row.values >= 1]).tolist():
            yield int(row["vector"]), number, row.values == number


def shown(value: object) -> str:
    """Convert a value to text for display: cut long text, and replace unprintable characters."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"
    clean = "".join(sign if sign in "\n\t" or (sign.isprintable() or sign.isspace()) else "\ufffd" for sign in text)
    return clean.encode("utf-8", "replace").decode()


def _kinds_of(projections: xr.Dataset) -> dict[str, np.ndarray]:
    """Columns of the token table that describe tokens: ``text``, and columns with few values."""
    columns = {}
    for name, column in token_table(projections).items():
        if name not in PLACES:
            values = np.array([shown(value) for value in column.tolist()], dtype=object)
            if name == "text" or len(set(values)) <= _KINDS:
                columns[name] = values
    return columns


def _phrases(columns: Mapping[str, np.ndarray], table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What each token is, by column, as phrases for labels: its text, with the one before it, and other values."""
    phrases = {}
    if "text" in columns:
        phrases["text"] = np.array([quoted(text) for text in columns["text"]], object)
        if {*PLACES} <= {*table}:
            phrases["pair"] = after(phrases["text"], *(table[name].to_numpy() for name in PLACES))
    others = {name: values for name, values in columns.items() if name != "text"}
    return phrases | {n: np.array([f"{shown(n)} {value}" for value in v], object) for n, v in others.items()}


def _made_of(columns: Mapping[str, np.ndarray], inside: np.ndarray, kept: np.ndarray) -> str:
    """List the most frequent values of a cluster: of ``text``, and of its most distinctive column."""
    lists, best, largest = {}, "", 0.0
    for name, values in columns.items():
        shares = pd.Series(values[inside]).value_counts(normalize=True)
        lists[name] = ", ".join(f"{value!r} {share:.0%}" for value, share in shares.head(_TOP).items())
        # The most distinctive column has the value whose share exceeds its share of all kept tokens most.
        base = pd.Series(values[kept]).value_counts(normalize=True)
        excess = float((shares - base.reindex(shares.index).fillna(0)).max())
        if name != "text" and excess > largest:
            best, largest = name, excess
    names = [name for name in ("text", best) if name in lists]
    return "; ".join(lists[name] if name == "text" else f"{shown(name)}: {lists[name]}" for name in names)


def _plain(value: Any) -> Any:
    """Convert a value for JSON: NumPy scalars to Python, NaN and infinity to None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
