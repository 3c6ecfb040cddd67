import numpy as np
import pytest
import torch
from cases import (
    Mlp,
    fail_at,
    folder_bytes,
    mlp_batch,
    mlp_loss,
    orthonormal,
    problem,
    tiny_checkpoints,
    tiny_config,
)  # fmt: skip

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.memory import peak_bytes
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method import basis as basis_module
from polca_lib.method import vectors
from polca_lib.method.basis import compute_basis, load_basis
from polca_lib.method.settings import BasisSettings
from polca_lib.method.vectors import gram_error, inner_products, orthogonalise, read_vectors, without
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model

KINDS = ("hessian", "shuffled", "final", "random", "parameters")
BATCH = mlp_batch(7, torch.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def compute(folder, checkpoints, **overrides):
    folder.mkdir(exist_ok=True)
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    return compute_from(folder, tiny_config(**overrides), checkpoints, BATCH)


def compute_from(folder, config, checkpoints, batch):
    return compute_basis(
        folder / "basis.zarr", config.basis, checkpoints, batch,
        steps=config.basis_steps, seed=config.seed, memory=config.memory,
    )  # fmt: skip


def algorithm_1(checkpoints, births, k, n, which):
    """The paper's Algorithm 1 with dense matrices in float64: vectors in rows, and their eigenvalues."""
    token_loss, _, batch = problem("mlp", examples=7)
    vectors, values = torch.zeros(0, token_loss.n_parameters, dtype=torch.float64), []
    for step in births[::k]:
        theta = checkpoints.theta(int(step)).double()
        hessian = torch.func.hessian(lambda at: token_loss(at, batch).mean())(theta)
        project = torch.eye(len(theta), dtype=torch.float64) - vectors.T @ vectors
        ritz, found = torch.linalg.eigh(project @ hessian @ project)
        order = torch.argsort(ritz.abs() if which == "magnitude" else ritz, descending=True)[:k]
        vectors = torch.cat([vectors, found[:, order].T])
        values += ritz[order].tolist()
    return vectors[:n].numpy(), values[:n]


@pytest.mark.parametrize(
    ("kind", "k", "n_vectors", "which"),
    [
        ("hessian", 1, None, "largest"),
        ("hessian", 1, 3, "largest"),
        ("hessian", 2, None, "largest"),
        ("hessian", 2, 5, "largest"),
        ("hessian", 2, None, "magnitude"),
        ("shuffled", 1, None, "largest"),
        ("shuffled", 2, None, "largest"),
        ("final", 1, None, "largest"),
    ],
)
def test_basis_is_that_of_algorithm_1_with_dense_matrices(tmp_path, checkpoints, kind, k, n_vectors, which):
    basis = compute(tmp_path, checkpoints, basis__kind=kind, basis__k=k, basis__n_vectors=n_vectors, basis__which=which)
    births = basis["birth_step"].values
    # Repeated so that a truncated last block is still found whole.
    births = np.concatenate([births, np.repeat(births[-1:], -len(births) % k)])
    vectors, values = algorithm_1(checkpoints, births, k, n_vectors or 4 * k, which)
    np.testing.assert_allclose(basis["eigenvalue"], values, rtol=1e-3)
    np.testing.assert_allclose(np.abs((read_vectors(basis).numpy() * vectors).sum(1)), 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("k", "which"), [(1, "largest"), (2, "magnitude")])
def test_basis_is_the_same_by_cola(tmp_path, checkpoints, k, which):
    settings = {"basis__k": k, "basis__which": which, "basis__tolerance": 1e-5}
    ours = compute(tmp_path / "ours", checkpoints, **settings)
    colas = compute(tmp_path / "colas", checkpoints, **settings, basis__solver="cola")
    cosines = inner_products(read_vectors(ours), read_vectors(colas)).abs().diagonal()
    assert (cosines > 1 - 1e-4).all()
    np.testing.assert_allclose(colas["eigenvalue"], ours["eigenvalue"], rtol=1e-4)
    assert (colas["residual"] <= 1e-5).all()


def test_memory_too_small_for_what_cola_allocates_is_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match=r"one example takes .* bytes .* raise memory"):
        compute(tmp_path, checkpoints, basis__solver="cola", memory=17_000)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_basis_is_orthonormal_in_float32(tmp_path, checkpoints, kind, k):
    vectors = read_vectors(compute(tmp_path, checkpoints, basis__kind=kind, basis__k=k))
    assert vectors.dtype == torch.float32
    assert vectors.shape == (4 * k, 31)
    assert gram_error(vectors) < 1e-5


