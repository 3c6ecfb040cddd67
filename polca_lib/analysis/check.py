"""Look for what would go wrong with a run, before anything is computed: ``polca check``."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from polca_lib.analysis.analysis import Analysis
from polca_lib.analysis.runfile import open_analysis, open_checkpoints
from polca_lib.analysis.settings import RunFile
from polca_lib.derivatives.batches import losses_by_example, map_examples, n_examples, token_name
from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.strategy import choose
from polca_lib.derivatives.token_loss import Batch, split_examples, to_device
from polca_lib.method.checkpoint_spacing import advice
from polca_lib.method.settings import HESSIAN_KINDS, few_steps
from polca_lib.method.vectors import gaussian
from polca_lib.report.findings import PLACES, checkpoint_spacing
from polca_lib.storage.checkpoint_folders import SafetensorsFolder, StateDictFolder
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.columns import as_coordinates
from polca_lib.storage.hashing import hash_tensors
from polca_lib.storage.names import few

READ_BYTES = 2 * 2**30
"""Weights of more bytes are only read if that is asked for."""

_SPACING_SECONDS = 60.0  # most time to look at the losses of all checkpoints

_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: Literal["ok", "note", "problem"]
    about: str  # steps, weights, values, tokens, losses, settings, ...
    text: str  # of a problem: also what to do


def as_table(findings: list[Finding]) -> str:
    """The findings as text, and how many problems there are."""
    width = max((len(finding.about) for finding in findings), default=0)
    lines = [f"{finding.state:<8} {finding.about:<{width}}  {finding.text}" for finding in findings]
    problems = sum(finding.state == "problem" for finding in findings)
    notes = sum(finding.state == "note" for finding in findings)
    last = f"no problem found{f'; {notes} to note' if notes else ''}"
    last = f"{problems} problem{'s' * (problems != 1)}; mend them before polca run" if problems else last
    return "\n".join([*lines, "", last])


def check_folder(path: Path, *, read: bool = False) -> list[Finding]:
    """Check a folder of checkpoints without a model: names, steps, shapes, dtypes, and values of small runs.

    Args:
        path: folder with safetensors or ``state_dict`` files, or with subfolders that hold them.
        read: read all weights, whatever their size.
    """
    findings: list[Finding] = []
    for kind in (SafetensorsFolder, StateDictFolder):
        opened = _attempt(findings, kind.__name__, lambda kind=kind: kind(path, None))
        if opened is not None:
            # What the other kind could not read does not matter.
            notes = [finding for finding in findings if finding.state == "note"]
            return [Finding("ok", "kind", kind.__name__), *notes, *check_checkpoints(opened, read=read)]
    return findings


def check_file(path: Path, *, code: bool = True, read: bool = False) -> list[Finding]:
    """Check the run that a TOML file describes.

    Args:
        path: of the file.
        code: call the function that the file names. Without it, checkpoints are only compared with one another.
        read: read all weights, whatever their size.

    Raises:
        FileNotFoundError, ValueError: the file is missing or wrong.
    """
    run_file, findings = RunFile.read(path), []
    analysis = _attempt(findings, "opening", lambda: open_analysis(run_file)) if code else None
    if analysis is not None:
        findings += check_analysis(analysis, read=read)
        for kind in run_file.beside:
            _attempt(findings, f"beside {kind}", lambda kind=kind: analysis.on_basis(kind))
        return findings
    checkpoints = _attempt(findings, "checkpoints", lambda: open_checkpoints(run_file, None))
    if checkpoints is None:
        return findings
    steps = _attempt(findings, "steps", lambda: run_file.settings.chosen(checkpoints.steps))
    return findings + check_checkpoints(checkpoints, steps=steps, read=read)


def check_checkpoints(
    checkpoints: Checkpoints, *, steps: Sequence[int] | None = None, read: bool = False
) -> list[Finding]:
    """Check checkpoints: names, shapes and dtypes; values, too, if they are small.

    Without ``token_loss`` they are only compared with one another.

    Args:
        steps: those to check; all if not given.
        read: read all weights, whatever their size.
    """
    steps = list(steps or checkpoints.steps)
    gaps = {int(gap) for gap in np.diff(steps)}
    cadence = f", every {gaps.pop()}" if len(gaps) == 1 else ""
    many = len(steps) > 1
    findings = [Finding("ok" if many else "problem", "steps", f"{len(steps)} checkpoints: {few_steps(steps)}{cadence}")]
    if checkpoints.token_loss is not None:
        findings += [Finding("note", "checkpoints", note) for note in getattr(checkpoints, "notes", list)()]
    headers = _headers(checkpoints, steps, findings)
    if not headers:
        if all(finding.state != "problem" for finding in findings):
            findings.append(Finding("note", "weights", "names and shapes can only be read with the weights"))
        return findings
    findings += _compare_layouts(headers, "problem" if checkpoints.token_loss is None else "note")
    size = sum(tensor.nbytes for tensors in headers.values() for tensor in tensors.values())
    if read or size <= READ_BYTES:
        findings += _check_values(checkpoints, list(headers))
    else:
        findings.append(Finding("note", "values", f"{size / 2**30:.1f} GiB were not read; polca check --read does it"))
    return findings


def check_analysis(analysis: Analysis, *, read: bool = False) -> list[Finding]:
    """Check all that an analysis depends on: checkpoints, data, loss, derivatives and settings.

    The loss of all examples is computed at the first and the last checkpoint, and at all where that is quick.
    """
    checkpoints, loss = analysis.checkpoints.inner, analysis.checkpoints.token_loss
    findings = check_checkpoints(checkpoints, steps=analysis.steps, read=read)
    theta = _attempt(findings, "weights", lambda: checkpoints.theta(analysis.steps[0]))
    if theta is None:
        return findings
    # Count the tokens, and check that the loss can be taken apart and differentiated.
    batch = to_device(analysis.validation, theta.device)
    counts = _attempt(findings, "tokens", lambda: loss.check(theta, batch, "validation"))
    if counts is None:
        return findings
    each = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.min()}"
    findings.append(
        Finding("ok", "tokens", f"{counts.sum():,} of {n_examples(batch):,} examples, {each} in an example")
    )
    table = _attempt(findings, "tokens", lambda: analysis.with_places(counts))
    if table is not None and set(table) == set(PLACES):
        text = "no table of tokens: the report can't name clusters or show contexts; give Subject(tokens=...)"
        findings.append(Finding("note", "tokens", text))
    _check_training(findings, analysis, theta, batch, counts, table)
    if analysis.settings.basis.kind in HESSIAN_KINDS:
        hessian, hessian_loss = to_device(analysis.hessian, theta.device), analysis.hessian_token_loss
        if _attempt(findings, "hessian", lambda: hessian_loss.check_data(theta, hessian, "hessian")) is not None:
            findings.append(Finding("ok", "hessian", f"{n_examples(hessian):,} examples"))
            part = next(split_examples(hessian, 4))
            _attempt(findings, "hessian", lambda: HessianOperator(hessian_loss, theta, part))
    # Differentiate two examples along two directions, as the run will do.
    order = 2 if analysis.settings.projection.curvature else 1
    most_first = torch.from_numpy(np.argsort(-counts, kind="stable")[:2].copy())
    pair = map_examples(lambda tensor: tensor[most_first.to(tensor.device)], batch)
    options, before = analysis.settings.projection.differentiation(order), len(findings)
    directions = torch.stack([gaussian(seed, 0, len(theta), device=theta.device, dtype=theta.dtype) for seed in (0, 1)])
    directions /= directions.norm(dim=1, keepdim=True)
    _attempt(findings, "derivatives", lambda: choose(loss, theta, pair, directions, **options))
    if len(findings) == before:
        findings.append(
            Finding("ok", "derivatives", f"of order {order}, right in float64 on {n_examples(pair)} examples")
        )
    _attempt(findings, "settings", lambda: analysis.settings.clustering.check(analysis.steps, int(counts.sum())))
    return findings


def _attempt(findings: list[Finding], about: str, function: Callable[[], Any]) -> Any:
    """Result of ``function``; its warnings become notes, and an error becomes a problem and gives None."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            result = function()
        except Exception as error:  # models and losses may raise anything
            text = str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"
            result = None
            if not any(finding.text.startswith(text) for finding in findings):
                findings.append(Finding("problem", about, text))
    texts = [str(warning.message) for warning in told if warning.category is UserWarning]
    known = {finding.text for finding in findings}
    findings += [Finding("note", about, text) for text in texts if text not in known]
    return result


