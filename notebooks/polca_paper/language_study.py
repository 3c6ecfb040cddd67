"""One run on text with its ablations: parts of speech, every kind of trajectory, clusters and their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import joblib
import pandas as pd
import xarray as xr

from polca_lib.method import breakthroughs, decomposition
from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.decomposition import available_orders
from polca_lib.method.settings import Scaling
from polca_lib.tasks.language import CONTEXT, Language, Wikipedia
from polca_lib.tasks.run import Run
from polca_paper import labeling
from polca_paper.study import Study
from polca_paper.tagging import load_pipeline, preceding_tags, tag_windows

if TYPE_CHECKING:
    import spacy


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
        other = f" on {self.basis}" if self.basis not in ("", "hessian") else ""
        return f"{self.trajectory}{other}, {self.scaling}"


class LanguageStudy(Study):
    """A run on text and its ablations, with the part of speech of every token.

    Args:
        run: of task ``grammar`` or ``wikipedia``.
        bases: that are compared.
        ablation_curvature: see :class:`polca_paper.study.Study`; as many examples as on the run's own basis if not
            given.
        pipeline: spaCy's, which tags the words of Wikipedia: its name, or a path; the environment variable
            ``POLCA_SPACY``, or else ``en_core_web_sm``, if not given. The grammar knows its own tags.
    """

    def __init__(
        self,
        run: Run,
        bases: Sequence[str] = ("hessian", "random"),
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
        self._name = pipeline or os.environ.get("POLCA_SPACY") or "en_core_web_sm"

    @property
    def settings(self) -> dict[str, object]:
        """Everything that tables depend on; of the corpus its name, for where it lies is nobody's business."""
        found = super().settings
        corpus = found["run"]["corpus"]
        return {**found, "run": {**found["run"], "corpus": {**corpus, "source": Path(corpus["source"]).name}}}

    @property
    def task(self) -> Language:
        """Of the run."""
        return self.run.task

    @property
    def by(self) -> str:
        """What says best what a token is, its construction where that is known, else its part of speech."""
        return "construction" if self.run.settings.task == "grammar" else "tag"

    @cached_property
    def pipeline(self) -> spacy.Language:
        """spaCy's."""
        return load_pipeline(self._name)

    @cached_property
    def notes(self) -> dict[str, str]:
        """What made the labels, corpus and tagger."""
        if not isinstance(self.task, Wikipedia):
            return {"corpus": self.task.description, "tags": "of the grammar"}
        meta = self.pipeline.meta
        tagger = f"spaCy pipeline {meta['lang']}_{meta['name']} {meta['version']}"
        return {"corpus": self.task.description, "tags": tagger}

    @cached_property
    def tags(self) -> pd.DataFrame:
        """Part of speech of each token and of the three before it, ``tag``, ``tag_1``, ``tag_2``, ``tag_3``."""
        task = self.task
        windows = tag_windows(task, self.pipeline) if isinstance(task, Wikipedia) else task.tags
        return preceding_tags(windows, range(CONTEXT, windows.shape[1]))

    @cached_property
    def main(self) -> xr.Dataset:
        """Projections on the run's own basis, each token with its tag."""
        return super().main.assign_coords(tag=("token", self.tags["tag"].to_numpy(str)))

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """All kinds of trajectory with all scalings that apply, clustered, by name."""
        loss, found = self.main["loss"], []
        for basis in self.bases:
            projections = self.main if basis == self.run.settings.basis.kind else self.projections[basis].load()
            for order in available_orders(projections):
                curves = decomposition.projected_loss(projections, order).assign_coords(loss.coords)
                found += [(basis, f"POLCA {order}", scaling, curves, True) for scaling in ("raw", "unit")]
        found += [("", "exact loss", scaling, loss, True) for scaling in ("raw", "unit")]
        change = decomposition.loss_change(self.main)
        found += [("", "change in loss", scaling, change, False) for scaling in ("raw", "zscore")]
        jobs = (
            joblib.delayed(cluster_tokens)(curves, self.clustering(scaling), only_falling=falling)
            for _, _, scaling, curves, falling in found
        )
        labels = joblib.Parallel(n_jobs=-1)(jobs)
        kinds = (Kind(*one, own) for one, own in zip(found, labels, strict=True))
        return {kind.name: kind for kind in kinds}

    @cached_property
    def labelled(self) -> pd.DataFrame:
        """One row per cluster of every kind of trajectory, with its label and its breakthrough."""
        parts = []
        for name, kind in self.kinds.items():
            table = labeling.label_clusters(kind.labels, self.tags, self.run.tokens["text"].tolist())
            window = self.run.settings.clustering.breakthrough_window
            table = breakthroughs.mark_hidden(table, kind.labels, kind.curves, window, self.hidden_after)
            parts.append(table.assign(kind=name))
        return pd.concat(parts, ignore_index=True)
