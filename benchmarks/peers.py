"""The ways there are to have <grad L(x), b> for all tokens x and vectors b, by torch and by other libraries."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import harness
import torch
from harness import GIB, Trial
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polca_lib.derivatives.token_loss import Batch, TokenLoss

Block = dict[str, int]
Loss = Callable[[nn.Module, Batch], Tensor]

LEAST_TARGETS = 8  # of an example that a peer works on
PEER_BYTES = 4 * GIB  # what one block of a peer may take


@dataclass(frozen=True)
class Problem:
    """Tokens to project, and vectors to project them on."""

    token_loss: TokenLoss
    loss: Loss
    theta: Tensor
    batch: Tensor
    vectors: Tensor
    targets: int  # of an example; those after it are left out

    @property
    def tokens(self) -> int:
        return len(self.batch) * self.targets

    @property
    def size(self) -> int:
        return self.tokens * len(self.vectors)

    def cut(self, examples: int | None = None, targets: int | None = None, vectors: int | None = None) -> Problem:
        """The first examples, targets of an example, or vectors alone."""
        return dataclasses.replace(
            self,
            batch=self.batch[:examples],
            targets=min(targets or self.targets, self.targets),
            vectors=self.vectors[:vectors],
        )

    def losses(self, theta: Tensor, batch: Tensor) -> Tensor:
        """Loss by example and target."""
        return self.token_loss(theta, batch).view(len(batch), -1)[:, : self.targets]


# Contenders: (problem, block) -> (tokens, vectors). What is held in memory at a time is the block.


def naive(problem: Problem, block: Block) -> Tensor:
    """One backward pass for each token, and its dot product with each vector."""
    rows = []
    theta = problem.theta.clone().requires_grad_()
    for example in problem.batch.split(1):
        for loss in problem.losses(theta, example).flatten():
            (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
            rows.append(problem.vectors @ gradient)
    return torch.stack(rows)


def vmap_grad(problem: Problem, block: Block) -> Tensor:
    """Gradients of many tokens at once by ``torch.func``, times the vectors."""
    one_hot = torch.eye(problem.targets, device=problem.theta.device)

    def rows(example: Tensor, which: Tensor) -> Tensor:
        _, back = vjp(lambda theta: problem.losses(theta, example[None])[0], problem.theta)
        return vmap(back)(which)[0] @ problem.vectors.T

    results = []
    for examples in problem.batch.split(block["examples"]):
        parts = [vmap(rows, in_dims=(0, None))(examples, which) for which in one_hot.split(block["targets"])]
        results.append(torch.cat(parts, dim=1).flatten(0, 1))
    return torch.cat(results)


def jvp_loop(problem: Problem, block: Block) -> Tensor:
    """One forward-mode pass for each vector."""
    results = []
    for examples in problem.batch.split(block["examples"]):
        along = [_slope(problem, examples, vector) for vector in problem.vectors]
        results.append(torch.stack(along, dim=1))
    return torch.cat(results)


def vmap_jvp(problem: Problem, block: Block) -> Tensor:
    """Forward-mode passes for many vectors at once by ``torch.func``."""
    results = []
    for examples in problem.batch.split(block["examples"]):
        along = vmap(lambda vector, examples=examples: _slope(problem, examples, vector), chunk_size=block["vectors"])
        results.append(along(problem.vectors).T)
    return torch.cat(results)


@torch.no_grad()
def _slope(problem: Problem, examples: Tensor, vector: Tensor) -> Tensor:
    return jvp(lambda theta: problem.losses(theta, examples).flatten(), (problem.theta,), (vector,))[1]


class LossOfExamples(nn.Module):
    """A model whose outputs are the losses of each example's targets, for libraries that know models alone."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.model, self.loss, self.targets = problem.token_loss.model, problem.loss, problem.targets

    def forward(self, batch: Tensor) -> Tensor:
        # Fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss(self.model, batch).view(len(batch), -1)[:, : self.targets]


