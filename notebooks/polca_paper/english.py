"""One run on text with its ablations: parts of speech, every kind of trajectory, clusters, and tables of them.

Runs are of task ``grammar`` or ``wikipedia``. Tables compare clusters with what the tokens are: with constructions
where these are known, else with parts of speech.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import joblib
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool

from polca_lib.method import breakthroughs, decomposition
from polca_lib.method.clustering import DROPPED, OUTLIER, by_vector, cluster_tokens, is_decreasing, summarise_clusters
from polca_lib.method.settings import Scaling
from polca_lib.report.contexts import NEAREST, nearest
from polca_lib.report.explorer import Explorer
from polca_lib.report.findings import checkpoint_spacing
from polca_lib.tasks.language import Wikipedia
from polca_lib.tasks.run import Run
from polca_lib.tasks.tokenization import PAD
from polca_paper import labeling, tables
from polca_paper.constructions import (
    ambiguous,
    best_clusters,
    best_found,
    cluster_readings,
    construction_table,
    judge_reading,
    knn_recall,
    majority_recall,
)
from polca_paper.detectors import DETECTORS, FEWEST, detect, verdict
from polca_paper.evidence import completeness, completeness_curves, join_kinds, kept_summary
from polca_paper.fit import TABLED
from polca_paper.study import Study
from polca_paper.tagging import load_pipeline, preceding_tags, tag_windows

if TYPE_CHECKING:
    import spacy

SHOWN = ("POLCA second, raw", "POLCA first, raw", "POLCA first, zscore", "exact loss, raw")
"""Kinds of trajectory whose clusters are kept with curves and contexts."""

COMPARED = (
    *(f"{loss}, {scaling}" for loss in ("exact loss", "change in loss") for scaling in ("raw", "zscore")),
    *(f"POLCA first{on}, {s}" for on in ("", " on trajectory", " on random") for s in ("raw", "unit", "zscore")),
    "POLCA second, raw",
)
"""Kinds that pages set side by side."""


class Kind(NamedTuple):
    """Trajectories of one kind, and their clusters."""

    basis: str  # empty for those of the loss
    trajectory: str
    scaling: Scaling
    curves: xr.DataArray  # (step, token) or (step, token, vector)
    only_falling: bool
    labels: xr.DataArray  # (token,) or (vector, token)

    @property
    def name(self) -> str:
        """Trajectory and scaling, and the basis if it is not the run's own."""
        basis = f" on {self.basis}" if self.basis not in ("", "hessian") else ""
        return f"{self.trajectory}{basis}, {self.scaling}"


