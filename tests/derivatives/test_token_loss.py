import pickle
from copy import deepcopy

import cloudpickle
import pytest
import torch
from cases import (
    MIXED,
    MODELS,
    Attention,
    Mlp,
    mlp_batch,
    mlp_loss,
    next_token_loss,
    of_tokens,
    problem,
    token_gradients,
    token_hessians,
)
from torch import nn
from torch.func import jvp, vmap

from polca_lib.derivatives.projection import project
from polca_lib.derivatives.token_loss import TokenLoss, n_examples, split_examples


def test_flatten_undoes_unflatten_and_back(case):
    token_loss, theta, _ = case
    assert torch.equal(token_loss.flatten(token_loss.unflatten(theta)), theta)
    own = dict(token_loss.model.named_parameters())
    again = token_loss.unflatten(token_loss.flatten(own))
    assert all(torch.equal(again[name], own[name]) for name in own)


def test_flat_vector_follows_the_order_of_named_parameters():
    model = Mlp()
    expected = torch.cat([p.flatten() for _, p in model.named_parameters()])
    assert torch.equal(TokenLoss(model, mlp_loss).flatten(dict(model.named_parameters())), expected)


@pytest.mark.parametrize(("name", "loss"), [("mlp", mlp_loss), ("attention", next_token_loss)])
def test_value_is_that_of_the_module_with_those_weights(name, loss):
    token_loss, theta, batch = problem(name)
    plain = (Mlp() if name == "mlp" else Attention()).double()
    nn.utils.vector_to_parameters(theta, plain.parameters())
    torch.testing.assert_close(token_loss(theta, batch), loss(plain, batch), rtol=1e-12, atol=1e-12)


def test_calling_it_changes_no_weight_of_the_model(case):
    before = [p.clone() for p in case.token_loss.model.parameters()]
    case.token_loss(case.theta, case.batch)
    assert all(torch.equal(p, b) for p, b in zip(case.token_loss.model.parameters(), before, strict=True))


def test_active_dropout_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"'1'.*p = 0\.5.*eval"):
        TokenLoss(model, mlp_loss)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)).eval(), nn.Linear(1, 1)])
def test_dropout_that_is_off_is_accepted(model):
    assert TokenLoss(model, mlp_loss).n_parameters == 2


def mixed_dtypes():
    return nn.Sequential(nn.Linear(3, 4).half(), nn.Tanh(), nn.Linear(4, 3).bfloat16())


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (mixed_dtypes, torch.float32),
        (lambda: Mlp().bfloat16(), torch.float32),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3).double()), torch.float64),
    ],
)
def test_loss_is_computed_in_the_widest_dtype_and_in_no_less_than_float32(model, dtype):
    model = model().eval()
    token_loss = TokenLoss(model, mlp_loss)
    theta = token_loss.flatten(dict(model.named_parameters()))
    assert theta.dtype == token_loss.dtype == dtype
    assert {p.dtype for p in token_loss.parameters.values()} == {dtype}
    batch = mlp_batch(5, dtype)
    torch.testing.assert_close(token_loss(theta, batch), mlp_loss(deepcopy(model).to(dtype), batch))


def test_parameters_that_are_no_floating_point_numbers_are_refused():
    model = Mlp()
    model.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match=r"parameter 'table' holds torch\.int64"):
        TokenLoss(model, mlp_loss)
    with pytest.raises(ValueError, match="no parameter of the model requires_grad"):
        TokenLoss(Mlp().requires_grad_(False), mlp_loss)


def frozen():
    model = Mlp()
    model.layers[0].requires_grad_(False)
    return model


def test_frozen_parameters_are_no_part_of_the_vector_and_count_all_the_same():
    model = frozen()
    token_loss, batch = TokenLoss(model, mlp_loss), mlp_batch(5, torch.float32)
    assert list(token_loss.parameters) == ["layers.2.weight", "layers.2.bias"]
    theta = token_loss.flatten(model.state_dict())
    assert torch.equal(token_loss(theta, batch), mlp_loss(model, batch))
    expected = torch.autograd.grad(mlp_loss(model, batch).sum(), list(model.layers[2].parameters()))
    found = torch.func.grad(lambda at: token_loss(at, batch).sum())(theta)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]))
    changed = {**model.state_dict(), "layers.0.bias": torch.ones(4)}
    with pytest.raises(ValueError, match=r"'layers\.0\.bias' is frozen, or a buffer, but differs from the model's own"):
        token_loss.flatten(changed)


