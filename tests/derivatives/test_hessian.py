import numpy as np
import pytest
import torch
from cases import problem

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.memory import peak_bytes
from polca_lib.derivatives.token_loss import TokenLoss, n_examples
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import ModelSettings


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


@pytest.mark.slow
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
