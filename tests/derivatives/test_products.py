import pytest
import torch
from cases import MODELS, Quadratic, problem
from torch import nn

from polca_lib.derivatives.products import WatchProducts, model_structure, single_target_signals
from polca_lib.derivatives.token_loss import TokenLoss, split_examples

HEADS = {f"heads.{name}" for name, _ in MODELS["multi-head"][0].heads.named_parameters()}

# By model: the number of products of data with weights, and the parameters used in any other way.
SEEN = {
    "mlp": (2, {"layers.0.bias", "layers.2.bias"}),
    "attention": (2, {"embed.weight", "out.bias"}),
    "layer norm": (2, {"embed.weight", "norm.weight", "norm.bias", "out.bias"}),
    "multi-head": (1, {"embed.weight", "out.bias"} | HEADS),
    "sequence first": (2, {"embed.weight", "hidden.bias", "out.bias"}),
    "fused": (6, {"embed.weight", "out.bias"}),
    "products": (7, {"bias"}),
    "images": (1, {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "out.bias"}),
    "recurrent": (6, {"hidden.bias", "out.bias"}),
    "tied": (3, {"embed.weight"}),
}


def seen(name, theta=None):
    token_loss, own, batch = problem(name)
    return model_structure(token_loss, own if theta is None else theta, next(split_examples(batch, 1)))


@pytest.mark.parametrize("name", SEEN)
def test_products_of_data_with_weights_are_found_however_they_are_written(name):
    found = seen(name)
    assert (len(found.products), set(found.other_parameters)) == SEEN[name]


def test_every_parameter_is_found_in_a_product_or_elsewhere(case):
    found = model_structure(case.token_loss, case.theta, next(split_examples(case.batch, 1)))
    assert set().union(found.other_parameters, *(product.weight.leaves for product in found.products)) == set(
        case.token_loss.parameters
    )


@pytest.mark.parametrize(("name", "tokens"), [("mlp", 2), ("attention", 3), ("last position", 1)])
def test_target_tokens_of_an_example_are_counted(name, tokens):
    assert seen(name).tokens == tokens


def test_shapes_are_those_of_the_weight_from_input_to_output_and_of_the_product_for_one_example():
    found = [(tuple(product.weight.value.shape), product.shape) for product in seen("fused").products]
    assert found[:3] == [((4, 4), (1, 3, 4))] * 3
    assert found[3:] == [((4, 6), (1, 3, 6)), ((4, 4), (1, 3, 4)), ((4, 5), (1, 3, 5))]


@pytest.mark.parametrize("name", ["fused", "products", "tied", "encoder layer"])
def test_rearranged_weights_are_built_anew_elsewhere(name):
    token_loss, theta, _ = problem(name)
    other = torch.arange(len(theta), dtype=theta.dtype)
    # The values are those at some point near theta; what is built is at whichever point is asked for.
    point = token_loss.unflatten(other)
    for product in seen(name).products:
        built = product.weight.build(point)
        assert built.shape == product.weight.value.shape
        own = torch.cat([point[leaf].flatten() for leaf in product.weight.leaves])
        assert torch.isin(built, own).all()
    first = seen("tied").products[1].weight
    hidden = problem("tied").token_loss.unflatten(torch.arange(44.0))["hidden"]
    assert torch.equal(first.build({"hidden": hidden}), hidden.T)


class Summed(nn.Module):
    """Weights multiplied with each other, with a constant, and with data that comes second."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, batch):
        inputs, _ = batch
        return (inputs @ (self.one @ self.two) + (self.three @ inputs.mT).mT + inputs @ (self.one * self.mask)).sum(2)


def test_product_of_weights_is_a_weight_and_what_meets_a_constant_or_comes_first_is_elsewhere():
    token_loss = TokenLoss(Summed().double(), lambda model, batch: model(batch).flatten())
    _, _, batch = problem("mlp")
    found = model_structure(token_loss, token_loss.flatten(token_loss.parameters), next(split_examples(batch, 1)))
    assert [set(product.weight.leaves) for product in found.products] == [{"one", "two"}]
    assert found.other_parameters == {"one", "three"}
    leaves = {name: torch.randn(3, 3, dtype=torch.float64) for name in ("one", "two")}
    assert torch.equal(found.products[0].weight.build(leaves), leaves["one"] @ leaves["two"])


# By model: products that matter to the token at their own position alone, as all do after the last mixing of positions.
ALONE = {
    "mlp": {0, 1},
    "attention": {1},
    "layer norm": {1},
    "encoder layer": {0, 1, 2},
    "fused": {0, 3, 4, 5},
    "recurrent": {3, 4, 5},
    "tied": {0, 1, 2},
    "last position": {0, 1},
    "images": {0},
}


@pytest.mark.parametrize("name", ALONE)
def test_products_behind_the_last_mixing_of_positions_matter_to_single_tokens(name):
    token_loss, theta, batch = problem(name)
    # Tokens all different: of equal ones, attention to either is the same.
    example = torch.arange(4)[None] if isinstance(batch, torch.Tensor) else next(split_examples(batch, 1))
    assert model_structure(token_loss, theta, example).single_target == ALONE[name]


def test_a_point_where_no_signal_comes_back_tells_as_much():
    token_loss, _, batch = problem("mlp")
    # The output layer is zero, so the one before it matters to nothing here.
    theta = token_loss.flatten({n: p * (n != "layers.2.weight") for n, p in token_loss.parameters.items()})
    assert model_structure(token_loss, theta, next(split_examples(batch, 1))).single_target == {0, 1}


@pytest.mark.parametrize("name", ["attention", "fused", "mixing"])
def test_signals_are_those_of_one_backward_pass_per_token(name):
    token_loss, theta, batch = problem(name, examples=3)
    if name != "mixing":
        batch = torch.tensor([[0, 1, 2, 3], [3, 0, 4, 1], [1, 2, 4, 0]])
    parameters = token_loss.unflatten(theta)
    n_sites = len(seen(name).products)
    found = single_target_signals(token_loss, parameters, batch, range(n_sites))
    probes = []

    def probe(index, x, weight, bias):
        result = x @ weight.value
        probes.append(torch.zeros_like(result, requires_grad=True))
        return result + probes[-1] + (0 if bias is None else bias)

    with WatchProducts(parameters, probe):
        losses = token_loss.at(parameters, batch)
    by_token = zip(*(torch.autograd.grad(loss, probes, retain_graph=True) for loss in losses), strict=True)
    for index, signals in enumerate(torch.stack(each).flatten(1, -2) for each in by_token):
        signal, token = found[index]
        torch.testing.assert_close(signal, signals.sum(0))
        matters = (signals != 0).any(2)  # token, position
        assert (token is not None) == (matters.sum(0) <= 1).all()
        if token is not None:
            assert matters[token[matters.any(0)], matters.any(0)].all()


def test_a_model_without_products_has_no_sites():
    token_loss = TokenLoss(Quadratic(), lambda model, batch: model(batch))
    batch = torch.eye(4, dtype=torch.float64)[None], torch.ones(1, 4, dtype=torch.float64)
    found = model_structure(token_loss, torch.ones(4, dtype=torch.float64), batch)
    assert (found.products, found.other_parameters, found.tokens) == ((), {"w"}, 1)