def test_running_statistics_that_change_are_refused_and_counters_are_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="module '1' normalises over the batch"):
        TokenLoss(model, mlp_loss)
    token_loss = TokenLoss(model.eval(), mlp_loss)
    state = model.state_dict()
    token_loss.flatten({**state, "1.num_batches_tracked": torch.tensor(7)})
    with pytest.raises(ValueError, match=r"'1\.running_mean' is frozen, or a buffer, but differs"):
        token_loss.flatten({**state, "1.running_mean": torch.ones(3)})


def test_tied_parameters_are_there_once_and_may_have_either_name():
    model = of_tokens(lambda model, tokens: model.out(model.embed(tokens)), tie=True)
    token_loss = TokenLoss(model, next_token_loss)
    assert list(token_loss.parameters) == ["embed.weight", "out.bias"]
    state = model.state_dict()
    theta = token_loss.flatten(state)
    alone = {"out.weight": state["out.weight"], "out.bias": state["out.bias"]}
    assert torch.equal(token_loss.flatten(alone), theta)
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'out\.weight' are tied in the model, but differ"):
        token_loss.flatten({**state, "out.weight": state["out.weight"] + 1})


def with_buffer(value):
    model = Mlp()
    model.register_buffer("table", value)
    return TokenLoss(model, mlp_loss), dict(model.named_parameters())


NUMBERS = torch.tensor([0.1, float("nan"), -0.0, float("inf"), 1 / 3])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_buffers_and_frozen_weights_are_compared_in_the_coarser_dtype(dtype, stored):
    """A bf16 checkpoint of a float32 rotary table, and a float32 checkpoint of a bf16 base."""
    token_loss, parameters = with_buffer(NUMBERS.to(dtype))
    token_loss.flatten({**parameters, "table": NUMBERS.to(dtype).to(stored)})  # the checkpoint is a copy
    if {dtype, stored} != {torch.bfloat16, torch.float16}:
        token_loss.flatten({**parameters, "table": NUMBERS.to(stored)})  # the model is a copy
    changed = NUMBERS.to(dtype).to(stored).clone()
    changed[4] *= 1.02
    with pytest.raises(ValueError, match="'table' is frozen, or a buffer, but differs"):
        token_loss.flatten({**parameters, "table": changed})
    with pytest.raises(ValueError, match="'table' is frozen, or a buffer, but differs"):
        token_loss.flatten({**parameters, "table": NUMBERS.nan_to_num(0.0).to(stored)})


def test_counters_may_differ_and_tables_of_integers_may_not():
    token_loss, parameters = with_buffer(torch.tensor(3))
    token_loss.flatten({**parameters, "table": torch.tensor(7)})
    token_loss, parameters = with_buffer(torch.tensor([3, 4]))
    token_loss.flatten({**parameters, "table": torch.tensor([3, 4], dtype=torch.int32)})
    with pytest.raises(ValueError, match="'table' is frozen, or a buffer, but differs"):
        token_loss.flatten({**parameters, "table": torch.tensor([4, 3])})


def test_frozen_weights_that_the_model_has_not_loaded_are_named():
    model = nn.Sequential(nn.Linear(3, 3, device="meta").requires_grad_(False), nn.Linear(3, 3))
    state = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).state_dict()
    with pytest.raises(ValueError, match=r"'0\.weight' is frozen, but the model has no values for it; load them"):
        TokenLoss(model, mlp_loss).flatten(state)


def test_parameters_that_were_quantised_are_refused():
    token_loss = TokenLoss(Mlp(), mlp_loss)
    with pytest.raises(ValueError, match=r"'layers\.0\.bias' holds torch\.int8; allowed: floating-point"):
        token_loss.flatten({**token_loss.parameters, "layers.0.bias": torch.zeros(4, dtype=torch.int8)})