class LanguageStudy(Study):
    """A run on text and its ablations, with the part of speech of every token.

    Args:
        run: of task ``grammar`` or ``wikipedia``.
        bases: that are compared.
        ablation_curvature: see :class:`polca_paper.study.Study`; as many examples as on the run's own basis if not
            given.
        pipeline: name or path of the spaCy pipeline that tags the words of Wikipedia; the environment variable
            ``POLCA_SPACY``, or else ``en_core_web_sm``, if not given. The grammar knows its own tags.
    """

    def __init__(
        self,
        run: Run,
        bases: Sequence[str] = ("hessian", "trajectory", "random"),
        ablation_curvature: int | None = None,
        pipeline: str = "",
    ):
        settings = run.settings
        if settings.basis.kind != "hessian" or not settings.projection.curvature:
            raise ValueError(
                f"basis.kind = {settings.basis.kind!r} and projection.curvature = {settings.projection.curvature}; "
                "allowed for the run of a study of text: 'hessian' and True; name other bases in bases"
            )
        measured = settings.projection.curvature_examples or settings.data.validation_examples
        super().__init__(run, bases, measured if ablation_curvature is None else ablation_curvature, variants=False)
        self._pipeline = pipeline or os.environ.get("POLCA_SPACY") or "en_core_web_sm"

    @property
    def settings(self) -> dict[str, object]:
        """Everything that tables depend on; the corpus by its name, without the folder that it lies in."""
        settings = super().settings
        corpus = settings["run"]["corpus"]
        corpus["source"] = Path(corpus["source"]).name
        return settings

    @property
    def by(self) -> str:
        """The coordinate that says best what a token is, its construction if that is known, else its tag."""
        return "construction" if self.run.settings.task == "grammar" else "tag"

    @property
    def what(self) -> np.ndarray:
        """What each token is."""
        return self.main[self.by].values

    @cached_property
    def pipeline(self) -> spacy.Language:
        """The spaCy pipeline."""
        return load_pipeline(self._pipeline)

    @cached_property
    def notes(self) -> dict[str, str]:
        """Corpus and tagger."""
        if not isinstance(self.run.task, Wikipedia):
            return {"corpus": self.run.task.description, "tags": "of the grammar"}
        meta = self.pipeline.meta
        tagger = f"spaCy pipeline {meta['lang']}_{meta['name']} {meta['version']}"
        return {"corpus": self.run.task.description, "tags": tagger}

    @cached_property
    def tags(self) -> pd.DataFrame:
        """Part of speech of each token and of the three before it, ``tag``, ``tag_1``, ``tag_2``, ``tag_3``."""
        windows, tokens = self.windows[1], self.run.tokens
        every = preceding_tags(windows, range(windows.shape[1]))
        rows = tokens["example"] * windows.shape[1] + tokens["position"]
        return every.iloc[rows].reset_index(drop=True)

    @cached_property
    def main(self) -> xr.Dataset:
        """Projections on the run's own basis, each token with its tag."""
        return super().main.assign_coords(tag=("token", self.tags["tag"].to_numpy(str)))

    @property
    def sources(self) -> list[tuple[str, str, Scaling, xr.DataArray, bool]]:
        """Basis, trajectory, scaling and curves of all that can be clustered, and whether only what falls is."""
        loss, change, sources = self.main["loss"], decomposition.loss_change(self.main), []
        for basis, projections in self.projections.items():
            for order in decomposition.available_orders(projections):
                curves = decomposition.projected_loss(projections.load(), order).assign_coords(loss.coords)
                sources += [(basis, f"POLCA {order}", scaling, curves, True) for scaling in TABLED]
        sources += [("", "exact loss", scaling, loss, True) for scaling in TABLED]
        # A rate that ends at zero has no unit scaling.
        return sources + [("", "change in loss", scaling, change, False) for scaling in ("raw", "zscore")]

    @cached_property
    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Text and tag of every token of every window, (window, width)."""
        task = self.run.task
        return task.texts, tag_windows(task, self.pipeline) if isinstance(task, Wikipedia) else task.tags

    @cached_property
    def paper_sets(self) -> pd.DataFrame:
        """Which tokens are what the paper's clusters are, see :mod:`polca_paper.detectors`."""
        return detect(*self.windows, self.run.tokens)

    @cached_property
    def before(self) -> np.ndarray:
        """Text of the token before each token."""
        tokens = self.run.tokens
        return self.run.task.texts[tokens["example"], tokens["position"] - 1]

    @property
    def pair(self) -> np.ndarray:
        """Text of each token with the one before it."""
        return self.before + "|" + self.run.tokens["text"].to_numpy()

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """All kinds of trajectory with all scalings that apply, clustered, by name."""
        sources = [source for source in self.sources if source[0] in ("", "hessian") or source[1] == "POLCA first"]
        jobs = (
            joblib.delayed(cluster_tokens)(curves, self.clustering(scaling), only_falling=falling)
            for _, _, scaling, curves, falling in sources
        )
        labels = joblib.Parallel(n_jobs=-1)(jobs)
        kinds = [Kind(*source, clusters) for source, clusters in zip(sources, labels, strict=True)]
        return {kind.name: kind for kind in kinds}

    @cached_property
    def labelled(self) -> pd.DataFrame:
        """One row per cluster of every kind of trajectory, with its label, how much that says, and its breakthrough."""
        window, texts = self.run.settings.clustering.breakthrough_window, self.run.tokens["text"].tolist()

        construction = {"construction": self.what.astype(object)} if self.by == "construction" else {}
        columns = labeling.phrases(texts, self.before, self.tags, **construction)
        sets = {name: self.paper_sets[name].to_numpy() for name in self.paper_sets}

        def table(kind: Kind) -> pd.DataFrame:
            clusters = labeling.label_clusters(kind.labels, self.tags, texts)
            clusters = clusters.join(labeling.written_labels(kind.labels, columns, sets))
            return breakthroughs.mark_hidden(clusters, kind.labels, kind.curves, window, self.hidden_after)

        return _of_each_kind(self.kinds, table)

    def falls(self, kind: Kind) -> np.ndarray:
        """Which vectors have a mean that falls."""
        return is_decreasing(by_vector(kind.curves.mean("token")), self.run.settings.clustering.falls_by).values

    def summary(self, kind: Kind) -> xr.Dataset:
        """Medoids, quartiles and composition of the clusters of a kind."""
        return summarise_clusters(kind.curves, self.main["loss"], kind.labels, kind.scaling, self.by)


