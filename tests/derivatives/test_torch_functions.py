"""Losses, norms, activations and other functions of torch: right first and second derivatives, or a refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import TokenLoss


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y, POSITIVE, EYE = numbers(4, 4), numbers(4, 4, seed=1).exp(), torch.eye(4, dtype=torch.float64)
CLASSES, SIGNS = torch.tensor([1, 0, 3, 2]), torch.tensor([1.0, -1, -1, 1]).double()
PROBABLE = POSITIVE / (1 + POSITIVE)
NONE = {"reduction": "none"}


def three(x):
    return x.reshape(2, 2, 4)


def image(x):
    return x[None, None]


def definite(x):
    return x @ x.T + EYE


# Of a matrix x (4, 4).
LOSSES = {
    "cross_entropy": lambda x: F.cross_entropy(x, CLASSES, **NONE),
    "cross_entropy smoothed": lambda x: F.cross_entropy(x, CLASSES, label_smoothing=0.1, **NONE),
    "cross_entropy weighted": lambda x: F.cross_entropy(x, CLASSES, weight=POSITIVE[0], **NONE),
    "cross_entropy of probabilities": lambda x: F.cross_entropy(x, POSITIVE.softmax(1), **NONE),
    "cross_entropy ignoring": lambda x: F.cross_entropy(x, torch.tensor([0, -100, 1, 2]), **NONE),
    "cross_entropy of positions": lambda x: F.cross_entropy(three(x), torch.zeros(2, 4).long(), **NONE),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(1), CLASSES, **NONE),
    "mse_loss": lambda x: F.mse_loss(x, Y, **NONE),
    "mse_loss mean": lambda x: F.mse_loss(x, Y),
    "mse_loss of two": lambda x: F.mse_loss(x.exp(), x.sin(), **NONE),
    "l1_loss": lambda x: F.l1_loss(x.exp(), x.sin() - 2, **NONE),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x.sin(), Y, beta=0.5, **NONE),
    "huber_loss": lambda x: F.huber_loss(x, Y, **NONE),
    "huber_loss weighted mean": lambda x: F.huber_loss(x.sin(), Y, delta=0.5, weight=POSITIVE),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), PROBABLE, **NONE),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, PROBABLE, **NONE),
    "binary_cross_entropy_with_logits weighted": lambda x: F.binary_cross_entropy_with_logits(
        x, x.cos().sigmoid(), weight=POSITIVE, pos_weight=POSITIVE[0], reduction="sum"
    ),
    "kl_div": lambda x: F.kl_div(x.log_softmax(1), x.sin().softmax(1), **NONE),
    "kl_div of logarithms": lambda x: F.kl_div(x.log_softmax(1), PROBABLE.log(), log_target=True, **NONE),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, POSITIVE, full=True, **NONE),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, Y, x.exp(), **NONE),
    "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x.sin(), SIGNS, **NONE),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x.sin(), x.cos(), SIGNS.expand(4, 4), **NONE),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, SIGNS.expand(4, 4), **NONE),
    "soft_margin_loss sum": lambda x: F.soft_margin_loss(x, SIGNS.expand(4, 4), reduction="sum"),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, -1, -1]] * 4), **NONE),
    "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, (SIGNS.expand(4, 4) + 1) / 2, **NONE),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, CLASSES, **NONE),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, Y, SIGNS, **NONE),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, Y, x.sin(), margin=9.0, **NONE),
    "ctc_loss": lambda x: F.ctc_loss(x[:, None].log_softmax(2), torch.tensor([[1, 2]]), (4,), (2,), **NONE),
}
NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (4,), x[0], x[1]),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (4,)),
    "native_layer_norm": lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5)[0],
    "group_norm": lambda x: F.group_norm(x.reshape(2, 4, 2), 2, x[0], x[1]),
    "instance_norm": lambda x: F.instance_norm(three(x)),
    "instance_norm with scale": lambda x: F.instance_norm(three(x), weight=x[0, :2], bias=x[1, :2]),
    "instance_norm with statistics": lambda x: F.instance_norm(
        three(x).sin(), POSITIVE[0, :2], POSITIVE[1, :2], use_input_stats=False
    ),
    "torch.instance_norm": lambda x: torch.instance_norm(three(x), None, None, None, None, True, 0.1, 1e-5, False),
    "batch_norm": lambda x: F.batch_norm(x.sin(), POSITIVE[0], POSITIVE[1], x[0], x[1]),
    "batch_norm of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "local_response_norm": lambda x: F.local_response_norm(x.reshape(2, 4, 2), 3),
    "rms_norm": lambda x: F.rms_norm(x, (4,), x[0]),
    "normalize": F.normalize,
    "normalize, p = 3": lambda x: F.normalize(x, p=3.0),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1], 0),
    "weight_norm by column": lambda x: torch._weight_norm(x, x[:1], 1),
    "weight_norm as a whole": lambda x: torch._weight_norm(x, x[0, 0], -1),
}
ACTIVATIONS = {
    **{
        name: lambda x, name=name: getattr(F, name)(4 * x.sin())
        for name in [
            "relu",
            "relu6",
            "elu",
            "selu",
            "celu",
            "gelu",
            "silu",
            "mish",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "leaky_relu",
            "rrelu",
            "softplus",
            "softsign",
            "logsigmoid",
            "tanhshrink",
            "softshrink",
            "hardshrink",
            "sigmoid",
            "tanh",
        ]
    },
    "silu in place": lambda x: F.silu(x.sin(), inplace=True),
    "hardsigmoid in place": lambda x: F.hardsigmoid(x.sin(), True),
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "glu": F.glu,
    "glu by row": lambda x: nn.GLU(0)(x),
    "threshold": lambda x: F.threshold(x.sin(), 0.1, 0.2),
    "prelu": lambda x: F.prelu(x.sin(), x[0, :1]),
    "softmax": lambda x: F.softmax(x, 1),
    "softmin": lambda x: F.softmin(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "softplus, beta = 2": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
}
OTHERS = {
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "norm": lambda x: x.norm(dim=1),
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "max": lambda x: x.exp().max(1)[0],
    "topk": lambda x: x.exp().topk(2)[0],
    "clamp": lambda x: x.exp().clamp(0.5, 2),
    "erf": torch.erf,
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.sin() + 1),
    "pairwise_distance": lambda x: F.pairwise_distance(x, Y),
    "cdist": lambda x: torch.cdist(x, Y),
    "cdist, p = 3": lambda x: torch.cdist(x, Y, p=3.0),
    "conv2d": lambda x: F.conv2d(image(x), x[:2, :2][None, None], padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(image(x), x[:2, :2][None, None]),
    "max_pool2d": lambda x: F.max_pool2d(image(x).exp(), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(image(x).exp(), 2),
    "interpolate": lambda x: F.interpolate(image(x).exp(), scale_factor=2, mode="bilinear"),
    "grid_sample": lambda x: F.grid_sample(image(Y), (x[:2] / 3).reshape(1, 2, 2, 2), align_corners=False),
    "embedding": lambda x: F.embedding(CLASSES, x).exp(),
    "embedding_bag": lambda x: F.embedding_bag(CLASSES.reshape(2, 2), x).exp(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x.sin()[None], x.cos()[None]),
    "matrix_exp": torch.matrix_exp,
    "inv": lambda x: torch.linalg.inv(x + 3 * EYE),
    "solve": lambda x: torch.linalg.solve(x + 3 * EYE, Y),
    "det": torch.linalg.det,
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "cholesky": lambda x: torch.linalg.cholesky(definite(x)),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(definite(x))),
    "cholesky_solve": lambda x: torch.cholesky_solve(
        Y[:, :2], torch.stack([torch.linalg.cholesky(definite(x)), torch.linalg.cholesky(definite(x.sin()))])
    ),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(definite(x)),
    "householder_product": lambda x: torch.linalg.householder_product(x.tril(-1) + EYE, x[0].sigmoid()),
    "rfft": lambda x: torch.fft.rfft(x.exp()).abs(),
    "straight-through rounding": lambda x: x + (x.round() - x).detach(),
    "stopped gradient": lambda x: x * x.detach(),
}
FUNCTIONS = LOSSES | NORMS | ACTIVATIONS | OTHERS

MISSING, WRONG = (
    "has no derivatives of order {order} in forward mode",
    "differ by .*% from central differences of the {of}",
)
# What is said of derivatives of order 1 (None if they are right) and 2.
REFUSED = {
    **dict.fromkeys(
        ["multilabel_margin_loss", "multi_margin_loss", "ctc_loss", "rrelu", "grid_sample", "embedding_bag"],
        (MISSING, MISSING),
    ),
    **dict.fromkeys(
        ["native_layer_norm", "batch_norm of the batch", "solve", "det", "slogdet", "householder_product"],
        (None, WRONG + ".*those of .*{name}.* are known to be wrong in torch"),
    ),
    "cholesky_inverse": (WRONG + ".*those of .*{name}.* are known to be wrong in torch", WRONG),
    **dict.fromkeys(["straight-through rounding", "stopped gradient"], (WRONG + ".* detaches tensors", WRONG)),
}


class Shifted(nn.Module):
    """Parameters, plus data."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))

    def forward(self, data):
        return self.weight + data


