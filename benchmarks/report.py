"""Records of the benchmarks as tables and figures, and what was aimed at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from harness import GIB, SIZES
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from polca_lib.report.palette import OKABE_ITO

QUESTIONS = ("projections", "scaling", "profile", "memory", "eigenvector", "hessian product")
QUESTIONS += ("training step", "storage", "stages")
OPTIONAL = ("error", "fraction_of_peak", "max_error", "peak_bytes", "ratio_to_budget", "products", "residual")
OURS, OURS_LOW = "ours, float32", "ours, bfloat16"


def load(folder: Path, machine: str) -> pd.DataFrame:
    """All records in ``folder`` of one kind of device, cpu or cuda.

    Raises:
        ValueError: a question has not been asked on such a device.
    """
    records = pd.DataFrame(
        [record for file in sorted(folder.glob("*.json")) for record in json.loads(file.read_text())]
    )
    own = records[records["device"].str.startswith(machine)] if len(records) else pd.DataFrame(columns=["question"])
    if missing := sorted(set(QUESTIONS) - set(own["question"])):
        raise ValueError(
            f"{folder} has no records of {machine} for {missing}; make benchmarks DEVICE={machine} writes them"
        )
    return own.reindex(columns=[*own.columns.union(OPTIONAL, sort=False)])


def at(records: pd.DataFrame, question: str, size: str) -> pd.DataFrame:
    """Records of a question at ``size`` or, where nothing was measured there, at the next smaller size."""
    own = records[records["question"] == question]
    for candidate in reversed(SIZES[: SIZES.index(size) + 1]):
        if (own["size"] == candidate).any():
            return own[own["size"] == candidate]
    return own[:0]


def table(records: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """``columns`` of records, renamed, by setting and contender; a contender that failed keeps its row."""
    return records.set_index(["setting", "contender"])[[*columns]].rename(columns=columns)


def failures(records: pd.DataFrame) -> pd.DataFrame:
    """What did not run, and what it said."""
    by_error = records.dropna(subset="error").groupby(["question", "contender", "error"], sort=False)["setting"]
    return by_error.agg("; ".join).reset_index("error")[["setting", "error"]]


def times(records: pd.DataFrame, label: str, scale: float = 1.0) -> Figure:
    """Median times of all contenders with the range of all repeats, one panel a setting, on a log scale."""
    settings = list(records["setting"].unique())
    heights = [(records["setting"] == setting).sum() + 3 for setting in settings]
    ratios = {"height_ratios": heights, "sharex": True}
    figure, panels = plt.subplots(len(settings), 1, figsize=(8, 0.3 * sum(heights)), squeeze=False, **ratios)
    for setting, axes in zip(settings, panels[:, 0], strict=True):
        rows = records[records["setting"] == setting]
        for position, row in enumerate(rows.itertuples()):
            colour = OKABE_ITO[0] if row.contender.startswith("ours") else "0.4"
            axes.hlines(position, row.low_s * scale, row.high_s * scale, color=colour, linewidth=3, alpha=0.4)
            axes.plot(row.median_s * scale, position, "o", color=colour)
            if np.isnan(row.median_s):
                axes.text(0.02, position, "does not run", va="center", fontsize=8, transform=axes.get_yaxis_transform())
            else:
                axes.text(row.high_s * scale * 1.15, position, f"{row.ratio_to_ours:.3g} x", va="center", fontsize=8)
        axes.set(xscale="log", xlabel=label if setting == settings[-1] else "")
        _ticks(axes.xaxis)
        axes.set_title(setting, fontsize=9)
        axes.set_yticks(range(len(rows)), rows["contender"])
        axes.invert_yaxis()
        axes.grid(axis="x", color="0.9")
        axes.set_xlim(None, axes.get_xlim()[1] * 2)
    return figure


def slopes(records: pd.DataFrame) -> pd.DataFrame:
    """Least-squares exponent of the whole time against each axis, by contender."""
    found: dict[str, dict[str, float]] = {}
    for axis, contender, rows in _curves(records):
        logs = np.log(rows[["x", "seconds"]].dropna())
        slope = np.polyfit(logs["x"], logs["seconds"], 1)[0] if len(logs) > 1 else np.nan
        found.setdefault(axis, {})[contender] = slope
    return pd.DataFrame(found)


def scaling(records: pd.DataFrame) -> Figure:
    """Whole time against tokens, vectors and parameters, log-log; the legends give the slopes."""
    slope = slopes(records)
    figure, panels = plt.subplots(1, slope.shape[1], figsize=(2.9 * slope.shape[1], 3.8), squeeze=False)
    by_axis = dict(zip(slope.columns, panels[0], strict=True))
    colours = dict(zip(slope.index, OKABE_ITO, strict=False))
    for axis, contender, rows in _curves(records):
        exponent, colour = slope.loc[contender, axis], colours[contender]
        label = f"{contender}: {exponent:.2f}" if np.isfinite(exponent) else contender  # one point has no slope
        by_axis[axis].plot(rows["x"], rows["seconds"], "o-", color=colour, label=label)
        low, high = rows["low_s"] * rows["tokens"], rows["high_s"] * rows["tokens"]
        by_axis[axis].fill_between(rows["x"], low, high, color=colour, alpha=0.2)
    for axis, axes in by_axis.items():
        axes.set(xscale="log", yscale="log", xlabel=axis)
        _ticks(axes.xaxis, axes.yaxis)
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    panels[0][0].set_ylabel("seconds in all")
    return figure


def _curves(records: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Axis, contender and points of each curve; of the width, what counts is how many parameters it makes."""
    for (axis, contender), rows in records.groupby(["axis", "contender"], sort=False):
        width = axis == "d_model"
        points = rows.assign(x=rows["parameters" if width else "value"], seconds=rows["median_s"] * rows["tokens"])
        yield "parameters" if width else axis, contender, points.sort_values("x")


