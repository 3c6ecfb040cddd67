from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from cases import Problem, Quadratic, orthonormal, problem, token_gradients

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.decomposition import (
    ORDERS,
    accumulate,
    compare_trajectories,
    completeness,
    fisher,
    loss_change,
    movement_share,
    polca,
    projected_loss,
    reversals,
    second_order_health,
)


def projections(token_loss, thetas, batch, vectors):
    """What ``project_run`` stores, in float64."""
    parts = [project(token_loss, theta, batch, vectors, curvature=True) for theta in thetas]
    change = thetas.diff(dim=0)
    rest = torch.full((1, len(vectors)), torch.nan, dtype=torch.float64)
    inside = [token_loss(at + vectors.T @ (vectors @ move), batch) for at, move in zip(thetas, change, strict=False)]
    inside.append(torch.full_like(inside[0], torch.nan))
    return xr.Dataset(
        {
            "loss": (("step", "token"), torch.stack([p.loss for p in parts]).numpy()),
            "gradient": (("step", "token", "vector"), torch.stack([p.gradient for p in parts]).numpy()),
            "curvature": (("step", "token", "vector"), torch.stack([p.curvature for p in parts]).numpy()),
            "movement": (("step", "vector"), torch.cat([change @ vectors.T, rest]).numpy()),
            "distance": ("step", torch.cat([change.norm(dim=1), rest[0, :1]]).numpy()),
            "inside_loss": (("step", "token"), torch.stack(inside).numpy()),
        },
        coords={
            "step": 20 * np.arange(len(thetas)),
            "token": np.arange(len(parts[0].loss)),
            "vector": 1 + np.arange(len(vectors)),
        },
    )


def walk(theta, n=4, size=0.2):
    generator = torch.Generator().manual_seed(1)
    moves = size * torch.randn(n, len(theta), generator=generator, dtype=theta.dtype)
    return theta + torch.cat([torch.zeros_like(theta)[None], moves]).cumsum(0)


