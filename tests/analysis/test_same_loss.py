"""A run is opened with the loss that it was computed with, by every process, or not at all."""

import importlib
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from cases import Mlp, folder_bytes, mlp_batch, mlp_loss, tiny_checkpoints
from torch import nn

from polca_lib import Run
from polca_lib.analysis.analysis import Analysis
from polca_lib.analysis.engine import EngineFailure, parallel_backend
from polca_lib.analysis.runfile import open_analysis
from polca_lib.analysis.status import status
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import ArtefactMismatch
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.storage.pieces import PieceStore

BATCH, SAMPLE = mlp_batch(20, torch.float32), mlp_batch(7, torch.float32, seed=1)
SETTINGS = {"basis": {"n_vectors": 3, "tolerance": 1e-3}, "clustering": {"min_cluster_size": 5}, "threads": 1}


@pytest.fixture
def checkpoints(tmp_path):
    return tiny_checkpoints(tmp_path / "checkpoints", range(0, 41, 10))


def analyse(tmp_path, checkpoints, loss=mlp_loss, model=None, **settings):
    """The run in one folder, with another loss or model."""
    if loss is not mlp_loss or model is not None:
        checkpoints = CheckpointFolder(checkpoints.path, TokenLoss(Mlp() if model is None else model, loss))
    return Analysis(tmp_path / "run", checkpoints, BATCH, hessian=SAMPLE, **{**SETTINGS, **settings})


def smooth(model, batch):
    logits, targets = model(batch[0]).flatten(0, 1), batch[1].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def detached(model, batch):
    """Equal losses, unequal gradients."""
    logits = model(batch[0]).flatten(0, 1)
    return nn.functional.nll_loss(
        logits - logits.logsumexp(-1, keepdim=True).detach(), batch[1].flatten(), reduction="none"
    )


class Other(Mlp):
    """Equal names and shapes, another forward pass."""

    def forward(self, inputs):
        return self.layers[2](self.layers[0](inputs).relu())


Other.__name__ = "Mlp"


@pytest.mark.parametrize(("loss", "model"), [(smooth, None), (detached, None), (mlp_loss, Other())])
def test_finished_run_is_not_opened_with_another_loss(tmp_path, checkpoints, loss, model):
    first = analyse(tmp_path, checkpoints)
    expected = first.labels
    with pytest.raises(
        ArtefactMismatch,
        match=r"was begun with another loss.*use another folder of results, or delete .*-\w+ to recompute",
    ):
        analyse(tmp_path, checkpoints, loss, model).labels  # noqa: B018
    with pytest.raises(ArtefactMismatch, match="basis-"):
        analyse(tmp_path, checkpoints, loss, model).basis  # noqa: B018
    again = analyse(tmp_path, checkpoints)
    assert again.labels.equals(expected)
    assert again.provenance()["value"]["projection: loss"] == "as at the start of the stage (step 0)"


@pytest.mark.parametrize("loss", [smooth, detached])
def test_basis_of_another_loss_is_not_projected_on(tmp_path, checkpoints, loss):
    analyse(tmp_path, checkpoints).basis  # noqa: B018
    with pytest.raises(ArtefactMismatch, match="basis-"):
        analyse(tmp_path, checkpoints, loss).projections  # noqa: B018
    assert [row["done"] for row in status(tmp_path / "run") if row["stage"] == "projection"] in ([], [0])


def test_changed_loss_of_the_hessian_alone_is_noticed(tmp_path, checkpoints):
    def run(factor):
        settings = {"basis": {**SETTINGS["basis"], "targets": "all"}}
        return analyse(tmp_path, checkpoints, hessian_loss=lambda m, b: factor * mlp_loss(m, b), **settings)

    run(2).basis  # noqa: B018
    run(2.0001).basis  # noqa: B018
    with pytest.raises(ArtefactMismatch, match="basis-"):
        run(3).basis  # noqa: B018


@pytest.mark.parametrize("kind", ["random", "trajectory", "parameters"])
def test_basis_that_does_not_depend_on_the_loss_serves_another(tmp_path, checkpoints, kind, monkeypatch):
    analyse(tmp_path, checkpoints, basis={"kind": kind, "n_vectors": 3}).basis  # noqa: B018
    assert analyse(tmp_path, checkpoints, smooth, basis={"kind": kind, "n_vectors": 3}).projections.sizes["vector"] == 3


