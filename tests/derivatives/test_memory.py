import math

import psutil
import pytest
import torch
from cases import problem
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import jvp, vmap

from polca_lib.derivatives import memory
from polca_lib.derivatives.memory import default_budget, fit, peak_bytes

N = 1000  # float32 numbers, 4000 bytes


def test_peak_is_what_is_held_at_one_time_not_all_that_was():
    def chain():
        a, b = torch.ones(N), torch.ones(N)
        x = a + b
        y = x + b
        del x
        z = y + b
        del y
        return z + a

    assert peak_bytes(chain, "cpu") == 4 * 4 * N


def test_what_was_there_before_does_not_count_nor_do_views_and_changes_in_place():
    before = torch.ones(10 * N)

    def nothing_new():
        before.view(10, N)[3:].add_(1).t().mul_(2)
        return before.detach()

    assert peak_bytes(nothing_new, "cpu") == 0
    assert peak_bytes(lambda: (before[:N] + 1).view(10, -1)[2:].mul_(2), "cpu") == 4 * N


def test_tensors_that_only_a_graph_holds_count_as_long_as_it_lives():
    def five_saved():
        x = start
        for _ in range(5):
            x = x.exp()
        return x.sum()

    start = torch.ones(N, requires_grad=True)
    assert peak_bytes(five_saved, "cpu") == 5 * 4 * N + 4
    # Of two graphs one after the other only one is there at a time.
    assert peak_bytes(lambda: [five_saved().item() for _ in range(2)], "cpu") == 5 * 4 * N + 4


def test_tangents_of_all_vectors_count_under_vmap():
    point, vectors = torch.ones(N), torch.ones(8, N)
    # The sine and its slope once, the tangents for each vector.
    peak = peak_bytes(lambda: vmap(lambda v: jvp(torch.sin, (point,), (v,))[1])(vectors), "cpu")
    assert peak == (1 + 1 + 8) * 4 * N


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.nn.functional.mse_loss(x, torch.ones(N), reduction="none"),
        # A tangent of zeros that is expanded is written to later.
        lambda x: x.view(1, 2, -1).transpose(1, 2) * torch.ones(1, N // 2, 1),
    ],
)
def test_derivatives_of_derivatives_are_measured_though_torch_has_zeros_without_memory(function):
    def second(vector):
        slope = lambda at: jvp(function, (at,), (vector,))[1]  # noqa: E731
        return jvp(slope, (torch.ones(N),), (vector,))[1]

    results = []
    vectors = torch.ones(3, N)
    assert peak_bytes(lambda: results.append(vmap(second)(vectors)), "cpu") > 4 * N
    torch.testing.assert_close(results[0], vmap(second)(vectors))


def by_the_allocator(function):
    """Peak of all that torch's own allocator gave out and took back, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def product_with_the_hessian(token_loss, theta, batch):
    point = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(token_loss(point, batch).sum(), point, create_graph=True)[0]
    return torch.autograd.grad(gradient, point, theta)


def gradients_of_all_tokens(token_loss, theta, batch):
    point = theta.clone().requires_grad_()
    losses = token_loss(point, batch)
    return torch.autograd.grad(losses, point, torch.eye(len(losses), dtype=losses.dtype), is_grads_batched=True)


def curvature_along_vectors(token_loss, theta, batch):
    def slope(at, vector):
        return jvp(lambda point: token_loss(point, batch), (at,), (vector,))[1]

    vectors = torch.eye(len(theta), dtype=theta.dtype)[:5]
    return vmap(lambda v: jvp(lambda at: slope(at, v), (theta,), (v,))[1])(vectors)


@pytest.mark.parametrize("work", [product_with_the_hessian, gradients_of_all_tokens, curvature_along_vectors])
@pytest.mark.parametrize("name", ["mlp", "layer norm"])
def test_peak_of_derivatives_is_that_of_the_allocator(name, work):
    arguments = problem(name, examples=50)
    work(*arguments)
    expected = by_the_allocator(lambda: work(*arguments))
    assert expected > 10_000
    assert peak_bytes(lambda: work(*arguments), "cpu") == pytest.approx(expected, rel=0.01)


def test_budget_is_half_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_LIMITS", ())
    assert default_budget("cpu") == pytest.approx(psutil.virtual_memory().available / 2, rel=0.1)


@pytest.mark.parametrize(("content", "counts"), [("{}\n", True), ("max\n", False)])
def test_budget_respects_the_limit_of_a_container(monkeypatch, tmp_path, content, counts):
    limit = psutil.Process().memory_info().rss + 2**27
    (tmp_path / "memory.max").write_text(content.format(limit))
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "memory.max", tmp_path / "no such file"))
    assert (default_budget("cpu") <= 2**27) == counts
    (tmp_path / "memory.max").write_text("1000")
    assert default_budget("cpu") == 0


MOMENTS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 1000)), min_size=1, max_size=4)


@given(MOMENTS, st.integers(100, 1_000_000), st.integers(1, 300))
def test_as_many_examples_fit_as_stay_within_the_budget(moments, budget, most):
    def peak(n):
        return max(fixed + slope * n for fixed, slope in moments)

    if peak(1) > budget:
        with pytest.raises(ValueError, match="one example takes"):
            fit(peak, budget, most)
        return
    found = fit(peak, budget, most)
    best = max(n for n in range(1, most + 1) if peak(n) <= budget)
    assert found <= best
    assert best <= 2 * found + 2


@given(st.integers(0, 10_000), st.integers(1, 1000), st.floats(0, 1), st.floats(1, 2), st.integers(100, 100_000))
@example(fixed=850, slope=400, less=0.1, steeper=1.9, budget=2500)
def test_nothing_beyond_the_budget_is_tried_but_two_examples(fixed, slope, less, steeper, budget):
    def peak(n):
        # The slope may grow to twice what it is at few examples.
        return math.ceil(max(fixed + slope * n, less * fixed + steeper * slope * n))

    tried = []
    if peak(1) <= budget:
        fit(lambda n: (tried.append(n), peak(n))[1], budget, 300)
    assert all(peak(n) <= budget for n in tried if n > 2)


def test_one_measurement_is_enough_when_memory_is_ample():
    tried = []
    assert fit(lambda n: (tried.append(n), 1000 + 10 * n)[1], 10**6, 256) == 256
    assert tried == [1]


def test_a_line_through_few_examples_is_not_believed():
    # As measured for Hessian-vector products: parameters make the peak at few examples, activations at many.
    found = fit(lambda n: max(1000 + 5 * n, 500 + 20 * n), budget=2000, most=256)
    assert 60 <= found <= 75


def test_too_small_a_budget_says_what_is_needed_and_what_to_do():
    with pytest.raises(ValueError, match=r"one example takes 1,010 bytes .* only 1,000 are left .* raise memory"):
        fit(lambda n: 1000 + 10 * n, 1000, 5)