def test_vectors_for_which_memory_has_no_room_are_read_from_disk(tmp_path, checkpoints, monkeypatch):
    read, rows = basis_module.read_vectors, []

    def listed(basis, start, stop, **place):
        rows.append((start, stop))
        return read(basis, start, stop, **place)

    ample = compute(tmp_path / "ample", checkpoints, basis__k=4)
    monkeypatch.setattr(basis_module, "read_vectors", listed)
    # A half is set aside for Lanczos and a quarter holds vectors: eight of 31 float32 each.
    tight = compute(tmp_path / "tight", checkpoints, basis__k=4, memory=4000)
    assert rows[0] == (0, 0)
    assert set(rows[1:]) == {(row, row + 1) for row in range(8, 15)}
    np.testing.assert_allclose(tight["eigenvalue"], ample["eigenvalue"], rtol=1e-4)
    np.testing.assert_allclose(read(tight) @ read(ample).T, np.eye(16), rtol=0, atol=1e-4)
    assert gram_error(read(tight)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["lanczos", "cola"])
def test_basis_stays_within_the_memory(tmp_path, solver):
    settings = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.d_mlp": 32}
    settings |= {"basis.k": 2, "basis.every": 40, "basis.tolerance": 0.3, "basis.max_products": 20}
    config = tiny_config(**settings, **{"basis.solver": solver}, memory=1_500_000)
    token_loss = TokenLoss(build_model(config.model, seed=0), arithmetic.answer_loss)
    checkpoints = CheckpointFolder(tmp_path, token_loss)
    for step in (40, 80):
        checkpoints.save(step, token_loss.parameters)
    batch = arithmetic.encode(np.arange(60).reshape(30, 2))
    peak = peak_bytes(lambda: compute_from(tmp_path, config, checkpoints, batch), "cpu")
    assert 500_000 < peak <= 1_500_000


def test_memory_too_small_for_the_hessian_of_an_example_is_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match=r"one example takes .* bytes .* raise memory"):
        compute(tmp_path, checkpoints, memory=1000)


def test_vectors_are_born_in_training_order_k_at_a_time(tmp_path, checkpoints):
    basis = compute(tmp_path, checkpoints, basis__k=2, basis__n_vectors=7)
    assert basis["birth_step"].values.tolist() == [20, 20, 40, 40, 60, 60, 80]
    assert basis["vector"].values.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_trajectory_has_the_principal_directions_of_the_checkpoints(tmp_path, checkpoints):
    basis = compute(tmp_path, checkpoints, basis__kind="trajectory")
    points = np.stack([checkpoints.theta(step).double().numpy() for step in (0, 20, 40, 60, 80)])
    expected = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2][:4]
    vectors = read_vectors(basis).double().numpy()
    np.testing.assert_allclose(abs(vectors @ expected.T), np.eye(4), atol=1e-4)
    assert basis["birth_step"].values.tolist() == [80] * 4
    # All of the movement from one of the checkpoints to another lies in it.
    change = points[1:] - points[:-1]
    np.testing.assert_allclose(change @ vectors.T @ vectors, change, rtol=1e-4, atol=1e-6)


def test_trajectory_refuses_more_directions_than_checkpoints_have():
    with pytest.raises(ValueError, match=r"at most 4 directions in 5 checkpoints; 8 were asked for"):
        tiny_config(**{"basis.kind": "trajectory", "basis.k": 2})


def test_fewer_vectors_are_the_first_of_more(tmp_path, checkpoints):
    few = compute(tmp_path / "few", checkpoints, basis__k=2, basis__n_vectors=3)
    all_of_them = compute(tmp_path / "all", checkpoints, basis__k=2)
    assert torch.equal(read_vectors(few), read_vectors(all_of_them)[:3])


def test_shuffled_has_the_same_birth_steps_in_another_order_fixed_by_the_seed(tmp_path, checkpoints):
    births = {}
    for seed in range(6):
        basis = compute(tmp_path / str(seed), checkpoints, basis__kind="shuffled", seed=seed)
        births[seed] = tuple(basis["birth_step"].values.tolist())
    assert all(sorted(order) == [20, 40, 60, 80] for order in births.values())
    assert len(set(births.values())) > 1
    assert set(births.values()) != {(20, 40, 60, 80)}
    again = compute(tmp_path / "again", checkpoints, basis__kind="shuffled", seed=0)
    assert tuple(again["birth_step"].values.tolist()) == births[0]


