import pytest
import torch
from cases import MIXED, MODELS, orthonormal, problem, token_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polca_lib.derivatives.reverse as reverse
import polca_lib.derivatives.signals as kept_signals
from polca_lib.derivatives.products import model_structure
from polca_lib.derivatives.reverse import project_reverse
from polca_lib.derivatives.signals import signals, weights_of
from polca_lib.derivatives.token_loss import TokenLoss, split_examples

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def directions(n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64) / d**0.5


def project(
    token_loss, theta, batch, vectors, dtype=torch.float64, chunk_examples=100, pass_examples=100, batched=True
):
    seen = model_structure(token_loss, theta, next(split_examples(batch, 1)))
    sizes = {"chunk_examples": chunk_examples, "pass_examples": pass_examples, "batched": batched}
    return project_reverse(token_loss, theta, seen, batch, vectors, dtype=dtype, **sizes)


# With few vectors no gradient is formed; with many, all are that have signals at more positions than there are tokens.
@pytest.mark.parametrize("n_vectors", [1, 5, 200])
@pytest.mark.parametrize("name", sorted(set(MODELS) - set(MIXED)))
def test_gradients_are_those_of_one_backward_pass_per_token(name, n_vectors):
    token_loss, theta, batch = problem(name)
    vectors = directions(n_vectors, len(theta))
    # Ragged losses go without vmap, one example at a time.
    single = {"batched": False, "pass_examples": 1} if name == "ragged" else {}
    loss, gradient = project(token_loss, theta, batch, vectors, **single)
    torch.testing.assert_close(loss, token_loss(theta, batch), **EXACT)
    torch.testing.assert_close(gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)


class Odd(nn.Module):
    """A single number as a parameter, one that is not used, and a product of a constant with a weight."""

    def __init__(self):
        super().__init__()
        self.scale, self.unused, self.weight = (nn.Parameter(torch.ones(shape)) for shape in ((), (2,), (3, 3)))
        self.register_buffer("places", torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))

    def forward(self, batch):
        return self.scale * (batch[0] @ self.weight + self.places @ self.weight).square().sum(2)


def test_single_numbers_unused_parameters_and_products_with_constants_go_right():
    token_loss, batch = TokenLoss(Odd().double(), lambda model, batch: model(batch).flatten()), problem("mlp").batch
    theta, vectors = torch.linspace(-1, 1, 12, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    gradient = project(token_loss, theta, batch, vectors)[1]
    torch.testing.assert_close(gradient, token_gradients(token_loss, theta, batch), **EXACT)


@pytest.mark.parametrize("back", [True, False])
def test_models_that_multiply_in_two_dtypes_go_right(back):
    token_loss, theta, batch = problem("mlp", dtype=torch.float32)
    vectors = orthonormal(5, len(theta)).float()

    def loss(model, batch):
        layers, (inputs, targets) = model.layers, batch
        x = layers[1](layers[0](inputs)).double()
        logits = x @ layers[2].weight.T.double() + layers[2].bias
        logits = (logits.float() if back else logits).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")

    mixed = TokenLoss(token_loss.model, loss)
    found = project(mixed, theta, batch, vectors, dtype=torch.float32)[1]
    expected = token_gradients(mixed, theta, batch) @ vectors.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-10, 1e-6), (torch.bfloat16, 1e-4, 2e-2)])
def test_products_in_another_dtype_err_by_its_rounding(dtype, least, most):
    token_loss, theta, batch = problem("attention", examples=30)
    vectors = orthonormal(5, len(theta))
    exact = project(token_loss, theta, batch, vectors)[1]
    error = (project(token_loss, theta, batch, vectors, dtype=dtype)[1] - exact).norm() / exact.norm()
    assert least < error < most


SMALL = problem("attention")
GRADIENTS = token_gradients(*SMALL)
FEW_OR_MANY = pytest.mark.parametrize("n_vectors", [1, 6])  # none of its gradients is formed, or all are


@FEW_OR_MANY
@given(chunk_examples=st.integers(1, 9), pass_examples=st.integers(1, 9), tokens=st.integers(1, 30))
def test_results_do_not_depend_on_the_chunks(n_vectors, chunk_examples, pass_examples, tokens):
    vectors = directions(n_vectors, len(SMALL.theta))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_signals, "_TOKENS", tokens)
        loss, found = project(*SMALL, vectors, chunk_examples=chunk_examples, pass_examples=pass_examples)
    torch.testing.assert_close(loss, SMALL.token_loss(SMALL.theta, SMALL.batch), **EXACT)
    torch.testing.assert_close(found, GRADIENTS @ vectors.T, **EXACT)


