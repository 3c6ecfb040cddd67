from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from cases import (
    fail_at,
    folder_bytes,
    mlp_batch,
    orthonormal,
    problem,
    tiny_checkpoints,
    tiny_config,
    token_curvatures,
    token_gradients,
    token_hessians,
)
from hypothesis import given
from hypothesis import strategies as st

import polca_lib.projection as projection
from polca_lib.artefacts import PieceStore
from polca_lib.basis import compute_basis
from polca_lib.config import ModelConfig
from polca_lib.models import build_model
from polca_lib.projection import NonFiniteProjection, project, project_run
from polca_lib.tasks import arithmetic
from polca_lib.token_loss import TokenLoss

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def test_derivatives_are_those_of_one_backward_pass_per_token_and_of_dense_hessians(case):
    token_loss, theta, batch = case
    vectors = orthonormal(5, len(theta))
    result = project(token_loss, theta, batch, vectors, curvature=True)
    curvature = torch.einsum("vi,tij,vj->tv", vectors, token_hessians(token_loss, theta, batch), vectors)
    torch.testing.assert_close(result.loss, token_loss(theta, batch), **EXACT)
    torch.testing.assert_close(result.gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    torch.testing.assert_close(result.curvature, curvature, **EXACT)


def against_backward_passes(token_loss, theta, batch):
    vectors = orthonormal(3, len(theta))
    result = project(token_loss, theta, batch, vectors, curvature=True)
    torch.testing.assert_close(result.gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    torch.testing.assert_close(result.curvature, token_curvatures(token_loss, theta, batch, vectors), **EXACT)


def test_derivatives_go_right_through_native_layer_norm():
    # Forward mode nested in itself is wrong in F.layer_norm (pytorch issue 196700).
    against_backward_passes(*problem("layer norm"))


@pytest.mark.parametrize("activation", get_args(ModelConfig.model_fields["activation"].annotation))
def test_derivatives_are_right_for_the_transformer_with_every_activation(activation):
    config = ModelConfig(n_layers=1, d_model=4, n_heads=2, d_mlp=4, activation=activation)
    # Not .double(): the model would still round to float32 inside, as its own configuration says.
    token_loss = TokenLoss(build_model(config, seed=0).to(torch.float64), arithmetic.answer_loss)
    theta = token_loss.flatten(token_loss.parameters)
    theta = theta + 0.5 * torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    against_backward_passes(token_loss, theta, arithmetic.encode(np.array([[581, 493], [7, 5]])))


SMALL = problem("attention")
VECTORS = orthonormal(6, len(SMALL.theta))


@given(st.integers(1, 9), st.integers(1, 8))
def test_results_do_not_depend_on_the_chunks(chunk_examples, chunk_vectors):
    whole = project(*SMALL, VECTORS, curvature=True, chunk_examples=100, chunk_vectors=100)
    parts = project(*SMALL, VECTORS, curvature=True, chunk_examples=chunk_examples, chunk_vectors=chunk_vectors)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-12)


def test_curvature_is_left_out_unless_asked_for():
    assert project(*SMALL, VECTORS).curvature is None


@pytest.mark.parametrize("shape", [(2, 92), (93,), (2, 3, 93)])
def test_vectors_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"vectors have shape \(.*allowed: \(any, 93\)"):
        project(*SMALL, torch.zeros(shape, dtype=torch.float64))


STEPS = list(range(0, 81, 20))
BATCH = mlp_batch(5, torch.float32)
TOKENS = pd.DataFrame(
    {
        "place": ["10s", "1s"] * 5,
        "digit": np.arange(10),
        "carry": [True, False] * 5,
        "text": [f"t{i}" for i in range(10)],
    }
)


@pytest.fixture
def made(tmp_path):
    """Checkpoints and a basis of three vectors."""
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints")
    config = tiny_config(**{"basis.n_vectors": 3})
    return checkpoints, compute_basis(tmp_path / "basis.zarr", config, checkpoints, BATCH)


