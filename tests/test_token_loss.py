import pytest
import torch
from cases import Attention, Mlp, mlp_loss, next_token_loss, problem, token_gradients, token_hessians
from torch import nn
from torch.func import jvp, vmap

from polca_lib.token_loss import TokenLoss, n_examples, split_examples


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


def test_parameters_of_several_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"float32.*float64"):
        TokenLoss(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), mlp_loss)


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
