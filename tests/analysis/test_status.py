"""What is done and what is missing, told from files."""

import json

import numpy as np
import pytest
import xarray as xr
from cases import flip_bit, folder_bytes

from polca_lib.analysis.status import as_table, status
from polca_lib.storage.artefacts import Artefact
from polca_lib.storage.pieces import PieceStore

TEMPLATE = xr.Dataset(coords={"step": [0, 20, 40], "vector": [1, 2, 3]})
VARIABLES = {"gradient": (("step", "vector"), "float32"), "loss": (("step",), "float32")}


@pytest.fixture
def folder(tmp_path):
    """A basis that is begun, and projections of which five of nine pieces are done."""
    Artefact.open(tmp_path / "basis-1", "basis", {}, {})
    made = Artefact.open(tmp_path / "projection-2", "projection", {}, {})
    with made.at_work():
        store = PieceStore(made.path / "projections.zarr", TEMPLATE, VARIABLES, "step", block=("vector", 2))
        for piece in (0, 1, 2, 5, 7):
            index, part = divmod(piece, 3)
            store.write(piece, **({"loss": np.float32(index)} if part == 2 else {}))
    return tmp_path


def test_status_counts_pieces_and_names_those_missing_without_changing_anything(folder):
    before = folder_bytes(folder)
    basis, projection = status(folder, verify=True)
    assert folder_bytes(folder) == before
    assert (basis["stage"], basis["done"], basis["pieces"]) == ("basis", 0, None)
    assert (projection["stage"], projection["done"], projection["pieces"]) == ("projection", 5, 9)
    assert projection["missing"] == ["step 20, vectors 1 to 2", "step 20, vectors 3 to 3", "step 40, vectors 1 to 2",
                                     "step 40"]  # fmt: skip
    assert projection["problem"] is None
    json.dumps([basis, projection])
    text = as_table(folder, [basis, projection])
    assert "5 of 9 pieces" in text
    assert "missing: step 20, vectors 1 to 2; " in text
    assert "not begun" in text


def test_status_finds_damage_if_asked(folder):
    file = folder / "projection-2" / "projections.zarr" / "gradient" / "0.1"
    flip_bit(file, -1)
    assert status(folder)[1]["damaged"] == []
    damaged = status(folder, verify=True)[1]
    assert damaged["damaged"] == [str(file)]
    assert "recompute them with polca run" in damaged["problem"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"format_version": 3}', "KeyError: 'software'"),
        (b'{"format_version": 2, "software": {"commit": "x"}}', "format 2, not 3"),
        (b'{"format_version": 3, "stage": "../../etc", "software": {"commit": "x"}}', "KeyError"),
    ],
)
def test_status_tells_of_what_it_cannot_read(folder, content, told):
    (folder / "projection-2" / "manifest.json").write_bytes(content)
    row = next(row for row in status(folder) if row["folder"] == "projection-2")
    assert told in row["problem"]


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        status(tmp_path / "nowhere")
