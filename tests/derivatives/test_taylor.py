import math
from dataclasses import replace

import pytest
import torch
from cases import MODELS, orthonormal, problem, token_curvatures, token_gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.derivatives.products import model_structure
from polca_lib.derivatives.strategy import choose, differentiate
from polca_lib.derivatives.token_loss import TokenLoss, split_examples

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Ways of forward mode: with what is known of the products, without, and by plain jvp.
WAYS = ("structure", "taylor", "jvp")


def by_way(way, token_loss, theta, batch, vectors, order):
    seen = model_structure(token_loss, theta, next(split_examples(batch, 1))) if way == "structure" else None
    strategy = choose(token_loss, theta, batch, vectors, order=order, mode="forward")
    return replace(strategy, structure=seen, taylor=way != "jvp")


def forward(token_loss, theta, batch, vectors, order, way):
    strategy = by_way(way, token_loss, theta, batch, vectors, order)
    return differentiate(strategy, token_loss, theta, batch, vectors)


def against_backward_passes(token_loss, theta, batch, order, way):
    vectors = orthonormal(3, len(theta))
    loss, derivatives = forward(token_loss, theta, batch, vectors, order, way)
    torch.testing.assert_close(loss, token_loss(theta, batch), **EXACT)
    torch.testing.assert_close(derivatives[0], token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    if order == 2:
        torch.testing.assert_close(derivatives[1], token_curvatures(token_loss, theta, batch, vectors), **EXACT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"in place"}))
def test_first_derivatives_are_those_of_one_backward_pass_per_token(name, way):
    against_backward_passes(*problem(name), order=1, way=way)


@pytest.mark.parametrize("way", ["taylor", "jvp"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"in place"}))
def test_both_derivatives_are_those_of_backward_passes(name, way):
    against_backward_passes(*problem(name, examples=3), order=2, way=way)


class Head(nn.Module):
    """A hidden layer with any function behind it, and frozen weights with a bias that is not."""

    def __init__(self, function, bias_alone=False):
        super().__init__()
        self.hidden, self.bias, self.function, self.bias_alone = (
            nn.Linear(3, 3),
            nn.Parameter(torch.zeros(3)),
            function,
            bias_alone,
        )
        self.register_buffer("frozen", torch.eye(3) + 1)

    def forward(self, inputs):
        x = nn.functional.linear(inputs, self.frozen, self.bias) if self.bias_alone else inputs
        return self.function(self.hidden(x)) + self.bias


def head(function, **settings):
    _, _, batch = problem("mlp")
    token_loss = TokenLoss(Head(function, **settings).double(), MODELS["mlp"][1])
    generator = torch.Generator().manual_seed(0)
    return token_loss, torch.randn(token_loss.n_parameters, generator=generator, dtype=torch.float64), batch


FUNCTIONS = {
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
    "layer norm": lambda x: nn.functional.layer_norm(x, (3,)),
    "layer norm of torch": lambda x: torch.layer_norm(x, (3,)),
    "rms norm": lambda x: nn.functional.rms_norm(x, (3,)),
    "group norm": lambda x: nn.functional.group_norm(x.flatten(0, 1), 1).unflatten(0, x.shape[:2]),
    "normalize": lambda x: nn.functional.normalize(x, dim=-1),
    "softmax without a dimension": nn.Softmax(),
    "guarded root": lambda x: torch.where(x > 0, x.clamp(min=0.1).sqrt(), 0.0),
    "in place at the end": nn.ReLU(inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers_go_right_whichever_way_they_are_differentiated(name, order):
    token_loss, theta, batch = head(FUNCTIONS[name])
    vectors = orthonormal(24, len(theta))  # so many that Taylor arithmetic spares enough of the first derivatives
    strategy = choose(token_loss, theta, batch, vectors, order=order, mode="forward")
    # A softmax over examples leaves no product to spare.
    assert strategy.taylor or "taylor" in strategy.unfit or name == "softmax without a dimension"
    found = differentiate(strategy, token_loss, theta, batch, vectors)[1]
    torch.testing.assert_close(found[0], token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    if order == 2:
        torch.testing.assert_close(found[1], token_curvatures(token_loss, theta, batch, vectors), **EXACT)


@pytest.mark.parametrize("order", [1, 2])
def test_a_bias_after_frozen_weights_goes_right(order):
    against_backward_passes(*head(torch.tanh, bias_alone=True), order=order, way="taylor")


@pytest.mark.parametrize("order", [1, 2])
def test_a_loss_of_none_of_the_parameters_has_derivatives_zero(order):
    token_loss = TokenLoss(nn.Linear(3, 1).double(), lambda model, batch: batch[0].sum(2).flatten())
    theta, vectors = torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    _, derivatives = forward(token_loss, theta, problem("mlp").batch, vectors, order, "taylor")
    for derivative in derivatives:
        assert torch.equal(derivative, torch.zeros(14, 4, dtype=torch.float64))


class Deep(nn.Module):
    """Products, and little besides, between data that depend on the parameters."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(5, 8), nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.out = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x).cumsum(1).tanh()
        return self.out(x)


# The counter does not know this one by itself.
IN_PLACE = {torch.ops.aten.baddbmm_: lambda _, one, other, **settings: 2 * math.prod(one) * other[-1]}


def operations(run):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def cost_of_a_vector(order, way):
    """Operations of matrix products, in forward passes."""
    token_loss, batch = TokenLoss(Deep(), MODELS["attention"][1]), problem("attention").batch
    theta = token_loss.flatten(token_loss.parameters)
    vectors = orthonormal(9, len(theta)).float()
    strategy = by_way(way, token_loss, theta, batch, vectors, order)
    strategy = replace(strategy, pass_examples=7, chunk_vectors=9)
    three, nine = (
        operations(lambda n=n: differentiate(strategy, token_loss, theta, batch, vectors[:n])) for n in (3, 9)
    )
    return (nine - three) / 6 / operations(lambda: token_loss(theta, batch))


def test_first_derivatives_cost_two_passes_a_vector_and_both_four_where_nested_jvp_takes_seven():
    assert cost_of_a_vector(1, "jvp") == 2
    assert cost_of_a_vector(1, "taylor") == pytest.approx(2, rel=0.01)
    # A little less, as what enters the first product has no second derivative.
    assert 3.8 < cost_of_a_vector(2, "taylor") <= 4
    assert cost_of_a_vector(2, "jvp") > 6.8


def test_first_derivatives_cost_less_where_products_matter_to_single_tokens():
    assert cost_of_a_vector(1, "structure") < 1.95