def test_row_of_padding_has_the_derivative_that_the_function_has():
    embed = nn.Embedding(5, 4, padding_idx=2, sparse=True)
    nn.init.normal_(embed.weight)
    model = of_tokens(lambda model, tokens: model.out(model.embed(tokens).tanh())).double()
    model.embed = embed.double()
    token_loss, batch = TokenLoss(model, next_token_loss), torch.tensor([[0, 2, 1, 2], [2, 3, 4, 0]])
    theta = torch.randn(token_loss.n_parameters, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(token_loss.n_parameters, 5, dtype=torch.float64))[0].T
    step = 1e-5
    differences = torch.stack(
        [(token_loss(theta + step * v, batch) - token_loss(theta - step * v, batch)) / (2 * step) for v in vectors], 1
    )
    torch.testing.assert_close(token_gradients(token_loss, theta, batch) @ vectors.T, differences, rtol=1e-6, atol=1e-8)
    hessian = token_hessians(token_loss, theta, batch)
    torch.testing.assert_close(hessian, hessian.transpose(1, 2))
    with pytest.raises(ValueError, match=r"module '0' has max_norm = 1\.0"):
        TokenLoss(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), next_token_loss)


@pytest.mark.parametrize("name", MODELS)
def test_loss_that_can_be_taken_apart_passes_the_check(name):
    token_loss, theta, batch = problem(name)
    if name in MIXED:
        with pytest.raises(ValueError, match="depends on the other examples"):
            token_loss.check(theta, batch)
    else:
        token_loss.check(theta, batch)


