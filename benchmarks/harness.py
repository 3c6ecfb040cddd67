"""Timing side by side: contenders take turns in one process, and every figure becomes a record in a JSON file."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.storage.artefacts import software

RESULTS = Path(__file__).parent / "results"
SIZES = ("smoke", "laptop", "paper")
GIB = 2**30
_REST = 0.3  # seconds before a turn, until the threads that the last one left spinning sleep

Record = dict[str, Any]


@dataclass
class Trial:
    """What one contender does in one turn."""

    run: Callable[[], Any]
    units: int = 1  # what a time is divided by, such as the tokens of one run
    precision: torch.dtype = torch.float32  # of its matrix products
    keys: Record = field(default_factory=dict)  # further keys of its record


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["laptop"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--device", default="cpu")
    return parser


def compare(
    question: str,
    setting: str,
    contenders: Mapping[str, Callable[[], Trial]],
    *,
    ours: str,
    repeats: int,
    device: str,
    examine: Callable[[Any], Record] | None = None,
    with_rate: bool = False,
    **keys: Any,
) -> list[Record]:
    """Time ``contenders`` in turns: a warm-up each, then ``repeats`` rounds, each starting with another one.

    Args:
        question, setting: of the records.
        contenders: by name, what sets one up. One that raises, there or later, leaves a record with the error.
        ours: the contender that ``ratio_to_ours`` refers to: their median over this one's.
        repeats: rounds.
        device: where it runs.
        examine: result of the warm-up -> further keys of its record, such as an error.
        with_rate: measure the rate of a large matrix product before every turn; say what share of the best is reached.
        keys: further keys of every record.
    """
    print(f"{question}: {setting}", file=sys.stderr)
    # What is alive now need not be looked through for garbage before every turn.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    ready: dict[str, Trial] = {}
    times: dict[str, list[float]] = {}
    found: dict[str, Record] = {name: {} for name in contenders}
    rates: dict[torch.dtype, float] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            ready.pop(name, None)
            found[name] = {"error": describe(error)}
            print(f"  {name}: {found[name]['error']}", file=sys.stderr)

    def warm_up(name: str, prepare: Callable[[], Trial]) -> None:
        trial = prepare()
        with FlopCounterMode(display=False) as counter:
            result = trial.run()
        found[name] = {"flops": counter.get_total_flops() / trial.units, **(examine(result) if examine else {})}
        ready[name], times[name] = trial, []

    def turn(name: str) -> None:
        time.sleep(_REST)
        times[name].append(seconds(ready[name].run, device) / ready[name].units)

    for name, prepare in contenders.items():
        attempt(name, lambda name=name, prepare=prepare: warm_up(name, prepare))
    for index in range(repeats):
        names = list(ready)
        start = index % max(len(names), 1)
        for name in names[start:] + names[:start]:
            if with_rate:
                dtype = ready[name].precision
                rates[dtype] = max(rates.get(dtype, 0.0), matrix_rate(dtype, device))
            attempt(name, lambda name=name: turn(name))

    reference = statistics.median(times[ours]) if ours in ready else None
    records = []
    for name in contenders:
        timed = times[name] if name in ready else []
        median = statistics.median(timed) if timed else None
        record = {
            "question": question,
            "setting": setting,
            "contender": name,
            "median_s": median,
            "low_s": min(timed, default=None),
            "high_s": max(timed, default=None),
            "ratio_to_ours": median / reference if median and reference else None,
            "repeats": len(timed),
            **provenance(device),
            **keys,
            **(ready[name].keys if name in ready else {}),
            **found[name],
        }
        if median and rates:
            record["matrix_rate"] = rates[ready[name].precision]
            record["fraction_of_peak"] = record["flops"] / median / record["matrix_rate"]
        records.append(record)
        if median:
            print(f"  {name}: {median:.3g} s, ratio {record['ratio_to_ours'] or float('nan'):.3g}", file=sys.stderr)
    return records


def write(folder: Path, records: list[Record]) -> None:
    """Put records into ``<question>.json``, in place of those of the same setting and kind of device."""
    folder.mkdir(parents=True, exist_ok=True)

    def place(record: Record) -> tuple[str, str]:
        return record["setting"], record["device"].split(",")[0]

    for question in dict.fromkeys(record["question"] for record in records):
        file = folder / f"{question.replace(' ', '_')}.json"
        new = [_finite(record) for record in records if record["question"] == question]
        old = json.loads(file.read_text()) if file.exists() else []
        places = {place(record) for record in new}
        kept = [record for record in old if place(record) not in places]
        file.write_text(json.dumps(kept + new, indent=1, allow_nan=False) + "\n")


def _finite(record: Record) -> Record:
    """JSON knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def provenance(device: str) -> Record:
    """What every record says of where it comes from."""
    return {
        "device": device_name(device),
        "torch": software()["torch"],
        "commit": software()["commit"],
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """Kind of device, threads or model."""
    if device.startswith("cuda"):
        return f"cuda, {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        model = {name.strip(): value.strip() for name, value in fields.items()}.get("model name", model)
    threads = torch.get_num_threads()
    return f"cpu, {threads} {'thread' if threads == 1 else 'threads'}, {model}"


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call."""
    gc.collect()
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second in one product of two square matrices."""
    matrix = _matrix(dtype, device)
    return 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix, device)


@cache
def _matrix(dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(2048, 2048, device=device).to(dtype)


class PeakMemory:
    """Growth of the process's memory inside the block, in bytes, at its peak: ``with PeakMemory("cpu") as peak``.

    On the CPU a thread reads the resident size every millisecond.
    """

    growth: int

    def __init__(self, device: str):
        self._device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.startswith("cuda"):
            _synchronise(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        self._before = self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: object) -> None:
        if self._device.startswith("cuda"):
            self._peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._done.set()
            self._thread.join()
        self.growth = self._peak - self._before


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def describe(error: Exception) -> str:
    """One line for a record."""
    lines = str(error).splitlines() or [""]
    hint = "; make benchmarks installs it" if isinstance(error, ModuleNotFoundError) else ""
    return f"{type(error).__name__}: {lines[0][:200]}{hint}"
