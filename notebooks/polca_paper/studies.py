"""Make and keep everything that the book says about one run.

Each table is a CSV file in ``data/addition/<preset>-<seed>`` or ``data/english/<task>-<preset>-<seed>``. It is written
as soon as it is computed, so that a study that was stopped resumes; ``provenance.json`` says what made it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from polca_lib.storage.artefacts import differences, software, write_atomically
from polca_paper import english, evidence
from polca_paper.saved_study import saved_settings, study_folder, table_file
from polca_paper.study import Study


def complete(study: Study, name: str, only: Iterable[str] = ()) -> None:
    """Make and keep what is missing of a study.

    Args:
        study: what to make tables of.
        name: of the folder.
        only: tables; all if empty.

    Raises:
        ValueError: the folder holds a study of other settings, or a table is unknown.
    """
    setting, book = ("addition", evidence) if study.run.settings.task == "addition" else ("english", english)
    if unknown := set(only) - set(book.TABLES):
        raise ValueError(f"tables {sorted(unknown)} are unknown; allowed: {', '.join(book.TABLES)}")
    path = study_folder(name, setting)
    record = path / "provenance.json"
    if record.exists() and study.run.settings.basis.tolerance is None:
        # Finish a study with the tolerance it was begun with, which may be the default of an earlier version.
        kept = {"tolerance": saved_settings(json.loads(record.read_text())).basis.tolerance}
        settings = study.run.settings
        basis = settings.basis.model_copy(update=kept)
        study.run = study.run.with_settings(settings.model_copy(update={"basis": basis}))
    if not record.exists():
        path.mkdir(parents=True, exist_ok=True)
        _write(record, {"settings": study.settings, "tables": {}, "software": software()})
    elif changes := list(differences(_settings(record), study.settings)):
        field, theirs, ours = changes[0]
        raise ValueError(
            f"{path} holds a study with {field} = {theirs!r}, not {ours!r}; give this one another --name, or delete "
            "the folder to have it made anew"
        )
    for table in only or book.TABLES:
        if not table_file(path, table).exists():
            start = time.perf_counter()
            rows = book.TABLES[table](study)
            write_atomically(path / f"{table}.csv", rows.to_csv(index=False, float_format="%.6g").encode())
            _note(record, study, table, time.perf_counter() - start)
    if not only and not (path / "clusters.zarr.zip").exists():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=path) as folder:
            book.cluster_summary(study).to_zarr(f"{folder}/clusters.zarr", zarr_format=2, consolidated=False)
            archive = Path(shutil.make_archive(f"{folder}/clusters", "zip", f"{folder}/clusters.zarr"))
            archive.replace(path / "clusters.zarr.zip")
        _note(record, study, "clusters", time.perf_counter() - start)


def _settings(file: Path) -> dict[str, object]:
    """Settings of a kept study, with those that the library got later."""
    record = json.loads(file.read_text())
    run = saved_settings(record).model_dump(mode="json")
    return {**record["settings"], "run": {**run, "device": record["settings"]["run"]["device"]}}


def _note(file: Path, study: Study, table: str, seconds: float) -> None:
    """Keep the commit and wall time of a table, and provenance of the stages before it.

    If the run was made anew, on another day or machine, the entry of the table says what of its stages was different.
    """
    record = json.loads(file.read_text())
    entry: dict[str, object] = {"commit": software()["commit"], "seconds": round(seconds, 1)}
    stages = record.setdefault("stages", {})
    now = {**study.run.provenance()["value"].to_dict(), **software(), **study.notes}
    del now["commit"]
    if changed := {name: value for name, value in now.items() if stages.setdefault(name, value) != value}:
        entry["stages"] = changed
    record["tables"][table] = entry
    _write(file, record)
    print(f"{file.parent.name}: {table}, {seconds:.0f} s", flush=True)


def _write(file: Path, record: dict) -> None:
    write_atomically(file, json.dumps(record, indent=1).encode() + b"\n")