def test_random_basis_is_determined_by_the_seed_alone(tmp_path, checkpoints):
    other_weights = tiny_checkpoints(tmp_path / "checkpoints", seed=5)
    one = compute(tmp_path / "one", checkpoints, basis__kind="random", seed=1)
    same = compute(tmp_path / "same", other_weights, basis__kind="random", seed=1)
    other = compute(tmp_path / "other", checkpoints, basis__kind="random", seed=2)
    assert one.identical(same)
    assert (read_vectors(one) @ read_vectors(other).T).abs().max() < 0.9


def test_parameter_basis_is_the_axes_of_the_largest_weights_at_the_end(tmp_path, checkpoints):
    basis = compute(tmp_path, checkpoints, basis__kind="parameters")
    theta = checkpoints.theta(80).numpy()
    expected = np.eye(31)[np.argsort(-np.abs(theta))[:4]]
    assert np.array_equal(read_vectors(basis), expected)
    assert basis["birth_step"].values.tolist() == [80] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_eigenvalues_are_recorded_where_they_have_a_meaning(tmp_path, checkpoints, kind):
    basis = compute(tmp_path, checkpoints, basis__kind=kind)
    for name in ("eigenvalue", "residual", "products"):
        assert np.isfinite(basis[name]).all() == (kind in ("hessian", "shuffled", "final"))


def test_recorded_products_are_those_that_were_made(tmp_path, checkpoints, monkeypatch):
    calls, product = [], HessianOperator.__call__
    monkeypatch.setattr(HessianOperator, "__call__", lambda self, v: (calls.append(1), product(self, v))[1])
    basis = compute(tmp_path, checkpoints, basis__k=2)
    assert basis["products"].sum().item() == len(calls)


def test_recorded_residuals_are_within_the_tolerance(tmp_path, checkpoints):
    basis = compute(tmp_path, checkpoints, basis__tolerance=0.1)
    assert (basis["residual"] <= 0.1).all()
    assert (basis["residual"] > 0).all()


def test_vector_that_did_not_converge_is_warned_of_by_number_and_step(tmp_path, checkpoints):
    with pytest.warns(UserWarning, match=r"basis vector 1 \(step 20\).*basis\.max_products = 2 .*tolerance = 0\.0001"):
        compute(tmp_path, checkpoints, basis__max_products=2, basis__n_vectors=1)


def test_vector_that_may_not_be_the_top_is_warned_of(tmp_path, checkpoints):
    enough = int(compute(tmp_path / "enough", checkpoints, basis__n_vectors=1, basis__tolerance=0.01)["products"][0])
    few = {"basis__max_products": enough - 1, "basis__tolerance": 0.01, "basis__n_vectors": 1}
    with pytest.warns(UserWarning, match=r"basis vector 1 \(step 20\) .* products may not be the top one"):
        basis = compute(tmp_path / "few", checkpoints, **few)
    assert basis["residual"][0] <= 0.01


def kill_in_write(patch, n):
    patch.setattr(PieceStore, "write", fail_at(PieceStore.write, n))


def kill_between_variables(patch, n):
    """The n-th piece is half on disk when the kill comes."""
    write = PieceStore.write
    calls = []

    def torn(self, index, **values):
        calls.append(1)
        if len(calls) == n:
            self._writable("vectors")[index] = values["vectors"]
            raise KeyboardInterrupt
        write(self, index, **values)

    patch.setattr(PieceStore, "write", torn)


def kill_in_product(patch, n):
    patch.setattr(HessianOperator, "__call__", fail_at(HessianOperator.__call__, 10 * n))


def damage(basis_folder, variable, row):
    (file,) = (basis_folder / "basis.zarr" / variable).glob(f"{row}*")
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(("kind", "variable"), [("hessian", "vectors"), ("random", "mixing"), ("parameters", "axis")])
def test_only_the_rows_asked_for_are_read(tmp_path, checkpoints, kind, variable):
    basis = compute(tmp_path, checkpoints, basis__kind=kind)
    whole = read_vectors(basis)
    damage(tmp_path, variable, 2)
    for start, stop in ((0, 1), (0, 2), (3, None), (1, 1)):
        assert torch.equal(read_vectors(basis, start, stop), whole[start:stop])
    for start, stop in ((0, None), (2, 3)):
        with pytest.raises((ValueError, RuntimeError, OSError)):
            read_vectors(basis, start, stop)