def _of_each_kind(kinds: dict[str, Kind], table: Callable[[Kind], pd.DataFrame]) -> pd.DataFrame:
    """The same table of several kinds of trajectory, one below the other, with their names in column ``kind``."""
    return pd.concat([table(kind).assign(kind=name) for name, kind in kinds.items()], ignore_index=True)


def counts(study: LanguageStudy) -> pd.DataFrame:
    """How many vectors are kept and have a simple label, by kind of trajectory, beside chance (v3: 26 and 22 of 30).

    Returns:
        ``vectors``; ``kept``: those whose mean falls; ``clustered``: those with a cluster; ``simple_label``: those with
        a cluster whose label is simple (see :func:`polca_paper.labeling.label_clusters`); ``simple_by_chance``: mean of
        the same over clusters of the same sizes drawn at random, and ``simple_p`` the share of draws with at least as
        many; ``simple_words``: those with a simple label of more than PAD; ``simple_all``, ``simple_all_by_chance``: by
        the stricter reading; ``clusters``, ``simple_clusters``; ``tokens``; ``dropped_mean``, ``outliers_mean``: over
        vectors kept; ``hidden``: share of clusters with a hidden breakthrough.
    """
    rows = []
    for name, kind in study.kinds.items():
        each = by_vector(kind.labels)
        some = each[(each != DROPPED).any("token").values]
        clusters = study.labelled[study.labelled["kind"] == name]
        chance = labeling.simple_by_chance(kind.labels, study.tags, seed=study.run.settings.seed)
        simple = {reading: clusters[clusters[reading]]["vector"].nunique() for reading in labeling.READINGS}
        rows.append(
            {
                "kind": name,
                "basis": kind.basis,
                "trajectory": kind.trajectory,
                "scaling": kind.scaling,
                "vectors": len(each),
                "kept": int(study.falls(kind).sum()) if kind.only_falling else len(each),
                "clustered": clusters["vector"].nunique(),
                "simple_label": simple["simple"],
                "simple_by_chance": chance["simple"],
                "simple_p": chance["simple_p"],
                "simple_words": simple["simple_words"],
                "simple_words_by_chance": chance["simple_words"],
                "simple_words_p": chance["simple_words_p"],
                "simple_all": simple["simple_all"],
                "simple_all_by_chance": chance["simple_all"],
                "clusters": len(clusters),
                "simple_clusters": int(clusters["simple"].sum()),
                "tokens": each.sizes["token"],
                "dropped_mean": (some == DROPPED).sum("token").values.mean() if len(some) else np.nan,
                "outliers_mean": (some == OUTLIER).sum("token").values.mean() if len(some) else np.nan,
                "hidden": clusters["hidden"].astype(float).mean(),
            }
        )
    return pd.DataFrame(rows)


def contexts(study: LanguageStudy) -> pd.DataFrame:
    """The tokens nearest the medoid of each cluster, in context, of the kinds in ``SHOWN``."""

    def table(kind: Kind) -> pd.DataFrame:
        near = nearest(kind.curves, kind.labels, kind.scaling)
        near = labeling.contexts(near, study.run.task.texts, study.run.tokens)
        if study.run.task.sources is None:
            return near
        articles = study.run.task.sources.iloc[study.run.tokens["example"].to_numpy()[near["token"]]]
        return near.assign(**articles.to_dict("list"))

    return _of_each_kind({name: study.kinds[name] for name in SHOWN}, table)


def mirrored(study: LanguageStudy) -> pd.DataFrame:
    """Pairs of clusters of one vector that move against each other, of every kind of projected loss."""
    projected = {name: kind for name, kind in study.kinds.items() if kind.basis}
    return _of_each_kind(projected, lambda kind: breakthroughs.mirrored(study.summary(kind)["median"]))


def constructions(study: LanguageStudy) -> pd.DataFrame:
    """The best cluster for each known construction (or part of speech), by kind of trajectory."""
    return _of_each_kind(study.kinds, lambda kind: best_clusters(construction_table(kind.labels, study.what)))


