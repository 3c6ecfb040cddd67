"""Plans against what is really done: operations counted, bytes written, tasks there were."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cases import mlp_batch, problem, project_run, tiny_checkpoints
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.analysis.plan import plan
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.basis import compute_basis
from polca_lib.method.settings import BasisSettings
from polca_lib.storage.pieces import PieceStore

BATCH = mlp_batch(5, torch.float32)
STEPS = [0, 20, 40, 60, 80]


def planned(token_loss, batch=BATCH, *, n_vectors=6, **settings):
    basis, projection = BasisSettings(kind="random", n_vectors=n_vectors), ProjectionSettings(curvature=False)
    return plan(token_loss, batch, **{"checkpoints": 5, "basis": basis, "projection": projection, **settings})


def bytes_of(path, name):
    return sum(file.stat().st_size - 4 for file in (path / name).glob("[0-9]*"))  # but for the checksums


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "random", "parameters", "trajectory"])
@pytest.mark.parametrize(
    "settings", [{"curvature": False}, {"curvature": True}, {"curvature_examples": 2, "storage": "float16"}], ids=str
)
@pytest.mark.parametrize("memory", [None, 1500])
def test_bytes_and_tasks_are_those_of_the_run(tmp_path, kind, settings, memory):
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints")
    basis = BasisSettings(kind=kind, k=2 if kind != "trajectory" else 1, n_vectors=6 if kind != "trajectory" else 4)
    n = basis.n_vectors
    steps = STEPS[1:]
    vectors = compute_basis(tmp_path / "basis.zarr", basis, checkpoints, BATCH, steps=steps)
    projection = ProjectionSettings(**settings)
    tokens = pd.DataFrame({"number": np.arange(10)})
    path = tmp_path / "projections.zarr"
    project_run(path, checkpoints, STEPS, BATCH, tokens, vectors, projection, memory)
    found = planned(
        checkpoints.token_loss, basis=basis, projection=projection, memory=memory, operations_per_second=1e9
    )
    stored = {"random": "mixing", "parameters": "axis"}.get(kind, "vectors")
    records = ("eigenvalue", "residual", "products")
    assert found.basis_bytes == sum(bytes_of(tmp_path / "basis.zarr", name) for name in (stored, *records))
    store = PieceStore.open(path)
    assert found.tasks == store.pieces
    # Not counted: the last block may be padded.
    padded = len(store.blocks) * (store.blocks[0].stop or n) / n
    along = ("gradient", "curvature", "movement", "product_error")
    written = sum(bytes_of(path, name) / (padded if name in along else 1) for name in store.variables)
    assert found.projection_bytes == pytest.approx(written, rel=1e-6)


def test_operations_of_a_pass_are_those_that_are_counted_on_real_data():
    for name in ("mlp", "attention", "images", "multi-head"):
        token_loss, theta, batch = problem(name, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            token_loss(theta, batch)
        found = planned(token_loss, batch, operations_per_second=1e9)
        assert found.pass_operations * 7 == counter.get_total_flops()
        assert found.tokens == len(token_loss(theta, batch))


def test_operations_are_those_of_forward_passes_along_all_vectors():
    token_loss, _, batch = problem("attention", dtype=torch.float32)
    one = planned(token_loss, batch, operations_per_second=1e6, workers=1)
    assert one.projection_operations == 5 * 7 * one.pass_operations * (1 + 2 * 6 + 1)
    assert one.projection_seconds == pytest.approx(one.projection_operations / 1e6)
    assert planned(token_loss, batch, operations_per_second=1e6, workers=5).projection_seconds == pytest.approx(
        one.projection_seconds / 5
    )
    assert one.products == one.basis_seconds == 0
    hessian = planned(token_loss, batch, basis=BasisSettings(n_vectors=6, max_products=10), operations_per_second=1e6)
    assert hessian.products == 60


@pytest.mark.parametrize("memory", [2**30, 20_000])
def test_probe_measures_the_way_that_will_be_gone(memory):
    token_loss, _, batch = problem("attention", dtype=torch.float32)
    found = planned(token_loss, batch, memory=memory)
    assert "computed as in the analysis" in found.measured
    assert found.operations_per_second > 0
    assert found.way.split(" by ")[0] in ("forward mode", "reverse mode")
    json.dumps(found.as_dict(), allow_nan=False)
    assert "93 trainable parameters" in str(found)


def test_model_that_does_not_fit_is_planned_on_paper():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(3, 10**5), torch.nn.Linear(10**5, 3))
    loss = TokenLoss(model, lambda m, batch: torch.nn.functional.cross_entropy(
        m(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none"))  # fmt: skip
    found = planned(loss, memory=1_000_000, n_vectors=3)
    assert "nothing was run" in found.measured
    assert found.block == 1
    assert found.pass_operations == 2 * 2 * (3 * 10**5 + 3 * 10**5)
    assert "This does not fit" in str(found)


def test_model_without_data_whose_loss_hangs_on_them_is_refused():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.register_buffer("scale", torch.ones(1))

    def loss(model, batch):
        return batch[0].flatten(1).sum(1) * model.weight.sum() * (2.0 if batch[0].sum() > 0 else model.scale)

    with torch.device("meta"):
        model = Odd()
    with pytest.raises(ValueError, match=r"can't be counted without data \(.*meta.*\), but the model has buffers on"):
        planned(TokenLoss(model, loss), n_vectors=2, operations_per_second=1e9)
    found = planned(TokenLoss(Odd(), loss), n_vectors=2, operations_per_second=1e9)
    assert (found.parameters, found.tokens) == (3, 5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"checkpoints": 1}, "checkpoints = 1; allowed: 2 or more"),
        ({"workers": 0}, "workers = 0; allowed: 1 or more"),
        ({"n_vectors": 1000}, "basis.n_vectors = 1000; allowed: 1 to 31, the number of parameters"),
        ({"basis": BasisSettings(every=20)}, "basis.n_vectors = None; allowed: 1 to 31, the number of parameters"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, told):
    token_loss, _, _ = problem("mlp", dtype=torch.float32)
    with pytest.raises(ValueError, match=told):
        planned(token_loss, **settings)


def test_loss_that_is_one_mean_is_refused_as_a_run_would():
    loss = problem("mlp", dtype=torch.float32).token_loss
    with pytest.raises(
        ValueError, match=r"the loss of one example has shape \(\); allowed: one number for each target"
    ):
        planned(TokenLoss(loss.model, lambda model, batch: loss.loss(model, batch).mean()))
