import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    Attention,
    Mlp,
    Quadratic,
    last_token_loss,
    mlp_loss,
    next_token_loss,
    orthonormal,
    problem,
    token_curvatures,
    token_gradients,
)
from torch import nn

import polca_lib.derivatives.signals as signals
import polca_lib.derivatives.strategy as strategies
from polca_lib.derivatives.memory import peak_bytes
from polca_lib.derivatives.products import model_structure, single_target_signals
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose, differentiate, relative_difference
from polca_lib.derivatives.token_loss import TokenLoss, split_examples
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import ModelSettings

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def long_problem(loss):
    """Attention over twelve positions."""
    batch = torch.randint(5, (6, 13), generator=torch.Generator().manual_seed(0))
    return TokenLoss(Attention().double(), loss), problem("attention").theta, batch


@pytest.mark.parametrize(("loss", "mode"), [(last_token_loss, "reverse"), (next_token_loss, "forward")])
def test_few_targets_an_example_are_differentiated_in_reverse_and_many_forward(loss, mode):
    arguments = long_problem(loss)
    strategy = choose(*arguments, orthonormal(12, 93))
    assert strategy.mode == mode
    least = min(("jvp", "spared", "reverse"), key=strategy.cost.get)
    assert least == ("reverse" if mode == "reverse" else "spared" if strategy.structure else "jvp")
    found = differentiate(strategy, *arguments, orthonormal(12, 93))[1][0]
    torch.testing.assert_close(found, token_gradients(*arguments) @ orthonormal(12, 93).T, **EXACT)


def test_the_more_vectors_the_more_there_is_to_gain_in_reverse():
    modes = [choose(*problem("attention"), orthonormal(n, 93)).mode for n in (1, 5, 10, 30, 60, 90)]
    assert modes == sorted(modes)
    assert set(modes) == {"forward", "reverse"}


def test_operations_are_counted_for_one_example_and_all_vectors():
    cost = choose(*problem("attention"), orthonormal(5, 93)).cost
    queries_to_values, attention, logits = 2 * 3 * 4 * 12, 2 * 2 * 2 * 3 * 3 * 2, 2 * 3 * 4 * 5
    assert cost["pass"] == queries_to_values + attention + logits
    assert cost["jvp"] == cost["pass"] * (1 + 2 * 5)
    # Of the logits' derivatives half is spared, at the price of two backward passes.
    assert cost["spared"] == pytest.approx((cost["pass"] * (1 + 2 * 5 + 4) - 5 * logits) / 0.85)
    # The gradients of weights are formed, of three positions each. Embedding, positions and biases are elsewhere.
    products = 3 * (3 + 5) * (4 * 12 + 4 * 5) + 3 * 5 * (93 - 4 * 12 - 4 * 5)
    assert cost["reverse"] == cost["pass"] * (1 + 4 * 3) + 2 * products
    assert choose(*problem("attention"), orthonormal(5, 93), order=2).cost["jvp"] == cost["pass"] * (1 + 4 * 5)


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_for_few_vectors_plain_jvp_is_taken(n_vectors):
    strategy = choose(*problem("attention"), orthonormal(n_vectors, 93))
    assert (strategy.mode, strategy.structure) == ("forward", None)