def curvlinops(problem: Problem, block: Block) -> Tensor:
    """curvlinops' Jacobian of the losses, times the vectors."""
    from curvlinops import JacobianLinearOperator

    model = LossOfExamples(problem)
    # The second item stands for labels, which a Jacobian does not use.
    data = [(examples, examples) for examples in problem.batch.split(block["examples"])]
    jacobian = JacobianLinearOperator(model, list(model.parameters()), data, check_deterministic=False)
    return torch.cat([jacobian @ some.T for some in problem.vectors.split(block["vectors"])], dim=1)


def opacus(problem: Problem, block: Block) -> Tensor:
    """Gradients of many tokens at once by opacus' hooks, times the vectors; each target is a sample of its own."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(problem.token_loss.model), batch_first=True, loss_reduction="sum")
    which = torch.arange(problem.targets, device=problem.theta.device).repeat(len(problem.batch))
    samples = problem.batch.repeat_interleave(problem.targets, dim=0)
    results = []
    size = block["examples"] * block["targets"]
    for examples, target in zip(samples.split(size), which.split(size), strict=True):
        losses = problem.loss(model, examples).view(len(examples), -1)
        losses.gather(1, target[:, None]).sum().backward()
        gradients = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)
        results.append(gradients @ problem.vectors.T)
        model.zero_grad()
    return torch.cat(results)


def per_token_blocks(problem: Problem) -> Iterator[Block]:
    """Sizes to choose from where the gradients of a block's tokens are formed."""
    for tokens in (4, 8, 16, 64):
        if tokens == 4 or 2 * tokens * problem.theta.nbytes <= PEER_BYTES:
            targets = min(tokens, problem.targets)
            yield {"examples": min(tokens // targets, len(problem.batch)), "targets": targets}


def per_vector_blocks(problem: Problem) -> Iterator[Block]:
    """Sizes to choose from where the activations of a block's examples are formed, for each vector of the block."""
    positions = problem.batch.shape[1]
    widest = max(max(p.shape) for p in problem.token_loss.parameters.values())
    for rows, vectors in itertools.product((350, 1400), (1, 4, 16)):
        smallest = (rows, vectors) == (350, 1)
        if smallest or 4 * rows * vectors * widest * problem.theta.itemsize <= PEER_BYTES:
            examples = min(max(1, rows // positions), len(problem.batch))
            yield {"examples": examples, "vectors": min(vectors, len(problem.vectors))}


PEERS: dict[str, tuple[Callable[[Problem, Block], Tensor], Callable[[Problem], Iterable[Block]]]] = {
    "naive": (naive, lambda problem: [{"examples": 1, "targets": 4}]),
    "vmap(grad)": (vmap_grad, per_token_blocks),
    "jvp, one by one": (jvp_loop, lambda p: [b for b in per_vector_blocks(p) if b["vectors"] == 1]),
    "vmap(jvp)": (vmap_jvp, per_vector_blocks),
    "curvlinops": (curvlinops, per_vector_blocks),
    "opacus": (opacus, per_token_blocks),
}


def peer_trial(name: str, problem: Problem, limit: float, device: str) -> Trial:
    """A peer at the best of its block sizes, on as many tokens as it can do in ``limit`` seconds or so.

    Its cost grows in proportion to the number of blocks, so its time a token does not depend on how many there are.
    """
    run, blocks = PEERS[name]

    def cost(block: Block) -> float:
        one = problem.cut(**block)
        run(one, block)
        return harness.seconds(lambda: run(one, block), device) / one.size

    choices = [dict(items) for items in dict.fromkeys(tuple(block.items()) for block in blocks(problem))]
    costs = [(cost(block), block) for block in choices]
    each, block = min(costs, key=lambda pair: pair[0])
    affordable = max(1, math.floor(limit / (each * len(problem.vectors))))
    examples, targets = block["examples"], block.get("targets", 1)
    if affordable >= problem.targets * examples:
        part = problem.cut(examples=affordable // problem.targets // examples * examples)
    elif "vectors" in block:
        part = problem.cut(examples=examples)
    else:
        part = problem.cut(examples=examples, targets=max(LEAST_TARGETS, affordable // examples // targets * targets))
    return Trial(lambda: run(part, block), part.tokens, keys={"tokens_timed": part.tokens, "block": block})
