"""Tiny models whose derivatives can be had by brute force, and the brute force."""

from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polca_lib.analysis.workers import project_runs
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.tasks.settings import RunSettings

TINY_RUN = {
    "data.validation_examples": 12,
    "data.hessian_examples": 8,
    "model.d_model": 8,
    "model.n_heads": 2,
    "model.d_mlp": 16,
    "training.steps": 40,
    "training.batch_size": 8,
    "training.checkpoint_every": 10,
    "training.state_every": 20,
    "basis.every": 20,
    "basis.tolerance": 0.2,
    "basis.max_products": 200,
    "clustering.min_cluster_size": 6,
    "clustering.breakthrough_window": 10,
}
"""Overrides of the smoke preset with which all stages take about a second."""


class Problem(NamedTuple):
    token_loss: TokenLoss
    theta: Tensor
    batch: object


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, inputs):
        return self.layers(inputs)


class Attention(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.out = nn.Linear(4, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(x + mixed.transpose(1, 2).flatten(-2))


class Made(nn.Module):
    """A model of given parts, run by a function."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, data):
        return self.run(self, data)


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape))


def multi_head(m, tokens):
    x, mask = m.embed(tokens), torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    return m.out(x + m.heads(x, x, x, attn_mask=mask, need_weights=False)[0])


def encoder_layer(m, tokens):
    x = m.embed(tokens)
    return m.out(m.layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)))


def sequence_first(m, tokens):
    return m.out(m.hidden(m.embed(tokens.T)).relu().cumsum(0).tanh()).transpose(0, 1)


def fused(m, tokens):
    x = m.embed(tokens)
    wq, wk, wv = m.qkv.chunk(3)
    weights = (nn.functional.linear(x, wq) @ (x @ wk.T).mT).tril().softmax(-1)
    up, down = m.mlp.split([6, 4], dim=1)
    return m.out(x + weights @ (x @ wv.T) + torch.tanh(x @ up)[..., :4] @ down)


def products(m, inputs):
    one, two, three, four, five, six = m.weights
    x = nn.functional.linear(inputs, one, m.bias).tanh()
    x = torch.matmul(x, two).tanh() @ three
    x = nn.functional.linear(x, bias=m.bias, weight=four.T)
    rows = torch.addmm(m.bias, x.flatten(0, -2), five).tanh()
    return torch.mm(rows, six).mm(one).view_as(inputs)


def images(m, pixels):
    return m.out(m.norm(m.conv(pixels)).sigmoid().flatten(1))[:, None]


def recurrent(m, inputs):
    states = [m.hidden(inputs[:, 0])]
    for x in inputs.unbind(1):
        states.append(torch.tanh(m.hidden(x) + m.stay(states[-1])))
    return m.out(torch.stack(states[1:], 1))


def tied(m, tokens):
    x = m.embed(tokens)
    return (x + torch.sigmoid(x @ m.hidden) @ m.hidden.T) @ m.embed.weight.T


def in_place(m, inputs):
    x = m.hidden(inputs)
    x += 1
    x[:, 1] = 2 * x[:, 0]
    return m.out(x.tanh())


def mixing(m, inputs):
    x = m.hidden(inputs)
    return m.out((x - x.mean(0)).tanh())


class Quadratic(nn.Module):
    """Loss of token x: w'A_x w / 2 + c_x'w, each token with a Hessian of its own."""

    def __init__(self, n=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, batch):
        curvature, slope = batch
        return torch.einsum("i,tij,j->t", self.w, curvature, self.w) / 2 + slope @ self.w


class Cube(torch.autograd.Function):
    """x^3; what is wrong about its derivatives shows in the second alone, in either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(context, inputs, output):
        context.x = inputs[0].detach()

    @staticmethod
    def backward(context, signal):
        return 3 * context.x**2 * signal

    @staticmethod
    def jvp(context, tangent):
        return 3 * context.x**2 * tangent


def mlp_loss(model, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")


def next_token_loss(model, tokens):
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def last_token_loss(model, tokens):
    """One target an example."""
    return nn.functional.cross_entropy(model(tokens[:, :-1])[:, -1], tokens[:, -1], reduction="none")


def ragged_loss(model, tokens):
    """As many targets as tokens that are not 0."""
    return next_token_loss(model, tokens)[tokens[:, 1:].flatten() != 0]


def mlp_batch(examples, dtype=torch.float64, seed=0):
    """Two tokens an example."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (examples, 2), generator=generator)


def of_tokens(run, tie=False, **parts):
    model = Made(run, embed=nn.Embedding(5, 4), out=nn.Linear(4, 5), **parts)
    model.out.weight = model.embed.weight if tie else model.out.weight
    return model


HEADS = nn.MultiheadAttention(4, 2, batch_first=True)
ENCODER = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True)
LAYERS = {"hidden": nn.Linear(3, 4), "out": nn.Linear(4, 3)}

# By name: how weights meet data, and the loss.
MODELS = {
    "mlp": (Mlp(), mlp_loss),
    "attention": (Attention(), next_token_loss),
    "layer norm": (Attention(norm=True), next_token_loss),
    "multi-head": (of_tokens(multi_head, tie=True, heads=HEADS), next_token_loss),
    "encoder layer": (of_tokens(encoder_layer, layer=ENCODER), next_token_loss),
    "sequence first": (of_tokens(sequence_first, hidden=nn.Linear(4, 4)), next_token_loss),
    "fused": (of_tokens(fused, qkv=zeros(12, 4), mlp=zeros(4, 10)), next_token_loss),
    "products": (Made(products, weights=zeros(6, 3, 3), bias=zeros(3)), mlp_loss),
    "images": (Made(images, conv=nn.Conv2d(1, 2, 3), norm=nn.GroupNorm(1, 2), out=nn.Linear(8, 3)), mlp_loss),
    "recurrent": (Made(recurrent, **LAYERS, stay=nn.Linear(4, 4, bias=False)), mlp_loss),
    "tied": (Made(tied, embed=nn.Embedding(5, 4), hidden=zeros(4, 6)), next_token_loss),
    "last position": (Attention(), last_token_loss),
    "in place": (Made(in_place, **LAYERS), mlp_loss),
    "mixing": (Made(mixing, **LAYERS), mlp_loss),
    "ragged": (Attention(), ragged_loss),
}
MIXED = ("mixing",)  # an example's loss depends on the others


def problem(name, examples=7, dtype=torch.float64, seed=0):
    """A token loss, a point and a batch: ``mlp`` has 31 parameters, ``attention`` 93."""
    generator = torch.Generator().manual_seed(seed)
    model, loss = MODELS[name]
    token_loss = TokenLoss(deepcopy(model).to(dtype).eval(), loss)
    batch = (
        mlp_batch(examples, dtype, seed) if loss is mlp_loss else torch.randint(5, (examples, 4), generator=generator)
    )
    if name == "images":
        batch = torch.randn(examples, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype), batch[1][:, :1]
    theta = torch.randn(token_loss.n_parameters, generator=generator, dtype=torch.float64).to(dtype)
    return Problem(token_loss, theta, batch)


def orthonormal(n, d, seed=0):
    """Random orthonormal rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64))[0].T.contiguous()


def token_gradients(token_loss, theta, batch):
    """One backward pass per token: (token, parameter)."""
    point = theta.detach().clone().requires_grad_()
    losses = token_loss(point, batch)
    return torch.stack([torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in losses])


def token_hessians(token_loss, theta, batch):
    """Dense Hessian of each token's loss, one by one and by backward passes alone: (token, parameter, parameter)."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda at, i=i: token_loss(at, batch)[i], theta)
            for i in range(len(token_loss(theta, batch)))
        ]
    )


def token_curvatures(token_loss, theta, batch, vectors):
    """b'H(x)b by two backward passes per token and vector, for models too large for dense Hessians: (token, vector)."""
    point = theta.detach().clone().requires_grad_()
    gradients = [torch.autograd.grad(loss, point, create_graph=True)[0] for loss in token_loss(point, batch)]
    rows = [[torch.autograd.grad(g @ v, point, retain_graph=True)[0] @ v for v in vectors] for g in gradients]
    return torch.tensor(rows, dtype=theta.dtype)


def tiny_config(**overrides):
    """Four basis checkpoints in 80 steps, for checkpoints from :func:`tiny_checkpoints`."""
    settings = {"training.steps": 80, "training.state_every": 40, "basis.every": 20, "basis.tolerance": 1e-4}
    return RunSettings.from_preset("smoke", **{**settings, **overrides})


def tiny_checkpoints(path, steps=range(0, 81, 20), seed=0):
    """A random walk of the MLP's weights in float32, stored as checkpoints."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    checkpoints = CheckpointFolder(path, TokenLoss(Mlp(), mlp_loss))
    theta = torch.randn(checkpoints.token_loss.n_parameters)
    for step in steps:
        checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
        theta = theta + 0.3 * torch.randn_like(theta)
    return checkpoints


def folder_bytes(path):
    """Every file below ``path`` with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def fail_at(function, n, error=KeyboardInterrupt):
    """``function``, but its n-th call (from 1) raises instead: a kill at that moment."""
    calls = 0

    def failing(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == n:
            raise error
        return function(*arguments, **keywords)

    return failing


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def sigmoid_drop(steps, centre, width=10.0, size=1.0):
    """A trajectory that falls from 0 to -size around ``centre``."""
    return -size / (1 + np.exp(-(np.asarray(steps) - centre) / width))


def project_run(path, checkpoints, steps, batch, tokens, basis, settings, *others, **more):
    """Projections on one basis."""
    return project_runs([path], checkpoints, steps, batch, tokens, [basis], [settings], *others, **more)[0]