def test_where_logits_cost_most_their_derivatives_are_spared():
    batch = torch.randint(5, (6, 13), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 300), nn.Linear(300, 5)).double()
    token_loss = TokenLoss(model, next_token_loss)
    theta = token_loss.flatten(token_loss.parameters)
    assert right(token_loss, theta, batch, mode="forward").structure


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("loss", [last_token_loss, next_token_loss])
def test_a_mode_can_be_forced(mode, loss):
    assert choose(*long_problem(loss), orthonormal(6, 93), mode=mode).mode == mode


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "backward"}, "mode = 'backward'; allowed: auto, forward, reverse"),
        ({"precision": "float16"}, "precision = 'float16'; allowed: float32, bfloat16, auto"),
        ({"order": 3}, "order = 3; allowed: 1, 2"),
        ({"order": 2, "mode": "reverse"}, "mode = 'reverse' gives no second derivatives; allowed with curvature"),
        ({"memory": 0}, "memory = 0; allowed: a positive number of bytes"),
        ({"memory": -5}, "memory = -5; allowed: a positive number of bytes"),
        ({"memory": 100}, "one example takes .* bytes at a time, but of memory only 100 are left"),
        ({"memory": 100, "mode": "reverse"}, "take .* bytes for two examples in reverse mode, but of memory only 100"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_with_what_is(settings, message):
    with pytest.raises(ValueError, match=message):
        choose(*problem("mlp"), orthonormal(5, 31), **settings)


def test_what_is_tried_is_what_runs(monkeypatch):
    kinds = []
    real = signals._factors
    monkeypatch.setattr(signals, "_factors", lambda *a: kinds.append(type(found := real(*a))) or found)
    strategy = choose(*problem("attention"), orthonormal(30, 93), mode="reverse")
    assert strategy.n_vectors == 30
    # Of two vectors' products none would be formed.
    assert set(kinds) == {signals.FormedGradients}


REASONS = {"mixing": "derivatives differ from those of jvp"}


@pytest.mark.parametrize("name", REASONS)
def test_models_whose_examples_are_not_apart_go_forward_and_in_reverse_are_refused_with_the_reason(name):
    token_loss, theta, batch = problem(name)
    vectors = orthonormal(60, len(theta))
    strategy = choose(token_loss, theta, batch, vectors)
    assert strategy.cost["reverse"] < min(strategy.cost["jvp"], strategy.cost["spared"])
    assert strategy.mode == "forward"
    assert re.search(REASONS[name], strategy.unfit["reverse"])
    with pytest.raises(ValueError, match=rf"mode = 'reverse' does not fit this model \(.*{REASONS[name]}.*'forward'"):
        choose(token_loss, theta, batch, vectors, mode="reverse")


@pytest.mark.parametrize(("name", "order"), [("attention", 2), ("in place", 1), ("mixing", 1), ("ragged", 1)])
def test_where_there_is_much_to_do_forward_mode_is_traced_if_it_can_be(name, order, monkeypatch):
    monkeypatch.setattr(strategies, "_TRACED", 0)
    token_loss, theta, batch = problem(name, examples=4)
    vectors = orthonormal(3, len(theta))
    strategy = choose(token_loss, theta, batch, vectors, order=order, mode="forward")
    assert (strategy.traced is None) == ("traced" in strategy.unfit) == (name == "ragged")
    _, (first, *second) = differentiate(strategy, token_loss, theta, batch, vectors)
    torch.testing.assert_close(first, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    for found in second:
        torch.testing.assert_close(found, token_curvatures(token_loss, theta, batch, vectors), **EXACT)


def test_a_graph_that_can_not_be_tried_is_not_used(monkeypatch):
    """In the first examples a product to spare matters to several tokens, so that no graph with it is run."""
    monkeypatch.setattr(strategies, "_TRACED", 0)
    token_loss, theta, batch = problem("attention", examples=4)
    real = strategies.model_structure
    wrong = lambda *arguments: replace(real(*arguments), single_target=frozenset({0, 1}))  # noqa: E731
    monkeypatch.setattr(strategies, "model_structure", wrong)
    monkeypatch.setattr(strategies, "_SPARED", 10)
    strategy = choose(token_loss, theta, batch, orthonormal(3, len(theta)), mode="forward")
    assert strategy.structure.single_target == {0, 1}
    assert strategy.traced is None
    assert "matters to several tokens" in strategy.unfit["traced"]


def right(token_loss, theta, batch, mode):
    """With enough vectors for reverse mode to be tried, and products spared if asked for."""
    vectors = orthonormal(min(10, len(theta)), len(theta)).to(theta)
    strategy = choose(token_loss, theta, batch, vectors, mode="forward" if mode == "spared" else mode)
    if mode == "spared":
        strategy = replace(strategy, structure=model_structure(token_loss, theta, next(split_examples(batch, 1))))
    found = differentiate(strategy, token_loss, theta, batch, vectors)[1][0]
    expected = token_gradients(token_loss, theta, batch) @ vectors.T
    assert relative_difference(found, expected) < (1e-10 if theta.dtype == torch.float64 else 1e-3)
    return strategy


MODES = pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])


@MODES
@pytest.mark.parametrize(("examples", "n_vectors"), [(1, 1), (1, 5), (2, 1), (7, 2)])
def test_one_example_or_one_vector_is_enough(mode, examples, n_vectors):
    token_loss, theta, batch = problem("attention", examples=examples)
    vectors = orthonormal(n_vectors, len(theta))
    strategy = choose(token_loss, theta, batch, vectors, mode=mode)
    found = differentiate(strategy, token_loss, theta, batch, vectors)[1][0]
    torch.testing.assert_close(found, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)