def count_calls(monkeypatch):
    calls, call = [], TokenLoss.__call__
    monkeypatch.setattr(TokenLoss, "__call__", lambda self, *a: calls.append(1) or call(self, *a))
    return calls


def test_opening_asks_once_and_on_three_examples(tmp_path, checkpoints, monkeypatch):
    analyse(tmp_path, checkpoints, tokens=pd.DataFrame({"n": range(40)})).labels  # noqa: B018
    calls = count_calls(monkeypatch)
    again = analyse(tmp_path, checkpoints, tokens=pd.DataFrame({"n": range(40)}))
    for run in (again, again, again.with_settings(again.settings), again.on_basis("hessian")):
        _ = run.basis, run.projections, run.labels
    assert len(calls) == 6  # three of the sample, three of the examples


class Remote(CheckpointFolder):
    """Checkpoints that are elsewhere, such as on a hub."""

    def identity(self, step):
        return f"commit {step}"

    @property
    def steps(self):
        return [0, 10, 20, 30, 40]


def test_results_open_without_checkpoints_and_say_that_nothing_was_compared(tmp_path, checkpoints):
    checkpoints = Remote(checkpoints.path, checkpoints.token_loss)
    expected = analyse(tmp_path, checkpoints, tokens=pd.DataFrame({"n": range(40)})).projections
    for step in checkpoints.steps:
        checkpoints.file(step).unlink()
    again = analyse(tmp_path, checkpoints, tokens=pd.DataFrame({"n": range(40)}))
    assert again.projections.equals(expected)
    assert again.provenance()["value"]["projection: loss"] == "not compared: no model and checkpoint can be run here"
    # If it would have to be fetched, it is not asked for.
    checkpoints.at_hand, checkpoints.theta = lambda step: False, lambda step: pytest.fail("a checkpoint was fetched")
    assert analyse(tmp_path, checkpoints, tokens=pd.DataFrame({"n": range(40)})).projections.equals(expected)


class Adapted(Mlp):
    """A frozen base, a buffer and a trainable adapter."""

    def __init__(self, base=1.0, scale=1.0):
        super().__init__()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.base = nn.Parameter(base * torch.randn(3, 3, generator=generator), requires_grad=False)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("derived", torch.ones(3) * scale, persistent=False)

    def forward(self, inputs):
        return self.layers(inputs) * self.scale + inputs @ self.base


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "run").glob("*-*"))


@pytest.mark.parametrize("changed", [{"base": 1.0001}, {"scale": 2.0}])
def test_another_frozen_weight_or_buffer_is_another_stage(tmp_path, checkpoints, changed):
    def run(**arguments):
        return analyse(tmp_path, checkpoints, model=Adapted(**arguments)).projections

    run()
    first = folders(tmp_path)
    run()
    assert folders(tmp_path) == first
    run(**changed)
    assert len(folders(tmp_path)) == 2 * len(first) == 4


def test_stages_from_before_frozen_weights_counted_are_opened_and_compared(tmp_path, checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Analysis, "_fixed", {})
        analyse(tmp_path, checkpoints, model=Adapted()).projections  # noqa: B018
    first = folders(tmp_path)
    for file in (tmp_path / "run").glob("projection-*/witness.json"):
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
        analyse(tmp_path, checkpoints, model=Adapted()).projections  # noqa: B018
    assert folders(tmp_path) == first
    with pytest.raises(ArtefactMismatch, match="basis-"):
        analyse(tmp_path, checkpoints, model=Adapted(2.0)).projections  # noqa: B018
    for file in (tmp_path / "run").glob("basis-*/witness.json"):
        file.unlink()
    old = analyse(tmp_path, checkpoints, model=Adapted())
    _ = old.basis, old.projections
    about = old.provenance()["value"]
    assert about["basis: loss"].startswith("not compared")
    assert about["projection: loss"].startswith("as at")
    with pytest.raises(ArtefactMismatch, match="projection-"):
        analyse(tmp_path, checkpoints, model=Adapted(2.0)).projections  # noqa: B018


def test_models_without_frozen_weights_keep_their_keys(tmp_path, checkpoints):
    assert analyse(tmp_path, checkpoints)._fixed == {}


# What a worker computes.


