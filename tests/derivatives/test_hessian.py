import numpy as np
import pytest
import torch
from cases import problem

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.memory import peak_bytes
from polca_lib.derivatives.token_loss import TokenLoss, n_examples
from polca_lib.method.eigenpairs import krylov_rows, top_eigenpairs
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import ModelSettings

D = 40


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


# Several chunks, built anew each time; two; the whole batch at once.
@pytest.mark.parametrize("memory", [{"mlp": 2500, "attention": 12_000}, {"mlp": 5000, "attention": 25_000}, None])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_hessian_vector_product_is_that_of_the_dense_hessian(name, memory):
    token_loss, theta, batch = problem(name)
    dense = torch.func.hessian(lambda at: token_loss(at, batch).mean())(theta)
    operator = HessianOperator(token_loss, theta, batch, memory=memory and memory[name])
    vectors = torch.randn(3, len(theta), dtype=theta.dtype)
    for vector in vectors:
        torch.testing.assert_close(operator(vector), dense @ vector, rtol=1e-9, atol=1e-11)
    assert operator.products == 3


@pytest.fixture(scope="module")
def transformer():
    """A loss, a point and 60 examples of which each takes many times the memory of the point."""
    config = ModelSettings(n_layers=1, d_model=16, n_heads=2, d_mlp=32)
    token_loss = TokenLoss(build_model(config, seed=0), arithmetic.answer_loss)
    pairs = np.random.default_rng(0).integers(1000, size=(60, 2))
    return token_loss, token_loss.flatten(token_loss.parameters), arithmetic.encode(pairs)


def passes_in_a_product(token_loss, theta, batch, memory):
    """Number of forward passes that a product takes, and the examples in each."""
    examples = []

    def counted(at, chunk):
        examples.append(n_examples(chunk))
        return token_loss(at, chunk)

    operator = HessianOperator(counted, theta, batch, memory)
    examples.clear()
    operator(theta)
    return examples


def test_the_more_memory_the_fewer_passes_a_product_takes(transformer):
    budgets = (300_000, 1_500_000, 2_500_000, 3_000_000, 4_000_000, 6_000_000)
    passes = [passes_in_a_product(*transformer, memory) for memory in budgets]
    assert len(passes[0]) > len(passes[1]) > len(passes[2]) > len(passes[3]) > 0
    assert passes[4] == passes[5] == []
    assert sum(passes[0]) == 60
    # Equal sizes, up to the rest; not as large as fits, so that something can be kept.
    assert set(passes[1]) == set(passes[2]) == {15}


def test_chunks_have_at_most_256_examples():
    token_loss, theta, batch = problem("mlp", examples=300)
    sizes = []
    HessianOperator(lambda at, chunk: (sizes.append(n_examples(chunk)), token_loss(at, chunk))[1], theta, batch)
    assert sizes[-2:] == [150, 150]


@pytest.mark.parametrize("memory", [400_000, 800_000, 1_500_000, 2_500_000, 4_000_000, 5_000_000])
def test_hessian_vector_products_stay_within_the_memory(transformer, memory):
    token_loss, theta, batch = transformer

    def products():
        operator = HessianOperator(token_loss, theta, batch, memory)
        return [operator(theta) for _ in range(3)]

    # The results and the point are the caller's.
    peak = peak_bytes(products, "cpu") - 4 * theta.nbytes
    assert memory / 2 < peak <= memory
    ample = HessianOperator(token_loss, theta, batch, memory=10**8)
    torch.testing.assert_close(products()[-1], ample(theta), rtol=1e-4, atol=1e-6)


def test_memory_too_small_for_one_example_is_refused(transformer):
    with pytest.raises(ValueError, match=r"one example takes \d+,\d+ bytes .* only 50,000 are left .* raise memory"):
        HessianOperator(*transformer, memory=50_000)