@FEW_OR_MANY
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (4, 5), (2, 100), (10, 2)])
def test_results_do_not_depend_on_the_tiles(monkeypatch, n_vectors, width, height):
    monkeypatch.setattr(kept_signals, "_TILE", dict.fromkeys(kept_signals._TILE, (width, height)))
    vectors = directions(n_vectors, len(SMALL.theta))
    torch.testing.assert_close(project(*SMALL, vectors)[1], GRADIENTS @ vectors.T, **EXACT)


def test_a_point_need_not_lie_side_by_side_in_memory():
    token_loss, theta, batch = problem("attention")
    strided = torch.stack([theta, theta], dim=1)[:, 0]
    vectors = directions(6, len(theta))
    torch.testing.assert_close(project(token_loss, strided, batch, vectors)[1], GRADIENTS @ vectors.T, **EXACT)


def test_of_positions_without_a_signal_nothing_is_kept():
    token_loss, theta, batch = problem("last position")
    seen = model_structure(token_loss, theta, next(split_examples(batch, 1)))
    parameters = token_loss.unflatten(theta)
    weights = weights_of(seen, parameters, torch.float64)
    kept = signals(token_loss, parameters, seen, weights, batch, n_vectors=5)
    # Of the projection to queries, keys and values all three positions; of the logits one.
    assert [[x.shape for x in factor.left] for factor in kept.factors] == [[(7, 1, 12, 3)], [(7, 1, 5, 1)]]
    assert [[x.shape for x in factor.right] for factor in kept.factors] == [[(7, 1, 3, 4)], [(7, 1, 1, 4)]]
    held = [kept.loss, *kept.gradients.values(), *(x for f in kept.factors for side in f for x in side)]
    assert kept.nbytes == sum(x.nbytes for x in held)
    # With one vector no gradient is formed.
    factors = signals(token_loss, parameters, seen, weights, batch, n_vectors=1).factors
    assert [[x.shape for x in factor] for factor in factors] == [[(21, 4), (21, 1, 12)], [(7, 4), (7, 1, 5)]]


def operations(token_loss, theta, batch, n_vectors):
    with FlopCounterMode(display=False) as counter:
        project(token_loss, theta, batch, directions(n_vectors, len(theta)))
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "tokens"), [("mlp", 2), ("attention", 3), ("last position", 1)])
def test_a_vector_more_costs_one_inner_product_with_the_gradient_of_each_token(name, tokens):
    token_loss, theta, batch = problem(name, examples=10)
    counts = [operations(token_loss, theta, batch, n_vectors) for n_vectors in (100, 105)]
    assert counts[1] - counts[0] == 5 * 10 * tokens * 2 * len(theta)


@pytest.mark.parametrize("name", ["mlp", "layer norm", "multi-head"])
def test_axes_of_parameters_cost_nothing_at_weights_that_they_leave_alone(name):
    token_loss, theta, batch = problem(name, examples=10)
    axes = torch.eye(len(theta), dtype=torch.float64)
    mixed = torch.cat([directions(3, len(theta)), axes])
    counts = []
    for vectors in (mixed, directions(len(mixed), len(theta))):
        with FlopCounterMode(display=False) as counter:
            gradient = project(token_loss, theta, batch, vectors)[1]
        torch.testing.assert_close(gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
        counts.append(counter.get_total_flops())
    sizes = [
        product.weight.value.numel()
        for product in model_structure(token_loss, theta, next(split_examples(batch, 1))).products
    ]
    tokens = len(token_loss(theta, batch))
    assert counts[1] - counts[0] == sum(2 * tokens * size * (len(theta) - size) for size in sizes)


def test_with_few_vectors_it_costs_less_not_to_form_gradients(monkeypatch):
    token_loss, theta, batch = problem("mlp", examples=10)
    least = operations(token_loss, theta, batch, 1)
    real = reverse.signals
    monkeypatch.setattr(reverse, "signals", lambda *arguments: real(*arguments[:-2], 10**6, True))
    assert least < operations(token_loss, theta, batch, 1)
