import re
from pathlib import Path

import cola
import numpy as np
import pytest
import torch
from cases import orthonormal, problem

import polca_lib
from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.memory import peak_bytes
from polca_lib.method.eigenpairs import as_cola, krylov_rows, top_eigenpairs

D = 40
SOLVERS = pytest.mark.parametrize("solver", ["lanczos", "cola"])


def matrix(spectrum, seed=0):
    """Random symmetric matrix with these eigenvalues, in float64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(torch.as_tensor(spectrum, dtype=torch.float64)) @ q.T


# The dominant eigenvalue is negative: largest and magnitude differ.
SPECTRUM = [-10.0, 6.0, 5.0, -4.5, 4.0, *np.linspace(-3, 3, D - 5)]


@pytest.fixture
def start():
    return torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def counted(a):
    calls = []

    def product(v):
        calls.append(1)
        return a @ v

    return product, calls


def check_against_dense(a, pairs, k, which):
    values, vectors = torch.linalg.eigh(a)
    order = torch.argsort(values if which == "largest" else values.abs(), descending=True)[:k]
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[order], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close((pairs.vectors @ vectors[:, order]).abs(), torch.eye(k).double(), rtol=0, atol=1e-6)


@SOLVERS
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("k", [1, 3])
def test_top_eigenpairs_are_those_of_a_dense_solver(which, k, start, solver):
    a = matrix(SPECTRUM)
    pairs = top_eigenpairs(lambda v: a @ v, start, k, which=which, tolerance=1e-9, max_products=D, solver=solver)
    check_against_dense(a, pairs, k, which)


@SOLVERS
@pytest.mark.parametrize("gap", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("seed", range(5))
def test_top_eigenpair_is_found_from_every_start_and_over_every_gap(seed, gap, solver):
    a = matrix([1 + gap, *np.linspace(-1.5, 1, D - 1)], seed)
    start = torch.randn(D, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    for which in ("largest", "magnitude"):
        pairs = top_eigenpairs(lambda v: a @ v, start, which=which, tolerance=1e-9, max_products=D, solver=solver)
        check_against_dense(a, pairs, 1, which)


def deflated_hessian(name, n_known):
    """The Hessian of a tiny model, vectors B, and P H P as a dense matrix, in float64."""
    token_loss, theta, batch = problem(name)
    known = orthonormal(n_known, len(theta)) if n_known else torch.zeros(0, len(theta), dtype=theta.dtype)
    project = torch.eye(len(theta), dtype=theta.dtype) - known.T @ known
    dense = torch.func.hessian(lambda at: token_loss(at, batch).mean())(theta)
    return HessianOperator(token_loss, theta, batch), theta, known, project @ dense @ project


@SOLVERS
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_known", [0, 3])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_eigenpairs_of_the_deflated_hessian_are_those_of_the_dense_matrix(name, n_known, k, which, solver):
    hessian, theta, known, dense = deflated_hessian(name, n_known)
    operator = as_cola(hessian, theta, known)
    start, settings = operator @ theta, {"which": which, "tolerance": 1e-9, "max_products": len(theta)}
    hessian.products = 0
    pairs = top_eigenpairs(lambda v: operator @ v, start, k, **settings, solver=solver)
    check_against_dense(dense, pairs, k, which)
    assert pairs.products == hessian.products


@pytest.mark.parametrize("n_known", [0, 3])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_cola_operator_is_the_dense_matrix_in_whatever_cola_does(name, n_known):
    hessian, theta, known, dense = deflated_hessian(name, n_known)
    operator, block = as_cola(hessian, theta, known), torch.randn(len(theta), 3, dtype=theta.dtype)
    assert operator.isa(cola.SelfAdjoint)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for own, expected in (
        (operator @ block, dense @ block),
        (operator @ theta, dense @ theta),
        (theta @ operator, theta @ dense),
        ((2 * operator @ operator) @ theta, 2 * dense @ dense @ theta),
        (operator.to_dense(), dense),
        (cola.linalg.trace(operator, cola.linalg.Exact()), dense.trace()),
    ):
        torch.testing.assert_close(own, expected, **close)
    estimate = cola.linalg.trace(operator, cola.linalg.Hutch(tol=2e-3, max_iters=3, key=1))
    assert abs(estimate - dense.trace()) < 0.3 * dense.norm()
    lanczos = cola.linalg.Lanczos(start_vector=operator @ theta, max_iters=len(theta) - n_known, tol=1e-12)
    value, vector = cola.linalg.eig(operator, 1, "LM", lanczos)
    torch.testing.assert_close(value[0], torch.linalg.eigvalsh(dense)[-1], rtol=1e-8, atol=0)
    torch.testing.assert_close(dense @ vector.to_dense(), value * vector.to_dense(), rtol=0, atol=1e-6)


def test_cola_takes_as_many_products_as_our_recurrence_and_those_that_measure(start):
    for k, which in ((1, "largest"), (3, "magnitude")):
        product, calls = counted(matrix(SPECTRUM))
        ours, colas = (top_eigenpairs(product, start, k, which=which, solver=s) for s in ("lanczos", "cola"))
        assert colas.products == ours.products + k == len(calls) - ours.products
        torch.testing.assert_close(colas.residuals, ours.residuals, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
@SOLVERS
def test_eigenvalue_is_right_in_float32_and_many_dimensions(solver):
    # As CoLA lays its vectors out, it would sum a million squares one by one, to three digits.
    diagonal = torch.linspace(-1, 1, 1_000_000)
    diagonal[0] = 4
    pairs = top_eigenpairs(
        lambda v: diagonal * v, torch.ones(1_000_000), tolerance=3e-4, max_products=20, solver=solver
    )
    assert pairs.converged
    assert pairs.values.item() == pytest.approx(4, rel=1e-5)


def test_cola_is_imported_only_where_it_is_used():
    files = list(Path(polca_lib.__file__).parent.rglob("*.py"))
    assert not [file.name for file in files if re.search("^(from|import) cola", file.read_text(), re.MULTILINE)]


@SOLVERS
def test_residual_is_the_norm_of_av_minus_lambda_v_over_lambda(start, solver):
    a = matrix(SPECTRUM)
    pairs = top_eigenpairs(lambda v: a @ v, start, 2, tolerance=0.05, solver=solver)
    by_hand = [(a @ v - value * v).norm() / value.abs() for v, value in zip(pairs.vectors, pairs.values, strict=True)]
    torch.testing.assert_close(pairs.residuals, torch.stack(by_hand), rtol=1e-9, atol=1e-12)
    assert (pairs.residuals > 1e-6).all()
    assert (pairs.residuals <= 0.05).all()


@SOLVERS
def test_vectors_have_unit_length(start, solver):
    pairs = top_eigenpairs(lambda v: matrix(SPECTRUM) @ v, start, 3, solver=solver)
    torch.testing.assert_close(pairs.vectors.norm(dim=1), torch.ones(3).double())


@SOLVERS
@pytest.mark.parametrize("k", [1, 3])
def test_running_out_of_products_is_reported(start, k, solver):
    product, calls = counted(matrix(SPECTRUM))
    pairs = top_eigenpairs(product, start, k, tolerance=1e-6, max_products=5, solver=solver)
    assert not pairs.converged
    assert pairs.residuals.max() > 1e-6
    assert len(calls) == pairs.products == 5 + (k if solver == "cola" else 0)


def test_iteration_stops_as_soon_as_the_residual_is_small_enough(start):
    product, calls = counted(matrix([100.0, *np.linspace(-1, 1, D - 1)]))
    pairs = top_eigenpairs(product, start, tolerance=0.01, max_products=D)
    assert pairs.converged
    assert pairs.residuals[0] <= 0.01
    assert len(calls) == pairs.products < 10


def test_a_finer_tolerance_takes_more_products(start):
    a = matrix(SPECTRUM)
    products = [top_eigenpairs(lambda v: a @ v, start, tolerance=t).products for t in (0.3, 0.03, 0.003)]
    assert products == sorted(set(products))


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 30])
def test_value_after_m_products_is_the_best_in_the_krylov_space_of_m_vectors(m, start):
    a = matrix(SPECTRUM).numpy()
    krylov = [start.numpy() / np.linalg.norm(start.numpy())]
    for _ in range(m - 1):
        vector = a @ krylov[-1]
        for _ in range(2):
            vector = vector - np.stack(krylov).T @ (np.stack(krylov) @ vector)
        krylov.append(vector / np.linalg.norm(vector))
    best = np.linalg.eigvalsh(np.stack(krylov) @ a @ np.stack(krylov).T)[-1]
    pairs = top_eigenpairs(lambda v: torch.from_numpy(a) @ v, start, tolerance=1e-14, max_products=m, seed=None)
    assert pairs.values.item() == pytest.approx(best, rel=1e-9)


@SOLVERS
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("max_products", [5, 8, 9, 33])
def test_lanczos_stays_within_the_vectors_it_says_it_needs(max_products, k, solver):
    diagonal, limits = torch.linspace(-1, 1, 10_000), {"tolerance": 1e-9, "max_products": max_products}

    def run():
        return top_eigenpairs(lambda v: diagonal * v, torch.randn(10_000), k, **limits, solver=solver)

    rows = krylov_rows(max_products, k, solver)
    assert rows - 1 < peak_bytes(run, "cpu") / diagonal.nbytes < rows + 0.5


@SOLVERS
def test_a_start_inside_an_invariant_subspace_stops_there(solver):
    a = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    pairs = top_eigenpairs(lambda v: a @ v, inside, solver=solver, seed=None)
    assert pairs.values.item() == pytest.approx(3.0)
    assert pairs.products <= 3 + (solver == "cola")
    assert top_eigenpairs(lambda v: a @ v, inside, solver=solver).values.item() == pytest.approx(5.0)


@SOLVERS
def test_fewer_pairs_than_asked_for_do_not_count_as_converged(solver):
    a = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    inside = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    pairs = top_eigenpairs(lambda v: a @ v, inside, k=2, solver=solver, seed=None)
    assert not pairs.converged
    assert len(pairs.values) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k = 0 .*allowed: 1 to 40"),
        ({"k": 41}, r"k = 41 .*allowed: 1 to 40"),
        ({"k": 3, "max_products": 2}, r"max_products = 2 .*k = 3 .*at least 3"),
    ],
)
def test_impossible_numbers_are_refused(start, arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(lambda v: v, start, **arguments)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_start_vector_of_no_length_is_refused(value):
    with pytest.raises(ValueError, match=rf"start vector is zero or not finite \(its length is {value}"):
        top_eigenpairs(lambda v: v, torch.full((4,), value))


@SOLVERS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_the_start_vector_does_not_matter(scale, solver):
    a = matrix(SPECTRUM).float()
    pairs = top_eigenpairs(lambda v: a @ v, scale * torch.ones(D), tolerance=1e-3, solver=solver)
    assert pairs.values.item() == pytest.approx(6, rel=1e-3)


# The next tests ask for the top, where a small residual alone accepts an eigenvector that is not: the spectrum has 15
# eigenvalues between 0.7 and 0.1, a bulk around 0, and two at the top with a gap between them.
MANY = 1000
BULK = np.concatenate([np.geomspace(0.7, 0.1, 15), np.linspace(-0.1, 0.1, MANY - 17)])


def diagonal_operator(*top):
    """Diagonal, which from a random start is the same as rotated at random."""
    diagonal = torch.from_numpy(np.concatenate([top, BULK[: MANY - len(top)]]))
    return lambda v: diagonal * v


def starts(n, seed=0):
    return torch.randn(n, MANY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gap", [0.02, 0.05, 0.1, 0.3])
def test_default_tolerance_gives_the_top_and_not_the_second(gap):
    product = diagonal_operator(1, 1 - gap)
    cosines = [top_eigenpairs(product, start, seed=None).vectors[0, 0].abs().item() for start in starts(200)]
    assert min(cosines) > 0.99


def test_residual_alone_accepts_the_second_from_these_starts():
    # What the test above rests on: without the check, some of its starts end at the second eigenvector.
    product, a_top = diagonal_operator(1, 0.98), []
    for start in starts(60):
        ends = [top_eigenpairs(product, start, max_products=m, seed=None) for m in range(5, 15)]
        a_top.append(next(pairs.vectors[0, 0].abs().item() for pairs in ends if pairs.residuals[0] <= 0.01))
    assert sum(cosine < 0.5 for cosine in a_top) > 6


@SOLVERS
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("seed", range(3))
def test_top_is_found_from_a_start_that_has_nothing_of_it(seed, which, solver):
    top = -1.0 if which == "magnitude" else 1.0
    product, start = diagonal_operator(top, 0.97), starts(1, seed)[0]
    start[0] = 0
    second = torch.zeros(MANY, dtype=torch.float64)
    second[1] = 1
    for without_top in (start, second):
        pairs = top_eigenpairs(product, without_top, which=which, solver=solver)
        assert pairs.converged
        assert pairs.values.item() == pytest.approx(top, rel=1e-4)
        assert pairs.vectors[0, 0].abs() > 0.99
    # Without the random vector the start can't show the top.
    assert top_eigenpairs(product, start, which=which, seed=None).values.item() == pytest.approx(0.97, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("k", [2, 3])
def test_each_of_several_top_pairs_is_missed_no_more_often_than_promised(k, which):
    sign = -1 if which == "magnitude" else 1
    top = np.array([1, 0.97 * sign, 0.95, 0.92 * sign])
    found = [top_eigenpairs(diagonal_operator(*top), start, k, which=which, seed=None) for start in starts(400, seed=k)]
    assert all(pairs.converged for pairs in found)
    wrong = [not np.allclose(pairs.values, top[:k], rtol=1e-3) for pairs in found]
    assert sum(wrong) <= 3  # one in a thousand for each of k is promised, 1.2 at most


@SOLVERS
def test_equal_eigenvalues_are_no_reason_to_go_on(solver):
    pairs = top_eigenpairs(diagonal_operator(1, 1), starts(1)[0], solver=solver)
    assert pairs.converged
    assert pairs.vectors[0, :2].norm() > 0.99


def test_products_that_leave_a_larger_eigenvalue_possible_do_not_count_as_converged():
    product, start = diagonal_operator(1, 0.98), starts(1)[0]
    enough = top_eigenpairs(product, start, seed=None)
    before = top_eigenpairs(product, start, max_products=enough.products - 1, seed=None)
    assert before.residuals[0] <= 1e-3
    assert enough.converged
    assert not before.converged


@SOLVERS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_product_that_is_not_finite_is_named(value, solver):
    calls = []

    def product(v):
        calls.append(1)
        return v * (value if len(calls) == 3 else torch.arange(1.0, D + 1))

    with pytest.raises(FloatingPointError, match="product 3 of the operator is not finite"):
        top_eigenpairs(product, torch.ones(D), solver=solver)


@SOLVERS
def test_zero_operator_is_refused_and_one_whose_first_value_is_zero_is_not(solver):
    with pytest.raises(ZeroDivisionError, match="the operator is zero"):
        top_eigenpairs(torch.zeros_like, torch.ones(D), solver=solver)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pairs = top_eigenpairs(lambda v: swap @ v, torch.tensor([1.0, 0.0]), solver=solver, seed=None)
    assert pairs.values.item() == pytest.approx(1)
