"""What a device computes, against brute force in float64. For a GPU: POLCA_DEVICE=cuda pytest <this file>"""

import os

import pytest
import torch
from cases import TINY_RUN, orthonormal, problem, token_gradients, token_hessians

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import to_device
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings

DEVICE = os.environ.get("POLCA_DEVICE", "cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of float32, over values of order 1


def on_device(name):
    """The same problem in float32 on the device and in float64 on the CPU."""
    exact, rounded = problem(name), problem(name, dtype=torch.float32)
    rounded.token_loss.model.to(DEVICE)
    return exact, (rounded.token_loss, rounded.theta.to(DEVICE), to_device(rounded.batch, torch.device(DEVICE)))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["mlp", "attention", "layer norm", "multi-head", "tied"])
def test_projections_are_those_of_brute_force(name, mode):
    exact, here = on_device(name)
    vectors = orthonormal(5, len(exact.theta))
    found = project(*here, vectors.float().to(DEVICE), mode=mode)
    assert found.gradient.device.type == torch.device(DEVICE).type
    torch.testing.assert_close(found.loss.cpu().double(), exact.token_loss(exact.theta, exact.batch), **CLOSE)
    torch.testing.assert_close(found.gradient.cpu().double(), token_gradients(*exact) @ vectors.T, **CLOSE)


def test_curvature_is_that_of_brute_force():
    exact, here = on_device("attention")
    vectors = orthonormal(5, len(exact.theta))
    found = project(*here, vectors.float().to(DEVICE), curvature=True)
    expected = torch.einsum("vi,tij,vj->tv", vectors, token_hessians(*exact), vectors)
    torch.testing.assert_close(found.curvature.cpu().double(), expected, **CLOSE)


def test_rounding_to_bfloat16_costs_what_it_says():
    exact, here = on_device("attention")
    vectors = orthonormal(5, len(exact.theta))
    found = project(*here, vectors.float().to(DEVICE), mode="reverse", precision="bfloat16")
    expected = token_gradients(*exact) @ vectors.T
    off = (found.gradient.cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < off < 0.02
    assert found.error == pytest.approx(float(off), rel=1)


def test_products_with_the_hessian_are_those_of_brute_force():
    exact, here = on_device("attention")
    vector = orthonormal(1, len(exact.theta))[0]
    expected = token_hessians(*exact).mean(0) @ vector
    torch.testing.assert_close(HessianOperator(*here)(vector.float().to(DEVICE)).cpu().double(), expected, **CLOSE)


def test_run_from_training_to_clusters(tmp_path):
    run = Run(RunSettings.from_preset("smoke", device=DEVICE, **TINY_RUN), tmp_path)
    assert run.labels.sizes["vector"] == run.basis.sizes["vector"]
    assert run.projections["gradient"].notnull().all()
    first, last = run.projections["loss"].mean("token")[[0, -1]].values
    assert last < first