def first_half(run: Run) -> Bool[np.ndarray, " token"]:
    """Which tokens lie in the half of the windows, drawn at random, that chooses readings and clusters."""
    windows = run.tokens["example"].to_numpy()
    order = np.random.default_rng(run.settings.seed).permutation(windows.max() + 1)
    return np.isin(windows, order[: len(order) // 2])


def choices(study: LanguageStudy) -> pd.DataFrame:
    """Which reading finds most known sets of tokens beyond what a token and the one before it tell.

    Known sets are constructions where these are known, else what the paper's clusters are; padding and what is left
    over are none. Half of the windows choose, the others judge: see
    :func:`polca_paper.constructions.judge_reading`.

    Returns:
        A row per ``basis`` (empty for trajectories of the loss), ``trajectory``, ``scaling``, ``way`` and
        ``min_samples_divisor``, with the columns of that function, and those beyond the token alone:
        ``token_chosen`` on the half that chooses, ``token_beyond`` and their names ``token_found`` on the other.
    """
    known, settings = study.paper_sets, study.run.settings
    if study.by == "construction":
        known = pd.get_dummies(pd.Series(study.what)).drop(columns=["padding", "clause"], errors="ignore")
    known = known.loc[:, known.sum() >= FEWEST]
    first = first_half(study.run)
    pair, text, clustering = study.pair, study.run.tokens["text"].to_numpy(), settings.clustering

    def judged(basis: str, trajectory: str, scaling: Scaling, curves: xr.DataArray, falling: bool) -> list[dict]:
        labels = cluster_readings(curves, clustering, scaling, only_falling=falling)
        key = {"basis": basis, "trajectory": trajectory, "scaling": scaling}
        rows = []
        for (way, divisor), each in labels.items():
            alone = judge_reading(each, known, text, first)
            row = {**key, "way": way, "min_samples_divisor": divisor, **judge_reading(each, known, pair, first)}
            beyond = {"token_chosen": alone["chosen_beyond"], "token_beyond": alone["held_out_beyond"]}
            rows.append({**row, **beyond, "token_found": alone["found"]})
        return rows

    rows = joblib.Parallel(n_jobs=-1)(joblib.delayed(judged)(*source) for source in study.sources)
    return pd.DataFrame([row for part in rows for row in part])


def paper_clusters(study: LanguageStudy) -> pd.DataFrame:
    """The best cluster of every kind of trajectory for each cluster that the paper shows, beside chance.

    Returns:
        ``kind``, ``name``, ``figure``, the columns of :func:`polca_paper.constructions.best_found`, where ``p`` and
        ``null`` permute tokens of the whole sample and ``p_text``, ``null_text`` tokens of the same text; and
        ``verdict``, see :func:`polca_paper.detectors.verdict`.
    """
    texts = study.run.tokens["text"].to_numpy()

    def table(kind: Kind) -> pd.DataFrame:
        found = best_found(kind.labels, study.paper_sets).drop(columns="free")
        like = best_found(kind.labels, study.paper_sets, texts)
        found = found.assign(null_text=like["null"], p_text=like["p"], free=like["free"])
        found.insert(1, "figure", found["name"].map({name: where for name, (where, _) in DETECTORS.items()}))
        return found.assign(verdict=[verdict(row) for row in found.to_dict("records")])

    return _of_each_kind(study.kinds, table)


def paper_contexts(study: LanguageStudy) -> pd.DataFrame:
    """The three contexts nearest the medoid of each cluster of :func:`paper_clusters`, of the kinds in ``COMPARED``."""

    def table(kind: Kind) -> pd.DataFrame:
        best = best_found(kind.labels, study.paper_sets, draws=1)
        best = best.loc[best["cluster"] > 0, ["name", "vector", "cluster"]]
        near = nearest(kind.curves, kind.labels, kind.scaling, 3)
        near = labeling.contexts(near, study.run.task.texts, study.run.tokens)
        return best.merge(near, on=["vector", "cluster"])

    return _of_each_kind({name: kind for name, kind in study.kinds.items() if name in COMPARED}, table)


def neighbours(study: LanguageStudy) -> pd.DataFrame:
    """How well known constructions (or parts of speech) can be told from nearest trajectories, without any clustering.

    Rows ``kind``, ``construction``; ``recall``, and ``recall_like``, where only tokens of the same text vote and only
    tokens are asked whose text has more than one construction, see :func:`polca_paper.constructions.knn_recall`. All
    vectors of projected losses are taken together. Two kinds stand beside the trajectories: ``token``, for which tokens
    of the same text vote, whatever their curves, and ``token and the one before``. All kinds are asked of the same
    tokens. Groups are articles, or windows.
    """
    what, tokens = study.what, study.run.tokens
    group = tokens["example"].to_numpy()
    if study.run.task.sources is not None:
        group = pd.factorize(study.run.task.sources["title"])[0][group]
    text = tokens["text"].to_numpy()
    asked = ambiguous(text, what, group)
    told = {
        name: (majority_recall(key, what, group), majority_recall(key[asked], what[asked], group[asked]))
        for name, key in (("token", text), ("token and the one before", study.pair))
    }
    for name, kind in study.kinds.items():
        if kind.scaling == "raw":
            curves = kind.curves - kind.curves.isel(step=0, drop=True) if kind.only_falling else kind.curves
            told[name] = tuple(knn_recall(curves, what, group, among=among) for among in (None, text))
    recalls = {name: pd.concat(both, axis=1, keys=["recall", "recall_like"]) for name, both in told.items()}
    table = pd.concat(recalls, names=["kind", "construction"]).reset_index()
    return table[["construction", "recall", "recall_like", "kind"]]


def cluster_summary(study: LanguageStudy) -> xr.Dataset:
    """Medoids, quartiles and composition of the clusters of the kinds in ``SHOWN``, and curves nearest the medoids."""
    summaries = {}
    for name in SHOWN:
        kind = study.kinds[name]
        curves, summary = by_vector(kind.curves), study.summary(kind)
        near = nearest(kind.curves, kind.labels, kind.scaling)
        lines = np.full((*summary["medoid"].shape[:2], NEAREST, summary.sizes["step"]), np.nan, np.float32)
        row = summary.indexes["vector"].get_indexer(near["vector"])
        tokens = xr.DataArray(near["token"].to_numpy(), dims="line")
        lines[row, near["cluster"] - 1, near["rank"] - 1] = (
            curves.isel(vector=xr.DataArray(row, dims="line"), token=tokens).transpose("line", "step").values
        )
        summary = summary.assign_coords(rank=np.arange(1, NEAREST + 1))
        summaries[name] = summary.assign(nearest=(("vector", "cluster", "rank", "step"), lines))
    return kept_summary(study, join_kinds(summaries))


def explorer_of(
    summary: xr.Dataset, clusters: pd.DataFrame, contexts: pd.DataFrame, pairs: pd.DataFrame, kind: str, **texts: str
) -> Explorer:
    """The explorer of one kind of trajectory of a study, at hand or kept.

    Args:
        summary: from :func:`cluster_summary`.
        clusters, contexts, pairs: tables ``labels``, ``contexts`` and ``mirrored``.
        kind: one of ``SHOWN``.
        texts: ``title`` and ``note``, shown above.

    Raises:
        ValueError: a kind whose curves are not kept.
    """
    if kind not in SHOWN:
        raise ValueError(f"kind = {kind!r} has no curves kept; allowed: {', '.join(SHOWN)}")
    clusters, contexts, pairs = (table[table["kind"] == kind] for table in (clusters, contexts, pairs))
    # What the search reads, too: tags, and the most frequent tokens.
    named = {"about": "tags " + clusters["label"] + "; tokens " + clusters["top_tokens"]}
    named["padding"] = clusters["top_tokens"].str.startswith(f"'{PAD}'") & (clusters["top_token_share"] > 0.5)
    if "name" in clusters:  # older studies have no written labels
        named |= {"label": clusters["name"], "simple": clusters["named"]}
    return Explorer(
        summary.sel(kind=kind, vector=sorted(clusters["vector"].unique())),
        clusters.assign(**named, mirrors=breakthroughs.named_mirrors(clusters, pairs)),
        contexts,
        hidden_after=summary.attrs.get("hidden_after"),
        **texts,
    )


TABLES: dict[str, Callable[[LanguageStudy], pd.DataFrame]] = {
    "losses": lambda study: tables.loss_quantiles(study.main["loss"], list(dict.fromkeys(["tag", study.by]))),
    "spacing": lambda study: checkpoint_spacing(study.main).reset_index().query("judged"),
    "labels": lambda study: study.labelled,
    "counts": counts,
    "contexts": contexts,
    "mirrored": mirrored,
    "constructions": constructions,
    "neighbours": neighbours,
    "completeness": completeness,
    "completeness_curves": completeness_curves,
    "choices": choices,
    "paper_clusters": paper_clusters,
    "paper_contexts": paper_contexts,
}
"""What is kept of a study of text, in the order in which it is made."""