def test_hessian_vector_product_goes_through_layer_norm():
    # The dense reference is by backward passes alone: torch.func.hessian is wrong here (pytorch issue 196700).
    token_loss, theta, batch = problem("layer norm")
    dense = torch.autograd.functional.hessian(lambda at: token_loss(at, batch).mean(), theta)
    vector = torch.randn_like(theta)
    torch.testing.assert_close(HessianOperator(token_loss, theta, batch)(vector), dense @ vector, rtol=1e-9, atol=1e-11)


def test_every_token_weighs_the_same_when_the_last_chunk_is_shorter():
    token_loss, theta, batch = problem("mlp", examples=7)
    # An average of chunk averages would give the last example three times its weight.
    assert passes_in_a_product(token_loss, theta, batch, memory=3000) == [3, 3, 1]
    dense = torch.func.hessian(lambda at: token_loss(at, batch).sum() / 14)(theta)
    vector = torch.ones_like(theta)
    operator = HessianOperator(token_loss, theta, batch, memory=3000)
    torch.testing.assert_close(operator(vector), dense @ vector, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("k", [1, 3])
def test_top_eigenpairs_are_those_of_a_dense_solver(which, k, start):
    a = matrix(SPECTRUM)
    values, vectors = torch.linalg.eigh(a)
    order = torch.argsort(values if which == "largest" else values.abs(), descending=True)[:k]
    pairs = top_eigenpairs(lambda v: a @ v, start, k, which=which, tolerance=1e-9, max_products=D)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((pairs.vectors @ vectors[:, order]).abs(), torch.eye(k).double(), rtol=0, atol=1e-7)


def test_residual_is_the_norm_of_av_minus_lambda_v_over_lambda(start):
    a = matrix(SPECTRUM)
    pairs = top_eigenpairs(lambda v: a @ v, start, 2, tolerance=0.05)
    by_hand = [(a @ v - value * v).norm() / value.abs() for v, value in zip(pairs.vectors, pairs.values, strict=True)]
    torch.testing.assert_close(pairs.residuals, torch.stack(by_hand), rtol=1e-9, atol=1e-12)
    assert (pairs.residuals > 1e-6).all()
    assert (pairs.residuals <= 0.05).all()


def test_vectors_have_unit_length(start):
    pairs = top_eigenpairs(lambda v: matrix(SPECTRUM) @ v, start, 3)
    torch.testing.assert_close(pairs.vectors.norm(dim=1), torch.ones(3).double())


@pytest.mark.parametrize("k", [1, 3])
def test_running_out_of_products_is_reported(start, k):
    product, calls = counted(matrix(SPECTRUM))
    pairs = top_eigenpairs(product, start, k, tolerance=1e-6, max_products=5)
    assert not pairs.converged
    assert pairs.residuals.max() > 1e-6
    assert len(calls) == pairs.products == 5


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
    pairs = top_eigenpairs(lambda v: torch.from_numpy(a) @ v, start, tolerance=1e-14, max_products=m)
    assert pairs.values.item() == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("max_products", [5, 8, 9, 33])
def test_lanczos_stays_within_the_vectors_it_says_it_needs(max_products, k):
    diagonal = torch.linspace(-1, 1, 10_000)

    def run():
        return top_eigenpairs(lambda v: diagonal * v, torch.randn(10_000), k, tolerance=1e-9, max_products=max_products)

    assert (
        krylov_rows(max_products, k) - 1 < peak_bytes(run, "cpu") / diagonal.nbytes < krylov_rows(max_products, k) + 0.5
    )


def test_a_start_inside_an_invariant_subspace_stops_there():
    a = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    pairs = top_eigenpairs(lambda v: a @ v, torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    assert pairs.values.item() == pytest.approx(3.0)
    assert pairs.products <= 3


def test_fewer_pairs_than_asked_for_do_not_count_as_converged():
    a = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    pairs = top_eigenpairs(lambda v: a @ v, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64), k=2)
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


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_the_start_vector_does_not_matter(scale):
    a = matrix(SPECTRUM).float()
    pairs = top_eigenpairs(lambda v: a @ v, scale * torch.ones(D), tolerance=1e-3)
    assert pairs.values.item() == pytest.approx(6, rel=1e-3)
