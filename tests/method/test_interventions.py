import numpy as np
import pytest
import torch
import xarray as xr
from cases import mlp_batch, orthonormal, problem, tiny_checkpoints

from polca_lib.method import interventions
from polca_lib.method.interventions import ablate_movement, losses_at, move_along, random_directions

STEPS = [0, 20, 40]
BATCH = mlp_batch(5, torch.float32)


@pytest.fixture
def checkpoints(tmp_path):
    return tiny_checkpoints(tmp_path / "checkpoints")


@pytest.fixture
def basis(checkpoints):
    vectors = orthonormal(3, checkpoints.token_loss.n_parameters).float().numpy()
    return xr.Dataset({"vectors": (("vector", "parameter"), vectors)}, coords={"vector": [1, 2, 3]})


def test_moving_along_each_vector_alone_changes_the_loss_as_computed_there(tmp_path, checkpoints, basis):
    found = move_along(tmp_path / "along.zarr", checkpoints, STEPS, BATCH, basis)
    token_loss, _, batch = problem("mlp", examples=5)
    assert found.dims == ("step", "token", "vector")
    assert found["step"].values.tolist() == [0, 20]
    for index, (start, end) in enumerate([(0, 20), (20, 40)]):
        theta, after = (checkpoints.theta(step).double() for step in (start, end))
        for column, b in enumerate(torch.from_numpy(basis["vectors"].values).double()):
            expected = token_loss(theta + b * (b @ (after - theta)), batch) - token_loss(theta, batch)
            np.testing.assert_allclose(found[index, :, column], expected, atol=1e-6)


def test_moving_along_resumes_at_the_first_missing_interval(tmp_path, checkpoints, basis, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return losses_at(*arguments)

    monkeypatch.setattr(interventions, "losses_at", counted)
    with pytest.raises(KeyboardInterrupt):
        move_along(tmp_path / "along.zarr", checkpoints, STEPS, BATCH, basis)
    calls.clear()
    monkeypatch.setattr(interventions, "losses_at", lambda *a: (calls.append(1), losses_at(*a))[1])
    killed = move_along(tmp_path / "along.zarr", checkpoints, STEPS, BATCH, basis)
    assert len(calls) == 1 + 4  # once for the number of tokens; the first interval is there
    np.testing.assert_array_equal(killed, move_along(tmp_path / "whole.zarr", checkpoints, STEPS, BATCH, basis))


def test_undoing_movement_takes_back_just_the_component_along_the_vector():
    token_loss, theta, batch = problem("mlp")
    end = theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    vectors = orthonormal(4, len(theta))
    changes, lengths = ablate_movement(token_loss, theta, end, batch, vectors)
    projector = torch.eye(len(theta), dtype=theta.dtype)
    for b, change, length in zip(vectors, changes, lengths, strict=True):
        undone = theta + (projector - torch.outer(b, b)) @ (end - theta)
        torch.testing.assert_close(length, b @ (end - theta))
        torch.testing.assert_close(change, token_loss(undone, batch) - token_loss(end, batch))


def test_undoing_all_of_a_complete_basis_leads_back_to_the_start_one_by_one():
    token_loss, theta, batch = problem("mlp")
    end = theta + 0.1
    vectors = orthonormal(len(theta), len(theta))
    _, lengths = ablate_movement(token_loss, theta, end, batch, vectors)
    torch.testing.assert_close(end - lengths @ vectors, theta)
    changes, given = ablate_movement(token_loss, theta, end, batch, vectors[:1], torch.tensor([0.3], dtype=theta.dtype))
    assert given.item() == pytest.approx(0.3)
    torch.testing.assert_close(changes[0], token_loss(end - 0.3 * vectors[0], batch) - token_loss(end, batch))


def test_random_directions_are_unit_fixed_by_the_seed_and_orthogonal_where_asked():
    like = torch.zeros(1, dtype=torch.float64)
    basis = orthonormal(3, 50)
    found = random_directions(4, 50, seed=1, like=like, orthogonal_to=basis)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found @ basis.T, torch.zeros(4, 3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(random_directions(4, 50, seed=1, like=like, orthogonal_to=basis), found)
    assert not torch.allclose(random_directions(4, 50, seed=2, like=like, orthogonal_to=basis), found)
    assert (random_directions(4, 50, seed=1, like=like) @ basis.T).abs().max() > 1e-3
