"""Modules that need another way of computing: derivatives against backward passes in float64."""

import pickle

import pytest
import torch
from cases import Made, next_token_loss, orthonormal, token_curvatures, token_gradients
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import relative_difference
from polca_lib.derivatives.token_loss import TokenLoss


def recurrent(kind, **settings):
    layer = getattr(nn, kind)(4, 4, batch_first=True, **settings)
    return Made(
        lambda m, tokens: m.out(m.layer(m.embed(tokens))[0]), embed=nn.Embedding(5, 4), layer=layer, out=nn.Linear(4, 5)
    )


def normed(norm):
    return Made(
        lambda m, tokens: m.out(m.layer(m.embed(tokens)).cumsum(1).tanh()),
        embed=nn.Embedding(5, 4),
        layer=norm(nn.Linear(4, 4)),
        out=norm(nn.Linear(4, 5)),
    )


def checkpointed(*nested, use_reentrant):
    """Blocks whose activations are not kept; ``nested`` ones are checkpointed within them."""

    def run(m, tokens):
        def block(x):
            x = m.layer(x).cumsum(1).tanh()
            return checkpoint(m.second, x, use_reentrant=use_reentrant) if nested else m.second(x)

        return m.out(checkpoint(block, m.embed(tokens), use_reentrant=use_reentrant))

    return Made(run, embed=nn.Embedding(5, 4), layer=nn.Linear(4, 4), second=nn.Linear(4, 4), out=nn.Linear(4, 5))


MODULES = {
    "LSTM": lambda: recurrent("LSTM"),
    "LSTM of two layers": lambda: recurrent("LSTM", num_layers=2),
    "GRU": lambda: recurrent("GRU"),
    "RNN": lambda: recurrent("RNN"),
    "RNN with ReLU": lambda: recurrent("RNN", nonlinearity="relu"),
    "weight norm": lambda: normed(nn.utils.weight_norm),
    "weight norm by parametrization": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "checkpoint": lambda: checkpointed(use_reentrant=False),
    "nested checkpoint": lambda: checkpointed("second", use_reentrant=False),
    "reentrant checkpoint": lambda: checkpointed(use_reentrant=True),
}


def of_module(name):
    """A token loss in float32, a point far from the module's own weights, and a batch."""
    torch.manual_seed(0)
    token_loss, batch = TokenLoss(MODULES[name]().eval(), next_token_loss), torch.randint(5, (4, 6))
    theta = token_loss.flatten(token_loss.parameters)
    return token_loss, theta + 0.3 * torch.randn_like(theta), batch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_derivatives_are_those_of_backward_passes_in_float64(name):
    token_loss, theta, batch = of_module(name)
    token_loss.check(theta, batch)
    exact, point, vectors = token_loss.in_float64(), theta.double(), orthonormal(30, len(theta))
    gradients = token_gradients(exact, point, batch) @ vectors.T
    curvatures = token_curvatures(exact, point, batch, vectors[:2])
    for mode in ("auto", "forward"):
        assert (
            relative_difference(project(token_loss, theta, batch, vectors.float(), mode=mode).gradient, gradients)
            < 1e-5
        )
    found = project(token_loss, theta, batch, vectors[:2].float(), curvature=True).curvature
    assert relative_difference(found, curvatures) < 1e-5
    # v'Hv of the mean loss is the mean of those of the tokens.
    operator = HessianOperator(token_loss, theta, batch)
    found = torch.stack([operator(vector) @ vector for vector in vectors[:2].float()])
    assert relative_difference(found, curvatures.mean(0)) < 1e-5
    # What modules note of a pass, such as the weight that is normed, does not keep them from travelling.
    travelled = pickle.loads(pickle.dumps(token_loss))
    torch.testing.assert_close(travelled(theta, batch), token_loss(theta, batch))


def test_modules_compute_as_before_after_a_loss():
    token_loss, theta, batch = of_module("checkpoint")
    token_loss(theta, batch)
    out = token_loss.model(batch).sum()
    out.backward()
    assert "Checkpoint" in repr(torch.utils.checkpoint.CheckpointFunction)
    assert all(parameter.grad is not None for parameter in token_loss.model.parameters())
    assert torch.backends.mkldnn.enabled


def test_where_a_loss_fails_checkpoints_are_back():
    original = vars(torch.utils.checkpoint).copy()
    with pytest.raises(ZeroDivisionError):
        TokenLoss(nn.Linear(1, 1), lambda model, batch: 1 / 0)(torch.zeros(2), torch.zeros(1, 1))
    assert vars(torch.utils.checkpoint) == original