def quadratic(n=4, tokens=5):
    """Each token has its own indefinite Hessian."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tokens, n, n, generator=generator, dtype=torch.float64)
    slope = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    token_loss = TokenLoss(Quadratic(n), lambda model, batch: model(batch))
    theta = torch.randn(n, generator=generator, dtype=torch.float64)
    return Problem(token_loss, theta, (a + a.mT, slope))


def true_change(token_loss, thetas, batch):
    return torch.stack([token_loss(theta, batch) for theta in thetas]).diff(dim=0).numpy()


def test_first_order_over_a_complete_basis_sums_to_the_gradient_times_the_movement(case):
    token_loss, theta, batch = case
    thetas, vectors = walk(theta), orthonormal(len(theta), len(theta))
    summed = polca(projections(token_loss, thetas, batch, vectors), "first").sum("vector")
    for t in range(4):
        expected = token_gradients(token_loss, thetas[t], batch) @ (thetas[t + 1] - thetas[t])
        np.testing.assert_allclose(summed[t], expected, rtol=1e-10, atol=1e-12)


def test_first_order_is_gradient_along_b_times_movement_along_b():
    token_loss, theta, batch = problem("mlp")
    thetas, vectors = walk(theta), orthonormal(3, len(theta))
    value = polca(projections(token_loss, thetas, batch, vectors), "first")
    expected = torch.stack(
        [
            (token_gradients(token_loss, at, batch) @ vectors.T) * (vectors @ (after - at))
            for at, after in pairwise(thetas)
        ]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_turning_a_vector_around_changes_nothing(case, order):
    token_loss, theta, batch = case
    thetas, vectors = walk(theta), orthonormal(3, len(theta))
    one, turned = (
        polca(projections(token_loss, thetas, batch, v), order)
        for v in (vectors, vectors * torch.tensor([[-1.0], [1.0], [-1.0]]))
    )
    np.testing.assert_allclose(turned, one, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("order", ["second", "exact", "trapezoid"])
def test_on_a_quadratic_loss_movement_along_one_vector_is_accounted_for_exactly(order):
    token_loss, theta, batch = quadratic()
    vectors = orthonormal(4, 4)
    thetas = theta + torch.tensor([0.0, 0.5, 0.2, -1.0, 2.0], dtype=torch.float64)[:, None] * vectors[1]
    data = projections(token_loss, thetas, batch, vectors)
    np.testing.assert_allclose(
        polca(data, order).sel(vector=2), true_change(token_loss, thetas, batch), rtol=1e-10, atol=1e-12
    )


def test_first_order_misses_the_curvature_of_a_quadratic_loss():
    token_loss, theta, batch = quadratic()
    vectors = orthonormal(4, 4)
    thetas = theta + torch.tensor([0.0, 0.5], dtype=torch.float64)[:, None] * vectors[1]
    missed = true_change(token_loss, thetas, batch) - polca(
        projections(token_loss, thetas, batch, vectors), "first"
    ).sel(vector=2)
    half_curvature = torch.einsum("i,tij,j->t", vectors[1], batch[0], vectors[1]) * 0.5**2 / 2
    np.testing.assert_allclose(missed[0], half_curvature, rtol=1e-10, atol=1e-12)


def test_trapezoid_over_a_complete_basis_sums_to_the_true_change_of_a_quadratic_loss():
    token_loss, theta, batch = quadratic()
    thetas = walk(theta, size=1.0)
    data = projections(token_loss, thetas, batch, orthonormal(4, 4))
    np.testing.assert_allclose(
        polca(data, "trapezoid").sum("vector"), true_change(token_loss, thetas, batch), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("order", ["second", "exact", "trapezoid"])
def test_all_second_orders_agree_when_the_basis_diagonalises_every_hessian(order):
    token_loss, theta, (_, slope) = quadratic()
    vectors = orthonormal(4, 4)
    spectra = 1 + torch.rand(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch = (torch.einsum("vi,tv,vj->tij", vectors, spectra, vectors), slope)
    thetas = walk(theta, size=1.0)
    data = projections(token_loss, thetas, batch, vectors)
    np.testing.assert_allclose(
        polca(data, order).sum("vector"), true_change(token_loss, thetas, batch), rtol=1e-9, atol=1e-11
    )
    np.testing.assert_allclose(second_order_health(data)["amplification"], 1, rtol=1e-9)


def by_hand():
    """Two tokens, two vectors, one interval. Along vector 1 the two gradients rise by opposite amounts."""
    gradient = np.array([[[1.0, 2.0], [3.0, -1.0]], [[2.0, 3.0], [2.0, 2.0]]])
    curvature = np.array([[[4.0, 1.0], [8.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]])
    return xr.Dataset(
        {
            "loss": (("step", "token"), [[2.0, 1.0], [1.5, 1.25]]),
            "gradient": (("step", "token", "vector"), gradient),
            "curvature": (("step", "token", "vector"), curvature),
            "movement": (("step", "vector"), [[0.5, -2.0], [np.nan, np.nan]]),
            "distance": ("step", [5.0, np.nan]),
            "inside_loss": (("step", "token"), [[1.0, 1.5], [np.nan, np.nan]]),
        },
        coords={"step": [0, 20], "token": [0, 1], "vector": [1, 2]},
    )


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("first", [[0.5, -4.0], [1.5, 2.0]]),
        # Vector 2: lambda = 3, rises 1 and 3 (mean 2), so 3/2 * 4 * (1/2, 3/2) is added; vector 1 is undefined.
        ("second", [[0.5, -4.0 + 3.0], [1.5, 2.0 + 9.0]]),
        ("exact", [[0.5 + 0.5, -4.0 + 2.0], [1.5 + 1.0, 2.0 + 10.0]]),
        ("trapezoid", [[0.75, -5.0], [1.25, -1.0]]),
    ],
)
def test_each_order_on_numbers_worked_out_by_hand(order, expected):
    value = polca(by_hand(), order)
    assert value.dims == ("step", "token", "vector")
    assert value["step"].values.tolist() == [0]
    np.testing.assert_allclose(value[0], expected, rtol=1e-12)


def test_health_counts_where_the_denominator_vanishes_and_measures_the_rest():
    health = second_order_health(by_hand())
    assert health["undefined"].values.tolist() == [[True, False]]
    assert np.isnan(health["amplification"].sel(vector=1)).all()
    assert health["amplification"].sel(vector=2).item() == pytest.approx(3 * -2.0 / 2)


def test_denominator_within_its_standard_error_is_noise():
    # Rises of vector 1: 1 and -1 (mean 0); of vector 2: 1 and 3 (mean 2, root mean square 2.2, over root 2 1.6).
    assert second_order_health(by_hand())["noise"].values.tolist() == [[True, False]]


def test_denominator_that_is_small_only_in_absolute_terms_is_used():
    data = by_hand()
    data["gradient"] = data["gradient"] * 1e-12
    assert second_order_health(data)["undefined"].values.tolist() == [[True, False]]


def test_weights_at_rest_change_no_loss():
    token_loss, theta, batch = quadratic()
    data = projections(token_loss, torch.stack([theta, theta]), batch, orthonormal(4, 4))
    for order in ORDERS:
        assert (polca(data, order) == 0).all()


def test_unknown_order_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"order = 'third'.*first, second, exact, trapezoid"):
        polca(by_hand(), "third")


@pytest.mark.parametrize("order", ORDERS)
def test_only_second_and_exact_need_the_curvature(order):
    data = by_hand().drop_vars("curvature")
    if order in ("second", "exact"):
        with pytest.raises(ValueError, match=rf"order = '{order}' needs the curvature.*first, trapezoid"):
            polca(data, order)
    else:
        assert polca(data, order).identical(polca(by_hand(), order))


@pytest.mark.parametrize("order", ORDERS)
def test_projected_loss_starts_at_zero_and_adds_up_the_changes_before_each_step(order):
    token_loss, theta, batch = problem("mlp")
    data = projections(token_loss, walk(theta), batch, orthonormal(3, len(theta)))
    changes, loss = polca(data, order), projected_loss(data, order)
    assert loss["step"].values.tolist() == data["step"].values.tolist()
    assert loss.dims == ("step", "token", "vector")
    for t in range(5):
        np.testing.assert_allclose(loss[t], changes.values[:t].sum(axis=0), rtol=1e-12, atol=1e-14)


def test_accumulate_keeps_attributes_and_coordinates():
    changes = xr.DataArray(
        [[1.0], [2.0]], dims=("step", "token"), coords={"step": [0, 5], "text": ("token", ["a"])}, attrs={"order": "x"}
    )
    total = accumulate(changes, xr.DataArray([0, 5, 10], dims="step", coords={"step": [0, 5, 10]}))
    assert total.values.tolist() == [[0], [1], [3]]
    assert total["step"].values.tolist() == [0, 5, 10]
    assert total["text"].values.tolist() == ["a"]
    assert total.attrs == {"order": "x"}


def test_loss_change_is_next_minus_this_at_the_start_of_the_interval():
    change = loss_change(by_hand())
    assert change["step"].values.tolist() == [0]
    assert change.values.tolist() == [[-0.5, 0.25]]


def test_fisher_is_the_square_of_the_gradient_along_b():
    assert fisher(by_hand())[0].values.tolist() == [[1.0, 4.0], [9.0, 1.0]]


def test_closure_compares_the_sum_over_vectors_with_the_true_change():
    result = completeness(by_hand(), "first")
    assert result["claimed"].values.tolist() == [[0.0, 0.0], [-3.5, 3.5]]
    assert result["true"].values.tolist() == [[0.0, 0.0], [-0.5, 0.25]]
    assert result["inside"].values.tolist() == [[0.0, 0.0], [-1.0, 0.5]]
    assert result.attrs["share"] == 0.0
    assert result.attrs["share_inside"] == pytest.approx(-0.5 / -0.25)
    assert result.attrs["correlation"] == pytest.approx(1.0)
    assert result.attrs["largest"] == 3.5
    assert result.attrs["largest_true"] == 0.5


def test_closure_share_is_the_part_of_the_fall_that_is_claimed():
    data = by_hand().sel(vector=[2])
    # Claimed: -5 and -1; true: -0.5 and 0.25.
    result = completeness(data, "trapezoid")
    assert result.attrs["share"] == pytest.approx((-5 - 1) / (-0.5 + 0.25))
    assert result.attrs["correlation"] == pytest.approx(1.0)


def test_closure_of_a_complete_basis_on_a_quadratic_loss_is_whole():
    token_loss, theta, batch = quadratic()
    data = projections(token_loss, walk(theta), batch, orthonormal(4, 4))
    result = completeness(data, "trapezoid")
    for name in ("share", "share_inside", "correlation", "correlation_inside"):
        assert result.attrs[name] == pytest.approx(1, rel=1e-9)


def test_exact_order_along_one_direction_claims_what_a_quadratic_loss_delivers_inside_the_basis():
    token_loss, theta, batch = quadratic()
    result = completeness(projections(token_loss, walk(theta), batch, orthonormal(4, 4)[:1]), "exact")
    np.testing.assert_allclose(result["claimed"], result["inside"], rtol=1e-9, atol=1e-12)
    assert abs(result.attrs["share"] - 1) > 0.05


def test_reversals_count_changes_of_direction():
    movement = np.array([[1.0, 1.0], [-1.0, 2.0], [1.0, 1.0], [-1.0, -1.0], [np.nan, np.nan]])
    data = xr.Dataset({"movement": (("step", "vector"), movement)}, {"step": range(5), "vector": [1, 2]})
    assert reversals(data).sel(vector=1) == 1
    assert reversals(data).sel(vector=2) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("n", "complete"), [(31, True), (10, False)])
def test_movement_share_is_one_for_a_complete_basis_and_less_for_a_part_of_it(n, complete):
    token_loss, theta, batch = problem("mlp")
    share = movement_share(projections(token_loss, walk(theta), batch, orthonormal(31, 31)[:n]))
    assert share["step"].values.tolist() == [0, 20, 40, 60]
    if complete:
        np.testing.assert_allclose(share, 1, rtol=1e-12)
    else:
        assert ((share > 0) & (share < 0.95)).all()


def test_movement_share_by_hand():
    assert movement_share(by_hand()).values.tolist() == pytest.approx([(0.25 + 4) / 25])


def test_trajectories_are_compared_by_mean_cosine_and_mean_distance():
    one = xr.DataArray([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0]], dims=("step", "token"))
    other = xr.DataArray([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]], dims=("step", "token"))
    result = compare_trajectories(one, other)
    # The third token's first trajectory is zero: it has no direction, but it has a distance.
    assert result["cosine"] == pytest.approx((1 + 0) / 2)
    assert result["l2"] == pytest.approx((0 + np.sqrt(5) + 1) / 3)


def test_second_order_takes_its_mean_curvature_from_a_sample_if_that_is_what_there_is():
    token_loss, theta, batch = problem("mlp")
    whole = projections(token_loss, walk(theta), batch, orthonormal(3, len(theta)))
    sampled = whole.assign(curvature=whole["curvature"][:, :2].rename(token="sample").drop_vars("sample"))
    first, curved = polca(whole, "first"), polca(whole, "second") - polca(whole, "first")
    ratio = whole["curvature"][:-1, :2].mean("token") / whole["curvature"][:-1].mean("token")
    np.testing.assert_allclose(polca(sampled, "second"), first + curved * ratio, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="measured it on a sample; allowed here: first, second, trapezoid"):
        polca(sampled, "exact")