def _headers(
    checkpoints: Checkpoints, steps: Sequence[int], findings: list[Finding]
) -> dict[int, Mapping[str, Tensor]]:
    """Names and shapes of the tensors of each checkpoint that can be read without its values."""
    headers, told = {}, {}
    for step in steps:
        header = getattr(checkpoints, "header", lambda step: None)  # a class of somebody's own may have none
        of_step: list[Finding] = []
        tensors = _attempt(of_step, "weights", lambda step=step, header=header: header(step))
        for finding in of_step:
            told.setdefault(finding.text.replace(checkpoints.name(step), ""), []).append(finding)
        if tensors is not None:
            headers[step] = tensors
    # What is wrong with all checkpoints is said once.
    for first, *others in told.values():
        more = f" (and {len(others)} more checkpoints alike)" if others else ""
        findings.append(first._replace(text=first.text + more))
    return headers


def _compare_layouts(
    headers: Mapping[int, Mapping[str, Tensor]], state: Literal["note", "problem"]
) -> Iterator[Finding]:
    """Compare names, shapes and dtypes of all checkpoints with those of most.

    Args:
        state: of what differs; all headers that fit the model may be read, such as those without a tied weight.
    """
    layouts = {step: {name: tuple(t.shape) for name, t in tensors.items()} for step, tensors in headers.items()}
    common = Counter(tuple(layout.items()) for layout in layouts.values()).most_common(1)[0][0]
    usual = dict(common)
    numbers = sum(math.prod(shape) for shape in usual.values())
    same = [step for step, layout in layouts.items() if layout == usual]
    yield Finding("ok", "weights", f"{len(usual)} tensors, {numbers:,} numbers, alike in {len(same)} of {len(layouts)}")
    for step, layout in layouts.items():
        told = [f"lacks {few(sorted(usual.keys() - layout.keys()))}"] * bool(usual.keys() - layout.keys())
        told += [f"has also {few(sorted(layout.keys() - usual.keys()))}"] * bool(layout.keys() - usual.keys())
        shapes = [
            f"{n} {layout[n]} instead of {usual[n]}" for n in layout.keys() & usual.keys() if layout[n] != usual[n]
        ]
        told += [f"has {few(sorted(shapes))}"] * bool(shapes)
        if told:
            advice = "; is it of another model? leave it out with steps or a pattern" * (state == "problem")
            yield Finding(state, "weights", f"step {step} {', '.join(told)}{advice}")
    dtypes = {step: ", ".join(sorted({str(t.dtype)[6:] for t in headers[step].values()})) for step in same}
    groups = {dtype: [step for step in dtypes if dtypes[step] == dtype] for dtype in dtypes.values()}
    told = (
        "; ".join(f"{dtype} at {few_steps(steps)}" for dtype, steps in groups.items())
        if len(groups) > 1
        else next(iter(groups))
    )
    yield Finding("note" if len(groups) > 1 else "ok", "dtypes", told)