def test_nothing_that_was_read_stays_in_memory(tmp_path, checkpoints):
    basis = compute(tmp_path, checkpoints)
    read_vectors(basis)
    damage(tmp_path, "vectors", 2)
    with pytest.raises((ValueError, RuntimeError, OSError)):
        read_vectors(basis)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_same_in_whichever_block_they_are_read(tmp_path, checkpoints, monkeypatch, kind):
    monkeypatch.setattr(vectors, "_SLICE", 10)
    basis = compute(tmp_path, checkpoints, basis__kind=kind, basis__k=3)
    whole = read_vectors(basis)
    for size in (1, 5, 7, 11):
        blocks = [read_vectors(basis, start, start + size) for start in range(0, 12, size)]
        assert torch.equal(torch.cat(blocks), whole)
    torch.testing.assert_close(read_vectors(basis, 4, 6, dtype=torch.float64), whole[4:6].double(), rtol=0, atol=1e-7)


def test_random_basis_is_gram_schmidt_on_the_gaussian_vectors_of_the_seed(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(vectors, "_SLICE", 7)
    basis = compute(tmp_path, checkpoints, basis__kind="random", basis__k=3, seed=5)
    gaussians = [np.random.default_rng([5, j]).standard_normal(31, dtype=np.float32) for j in range(12)]
    q, r = np.linalg.qr(np.stack(gaussians).T.astype(np.float64))
    np.testing.assert_allclose(read_vectors(basis), (q * np.sign(np.diag(r))).T, atol=1e-7)
    assert basis["mixing"].shape == (12, 12)
    assert "vectors" not in basis


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(1_000_000))


