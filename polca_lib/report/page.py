"""A page about any run that needs nothing else: losses, completeness, vectors, clusters, breakthroughs, contexts."""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from polca_lib.method.breakthroughs import mirrored, named_mirrors
from polca_lib.method.clustering import summarise_clusters
from polca_lib.method.decomposition import movement_share
from polca_lib.report.contexts import contexts, nearest
from polca_lib.report.explorer import Explorer
from polca_lib.report.findings import Findings, shown
from polca_lib.report.palette import OKABE_ITO
from polca_lib.storage.artefacts import write_atomically


def write_report(path: Path, findings: Findings, *, title: str, provenance: pd.DataFrame) -> Path:
    """Write the page: one HTML file, about 5 MB, from which no request leaves.

    Whatever stands in the token table or the title is shown as text, never read as HTML.

    Args:
        path: of the file.
        findings: of the run.
        title: of the page.
        provenance: what made the results, a column ``value``.

    Returns:
        ``path``.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("polca_lib.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=shown(title),
        found=findings.summary(),
        provenance={shown(name): shown(value) for name, value in provenance["value"].items()},
        vectors=findings.vectors.to_dict("records"),
        clusters=findings.clusters.to_dict("records"),
        figures={
            "loss": _loss_figure(findings),
            "completeness": _completeness_figure(findings),
            "share": _share_figure(findings),
        },
        explorer=explorer(findings)._repr_html_() if len(findings.clusters) else None,
        plotly=get_plotlyjs(),
    )
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def explorer(findings: Findings, *, title: str = "", note: str = "") -> Explorer:
    """The explorer of any run; without text, contexts are the other columns of the token table.

    Args:
        findings: of the run.
        title, note: shown above.
    """
    loss, scaling = findings.projections["loss"], findings.clustering.scaling
    about = findings.labels.assign_coords(_kind=("token", np.zeros(findings.labels.sizes["token"], int)))
    curves = summarise_clusters(findings.curves, loss, about, scaling, "_kind")
    clusters = findings.clusters.assign(label=findings.clusters["made_of"], simple=None)
    return Explorer(
        curves,
        clusters.assign(mirrors=named_mirrors(clusters, mirrored(curves["median"]))),
        contexts(nearest(findings.curves, findings.labels, scaling), findings.projections),
        title=shown(title),
        note=shown(note),
        hidden_after=findings.hidden_after,
    )


def _loss_figure(findings: Findings) -> str:
    loss, steps = findings.projections["loss"], findings.projections["step"].values
    low, high = (loss.quantile(q, "token").values for q in (0.25, 0.75))
    figure = go.Figure()
    figure.add_scatter(x=steps, y=high, line={"width": 0}, hoverinfo="skip", showlegend=False)
    band = {"width": 0}, "rgba(0,114,178,0.25)"
    figure.add_scatter(x=steps, y=low, line=band[0], fill="tonexty", fillcolor=band[1], name="middle half of tokens")
    figure.add_scatter(x=steps, y=loss.mean("token").values, line={"color": OKABE_ITO[0]}, name="mean")
    if findings.hidden_after is not None:
        figure.add_vline(x=findings.hidden_after, line={"dash": "dot", "color": "gray"})
    return _html(figure, "loss, nats")


def _completeness_figure(findings: Findings) -> str:
    parts = findings.completeness
    names = {"true": "true loss change", "inside": "after the movement inside the basis", "claimed": "projected losses"}
    figure = go.Figure()
    for (name, told), colour in zip(names.items(), ("gray", *OKABE_ITO), strict=False):
        if name in parts:
            line = {"color": colour}
            figure.add_scatter(x=parts["step"].values, y=parts[name].mean("token").values, name=told, line=line)
    return _html(figure, "mean loss change, nats")


def _share_figure(findings: Findings) -> str:
    share, figure = movement_share(findings.projections), go.Figure()
    figure.add_scatter(x=share["step"].values, y=share.values, line={"color": OKABE_ITO[2]}, name="inside the basis")
    figure.update_yaxes(range=[0, 1])
    return _html(figure, "share of the squared movement in the basis")


def _html(figure: go.Figure, y: str) -> str:
    figure.update_layout(
        xaxis_title="step",
        yaxis_title=y,
        height=320,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"orientation": "h", "y": 1.12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808890"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    settings = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=settings)
