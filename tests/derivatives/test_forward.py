from dataclasses import replace

import pytest
import torch
from cases import MODELS, orthonormal, problem, token_curvatures, token_gradients
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from polca_lib.derivatives.forward import trace
from polca_lib.derivatives.products import model_structure
from polca_lib.derivatives.strategy import _signals, choose, differentiate
from polca_lib.derivatives.token_loss import TokenLoss, n_examples, split_examples

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Ways of forward mode: by plain jvp, with products spared, and as a graph.
WAYS = ("jvp", "spared", "spared and traced")


def by_way(way, token_loss, theta, batch, vectors, order, size=None):
    seen = model_structure(token_loss, theta, next(split_examples(batch, 1))) if "spared" in way else None
    strategy = choose(token_loss, theta, batch, vectors, order=order, mode="forward")
    size = size or n_examples(batch)
    strategy = replace(strategy, structure=seen, pass_examples=size)
    if "traced" not in way:
        return strategy
    # At another point, and on other examples.
    other, part = theta.flip(0), pytree.tree_map(lambda t: t.flip(0)[:size], batch)
    return replace(strategy, traced=trace(token_loss, other, part, order, _signals(strategy, token_loss, other, part)))


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


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ragged"}))
def test_first_derivatives_are_those_of_one_backward_pass_per_token(name, way):
    against_backward_passes(*problem(name), order=1, way=way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jvp", "traced"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ragged"}))
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


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_between_layers_go_right_whichever_way_they_are_differentiated(name, order):
    token_loss, theta, batch = head(FUNCTIONS[name])
    against_backward_passes(token_loss, theta, batch, order, "spared" if order == 1 else "traced")


@pytest.mark.parametrize("order", [1, 2])
def test_a_bias_after_frozen_weights_goes_right(order):
    against_backward_passes(
        *head(torch.tanh, bias_alone=True), order=order, way="spared and traced" if order == 1 else "traced"
    )


@pytest.mark.parametrize("order", [1, 2])
def test_a_loss_of_none_of_the_parameters_has_derivatives_zero(order):
    token_loss = TokenLoss(nn.Linear(3, 1).double(), lambda model, batch: batch[0].sum(2).flatten())
    theta, vectors = torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    _, derivatives = forward(token_loss, theta, problem("mlp").batch, vectors, order, "traced")
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


def operations(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def cost_of_a_vector(order, way):
    """Operations of matrix products, in forward passes."""
    token_loss, batch = TokenLoss(Deep(), MODELS["attention"][1]), problem("attention").batch
    theta = token_loss.flatten(token_loss.parameters)
    vectors = orthonormal(9, len(theta)).float()
    strategy = by_way(way, token_loss, theta, batch, vectors, order)
    strategy = replace(strategy, chunk_vectors=9)
    three, nine = (
        operations(lambda n=n: differentiate(strategy, token_loss, theta, batch, vectors[:n])) for n in (3, 9)
    )
    return (nine - three) / 6 / operations(lambda: token_loss(theta, batch))


def test_first_derivatives_cost_two_passes_a_vector_and_both_four_where_nested_jvp_takes_seven():
    assert cost_of_a_vector(1, "jvp") == 2
    assert cost_of_a_vector(1, "traced") == pytest.approx(2, rel=0.01)
    # A little less, as what enters the first product has no second derivative.
    assert 3.8 < cost_of_a_vector(2, "traced") <= 4
    assert cost_of_a_vector(2, "jvp") > 6.8


def test_first_derivatives_cost_less_where_products_matter_to_single_tokens():
    assert cost_of_a_vector(1, "spared") < 1.95
    assert cost_of_a_vector(1, "spared and traced") < 1.95


@pytest.mark.parametrize("order", [1, 2])
def test_a_graph_is_used_for_as_many_examples_as_it_was_traced_on(order):
    arguments, vectors = problem("attention", examples=7), orthonormal(3, 93)
    strategy = by_way("traced", *arguments, vectors, order, size=3)
    calls = []
    graph = strategy.traced
    strategy = replace(strategy, traced=lambda *given: calls.append(len(given[1])) or graph(*given))
    found = differentiate(strategy, *arguments, vectors)[1]
    assert calls == [3, 3]
    torch.testing.assert_close(found[0], token_gradients(*arguments) @ vectors.T, **EXACT)


NUMBERS = {
    "bool": lambda x: x if (x > 0).all() else x.exp(),
    "list": lambda x: x * torch.tensor(x.detach().tolist()),
    "mask": lambda x: x[x > 0].sum() + x,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_depends_on_the_numbers_in_a_tensor_is_not_traced(name):
    token_loss, theta, batch = head(NUMBERS[name])
    with pytest.raises(Exception, match=r".+"):
        trace(token_loss, theta, batch, 1)


def test_a_single_number_is_read_anew_in_each_pass():
    scaled = head(lambda x: x * x.detach().flatten()[0].sign().item())
    against_backward_passes(*scaled, order=1, way="traced")


def test_numbers_of_a_batch_do_not_get_into_a_graph():
    def loss(model, batch):
        weights = torch.tensor(batch[1].tolist(), dtype=torch.float64)
        return (model(batch[0]).sum(2) * weights).flatten()

    _, theta, batch = problem("mlp")
    with pytest.raises(Exception, match=r".+"):
        trace(TokenLoss(MODELS["mlp"][0].double(), loss), theta, batch, 1)