def test_random_basis_of_long_vectors_is_orthonormal_and_never_in_memory_whole(tmp_path):
    wide = CheckpointFolder(tmp_path, TokenLoss(Wide(), None))
    row = 4_000_000
    peak = peak_bytes(lambda: compute(tmp_path, wide, basis__kind="random", basis__k=2), "cpu")
    assert peak < row
    basis = load_basis(tmp_path / "basis.zarr")
    assert gram_error(read_vectors(basis)) < 1e-6
    assert peak_bytes(lambda: read_vectors(basis, 6, 8), "cpu") < 3 * row


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "k", "kill"),
    [
        ("hessian", 1, kill_in_write),
        ("hessian", 2, kill_in_write),
        ("hessian", 2, kill_between_variables),
        ("hessian", 1, kill_in_product),
        ("shuffled", 2, kill_in_write),
        ("random", 1, kill_in_write),
        ("parameters", 1, kill_in_write),
    ],
)
def test_basis_killed_and_resumed_has_the_bytes_of_one_that_was_not(
    tmp_path, checkpoints, monkeypatch, kind, k, kill, n
):
    with monkeypatch.context() as patch:
        kill(patch, n)
        with pytest.raises(KeyboardInterrupt):
            compute(tmp_path / "killed", checkpoints, basis__kind=kind, basis__k=k)
    compute(tmp_path / "killed", checkpoints, basis__kind=kind, basis__k=k)
    compute(tmp_path / "whole", checkpoints, basis__kind=kind, basis__k=k)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_basis_that_is_partly_read_from_disk_resumes_to_the_same_bytes(tmp_path, checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        kill_in_write(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            compute(tmp_path / "killed", checkpoints, basis__k=4, memory=4000)
    compute(tmp_path / "killed", checkpoints, basis__k=4, memory=4000)
    compute(tmp_path / "whole", checkpoints, basis__k=4, memory=4000)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_finished_basis_is_opened_without_a_product(tmp_path, checkpoints, monkeypatch):
    first = compute(tmp_path, checkpoints)
    monkeypatch.setattr(basis_module, "_eigenvectors", fail_at(basis_module._eigenvectors, 1))
    assert compute(tmp_path, checkpoints).identical(first)


def test_orthogonalise_is_the_normalised_rest_after_projection():
    basis = orthonormal(3, 10)
    vector = torch.arange(1.0, 11.0, dtype=torch.float64)
    rest = (torch.eye(10, dtype=torch.float64) - basis.T @ basis) @ vector
    torch.testing.assert_close(orthogonalise(vector, list(basis)), rest / rest.norm())
    torch.testing.assert_close(orthogonalise(vector, []), vector / vector.norm())


def test_without_takes_out_the_span_and_keeps_the_rest_and_the_argument():
    basis = orthonormal(3, 10)
    vector = torch.arange(1.0, 11.0, dtype=torch.float64)
    rest = without(vector, basis[:2])
    torch.testing.assert_close(rest, vector - basis[:2].T @ (basis[:2] @ vector))
    assert torch.equal(vector, torch.arange(1.0, 11.0, dtype=torch.float64))


def test_orthogonalise_holds_for_vectors_almost_inside_the_span():
    basis = orthonormal(3, 10).float()
    vector = basis[0] + 1e-4 * torch.ones(10)
    assert (basis @ orthogonalise(vector, list(basis))).abs().max() < 1e-6


def test_gram_error_is_the_largest_deviation_from_the_identity():
    assert gram_error(torch.eye(3)) == 0
    assert gram_error(torch.tensor([[1.0, 0.0], [0.25, 1.5]])) == pytest.approx(1.5**2 + 0.25**2 - 1)


def test_basis_of_long_vectors_is_orthonormal_to_rounding():
    # torch's own float32 norm of a million numbers is wrong in the fourth or fifth digit.
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for _ in range(4):
        vectors.append(orthogonalise(torch.randn(2_500_000, generator=generator), vectors))
    exact = torch.stack(vectors).double()
    assert (exact @ exact.T - torch.eye(4)).abs().max() < 1e-6
    assert gram_error(torch.stack(vectors)) < 1e-6


def test_gram_error_sees_a_wrong_length_and_a_wrong_angle():
    basis = torch.eye(3, 1000)
    assert gram_error(basis) == 0
    assert gram_error(basis * torch.tensor([[1.0], [1.0001], [1.0]])) == pytest.approx(2e-4, rel=1e-2)
    basis[0, 1] = 1e-3
    assert gram_error(basis) == pytest.approx(1e-3, rel=1e-3)


def test_inner_products_of_several_pieces_are_whole():
    one, other = torch.randn(2, 2**20 + 5), torch.randn(3, 2**20 + 5)
    np.testing.assert_allclose(inner_products(one, other), one.double() @ other.double().T, rtol=1e-10)


def walk(path, thetas, loss=mlp_loss):
    """Checkpoints of the MLP with these parameters at steps 0, 10, 20, ..."""
    path.mkdir(exist_ok=True)
    checkpoints = CheckpointFolder(path, TokenLoss(Mlp(), loss))
    for index, theta in enumerate(thetas):
        checkpoints.save(10 * index, checkpoints.token_loss.unflatten(theta))
    return checkpoints


def trajectory(folder, checkpoints, n_vectors):
    settings = BasisSettings(kind="trajectory", n_vectors=n_vectors)
    return compute_basis(folder / "basis.zarr", settings, checkpoints, None, steps=checkpoints.steps[1:])


@pytest.mark.parametrize("rank", [1, 3])
def test_trajectory_has_as_many_vectors_as_the_weights_have_directions(tmp_path, rank):
    generator = torch.Generator().manual_seed(rank)
    start, directions = torch.randn(31, generator=generator), torch.randn(rank, 31, generator=generator)
    checkpoints = walk(tmp_path, [start + torch.randn(rank, generator=generator) @ directions for _ in range(9)])
    with pytest.warns(UserWarning, match=rf"n_vectors = 8, but the 9 checkpoints move in {rank} directions"):
        vectors = read_vectors(trajectory(tmp_path, checkpoints, 8))
    assert gram_error(vectors) < 1e-6
    inside = torch.linalg.qr(directions.T)[0].T
    torch.testing.assert_close((vectors @ inside.T).square().sum(), torch.tensor(float(rank)), rtol=1e-5, atol=0)


def test_short_movement_is_not_taken_for_rounding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start, steps = torch.randn(31, generator=generator), torch.randn(5, 31, generator=generator).cumsum(0)
    basis = trajectory(tmp_path, walk(tmp_path, [start, *(start + 1e-5 * steps)]), 5)
    assert basis.sizes["vector"] == 5
    assert gram_error(read_vectors(basis)) < 1e-6


@pytest.mark.parametrize("n", [2, 5])
def test_trajectory_of_equal_checkpoints_is_refused_with_their_steps(tmp_path, n):
    checkpoints = walk(tmp_path, [torch.arange(31.0) / 7] * n)
    steps = ", ".join(str(10 * index) for index in range(n))
    with pytest.raises(ValueError, match=rf"checkpoints at steps {steps} have equal weights but for rounding"):
        trajectory(tmp_path, checkpoints, 1)


def test_trajectory_of_two_checkpoints_is_their_difference(tmp_path):
    start, end = torch.randn(2, 31)
    vectors = read_vectors(trajectory(tmp_path, walk(tmp_path, [start, end]), 1))
    torch.testing.assert_close(abs(vectors[0] @ (end - start)), (end - start).norm())


def test_trajectory_with_weights_that_are_not_finite_names_the_checkpoint(tmp_path):
    thetas = torch.randn(4, 31)
    thetas[2, 7] = float("nan")
    with pytest.raises(ValueError, match=r"step-00000020.* not finite; leave step 20 out of steps"):
        trajectory(tmp_path, walk(tmp_path, thetas), 2)


@pytest.mark.parametrize("kind", [*KINDS, "trajectory"])
def test_more_vectors_than_parameters_are_refused(tmp_path, checkpoints, kind):
    settings = BasisSettings(kind=kind, n_vectors=32, k=32)
    with pytest.raises(ValueError, match=r"basis\.n_vectors = 32; allowed: 1 to 31, the number of parameters"):
        compute_basis(tmp_path / "basis.zarr", settings, checkpoints, BATCH, steps=[20])


def test_as_many_vectors_as_parameters_are_orthonormal(tmp_path, checkpoints):
    settings = BasisSettings(kind="random", n_vectors=31, k=31)
    basis = compute_basis(tmp_path / "basis.zarr", settings, checkpoints, None, steps=[20])
    assert gram_error(read_vectors(basis)) < 1e-5


def root_of_output(model, batch):
    return (0 * mlp_loss(model, batch)).sqrt()


def no_curvature(model, batch):
    return mlp_loss(model, batch) * 0


@pytest.mark.parametrize(
    ("loss", "bad", "cause"),
    [
        (mlp_loss, {1: float("nan")}, "the weights of this checkpoint are not finite; leave it out of steps"),
        (lambda model, batch: mlp_loss(model, batch) / 0, {}, "the loss of the Hessian's batch is not finite here"),
        (root_of_output, {}, "weights and losses are finite, but derivatives are not"),
        (no_curvature, {}, r"the operator is zero .* no curvature left here; lower basis\.n_vectors"),
    ],
)
def test_eigenproblem_that_fails_names_vector_step_and_cause(tmp_path, loss, bad, cause):
    thetas = torch.randn(3, 31)
    for index, value in bad.items():
        thetas[index, 3] = value
    checkpoints = walk(tmp_path, thetas, loss)
    settings = BasisSettings(n_vectors=2)
    with pytest.raises(ValueError, match=rf"basis vector 1 \(step 10\): .*{cause}"):
        compute_basis(tmp_path / "basis.zarr", settings, checkpoints, BATCH, steps=[10, 20])


@pytest.mark.parametrize("k", [1, 2])
def test_hessian_of_two_directions_says_that_further_vectors_are_rounding(tmp_path, recwarn, k):
    quadratic = torch.randn(2, 31, generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        theta = torch.cat([parameter.flatten() for parameter in model.parameters()])
        return (quadratic @ theta).square().sum() + 0 * mlp_loss(model, batch)

    checkpoints = walk(tmp_path, torch.randn(5, 31), loss)
    compute_basis(tmp_path / "two.zarr", BasisSettings(n_vectors=2, k=k), checkpoints, BATCH, steps=[10, 20])
    assert not [str(w.message) for w in recwarn]
    settings = BasisSettings(n_vectors=4, k=k)
    with pytest.warns(UserWarning, match=rf"basis vector 3 \(step {[30, 20][k - 1]}\) has eigenvalue .* rounding"):
        basis = compute_basis(tmp_path / "four.zarr", settings, checkpoints, BATCH, steps=[10, 20, 30, 40])
    assert gram_error(read_vectors(basis)) < 1e-5
