"""Studies as they lie in ``data``: tables as CSV, clusters as one archive, and what made them.

Nothing is computed here, and nothing of the machinery that makes studies is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from polca_lib.tasks.settings import RunSettings

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "data" / "paper"

_FORMER_NAMES = {"completeness": "closure", "completeness_curves": "closure_curves"}  # in studies of version 0.1


def study_folder(name: str, setting: str = "addition") -> Path:
    """Where a study is kept: in ``data/<setting>`` of the checkout, or of ``POLCA_STUDIES``."""
    return Path(os.environ.get("POLCA_STUDIES") or ROOT / "data") / setting / name


def table_file(folder: Path, name: str) -> Path:
    """File of a table of a study, under its former name if a study of version 0.1 has it so."""
    file, former = (folder / f"{n}.csv" for n in (name, _FORMER_NAMES.get(name, name)))
    return former if former.exists() and not file.exists() else file


class SavedStudy:
    """A study as it lies on disk.

    Args:
        name: of its folder.
        setting: ``addition`` or ``english``.

    Raises:
        FileNotFoundError: there is no such study.
    """

    def __init__(self, name: str, setting: str = "addition"):
        self.name, self.path = name, study_folder(name, setting)
        if not (self.path / "provenance.json").exists():
            known = sorted(path.parent.name for path in self.path.parent.glob("*/provenance.json"))
            raise FileNotFoundError(
                f"{self.path} holds no study; there are {', '.join(known) or 'none'}. `polca paper study` makes one"
            )
        self.provenance = json.loads((self.path / "provenance.json").read_text())
        # Studies of version 0.2 and before say it in their settings only.
        tolerance = self.provenance["settings"]["run"]["basis"]["tolerance"]
        self.provenance.setdefault("stages", {}).setdefault("basis: tolerance", str(tolerance))

    def has(self, name: str) -> bool:
        """Whether the study has a table."""
        return table_file(self.path, name).exists()

    def table(self, name: str) -> pd.DataFrame:
        """A table by its name, with the name of the study in column ``study``."""
        # A text may be "None" or "NA".
        return pd.read_csv(table_file(self.path, name), keep_default_na=False, na_values=[""]).assign(study=self.name)

    @cached_property
    def clusters(self) -> xr.Dataset:
        """See :func:`polca_paper.evidence.cluster_summary`."""
        store = zarr.storage.ZipStore(self.path / "clusters.zarr.zip", mode="r")
        with xr.open_zarr(store, chunks=None, zarr_format=2, consolidated=False) as summary:
            return summary.load().map(lambda v: v.astype(np.float32) if v.dtype == np.float16 else v)

    @property
    def settings(self) -> RunSettings:
        """Settings of the run, with device ``cpu``, which every machine has."""
        return saved_settings(self.provenance)

    @property
    def device(self) -> str:
        """The device that the run was made on."""
        return str(self.provenance["settings"]["run"]["device"])


def saved_settings(provenance: dict) -> RunSettings:
    """Settings of the run of a study; settings that the library got later have their defaults."""
    return RunSettings.model_validate({**provenance["settings"]["run"], "device": "cpu"})


def load_tables(names: Iterable[str], table: str, setting: str = "addition") -> pd.DataFrame:
    """The same table of several studies, one below the other.

    Raises:
        ValueError: ``names`` is not a list.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"studies = {names!r}; allowed: a list of names, such as [{names!r}]")
    return pd.concat([SavedStudy(name, setting=setting).table(table) for name in names], ignore_index=True)