def _check_values(checkpoints: Checkpoints, steps: list[int]) -> list[Finding]:
    """Read the weights: look for equal checkpoints, and for what is not finite."""
    findings, digests, wrong = [], {}, []
    for step in steps:
        if checkpoints.token_loss is None:
            tensors = _attempt(findings, "weights", lambda step=step: checkpoints.tensors(step))
        else:
            theta = _attempt(findings, "weights", lambda step=step: checkpoints.theta(step))
            tensors = None if theta is None else {"theta": theta}
        if tensors is not None:
            digests.setdefault(hash_tensors(tensors), []).append(step)
            floating = (t for t in tensors.values() if t.is_floating_point())
            wrong += [step] if not all(t.isfinite().all() for t in floating) else []
    equal = [group for group in digests.values() if len(group) > 1]
    if equal and len(digests) == 1:
        findings.append(
            Finding("problem", "values", "all checkpoints hold the same weights; check how they were saved")
        )
    else:
        text = "{} hold the same weights; if that is a mistake, leave some out with steps"
        findings += [Finding("note", "values", text.format(few_steps(group))) for group in equal]
    if wrong:
        text = f"weights are not finite at {few_steps(wrong)}; leave these checkpoints out with steps"
        findings.append(Finding("problem", "values", text))
    if not equal and not wrong:
        findings.append(Finding("ok", "values", f"all finite and different, in {sum(map(len, digests.values()))}"))
    return findings


