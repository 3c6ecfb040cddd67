import warnings

import pytest
import torch
from cases import Cube, mlp_batch, mlp_loss, orthonormal, problem, token_gradients
from torch import nn

from polca_lib.derivatives.finite_differences import by_backward, check_derivatives
from polca_lib.derivatives.forward import by_jvp
from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose
from polca_lib.derivatives.token_loss import TokenLoss


class Layers(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function):
        super().__init__()
        self.hidden, self.out, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, inputs):
        return self.out(self.function(self.hidden(inputs)))


def layers(function, dtype=torch.float64, scale=1.0):
    token_loss = TokenLoss(Layers(function).to(dtype), mlp_loss)
    theta = scale * torch.randn(token_loss.n_parameters, generator=torch.Generator().manual_seed(0)).to(dtype)
    return token_loss, theta, mlp_batch(2, dtype), orthonormal(2, len(theta)).to(dtype)


def test_a_function_that_takes_its_slope_for_a_constant_is_refused_with_curvature_alone():
    token_loss, theta, batch, vectors = layers(Cube.apply)
    gradient = project(token_loss, theta, batch, vectors, mode="forward").gradient
    torch.testing.assert_close(gradient, token_gradients(token_loss, theta, batch) @ vectors.T)
    message = r"second derivatives .* differ by [\d.]+% from central differences of the first derivatives.*Function"
    with pytest.raises(ValueError, match=message + ".*order = 'second' and a basis of the Hessian need them"):
        project(token_loss, theta, batch, vectors, curvature=True)
    with pytest.raises(ValueError, match=message):
        HessianOperator(token_loss, theta, batch)


def test_a_wrong_first_derivative_is_refused():
    with pytest.raises(ValueError, match=r"first derivatives .* differ by .*% from central differences of the loss"):
        choose(*layers(lambda x: x * x.detach()))


def no_warning(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_derivatives(*arguments)


SMOOTH_OR_NOT = {
    "relu": torch.relu,
    "constant": lambda x: 0 * x,
    "linear": lambda x: x,
    "steep": lambda x: torch.tanh(1000 * x),
    "rounded": lambda x: x.float().tanh().bfloat16().sin().to(torch.float32),
    "constants in float32": lambda x: torch.tanh(x @ torch.ones(4, 4) + torch.arange(4.0)),
    "maximum subtracted": lambda x: (x - x.amax(-1, keepdim=True).detach()).softmax(-1),
}


@pytest.mark.parametrize("derive", [by_jvp, by_backward])
@pytest.mark.parametrize("name", SMOOTH_OR_NOT)
def test_right_derivatives_pass_without_a_warning(name, derive):
    no_warning(*layers(SMOOTH_OR_NOT[name], torch.float32), 2, derive)


def test_at_a_kink_neither_side_is_wrong():
    """As at step 0, where padding is embedded as zeros and biases are 0."""
    token_loss, theta, (inputs, targets), vectors = layers(torch.relu)
    parameters = token_loss.unflatten(theta)
    theta = token_loss.flatten({**parameters, "hidden.bias": torch.zeros(4, dtype=theta.dtype)})
    inputs[0, 0] = 0
    no_warning(token_loss, theta, (inputs, targets), vectors, 2)


def test_where_no_difference_settles_a_warning_says_so():
    token_loss, theta, batch, vectors = layers(torch.relu)
    parameters = token_loss.unflatten(theta)
    zeros = {name: 0 * value if name.startswith("hidden") else value for name, value in parameters.items()}
    with pytest.warns(UserWarning, match="derivatives were not checked: the loss has kinks at each step"):
        check_derivatives(token_loss, token_loss.flatten(zeros), batch, vectors, 1)


def test_a_model_that_computes_in_float32_alone_is_not_checked_and_a_warning_says_so():
    def single(x):
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return torch.tanh(x)

    with pytest.warns(UserWarning, match="derivatives were not checked: in float64 RuntimeError: no kernel"):
        check_derivatives(*layers(single, torch.float32), 2)


def test_a_constant_in_float32_does_not_keep_from_checking():
    table = torch.eye(4)
    no_warning(*layers(lambda x: torch.tanh(x @ table), torch.float32), 2)


def test_losses_that_are_zero_to_the_last_bit_pass():
    no_warning(*layers(torch.tanh, scale=1e3), 2)


def test_the_check_leaves_nothing_behind():
    class Noting(nn.Module):
        table = None

        def forward(self, x):
            self.table = torch.linspace(0, 1, 4) if self.table is None else self.table
            self.noted = x.tanh() * self.table
            return self.noted

    model = Noting()
    token_loss, theta, batch, vectors = layers(model, torch.float32)
    token_loss(theta, batch)
    noted = model.noted
    check_derivatives(token_loss, theta, batch, vectors, 2)
    assert torch.get_default_dtype() == torch.float32
    assert model.table.dtype == torch.float32
    assert noted.dtype == token_loss(theta, batch).dtype == torch.float32


def test_memory_that_runs_out_is_not_blamed_on_the_model():
    token_loss, theta, batch, vectors = layers(torch.tanh)

    def derive(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        check_derivatives(token_loss, theta, batch, vectors, 1, derive)


def test_examples_without_a_target_pass():
    token_loss, theta, batch = problem("ragged")
    no_warning(token_loss, theta, torch.zeros_like(batch[:2]), orthonormal(2, len(theta)), 2)
    no_warning(token_loss, theta, torch.zeros_like(batch[:2]), orthonormal(2, len(theta)), 2, by_backward)