class SmallGpt(Mlp):
    def __init__(self):
        super().__init__()
        layers = self.layers
        self.run = lambda x: layers(x)

    def forward(self, inputs):
        return self.run(inputs)


@pytest.mark.slow
def test_workers_compute_with_the_weights_of_the_checkpoints(tmp_path, checkpoints):
    here = analyse(tmp_path / "here", checkpoints, model=SmallGpt())
    expected = here.projections.load()
    there = analyse(tmp_path / "there", checkpoints, model=SmallGpt(), code=[os.path.dirname(__file__)])
    with parallel_backend("processes", workers=2):
        assert there.projections.load().equals(expected)
    plain = analyse(tmp_path / "plain", checkpoints)
    assert plain.projections.load().equals(expected)


MODULE = """
import torch
from cases import mlp_loss
SCALE = torch.tensor(1.0)

def loss(model, batch):
    return SCALE * mlp_loss(model, batch)
"""


def test_worker_with_another_loss_refuses_to_work(tmp_path, checkpoints, monkeypatch):
    (tmp_path / "scaled_loss.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("scaled_loss")
    try:
        module.SCALE = torch.tensor(2.0)  # a worker imports the module anew
        run = analyse(tmp_path, checkpoints, module.loss, code=[str(tmp_path), *sys.path])
        with (
            parallel_backend("processes", workers=2),
            pytest.raises(
                EngineFailure, match=r'a worker computes loss .*, not .*step-00000000.*engine = "in-process"'
            ),
        ):
            run.projections  # noqa: B018
        store = PieceStore.open(run._projection.path / "projections.zarr")
        assert len(store.missing()) == store.pieces
        assert run.projections.sizes["token"] == 40
    finally:
        del sys.modules["scaled_loss"]


# A disk that takes no files.


def test_finished_results_open_on_a_read_only_disk(tmp_path, checkpoints, read_only):
    first = analyse(tmp_path, checkpoints)
    labels, before = first.labels, folder_bytes(tmp_path / "run")
    read_only(tmp_path / "run")
    again = analyse(tmp_path, checkpoints, verify=True)
    assert again.labels.equals(labels)
    assert again.report(tmp_path / "elsewhere.html").stat().st_size > 1e6
    assert all(row["problem"] is None for row in status(tmp_path / "run", verify=True))
    assert folder_bytes(tmp_path / "run") == before
    with pytest.raises(OSError, match=r"Read-only file system: it can't be written or locked.*use a folder.*clusters-"):
        analyse(tmp_path, checkpoints, clustering={"min_cluster_size": 6}).labels  # noqa: B018


def test_unfinished_results_on_a_read_only_disk_name_the_lock(tmp_path, checkpoints, read_only):
    run = analyse(tmp_path, checkpoints)
    run.basis  # noqa: B018
    PieceStore.open(run._basis.path / "basis.zarr")._writable("_done")[1] = False
    read_only(tmp_path / "run")
    with pytest.raises(OSError, match=r"Read-only file system: it can't be written or locked.*\.lock"):
        analyse(tmp_path, checkpoints).basis  # noqa: B018


# The run of version 0.1, and the paper's tasks.


def test_finished_run_of_version_01_is_compared_too(tmp_path):
    from test_older_runs import unpack

    unpack(tmp_path)
    analysis = open_analysis(tmp_path / "own" / "polca.toml")
    assert analysis.labels.shape == (24, 80)
    about = analysis.provenance()["value"]
    assert about["basis: loss"] == "not compared: no losses were stored that can be compared"
    assert about["projection: loss"] == "as at the start of the stage (step 0)"
    code = tmp_path / "own" / "my_run.py"
    sys.modules.pop("my_run")
    code.write_text(code.read_text().replace('reduction="none"', 'reduction="none", label_smoothing=0.05'))
    with pytest.raises(ArtefactMismatch, match="projection-3f615041f894 was begun with another loss"):
        open_analysis(tmp_path / "own" / "polca.toml").labels  # noqa: B018


def test_with_settings_keeps_what_a_run_was_opened_with(tmp_path):
    run = Run(Run.from_preset("smoke").settings, tmp_path, verify=True)
    run._code = ("folder",)
    other = run.on_basis("random")
    assert (other.verify, other._code) == (True, ("folder",))
    assert np.array_equal(other.steps, run.steps)
