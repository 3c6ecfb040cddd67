import itertools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor
from torch.func import jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import polca_lib.derivatives.taylor  # noqa: F401 (where the rules are)
from polca_lib.derivatives.jets import Jet

N_VECTORS = 2
MASK = torch.tensor([[True, False, True], [False, False, True]])
INDEX = torch.tensor([2, 0, 2])


def numbers(*shape, seed=0):
    """From 0.5 to 1.5, so that roots and logarithms are there."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.5


def curve(shape, kind, order, seed):
    """A tensor, and its derivatives: of a constant there are none, of a parameter no second."""
    first, second = (numbers(N_VECTORS, *shape, seed=seed + i) - 1 for i in (10, 20))
    given = {"constant": [None, None], "parameter": [first, None], "jet": [first, second]}[kind]
    return numbers(*shape, seed=seed), given[:order]


def by_backward_passes(function, curves, order):
    """Derivatives of ``function`` along each set of curves at 0, by reverse mode in the one number they depend on."""
    zero, found = torch.zeros((), dtype=torch.float64), []
    for v in range(N_VECTORS):

        def at(s, v=v):
            points = [
                value + sum(d[v] * s**n / n for n, d in enumerate(known, 1) if d is not None) for value, known in curves
            ]
            return [leaf for leaf in pytree.tree_leaves(function(*points)) if leaf.is_floating_point()]

        slope = jacrev(at)
        found.append([slope(zero), jacrev(slope)(zero)][:order])
    return [[torch.stack(leaves) for leaves in zip(*each, strict=True)] for each in zip(*found, strict=True)]


def check(function, shapes, kinds, order):
    curves = [curve(shape, kind, order, seed) for seed, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))]
    jets = [Jet.make(v.clone(), list(d)) if k != "constant" else v for (v, d), k in zip(curves, kinds, strict=True)]
    found = pytree.tree_leaves(function(*jets))
    plain = pytree.tree_leaves(function(*(value for value, _ in curves)))
    expected = zip(*by_backward_passes(function, curves, order), strict=True)
    for ours, value in zip(found, plain, strict=True):
        torch.testing.assert_close(ours.value if isinstance(ours, Jet) else ours, value)
        if value.is_floating_point():
            derivatives = ours.derivatives if isinstance(ours, Jet) else [None] * order
            for mine, reference in zip(derivatives, next(expected), strict=True):
                mine = torch.zeros_like(reference) if mine is None else mine
                torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def check_all(function, *shapes):
    """For every mixture of jets, parameters and constants."""
    for order in (1, 2):
        for kinds in itertools.product(("constant", "jet", "parameter")[: order + 1], repeat=len(shapes)):
            if set(kinds) != {"constant"}:
                check(function, shapes, kinds, order)


ONE = {
    "arithmetic with numbers": lambda x: (2 + x) * 3 - 1 + (1 - x) / 2 + 2 / x - (-x),
    "arithmetic by name": lambda x: torch.add(x, 2).sub(1).mul(3).div(2) + torch.mul(2.0, x) + torch.div(1.0, x),
    "scaled sum": lambda x: torch.add(x, x.exp(), alpha=3) - torch.sub(x, x.exp(), alpha=2),
    "powers": lambda x: x**3 + x**0.5 + 2**x + x**x + x.pow(-1.5) + torch.pow(x, 2) + torch.pow(2.0, x) + x**0,
    "roots": lambda x: x.sqrt() + x.rsqrt() + torch.sqrt(x) + x.reciprocal(),
    "exponentials": lambda x: x.exp() + x.log() + torch.expm1(x) + x.log1p() + x.log2(),
    "waves": lambda x: x.sin() + x.cos() + x.tanh() + torch.sigmoid(x) + torch.erf(x) + x.atan(),
    "kinks": lambda x: (x - 1).relu() + (x - 1).abs() + torch.relu(1 - x) + (x - 1).clamp(-0.2, 0.3),
    "square": lambda x: x.square() + torch.square(x),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x - 1),
    "activations": lambda x: F.softplus(x) + F.elu(x - 1) + F.leaky_relu(x - 1, 0.1) + F.logsigmoid(x) + F.tanh(x),
    "mish": lambda x: F.mish(x - 1),
    "softmax": lambda x: x.softmax(-1) + torch.softmax(x, 0) + F.softmax(x, dim=1),
    "softmax by keyword": lambda x: torch.softmax(input=x, dim=1),
    "log softmax": lambda x: x.log_softmax(-1) + torch.log_softmax(x, 0) + F.log_softmax(x, dim=1),
    "softmax in a dtype": lambda x: F.softmax(x, 1, dtype=torch.float64) + x.softmax(1, torch.float64),
    "logsumexp": lambda x: x.logsumexp(1),
    "masked fill": lambda x: x.masked_fill(MASK, -1.0).exp() + torch.masked_fill(x, ~MASK, torch.tensor(2.0)),
    "masked fill that broadcasts": lambda x: x[0].masked_fill(MASK, 3.0),
    "where with numbers": lambda x: torch.where(MASK, x, 0.0) + torch.where(MASK, 1.0, x) + x.where(MASK, 2.0),
    "sums": lambda x: [x.sum(), x.sum(1), x.mean(), x.mean(0, keepdim=True), torch.sum(x, dim=0), x.std(1), x.var(0)],
    "running sums": lambda x: [x.cumsum(1), torch.cumsum(x, 0), x.cumprod(1)],
    "largest": lambda x: [x.max(), x.max(1), torch.max(x, dim=0), x.amax(1), x.topk(2, 1), x.sort(1), x.argmax(1)],
    "norms": lambda x: [x.norm(), x.norm(dim=1), torch.linalg.norm(x)],
    "parts": lambda x: [x.split(2, 1), x.chunk(2, 1), x.unbind(0), torch.split(x, [1, 2], 1), list(x)],
    "joined": lambda x: torch.cat([x, x.exp(), MASK.double()]) + torch.stack([x, torch.ones(2, 3)]).sum(),
    "items": lambda x: [x[0], x[:, 1:], x[..., None], x[MASK], x[:, INDEX], x[torch.arange(2), 1], x[None, 1, ::2]],
    "gathered": lambda x: [x.gather(1, INDEX[None].expand(2, 3)), x.index_select(1, INDEX)],
    "shapes": lambda x: [x.view(3, 2), x.T.reshape(6), x.permute(1, 0), x.mT, x.unsqueeze(1).squeeze(), x.flatten(),
                         x.T.view_as(x.T.contiguous()), x.unflatten(1, (1, 3)), x.expand(4, 2, 3)],
    "more shapes": lambda x: [x.movedim(0, 1), x.swapaxes(0, 1), x.repeat(2, 1), x.repeat_interleave(2, 0), x.flip(1),
                              x.roll(1, 1), x.tril(), x.triu(1), x.narrow(1, 1, 2), x.select(1, 2), x.diagonal()],
    "casts": lambda x: [x.double(), x.to(torch.float64), x.to(x), x.type_as(x), x.clone(), x.contiguous()],
    "constants": lambda x: [torch.zeros_like(x), torch.ones_like(x) * x, x.detach(), x.sign(), x.new_zeros(3), x > 1],
    "stopped": lambda x: x * x.detach() + x.round(),
    "losses": lambda x: [F.cross_entropy(x, INDEX[:2], reduction="none"), F.mse_loss(x, x.exp())],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "dropout that is off": lambda x: F.dropout(x, 0.5, training=False),
    "a function of no jet's number": lambda x: x * x.shape[0] + len(x) + x.numel() + x.dim(),
    "chosen by value": lambda x: x.exp() if (x > 0).all() and x[0, 0].item() > 0 else x,
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_function_of_one_tensor(name):
    check_all(ONE[name], (2, 3))


TWO = {
    "sum": (lambda x, y: x + y, (2, 3), (3,)),
    "sum of fewer dimensions and more": (lambda x, y: torch.add(x, y) - y.add(x) * 2, (3,), (2, 1)),
    "difference": (lambda x, y: (x - y) * torch.sub(y, x), (2, 3), (2, 1)),
    "product": (lambda x, y: x * y + torch.mul(x, y) * y, (2, 1, 3), (4, 1)),
    "product with a single number": (lambda x, y: x * y, (2, 3), ()),
    "quotient": (lambda x, y: x / y + torch.div(y, x), (2, 3), (3,)),
    "quotient rounded": (lambda x, y: x * torch.div(x, y, rounding_mode="floor"), (2, 3), (3,)),
    "power": (lambda x, y: x**y + torch.pow(y, x), (2, 3), (3,)),
    "where": (lambda x, y: torch.where(MASK, x, y) * x, (2, 3), (3,)),
    "where by method": (lambda x, y: x.where(MASK, y), (2, 3), (2, 1)),
    "larger": (lambda x, y: torch.maximum(x, y) - torch.minimum(x, y), (2, 3), (3,)),
    "fused sum": (lambda x, y: torch.addcmul(x, y, y, value=2) + torch.lerp(x, y, 0.3), (2, 3), (2, 3)),
    "joined": (lambda x, y: [torch.cat([x, y], 1), torch.stack([x[:, 0], y[:, 0]])], (2, 3), (2, 2)),
    "matrices": (lambda x, y: [x @ y, x.matmul(y), torch.matmul(x, y), x.mm(y), torch.mm(x, y)], (2, 3), (3, 4)),
    "matrix and vector": (lambda x, y: [x @ y, torch.mv(x, y), y @ x.T], (2, 3), (3,)),
    "vectors": (lambda x, y: [x @ y, torch.dot(x, y), torch.outer(x, y)], (3,), (3,)),
    "batches": (lambda x, y: [x @ y, torch.bmm(x, y), x.bmm(y)], (2, 2, 3), (2, 3, 4)),
    "batches that broadcast": (lambda x, y: x @ y, (2, 1, 2, 3), (2, 3, 4)),
    "batch times matrix": (lambda x, y: [x @ y, y.T @ x.mT], (2, 5, 3), (3, 4)),
    "linear": (lambda x, y: F.linear(x, y), (2, 2, 3), (4, 3)),
    "linear of a vector": (lambda x, y: F.linear(x, y), (3,), (4, 3)),
    "linear by keywords": (lambda x, y: F.linear(input=x, weight=y), (2, 3), (4, 3)),
    "product of three": (lambda x, y: torch.einsum("bi,bj,ik->bjk", x, y, x), (2, 2), (2, 3)),
    "embedding": (lambda x, y: F.embedding(INDEX, x) * y, (3, 2), (2,)),
    "similarity": (lambda x, y: F.cosine_similarity(x, y, dim=1), (2, 3), (2, 3)),
    "convolution": (lambda x, y: F.conv1d(x, y, padding=1), (2, 2, 4), (3, 2, 2)),
    "soft targets": (lambda x, y: F.kl_div(x, y, reduction="none"), (2, 3), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_function_of_two_tensors_that_are_jets_parameters_or_constants(name):
    check_all(*TWO[name])


def attend(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


THREE = {
    "linear": (F.linear, (2, 2, 3), (4, 3), (4,)),
    "linear of a matrix": (F.linear, (2, 3), (4, 3), (4,)),
    "addmm": (torch.addmm, (4,), (2, 3), (3, 4)),
    "addmm with a matrix": (lambda b, x, w: torch.addmm(b, x, w) + b.addmm(x, w), (2, 4), (2, 3), (3, 4)),
    "scaled addmm": (lambda b, x, w: torch.addmm(b, x, w, beta=2, alpha=3), (4,), (2, 3), (3, 4)),
    "baddbmm": (torch.baddbmm, (2, 1, 4), (2, 2, 3), (2, 3, 4)),
    "attention": (attend, (2, 3, 2), (2, 3, 2), (2, 3, 2)),
    "group norm": (lambda x, w, b: F.group_norm(x, 1, w, b), (2, 2, 3), (2,), (2,)),
    "product of all": (lambda x, y, z: x * y / z + z, (2, 3), (3,), (2, 1)),
}


@pytest.mark.parametrize("name", THREE)
def test_function_of_three_tensors_that_are_jets_parameters_or_constants(name):
    check_all(*THREE[name])


KINDS = st.tuples(*[st.sampled_from(["constant", "jet", "parameter"])] * 2).filter(lambda k: set(k) != {"constant"})
POINTWISE = [torch.add, torch.sub, torch.mul, torch.div, lambda x, y: torch.where(x > y, x, y)]


@given(mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3), KINDS, st.sampled_from(POINTWISE))
def test_pointwise_functions_broadcast_any_shapes(shapes, kinds, function):
    check(function, shapes.input_shapes, kinds, 2)


@settings(max_examples=60)
@given(mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=2, max_side=3), KINDS)
def test_products_of_matrices_broadcast_any_shapes(shapes, kinds):
    check(torch.matmul, shapes.input_shapes, kinds, 2)


def zeros():
    return torch.zeros(2, 3, dtype=torch.float64)


IN_PLACE = [
    ("add_", lambda x: x.add_(1)),
    ("add_", lambda x: operator.iadd(x, 1)),
    ("mul_", lambda x: operator.imul(x, 2)),
    ("div_", lambda x: operator.itruediv(x, 2)),
    ("clamp_", lambda x: x.clamp_(0, 1)),
    ("relu_", torch.relu_),
    ("masked_fill_", lambda x: x.masked_fill_(MASK, 0)),
    ("copy_", lambda x: zeros().copy_(x)),
    ("exp", lambda x: torch.exp(x, out=zeros())),
    ("relu", lambda x: F.relu(x, inplace=True)),
    ("silu", lambda x: F.silu(x, inplace=True)),
    ("__setitem__", lambda x: operator.setitem(x, 0, 1.0)),
    ("__setitem__", lambda x: operator.setitem(x, 0, x[1])),
    ("__setitem__", lambda x: operator.setitem(zeros(), 0, x[1])),
]


@pytest.mark.parametrize(("name", "change"), IN_PLACE)
def test_changes_in_place_are_refused_by_name(name, change):
    with pytest.raises(NotImplementedError, match=rf"^{name} changes a tensor in place|{name}_out"):
        change(Jet.make(*curve((2, 3), "jet", 2, seed=0)))


def test_what_could_change_a_tensor_in_place_but_does_not_is_not_refused():
    check_all(lambda x: [F.normalize(x, dim=1), F.relu(x, inplace=False), torch.exp(x, out=None)], (2, 3))


def test_jets_are_tensors_with_the_shape_and_numbers_of_their_value():
    value, derivatives = curve((2, 3), "jet", 2, seed=0)
    jet = Jet.make(value, derivatives)
    assert isinstance(jet, Tensor)
    assert (jet.shape, jet.dtype, len(jet)) == (value.shape, value.dtype, 2)
    assert type(jet.value) is Tensor
    assert torch.equal(jet.value, value)
    assert type(jet.sum(1).value) is Tensor
    assert not isinstance(jet > 1, Jet)