@pytest.mark.parametrize("mode", ["auto", "forward"])
def test_a_model_without_products_goes_forward(mode):
    token_loss = TokenLoss(Quadratic(), lambda model, batch: model(batch))
    batch = torch.randn(5, 4, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    right(token_loss, torch.ones(4, dtype=torch.float64), batch, mode=mode)


@pytest.mark.parametrize("mode", ["spared", "reverse"])
def test_arguments_by_keyword_are_understood(mode):
    def loss(model, batch):
        x = torch.matmul(batch[0], other=model.layers[0].weight.T).softmax(dim=-1)
        x = torch.softmax(input=nn.functional.linear(input=x, weight=model.layers[2].weight), dim=-1)
        return -x.log()[..., 0].flatten()

    strategy = right(TokenLoss(Mlp().double(), loss), *problem("mlp")[1:], mode=mode)
    assert strategy.unfit == {}
    assert strategy.structure or strategy.mode == "reverse"


@pytest.mark.parametrize(
    ("name", "first"),
    # Attention to equal tokens has no gradient; and if all are 0, there is no target.
    [
        ("fused", [[1, 1, 2, 3], [2, 2, 0, 1]]),
        ("fused", [[1] * 4] * 2),
        ("ragged", [[0] * 4, [1] * 4]),
        ("ragged", [[0] * 4] * 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["auto", "spared", "reverse"])
def test_examples_need_not_be_like_the_first_two(name, first, mode):
    token_loss, theta, batch = problem(name, examples=6)
    batch[:2] = torch.tensor(first)
    right(token_loss, theta, batch, mode=mode)


@pytest.mark.parametrize("name", ["fused", "attention", "tied"])
@pytest.mark.parametrize("scale", [1, 3])
def test_small_signals_among_many_examples_do_not_disturb(name, scale):
    token_loss, theta, batch = problem(name, examples=100, dtype=torch.float32)
    theta, vectors = scale * theta, orthonormal(4, len(theta)).float()
    seen = model_structure(token_loss, theta, batch[:1])
    found = single_target_signals(token_loss, token_loss.unflatten(theta), batch, seen.single_target)
    assert found
    assert all(token is not None for _, token in found.values())
    strategy = replace(choose(token_loss, theta, batch, vectors, mode="forward"), structure=seen)
    gradient = differentiate(strategy, token_loss, theta, batch, vectors)[1][0]
    assert relative_difference(gradient, token_gradients(token_loss, theta, batch) @ vectors.T) < 1e-3


@MODES
def test_losses_that_are_zero_to_the_last_bit_have_derivatives_zero(mode):
    token_loss, theta, batch = problem("mlp", dtype=torch.float32)
    parameters = token_loss.unflatten(theta)
    batch[1][2:] = torch.func.functional_call(token_loss.model, parameters, (batch[0],))[2:].argmax(2)
    vectors = orthonormal(10, 31).float()
    strategy = choose(token_loss, theta, batch, vectors, mode=mode)
    assert strategy.structure or strategy.mode == "reverse"
    certain = token_loss.flatten({n: p * 1e4 if n.startswith("layers.2") else p for n, p in parameters.items()})
    one_by_one = replace(strategy, pass_examples=1, chunk_examples=1)
    found = differentiate(one_by_one, token_loss, certain, batch, vectors)[1][0]
    assert torch.equal(found[4:], torch.zeros(10, 10))


class Root(nn.Module):
    """Its gradient is not a number where the root is not taken; forward, nothing is wrong."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        x = self.hidden(inputs)
        return self.out(torch.where(x > 0, x.sqrt(), 0.0))


def test_a_mode_that_gives_no_numbers_where_another_does_is_not_used():
    token_loss, (_, theta, batch) = TokenLoss(Root().double(), mlp_loss), problem("mlp")
    theta, vectors = theta[:24], orthonormal(20, 24)
    with pytest.raises(ValueError, match="mode = 'reverse' does not fit this model"):
        choose(token_loss, theta, batch, vectors, mode="reverse")
    strategy = choose(token_loss, theta, batch, vectors)
    assert differentiate(strategy, token_loss, theta, batch, vectors)[1][0].isfinite().all()


def least_memory(*arguments, **settings):
    """Bytes that are enough, as refusals say."""
    least = 1
    while True:
        try:
            choose(*arguments, memory=least, **settings)
        except ValueError as refusal:
            least = int(re.search(r"takes? ([\d,]+) bytes", str(refusal))[1].replace(",", ""))
        else:
            return least


def test_where_reverse_mode_needs_more_memory_than_there_is_forward_mode_is_taken():
    token_loss, theta, batch = problem("attention", examples=10)
    vectors = orthonormal(40, 93)
    assert choose(token_loss, theta, batch, vectors).mode == "reverse"
    least = {mode: least_memory(token_loss, theta, batch, vectors, mode=mode) for mode in ("forward", "reverse")}
    assert least["forward"] < least["reverse"]
    strategy = choose(token_loss, theta, batch, vectors, memory=least["reverse"] - 1)
    assert strategy.mode == "forward"
    assert "are left" in strategy.unfit["reverse"]


WAYS = [{"mode": "forward"}, {"mode": "reverse"}, {"order": 2}]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_results_do_not_depend_on_the_memory_and_as_little_as_is_asked_for_is_enough(settings):
    arguments = *problem("attention", examples=10), orthonormal(10, 93)
    least = least_memory(*arguments, **settings)
    with pytest.raises(ValueError, match=f"only {least - 1:,} are left .* raise memory"):
        choose(*arguments, memory=least - 1, **settings)
    chosen = [choose(*arguments, memory=least * more, **settings) for more in (1, 3, 1000)]
    assert chosen[0].pass_examples == 1
    assert chosen[-1].pass_examples == 10
    sizes = [(s.pass_examples, s.chunk_examples, s.chunk_vectors) for s in chosen]
    assert sizes == sorted(sizes)
    results = [torch.stack(differentiate(strategy, *arguments)[1]) for strategy in chosen]
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-10, atol=1e-11)


@pytest.fixture(scope="module")
def transformer():
    config = ModelSettings(n_layers=1, d_model=32, n_heads=4, d_mlp=128)
    token_loss = TokenLoss(build_model(config, seed=0), arithmetic.answer_loss)
    pairs = np.random.default_rng(0).integers(1000, size=(40, 2))
    return token_loss, token_loss.flatten(token_loss.parameters), arithmetic.encode(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1_200_000, 3_000_000])
@pytest.mark.parametrize("settings", [{"mode": "forward"}, {"mode": "reverse"}, {"curvature": True}], ids=str)
def test_projections_stay_within_the_memory(transformer, settings, budget):
    vectors = orthonormal(10, len(transformer[1])).float()
    peak = peak_bytes(lambda: project(*transformer, vectors, memory=budget, **settings), "cpu")
    assert budget / 3 < peak < 1.2 * budget


@pytest.mark.parametrize(
    ("bfloat16", "float32", "expected"), [(1, 2, "bfloat16"), (1, 1.4, "float32"), (3, 1, "float32")]
)
def test_auto_rounds_where_that_is_half_as_fast_again(monkeypatch, bfloat16, float32, expected):
    clock, took = [0.0], {torch.bfloat16: bfloat16, torch.float32: float32}
    ones = torch.ones

    def slow(*size, dtype, device):
        clock.append(took[dtype])
        return ones(*size, dtype=dtype, device=device)

    def now():
        clock[0] += clock[-1]  # the products of the dtype that was last made
        return clock[0]

    monkeypatch.setattr(strategies.torch, "ones", slow)
    monkeypatch.setattr(strategies.time, "perf_counter", now)
    assert strategies.faster_precision(torch.device("cpu")) == expected


def test_a_probe_that_fails_says_so_and_takes_float32(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no bfloat16")

    monkeypatch.setattr(strategies.torch, "ones", fail)
    with pytest.warns(UserWarning, match=r"'auto': products in bfloat16 fail here \(no bfloat16\); float32 is taken"):
        assert strategies.faster_precision(torch.device("cpu")) == "float32"


def test_auto_is_resolved_when_a_way_is_chosen(monkeypatch):
    token_loss, theta, batch = problem("attention", dtype=torch.float32)
    monkeypatch.setattr(strategies, "faster_precision", lambda device: "bfloat16")
    vectors = torch.eye(len(theta))[:3]
    found = strategies.choose(token_loss, theta, batch, vectors, mode="reverse", precision="auto")
    assert found.precision == "bfloat16"