@torch.no_grad()
def _check_training(
    findings: list[Finding],
    analysis: Analysis,
    theta: Tensor,
    batch: Batch,
    counts: Int[np.ndarray, " example"],
    table: pd.DataFrame | None,
) -> None:
    """Losses at both ends of training, and between them where that is quick: do checkpoints see what is learned?"""
    checkpoints, loss, losses = analysis.checkpoints.inner, analysis.checkpoints.token_loss, {}

    def measure(step: int) -> bool:
        point = theta if step == first else _attempt(findings, "weights", lambda: checkpoints.theta(step))
        if point is not None:
            losses[step], _ = losses_by_example(lambda part: loss(point, part), batch, counts)
        return point is not None

    start, (first, *between, last) = time.perf_counter(), analysis.steps
    measured = [step for step in (first, last) if measure(step)]
    ends = [_judge_losses(losses[step], counts, step) for step in measured]
    findings += ends
    if len(measured) < 2 or any(finding.state == "problem" for finding in ends):
        return
    # A loss that rises hints at wrong targets, or another model.
    if losses[last].mean() >= losses[first].mean():
        text = f"the mean loss does not fall from step {first} to step {last}; is the model trained on such targets?"
        findings.append(Finding("note", "losses", text))
    elif (time.perf_counter() - start) * len(analysis.steps) / 2 > _SPACING_SECONDS:
        findings.append(Finding("note", "spacing", "not measured, for want of time; the report will tell it"))
    elif all(measure(step) for step in between):
        every = [losses[step].double().cpu().numpy() for step in analysis.steps]
        found = xr.Dataset({"loss": (("step", "token"), every)}, {"step": analysis.steps})
        told = advice(checkpoint_spacing(found if table is None else found.assign_coords(as_coordinates(table))))
        findings.append(Finding("ok" if told.startswith("fit") else "note", "spacing", told))


def _judge_losses(losses: Tensor, counts: Int[np.ndarray, " example"], step: int) -> Finding:
    """Mean and range of the losses at a checkpoint, or the first token whose loss is not finite."""
    if len(odd := (~losses.isfinite()).nonzero()[:, 0].tolist()):
        where = token_name(odd[0], counts)
        text = (
            f"step {step}: {losses[odd[0]].item()} for {where}, not finite for {len(odd):,} of {len(losses):,} tokens"
        )
        return Finding("problem", "losses", text)
    low, mean, high = losses.min().item(), losses.mean().item(), losses.max().item()
    return Finding("ok", "losses", f"step {step}: mean {mean:.4g} nats, from {low:.3g} to {high:.4g}")
