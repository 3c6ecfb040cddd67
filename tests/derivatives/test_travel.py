"""A loss that is sent to a worker computes there what it computes here, however it reaches its weights."""

import functools
import pickle

import cloudpickle
import pytest
import torch
from cases import Mlp, mlp_batch, mlp_loss, problem
from torch import nn

from polca_lib.derivatives.token_loss import TokenLoss


class SmallGpt(nn.Module):
    """Keeps a function that closes over its own submodules, as blocks of a well-known small GPT do."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 3)})
        parts = self.parts
        self.mlp = lambda x: parts["down"](torch.tanh(parts["up"](x)))

    def forward(self, inputs):
        return inputs + self.mlp(inputs)


class Nested(SmallGpt):
    """A closure in a closure, one of them in a list."""

    def __init__(self):
        super().__init__()
        inner = self.mlp
        self.functions = [lambda x: inner(inner(x))]

    def forward(self, inputs):
        return self.functions[0](inputs)


class Partial(Mlp):
    def __init__(self):
        super().__init__()
        self.run = functools.partial(lambda layers, x: layers(x), self.layers)

    def forward(self, inputs):
        return self.run(inputs)


class Method(Mlp):
    """Keeps a bound method of a submodule in a dictionary, out of the sight of nn.Module."""

    def __init__(self):
        super().__init__()
        self.__dict__["known"] = {"forward": self.layers.forward}

    def forward(self, inputs):
        return self.known["forward"](inputs)


def hooked():
    """A hook adds what another layer gives."""
    model = Mlp()
    first = model.layers[0]
    model.layers[1].register_forward_hook(lambda module, arguments, output: output + first.bias.sum())
    return model


def frozen():
    model = SmallGpt()
    model.parts["up"].requires_grad_(False)
    return model


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized():
    """torch refuses to pickle such a module."""
    model = Mlp()
    nn.utils.parametrize.register_parametrization(model.layers[0], "weight", Double())
    return model


def closing_loss():
    """A loss that takes no notice of the model it is given: it has its own name for it."""
    model = Mlp()
    return model, lambda _, batch: mlp_loss(model, batch)


def loss_object():
    class Loss:
        def __init__(self, model):
            self.model, self.scale = model, torch.tensor(3.0)

        def __call__(self, model, batch):
            return self.scale * mlp_loss(self.model, batch)

    model = Mlp()
    return model, Loss(model)


MADE = {
    "small GPT": lambda: (SmallGpt(), mlp_loss),
    "nested closures": lambda: (Nested(), mlp_loss),
    "partial": lambda: (Partial(), mlp_loss),
    "bound method": lambda: (Method(), mlp_loss),
    "hook": lambda: (hooked(), mlp_loss),
    "frozen": lambda: (frozen(), mlp_loss),
    "loss that closes over the model": closing_loss,
    "bound method of a loss": loss_object,
    "parametrized": lambda: (parametrized(), mlp_loss),
}


@pytest.mark.parametrize("dump", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("name", MADE)
def test_loss_that_travelled_is_the_loss(name, dump):
    torch.manual_seed(0)
    model, loss = MADE[name]()
    token_loss, batch = TokenLoss(model.eval(), loss), mlp_batch(5, torch.float32)
    theta = 2 * torch.randn(token_loss.n_parameters)
    again = pickle.loads(dump(token_loss))
    assert torch.equal(again(theta, batch), token_loss(theta, batch))
    twice = pickle.loads(dump(again))  # a worker may send it on
    gradients = [
        torch.func.grad(lambda point, each=each: each(point, batch).sum())(theta) for each in (twice, token_loss)
    ]
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() > token_loss.n_parameters / 2
    token_loss.check(theta, batch)


def test_trainable_weights_stay_at_home_and_a_teacher_travels():
    torch.manual_seed(0)
    model, teacher = nn.Linear(300, 300), nn.Linear(3, 3)

    def loss(model, batch):
        return (model(batch[0].repeat(1, 1, 100)).sum(-1) - teacher(batch[0]).sum(-1)).flatten() ** 2

    token_loss = TokenLoss(model, loss)
    content = cloudpickle.dumps(token_loss)
    assert len(content) < 20_000 < 4 * token_loss.n_parameters
    batch, theta = mlp_batch(2, torch.float32), torch.randn(token_loss.n_parameters)
    assert torch.equal(pickle.loads(content)(theta, batch), token_loss(theta, batch))


class Holds(Mlp):
    """Keeps a weight itself: as it is, as .data, as a view, or as an array."""

    def __init__(self, how):
        super().__init__()
        weight, self.how = self.layers[0].weight, how
        kept = {"weight": [weight], "data": [weight.data], "view": [weight.detach()[:2]], "array": weight.data.numpy()}[
            how
        ]
        self.kept = kept

    def forward(self, inputs):
        kept = torch.from_numpy(self.kept) if self.how == "array" else self.kept[0]
        return self.layers(inputs) + kept.sum() * inputs


@pytest.mark.parametrize("how", ["weight", "data", "view", "array"])
def test_weight_that_is_held_on_to_is_refused_and_the_model_is_left_as_it_was(how):
    torch.manual_seed(0)
    model = Holds(how)
    before = [p.clone() for p in model.parameters()]
    token_loss, batch = TokenLoss(model, mlp_loss), mlp_batch(5, torch.float32)
    # At the weights that the model has, nothing differs.
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    with pytest.raises(ValueError, match=r"does not follow the parameters it is given.*self\.layer\.weight"):
        token_loss.check(theta, batch)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_check_leaves_weights_and_their_memory_in_place_also_in_another_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        token_loss, theta, batch = problem("mlp", dtype=torch.float32)
        model = token_loss.model.to(dtype)
        token_loss = TokenLoss(model, mlp_loss)
        before = [(p.data_ptr(), p.dtype, p.clone()) for p in model.parameters()]
        token_loss.check(theta, batch)
        for p, (address, kind, values) in zip(model.parameters(), before, strict=True):
            assert (p.data_ptr(), p.dtype) == (address, kind)
            assert torch.equal(p, values)