def project_all(folder, made, curvature=True):
    folder.mkdir(exist_ok=True)
    checkpoints, basis = made
    return project_run(folder / "projections.zarr", checkpoints, STEPS, BATCH, TOKENS, basis, curvature=curvature)


def test_stored_derivatives_are_those_at_each_checkpoint(tmp_path, made):
    dataset = project_all(tmp_path / "run", made)
    checkpoints, basis = made
    token_loss, _, batch = problem("mlp", examples=5)
    vectors = torch.from_numpy(basis["vectors"].values).double()
    for step in STEPS:
        theta = checkpoints.theta(step).double()
        at = dataset.sel(step=step)
        curvature = torch.einsum("vi,tij,vj->tv", vectors, token_hessians(token_loss, theta, batch), vectors)
        np.testing.assert_allclose(at["loss"], token_loss(theta, batch), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(at["gradient"], token_gradients(token_loss, theta, batch) @ vectors.T, atol=1e-5)
        np.testing.assert_allclose(at["curvature"], curvature, atol=1e-4)


def test_movement_and_distance_are_those_to_the_next_checkpoint(tmp_path, made):
    dataset = project_all(tmp_path / "run", made)
    checkpoints, basis = made
    theta = np.stack([checkpoints.theta(step).numpy() for step in STEPS]).astype(np.float64)
    change = np.diff(theta, axis=0)
    np.testing.assert_allclose(dataset["movement"][:-1], change @ basis["vectors"].values.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dataset["distance"][:-1], np.linalg.norm(change, axis=1), rtol=1e-5)
    assert np.isnan(dataset["movement"][-1]).all()
    assert np.isnan(dataset["distance"][-1])


def test_columns_of_the_token_table_become_coordinates(tmp_path, made):
    dataset = project_all(tmp_path / "run", made)
    for name, column in TOKENS.items():
        assert dataset[name].dims == ("token",)
        assert dataset[name].values.tolist() == column.tolist()
    assert dataset["carry"].dtype == bool
    assert dataset["birth_step"].values.tolist() == [20, 40, 60]
    assert dataset["step"].values.tolist() == STEPS


def test_run_without_curvature_stores_none(tmp_path, made):
    assert "curvature" not in project_all(tmp_path / "run", made, curvature=False)


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("place", ["project", "write"])
def test_projections_killed_and_resumed_have_the_bytes_of_those_that_were_not(tmp_path, made, monkeypatch, place, n):
    with monkeypatch.context() as patch:
        owner = projection if place == "project" else PieceStore
        patch.setattr(owner, place, fail_at(getattr(owner, place), n))
        with pytest.raises(KeyboardInterrupt):
            project_all(tmp_path / "killed", made)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(projection, "project", lambda *a, **k: (calls.append(1), project(*a, **k))[1])
        project_all(tmp_path / "killed", made)
    project_all(tmp_path / "whole", made)
    assert len(calls) == len(STEPS) - (n - 1)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def break_checkpoint(checkpoints, step):
    """Put a NaN into a checkpoint; returns what it was."""
    sound = checkpoints.file(step).read_bytes()
    theta = checkpoints.theta(step).clone()
    theta[3] = torch.nan
    checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
    return sound


def test_checkpoint_that_is_not_finite_is_named_and_what_came_before_stays(tmp_path, made):
    break_checkpoint(made[0], 40)
    with pytest.raises(NonFiniteProjection, match=r"step-00000040\.safetensors"):
        project_all(tmp_path / "run", made)
    store = PieceStore(tmp_path / "run" / "projections.zarr", None, {}, dim="step")
    assert 0 not in store.missing()
    assert 2 in store.missing()


def test_projections_are_whole_once_a_broken_checkpoint_is_mended(tmp_path, made):
    sound = break_checkpoint(made[0], 40)
    with pytest.raises(NonFiniteProjection):
        project_all(tmp_path / "mended", made)
    made[0].file(40).write_bytes(sound)
    project_all(tmp_path / "mended", made)
    project_all(tmp_path / "whole", made)
    assert folder_bytes(tmp_path / "mended") == folder_bytes(tmp_path / "whole")
