"""Tiny models whose derivatives can be had by brute force, and the brute force."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polca_lib.checkpoints import CheckpointFolder
from polca_lib.config import RunConfig
from polca_lib.token_loss import TokenLoss

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


class Quadratic(nn.Module):
    """Loss of token x: w'A_x w / 2 + c_x'w, each token with a Hessian of its own."""

    def __init__(self, n=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, batch):
        curvature, slope = batch
        return torch.einsum("i,tij,j->t", self.w, curvature, self.w) / 2 + slope @ self.w


def mlp_loss(model, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")


def next_token_loss(model, tokens):
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def mlp_batch(examples, dtype=torch.float64, seed=0):
    """Two tokens an example."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (examples, 2), generator=generator)


def problem(name, examples=7, dtype=torch.float64, seed=0):
    """A token loss, a point and a batch: ``mlp`` (31 parameters), ``attention`` (93), ``layer norm`` (both; 101)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "mlp":
        token_loss, batch = TokenLoss(Mlp().to(dtype), mlp_loss), mlp_batch(examples, dtype, seed)
    else:
        token_loss = TokenLoss(Attention(norm=name == "layer norm").to(dtype), next_token_loss)
        batch = torch.randint(5, (examples, 4), generator=generator)
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
    return RunConfig.from_preset("smoke", **{**settings, **overrides})


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
