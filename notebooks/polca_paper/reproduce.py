"""Make, and keep, everything the book says about one run: the one command behind the pages of a study.

    python -m polca_paper.reproduce --preset paper --seed 0
    python -m polca_paper.reproduce --task grammar --preset laptop --seed 0

Each table is a CSV file in ``data/addition/<preset>-<seed>`` or ``data/english/<task>-<preset>-<seed>``, written as
soon as it is there, so that a study that is stopped goes on where it was; ``provenance.json`` says what made them.
Pages read these files, wherever they are built.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from polca_paper import english, evidence
from polca_lib.storage.artefacts import differences, software, write_atomically
from polca_lib.method.settings import Scaling
from polca_lib.tasks.settings import PRESET_NAMES, RunConfig, TaskName, parse_assignments
from polca_paper.language_study import LanguageStudy
from polca_lib.tasks.run import ROOT, Run
from polca_paper.study import BASES, Study


def folder(name: str, setting: str = "addition") -> Path:
    """Where a study is kept: in ``data/<setting>`` of the checkout, or of ``POLCA_STUDIES``."""
    return Path(os.environ.get("POLCA_STUDIES") or ROOT / "data") / setting / name


def setting_of(study: Study) -> str:
    """The paper's setting that a study is of: ``addition`` or ``english``."""
    return "addition" if study.run.config.task == "addition" else "english"


class Kept:
    """A study as it lies on disk.

    Args:
        name: of its folder.
        scaling: of the curves whose clusters the paper's claims are judged by; the paper says nothing of any.
        setting: ``addition`` or ``english``.

    Raises:
        FileNotFoundError: there is no such study.
    """

    def __init__(self, name: str, scaling: Scaling = "raw", setting: str = "addition"):
        self.name, self.path, self.scaling = name, folder(name, setting), scaling
        if not (self.path / "provenance.json").exists():
            known = sorted(path.parent.name for path in self.path.parent.glob("*/provenance.json"))
            raise FileNotFoundError(
                f"{self.path} holds no study; there are {', '.join(known) or 'none'}. "
                "python -m polca_paper.reproduce makes one"
            )
        self.provenance = json.loads((self.path / "provenance.json").read_text())

    def table(self, name: str) -> pd.DataFrame:
        """A table by its name, with the name of the study in column ``study``."""
        # A text may be "None" or "NA".
        rows = pd.read_csv(self.path / f"{name}.csv", keep_default_na=False, na_values=[""])
        return rows.assign(study=self.name)

    @cached_property
    def clusters(self) -> xr.Dataset:
        """See :func:`polca_paper.evidence.cluster_summary`."""
        store = zarr.storage.ZipStore(self.path / "clusters.zarr.zip", mode="r")
        with xr.open_zarr(store, chunks=None, zarr_format=2, consolidated=False) as summary:
            return summary.load().map(lambda v: v.astype(np.float32) if v.dtype == np.float16 else v)

    @property
    def settings(self) -> dict[str, object]:
        """Of the run, by dotted name."""
        return pd.json_normalize(self.provenance["settings"]["run"]).iloc[0].to_dict()

    @property
    def config(self) -> RunConfig:
        """Of the run."""
        return RunConfig.model_validate({**self.provenance["settings"]["run"], "device": "cpu"})


def gather(names: Iterable[str], table: str, setting: str = "addition") -> pd.DataFrame:
    """The same table of several studies, one below the other."""
    return pd.concat([Kept(name, setting=setting).table(table) for name in names], ignore_index=True)