def subject(function):
    return TokenLoss(Shifted(), lambda model, data: torch.cat([function(x).flatten() for x in model(data)]))


THETA, DATA, VECTORS = numbers(16, seed=3), numbers(2, 4, 4, seed=4) / 2, F.normalize(numbers(2, 16, seed=5))


def differences(function):
    """Values, and their first and second derivatives by differences of fourth order, computed by torch as it is."""

    def values(shift: float, vector: Tensor):
        return torch.cat([function(x).flatten() for x in (THETA + shift * vector).reshape(4, 4) + DATA])

    h = 1e-3
    first = [(8 * (values(h, v) - values(-h, v)) - values(2 * h, v) + values(-2 * h, v)) / (12 * h) for v in VECTORS]
    second = [
        (16 * (values(h, v) + values(-h, v)) - values(2 * h, v) - values(-2 * h, v) - 30 * values(0, v)) / (12 * h * h)
        for v in VECTORS
    ]
    return values(0, VECTORS[0]), torch.stack(first, 1), torch.stack(second, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_right_or_refused(name):
    token_loss, (loss, first, second) = subject(FUNCTIONS[name]), differences(FUNCTIONS[name])
    refusals = REFUSED.get(name, (None, None))
    for order, refusal in enumerate(refusals, start=1):
        if refusal:
            with pytest.raises(
                ValueError, match=refusal.format(order=order, of=("loss", ".*")[order - 1], name=name.split()[0])
            ):
                project(token_loss, THETA, DATA, VECTORS, curvature=order == 2)
    if not all(refusals):
        found = project(token_loss, THETA, DATA, VECTORS, curvature=not refusals[1])
        torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.gradient, first, rtol=1e-6, atol=1e-8)
        if not refusals[1]:
            torch.testing.assert_close(found.curvature, second, rtol=1e-4, atol=1e-6)


def test_about_a_hundred_functions_are_tried():
    assert len(FUNCTIONS) > 100
    assert set(REFUSED) < set(FUNCTIONS)
