"""HTML report of a run: losses, completeness, vectors, clusters, breakthroughs and contexts in one file."""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from polca_lib.method.breakthroughs import mirrored, named_mirrors
from polca_lib.method.clustering import summarise_clusters
from polca_lib.method.decomposition import movement_share
from polca_lib.report.contexts import contexts, nearest
from polca_lib.report.explorer import Explorer
from polca_lib.report.findings import Findings, shown
from polca_lib.report.palette import OKABE_ITO
from polca_lib.storage.artefacts import write_atomically
from polca_lib.storage.columns import token_table

_KINDS = 8  # of tokens that the page lists, those whose loss drop the checkpoints see least of


def write_report(path: Path, findings: Findings, *, title: str, provenance: pd.DataFrame) -> Path:
    """Write one HTML file of about 5 MB that loads nothing from elsewhere, and return ``path``.

    Text of the token table and the title is never read as HTML.

    Args:
        provenance: origin of the results, with a column ``value``.
    """
    templates = Environment(loader=PackageLoader("polca_lib.report", "."), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("report.html").render(
        title=shown(title),
        found=findings.summary(),
        provenance={shown(name): shown(value) for name, value in provenance["value"].items()},
        vectors=findings.vectors.to_dict("records"),
        clusters=findings.clusters.to_dict("records"),
        spacing=findings.spacing[findings.spacing["judged"]].head(_KINDS).reset_index().to_dict("records"),
        figures=_figures(findings),
        explorer=explorer(findings)._repr_html_() if len(findings.clusters) else None,
        plotly=get_plotlyjs(),
    )
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def explorer(findings: Findings, *, title: str = "", note: str = "", by: str | None = None) -> Explorer:
    """Build the explorer of any run; without text, contexts show the other columns of the token table.

    Args:
        by: column of the token table whose values the composition of a cluster counts; no composition if not given.

    Raises:
        ValueError: no such column.
    """
    loss, scaling, labels = findings.projections["loss"], findings.clustering.scaling, findings.labels
    known = token_table(findings.projections)
    if by is not None and by not in known:
        raise ValueError(f"by = {by!r} is no column of the token table; allowed: {', '.join(known)}")
    # Without a column, all tokens are of one kind.
    kind = np.zeros(labels.sizes["token"], int) if by is None else known[by].map(shown).to_numpy(str)
    labels = labels.assign_coords(_kind=("token", kind))
    curves = summarise_clusters(findings.curves, loss, labels, scaling, "_kind")
    mirrors = named_mirrors(findings.clusters, mirrored(curves["median"]))
    clusters = findings.clusters.assign(
        about=findings.clusters["made_of"], simple=findings.clusters["labelled"], mirrors=mirrors
    )
    texts = contexts(nearest(findings.curves, findings.labels, scaling), findings.projections)
    return Explorer(curves, clusters, texts, title=shown(title), note=shown(note), hidden_after=findings.hidden_after)


def _figures(findings: Findings) -> dict[str, str]:
    """Figures of the loss, the completeness and the movement in the basis, as HTML."""
    # Loss: mean and quartiles over tokens.
    loss, figure = findings.projections["loss"], go.Figure()
    low, high = (loss.quantile(q, "token").values for q in (0.25, 0.75))
    steps = loss["step"].values
    band = {"fill": "tonexty", "fillcolor": "rgba(0,114,178,0.25)", "name": "middle half of tokens"}
    figure.add_scatter(x=steps, y=high, line={"width": 0}, hoverinfo="skip", showlegend=False)
    figure.add_scatter(x=steps, y=low, line={"width": 0}, **band)
    _add_line(figure, loss.mean("token"), OKABE_ITO[0], "mean")
    if findings.hidden_after is not None:
        figure.add_vline(x=findings.hidden_after, line={"dash": "dot", "color": "gray"})
    figures = {"loss": _html(figure, "loss, nats")}
    # Completeness: true change and the sum of the projected losses.
    names = {"true": "true loss change", "inside": "after the movement inside the basis", "claimed": "projected losses"}
    figure = go.Figure()
    for (name, label), colour in zip(names.items(), ("gray", *OKABE_ITO), strict=False):
        if name in findings.completeness:
            _add_line(figure, findings.completeness[name].mean("token"), colour, label)
    figures["completeness"] = _html(figure, "mean loss change, nats")
    # Share of the movement inside the basis.
    figure = go.Figure()
    _add_line(figure, movement_share(findings.projections), OKABE_ITO[2], "inside the basis")
    figure.update_yaxes(range=[0, 1])
    return figures | {"share": _html(figure, "share of the squared movement in the basis")}


def _add_line(figure: go.Figure, values: xr.DataArray, colour: str, name: str) -> None:
    """Draw a curve over steps."""
    figure.add_scatter(x=values["step"].values, y=values.values, line={"color": colour}, name=name)


def _html(figure: go.Figure, y: str) -> str:
    """Convert a figure to HTML with colours for light and dark pages; ``y`` is the title of its y-axis."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    figure.update_layout(
        xaxis={"title": {"text": "step"}, **axis},
        yaxis={"title": {"text": y}, **axis},
        height=320,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"orientation": "h", "y": 1.12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#808890"},
    )
    settings = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=settings)
