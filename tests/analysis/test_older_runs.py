"""Runs made by version 0.1 open as they are: nothing is computed again, nothing is written."""

import tarfile
from pathlib import Path

import pytest
from cases import TINY_RUN, folder_bytes

from polca_lib import Run
from polca_lib.analysis.runfile import open_analysis
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks.settings import RunSettings

MADE = Path(__file__).parent / "data" / "runs-0.1.tar.xz"


def unpack(folder):
    """Unpack the runs; Python before 3.11.4 has no filters."""
    with tarfile.open(MADE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    unpack(tmp_path)
    monkeypatch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
    return tmp_path


def contents(folder):
    return {name: content for name, content in folder_bytes(folder).items() if not name.endswith((".lock", ".pyc"))}


def test_run_of_the_papers_tasks_opens_without_its_checkpoints(folder, monkeypatch):
    monkeypatch.setattr(TokenLoss, "__call__", lambda *a: pytest.fail("a loss was computed"))
    before = contents(folder / "tiny")
    run = Run(RunSettings.from_preset("smoke", **TINY_RUN), folder / "tiny")
    assert dict(run.projections.sizes) == {"step": 5, "token": 48, "vector": 2}
    assert dict(run.basis.sizes) == {"vector": 2, "parameter": 898}
    assert "curvature" not in run.on_basis("random").projections
    assert contents(folder / "tiny") == before


def test_run_of_ones_own_opens_and_is_read_whole(folder):
    before = contents(folder / "own")
    analysis = open_analysis(folder / "own" / "polca.toml", verify=True)
    assert analysis.labels.shape == (24, 80)
    assert len(analysis.breakthroughs) == 8
    assert contents(folder / "own") == before