def memory(records: pd.DataFrame) -> Figure:
    """Memory taken against memory given; the grey band ends a fifth above what was given."""
    figure, axes = plt.subplots(figsize=(4.6, 3.4))
    given = np.sort(records["budget_bytes"].unique()) / GIB
    axes.fill_between(given, given, 1.2 * given, color="0.85")
    axes.plot(given, given, color="black", linewidth=1)
    for (contender, rows), colour in zip(records.groupby("contender"), OKABE_ITO, strict=False):
        axes.plot(rows["budget_bytes"] / GIB, rows["peak_bytes"] / GIB, "o", color=colour, label=contender)
    axes.set(xscale="log", yscale="log", xlabel="given (GiB)", ylabel="taken at the peak (GiB)")
    _ticks(axes.xaxis, axes.yaxis)
    axes.legend()
    return figure


def _ticks(*axes: Axis) -> None:
    """Plain numbers at 1 and 3 of each decade."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())


def verdict(records: pd.DataFrame, size: str) -> pd.DataFrame:
    """What was aimed at, what was measured at ``size`` or in the worst setting, and whether it was reached."""
    addition, linear, language = (
        _times(records, size, task) for task in ("addition", "addition, nn.Linear", "language")
    )

    def over_peers(ours: str) -> float:
        """Times as fast as the best of them, each on a model that it does."""
        return min(
            (own.drop(index=["naive", OURS, OURS_LOW], errors="ignore") / own[ours]).min() for own in (addition, linear)
        )

    projections = at(records, "projections", size)
    low = projections[(projections["task"] == "addition") & (projections["contender"] == OURS_LOW)]
    products = _beside_best(records, "eigenvector", "products")
    product = _beside_best(records, "hessian product", "median_s")
    each = records.assign(each=records["median_s"] / records["products"])
    solver = _beside_best(each, "eigenvector", "each")
    errors = records[(records["question"] == "projections") & (records["contender"] == OURS)]["max_error"]
    gpu = records[
        (records["question"] == "stages") & (records["size"] == "paper") & records["device"].str.contains("cuda")
    ]
    stages = gpu.set_index("contender")["median_s"].reindex(["projections", "basis"])
    kept = at(records, "storage", size).set_index("contender")
    least = [
        ("addition, float32: speed over naive", 5, addition["naive"] / addition[OURS]),
        ("addition, float32: speed over best peer", 3, over_peers(OURS)),
        ("addition, bfloat16: speed over naive", 25, addition["naive"] / addition[OURS_LOW]),
        ("addition, bfloat16: speed over best peer", 12, over_peers(OURS_LOW)),
        ("addition, bfloat16: share of matrix rate", 0.65, low["fraction_of_peak"].max()),
        ("language, float32: speed over jvp, one by one", 1.5, language["jvp, one by one"] / language[OURS]),
    ]
    most = [
        ("eigenvector: products beyond best peer", 0, (products["ours"] - products["best"]).max()),
        ("Hessian product: time over best peer", 1.1, (product["ours"] / product["best"]).max()),
        ("eigenvector: time a product over best peer", 1.1, (solver["ours"] / solver["best"]).max()),
        ("peak memory over memory given", 1.2, records["ratio_to_budget"].max()),
        ("error of float32 over root mean square", 1e-4, errors.max()),
        ("storage: bytes of files over bytes of values", 1.2, kept["taken_over_held"].max()),
        ("storage: seconds to open a run", 1, kept.loc["open", "median_s"]),
        ("paper, one GPU: all projections, seconds", 180, stages["projections"]),
        ("paper, one GPU: basis, seconds", 180, stages["basis"]),
    ]
    result = pd.DataFrame(least + most, columns=["what", "target", "measured"]).set_index("what")
    at_least = np.arange(len(result)) < len(least)
    reached = np.where(at_least, result["measured"] >= result["target"], result["measured"] <= result["target"])
    result.insert(0, "bound", np.where(at_least, "at least", "at most"))
    result["verdict"] = np.where(result["measured"].isna(), "not measured", np.where(reached, "met", "not met"))
    return result


def _times(records: pd.DataFrame, size: str, task: str) -> pd.Series:
    """Median time of the projections by contender."""
    own = at(records, "projections", size)
    return own[own["task"] == task].set_index("contender")["median_s"]


def _beside_best(records: pd.DataFrame, question: str, column: str) -> pd.DataFrame:
    """Ours and the best of the peers, by setting."""
    by_contender = records[records["question"] == question].pivot(index="setting", columns="contender", values=column)
    return pd.DataFrame({"ours": by_contender["ours"], "best": by_contender.drop(columns="ours").min(axis=1)})