class Rounded(torch.autograd.Function):
    """Has a derivative backwards alone."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def random_loss(model, batch):
    return mlp_loss(model, batch) + torch.rand(())


@pytest.mark.parametrize(
    ("model", "loss", "told"),
    [
        (
            Mlp,
            lambda model, batch: mlp_loss(model, batch).mean(),
            r"has shape \(\).*one floating-point number",
        ),
        (Mlp, random_loss, "two calls of the loss differ.*model.eval"),
        (Mlp, lambda m, b: mlp_loss(m, b) - mlp_loss(m, b).mean(), "depends on the other examples"),
        (
            Mlp,
            lambda m, b: Rounded.apply(mlp_loss(m, b)),
            "no derivatives of order 1.*elementary operations",
        ),
    ],
)
def test_loss_that_cannot_be_taken_apart_is_refused_with_the_reason(model, loss, told):
    token_loss = TokenLoss(model(), loss)
    theta = token_loss.flatten(dict(token_loss.model.named_parameters()))
    with pytest.raises(ValueError, match=told):
        token_loss.check(theta, mlp_batch(5, torch.float32))


def test_lstm_and_attention_that_drop_out_are_refused():
    for module in (nn.LSTM(3, 3, num_layers=2, dropout=0.2), nn.MultiheadAttention(4, 2, dropout=0.2)):
        with pytest.raises(ValueError, match=r"drops out with p = 0\.2"):
            TokenLoss(module, mlp_loss)
        TokenLoss(module.eval(), mlp_loss)


@pytest.mark.parametrize("name", ["mlp", "tied", "multi-head"])
def test_token_loss_travels_without_its_weights(name):
    token_loss, theta, batch = problem(name, dtype=torch.float32)
    before = [p.clone() for p in token_loss.model.parameters()]
    content = cloudpickle.dumps(token_loss)
    again = pickle.loads(content)
    assert all(p.is_meta for p in again.parameters.values())
    assert again.n_parameters == token_loss.n_parameters
    assert torch.equal(again(theta, batch), token_loss(theta, batch))
    assert all(torch.equal(p, b) for p, b in zip(token_loss.model.parameters(), before, strict=True))
    vectors = torch.linalg.qr(torch.randn(token_loss.n_parameters, 3))[0].T.contiguous()
    for mode in ("forward", "reverse"):
        ours, theirs = (project(each, theta, batch, vectors, mode=mode).gradient for each in (again, token_loss))
        torch.testing.assert_close(ours, theirs)


def test_what_is_frozen_travels_with_its_values():
    token_loss, batch = TokenLoss(frozen(), mlp_loss), mlp_batch(5, torch.float32)
    theta = torch.randn(token_loss.n_parameters)
    assert torch.equal(pickle.loads(cloudpickle.dumps(token_loss))(theta, batch), token_loss(theta, batch))


def test_parameter_of_another_shape_is_refused_by_name():
    token_loss = TokenLoss(Mlp(), mlp_loss)
    parameters = {**token_loss.parameters, "layers.2.weight": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"'layers\.2\.weight'.*\(3, 5\).*\(3, 4\)"):
        token_loss.flatten(parameters)


def test_missing_and_unknown_parameters_are_refused_by_name():
    token_loss = TokenLoss(Mlp(), mlp_loss)
    missing = {name: p for name, p in token_loss.parameters.items() if name != "layers.0.bias"}
    with pytest.raises(ValueError, match=r"layers\.0\.bias"):
        token_loss.flatten(missing)
    with pytest.raises(ValueError, match="stranger"):
        token_loss.flatten({**token_loss.parameters, "stranger": torch.zeros(1)})


def test_fused_attention_has_a_forward_mode_derivative():
    token_loss, theta, batch = problem("attention")
    directions = torch.eye(len(theta), dtype=theta.dtype)
    forward = vmap(lambda v: jvp(lambda at: token_loss(at, batch), (theta,), (v,))[1], out_dims=1)(directions)
    torch.testing.assert_close(forward, token_gradients(*problem("attention")), rtol=1e-10, atol=1e-12)


def test_splitting_a_nested_batch_keeps_all_examples_in_order():
    batch = {"x": torch.arange(7), "pair": (torch.arange(14).view(7, 2),)}
    pieces = list(split_examples(batch, 3))
    assert [n_examples(piece) for piece in pieces] == [3, 3, 1]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), batch["x"])
    assert torch.equal(torch.cat([piece["pair"][0] for piece in pieces]), batch["pair"][0])


def test_losses_by_name_are_those_at_the_flat_vector(case):
    token_loss, theta, batch = case
    assert torch.equal(token_loss.at(token_loss.unflatten(theta), batch), token_loss(theta, batch))
    # At some of the names given, the others are the model's own.
    name, value = next(iter(token_loss.parameters.items()))
    moved = {**token_loss.parameters, name: value + 1}
    assert torch.equal(token_loss.at({name: value + 1}, batch), token_loss.at(moved, batch))


@pytest.mark.parametrize("rows", [(), (5,), (2, 3)])
def test_vectors_in_rows_are_split_by_parameter_without_a_copy(case, rows):
    token_loss, theta, _ = case
    vectors = torch.randn(*rows, len(theta), dtype=theta.dtype)
    pieces = token_loss.unflatten(vectors)
    for name, p in token_loss.parameters.items():
        assert pieces[name].shape == (*rows, *p.shape)
        assert pieces[name].untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr()
    flat = vectors.reshape(-1, len(theta))
    for row, vector in enumerate(flat):
        one = {
            name: piece.reshape(len(flat), *token_loss.parameters[name].shape)[row] for name, piece in pieces.items()
        }
        assert torch.equal(token_loss.flatten(one), vector)


@pytest.mark.parametrize("rows", [(), (5,)])
def test_a_parameter_that_is_a_single_number_is_one_entry(rows):
    model = nn.Linear(2, 1)
    model.scale = nn.Parameter(torch.tensor(3.0))
    token_loss = TokenLoss(model, mlp_loss)
    theta = torch.arange(4.0).expand(*rows, 4)
    assert token_loss.n_parameters == 4
    assert token_loss.unflatten(theta)["scale"].shape == rows
    assert torch.equal(token_loss.flatten(token_loss.unflatten(torch.arange(4.0))), torch.arange(4.0))


@pytest.mark.parametrize("norm", [nn.functional.layer_norm, torch.layer_norm], ids=["functional", "torch"])
def test_second_derivatives_go_right_through_layer_norm_in_either_spelling(norm):
    token_loss = TokenLoss(Mlp().double(), lambda model, batch: norm(model(batch[0]), (3,)).square()[..., 0].flatten())
    _, theta, batch = problem("mlp", examples=1)

    def slope(at):
        return jvp(lambda point: token_loss(point, batch), (at,), (torch.ones_like(theta),))[1]

    found = jvp(slope, (theta,), (torch.ones_like(theta),))[1]
    torch.testing.assert_close(found, token_hessians(token_loss, theta, batch).sum((1, 2)), rtol=1e-9, atol=1e-10)