def complete(study: Study, name: str, only: Iterable[str] = ()) -> None:
    """Make and keep what is missing of a study.

    Args:
        study: what to make tables of.
        name: of the folder.
        only: tables; all if empty.

    Raises:
        ValueError: the folder holds a study of other settings, or a table is unknown.
    """
    room = english if setting_of(study) == "english" else evidence
    if unknown := set(only) - set(room.TABLES):
        raise ValueError(f"tables {sorted(unknown)} are unknown; allowed: {', '.join(room.TABLES)}")
    path = folder(name, setting_of(study))
    record = path / "provenance.json"
    if not record.exists():
        path.mkdir(parents=True, exist_ok=True)
        _write(record, {"settings": study.settings, "tables": {}, "software": software()})
    elif found := list(differences(_settings(record), study.settings)):
        field, theirs, ours = found[0]
        raise ValueError(
            f"{path} holds a study with {field} = {theirs!r}, not {ours!r}; give this one another --name, or delete "
            "the folder to have it made anew"
        )
    for table in only or room.TABLES:
        if not (path / f"{table}.csv").exists():
            start = time.perf_counter()
            found = room.TABLES[table](study)
            write_atomically(path / f"{table}.csv", found.to_csv(index=False, float_format="%.6g").encode())
            _note(record, study, table, time.perf_counter() - start)
    if not only and not (path / "clusters.zarr.zip").exists():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=path) as place:
            room.cluster_summary(study).to_zarr(f"{place}/clusters.zarr", zarr_format=2, consolidated=False)
            archive = Path(shutil.make_archive(f"{place}/clusters", "zip", f"{place}/clusters.zarr"))
            archive.replace(path / "clusters.zarr.zip")
        _note(record, study, "clusters", time.perf_counter() - start)


def _settings(file: Path) -> dict[str, object]:
    """Of a kept study; those that came into the library later are at what they were: their defaults."""
    settings = json.loads(file.read_text())["settings"]
    run = RunConfig.model_validate({**settings["run"], "device": "cpu"}).model_dump(mode="json")
    return {**settings, "run": {**run, "device": settings["run"]["device"]}}


def _note(file: Path, study: Study, table: str, seconds: float) -> None:
    """Keep what made a table: its commit and wall time, and those of the stages before it.

    A table of a run that was made anew, on another day or machine, says itself what of its stages was different.
    """
    record = json.loads(file.read_text())
    entry: dict[str, object] = {"commit": software()["commit"], "seconds": round(seconds, 1)}
    stages = record.setdefault("stages", {})
    now = {**study.run.provenance()["value"].to_dict(), **{k: v for k, v in software().items() if k != "commit"}}
    now |= study.notes
    if others := {name: value for name, value in now.items() if stages.setdefault(name, value) != value}:
        entry["stages"] = others
    record["tables"][table] = entry
    _write(file, record)
    print(f"{file.parent.name}: {table}, {seconds:.0f} s", flush=True)


def _write(file: Path, record: dict) -> None:
    write_atomically(file, json.dumps(record, indent=1).encode() + b"\n")


def main() -> None:
    """Run a study: the pipeline on all bases, then every table; or finish one that was stopped."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--task", choices=get_args(TaskName), default="addition")
    parser.add_argument("--preset", choices=PRESET_NAMES, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the run")
    parser.add_argument("--name", help="of the study; task, preset and seed if not given")
    parser.add_argument(
        "--bases", help=f"that are compared; default: {','.join(BASES)}, and hessian,random for a task of text"
    )
    parser.add_argument(
        "--ablation-curvature",
        type=int,
        metavar="N",
        help="examples on which curvature along the bases beside the first is measured; 0 for none; default: 16, or as "
        "many as along the first for a task of text",
    )
    parser.add_argument("--no-variants", action="store_true", help="specification curve on one Hessian basis alone")
    parser.add_argument(
        "--spacy", default="", metavar="PIPELINE", help="spaCy pipeline that tags Wikipedia: name or path"
    )
    parser.add_argument("--tables", default="", help="only these, separated by commas")
    arguments = parser.parse_args()
    try:
        own = {"task": arguments.task, "seed": arguments.seed, "device": arguments.device}
        run = Run.from_preset(arguments.preset, **{**own, **parse_assignments(arguments.set)})
        name = arguments.name or f"{arguments.preset}-{arguments.seed}"
        if arguments.task == "addition":
            bases = tuple((arguments.bases or ",".join(BASES)).split(","))
            sample = 16 if arguments.ablation_curvature is None else arguments.ablation_curvature
            study = Study(run, bases, sample, not arguments.no_variants)
        else:
            bases = tuple((arguments.bases or "hessian,random").split(","))
            study = LanguageStudy(run, bases, arguments.ablation_curvature, arguments.spacy)
            name = arguments.name or f"{arguments.task}-{name}"
        complete(study, name, [table for table in arguments.tables.split(",") if table])
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
