"""Data come in many forms: what can be a batch is made one, and losses may differ in number from example to example."""

from collections import OrderedDict, UserDict
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from cases import (
    Attention,
    Mlp,
    mlp_batch,
    mlp_loss,
    next_token_loss,
    orthonormal,
    problem,
    ragged_loss,
    token_curvatures,
    token_gradients,
)
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import polca_lib.derivatives.strategy as strategies
from polca_lib import MaskedLoss, Shared, TokenLoss, plan
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.derivatives.batches import as_batch, losses_by_example, n_examples, split_examples
from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose, differentiate
from polca_lib.method.basis import compute_basis
from polca_lib.method.settings import BasisSettings
from polca_lib.storage.hashing import hash_batch

EXACT = {"rtol": 1e-9, "atol": 1e-10}


# 0 is padding: 0, 0, 1, 2, 3, 0, 2, 3 and 1 targets.
TARGETS = [0, 0, 1, 2, 3, 0, 2, 3, 1]
PADDED = torch.tensor(
    [
        [1, 0, 0, 0], [2, 0, 0, 0], [3, 1, 0, 0], [1, 2, 3, 0], [4, 4, 1, 2], [1, 0, 0, 0], [2, 1, 4, 0], [3, 3, 2, 1],
        [2, 2, 0, 0],
    ]
)  # fmt: skip


def ragged(dtype=torch.float64):
    token_loss, theta, _ = problem("ragged", dtype=dtype)
    return token_loss, theta, PADDED


@pytest.mark.parametrize("n_vectors", [2, 60])
@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
@pytest.mark.parametrize("memory", [None, 60_000])
def test_derivatives_of_ragged_losses_are_those_of_one_backward_pass_per_token(mode, n_vectors, memory):
    token_loss, theta, batch = ragged()
    vectors = orthonormal(n_vectors, len(theta))
    result = project(token_loss, theta, batch, vectors, mode=mode, memory=memory)
    assert len(result.loss) == sum(TARGETS)
    torch.testing.assert_close(result.loss, token_loss(theta, batch), **EXACT)
    torch.testing.assert_close(result.gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)


def test_curvature_of_ragged_losses_is_that_of_two_backward_passes():
    token_loss, theta, batch = ragged()
    vectors = orthonormal(4, len(theta))
    result = project(token_loss, theta, batch, vectors, curvature=True)
    torch.testing.assert_close(result.curvature, token_curvatures(token_loss, theta, batch, vectors), **EXACT)


def test_ragged_losses_in_bfloat16_are_near_and_state_the_error_of_the_first_examples_with_targets():
    token_loss, theta, batch = ragged(torch.float32)
    vectors = orthonormal(60, len(theta)).float()
    result = project(token_loss, theta, batch, vectors, mode="reverse", precision="bfloat16")
    exact = token_gradients(token_loss, theta, batch) @ vectors.T
    first = sum(TARGETS[:4])
    error = ((result.gradient - exact)[:first].square().mean() / exact[:first].square().mean()).sqrt()
    assert 1e-4 < result.error < 0.05
    assert result.error == pytest.approx(error.item(), rel=0.3)  # of every eighth vector
    # Of four examples without a target nothing can be measured: the next four count.
    late = torch.cat([PADDED[:2], PADDED[:2], PADDED[2:]])
    assert project(token_loss, theta, late, vectors, mode="reverse", precision="bfloat16").error > 1e-4


def test_trial_and_memory_are_of_the_examples_with_most_targets(monkeypatch):
    token_loss, theta, batch = ragged()
    strategy = choose(token_loss, theta, batch, orthonormal(60, len(theta)), mode="reverse")
    assert not strategy.batched
    assert strategy.structure.tokens == 3  # the first example has none


def test_losses_of_no_example_at_all_are_an_empty_result():
    token_loss, theta, batch = ragged()
    for mode in ("forward", "reverse"):
        result = project(token_loss, theta, batch[:2], orthonormal(3, len(theta)), mode=mode)
        assert (result.loss.shape, result.gradient.shape) == ((0,), (0, 3))


@pytest.mark.parametrize("memory", [12_000, 25_000, None])
def test_hessian_of_ragged_losses_is_that_of_the_mean_over_all_tokens(memory):
    token_loss, theta, batch = ragged()
    dense = torch.func.hessian(lambda at: torch.cat([token_loss(at, one) for one in batch.split(1)]).mean())(theta)
    vector = torch.randn(len(theta), dtype=theta.dtype)
    operator = HessianOperator(token_loss, theta, batch, memory=memory)
    torch.testing.assert_close(operator(vector), dense @ vector, rtol=1e-9, atol=1e-11)


def count(token_loss, theta, batch):
    return losses_by_example(lambda part: token_loss(theta, part), batch)


def test_losses_are_counted_example_by_example():
    losses, counts = count(*ragged())
    assert counts.tolist() == TARGETS
    token_loss, theta, batch = ragged()
    torch.testing.assert_close(losses, token_loss(theta, batch), **EXACT)


def test_examples_are_run_one_by_one_only_if_their_numbers_depend_on_the_data():
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return mlp_loss(model, batch)

    theta = problem("mlp", dtype=torch.float32).theta
    assert count(TokenLoss(Mlp(), loss), theta, mlp_batch(9, torch.float32))[1].tolist() == 9 * [2]
    assert sizes == [1, 9]  # the first under vmap
    sizes.clear()
    wide = tuple(part.repeat(100, 1, 200)[:9] if part.ndim == 3 else part for part in mlp_batch(9, torch.float32))
    count(TokenLoss(nn.Linear(600, 3), loss), torch.zeros(1803), wide)
    assert sizes == [1, 1, 1, 4, 4, 1]


def test_number_of_losses_that_depends_on_the_other_examples_is_refused():
    def loss(model, tokens):  # padding of the shortest is left out for all
        width = int((tokens != 0).sum(1).max())
        return next_token_loss(model, tokens[:, :width])

    token_loss = TokenLoss(Attention(), loss)
    with pytest.raises(ValueError, match=r"examples 0 to 3 have 12 losses together, but 8 one by one"):
        count(token_loss, problem("attention", dtype=torch.float32).theta, PADDED[4:8])


def by_length(model, batch):
    ids, lengths = batch
    losses = next_token_loss(model, ids).view(len(ids), -1)
    return torch.cat([row[:length] for row, length in zip(losses, lengths, strict=False)])


def test_lengths_in_a_tensor_give_ragged_losses_and_those_in_a_tuple_are_refused():
    _, theta, batch = ragged()
    token_loss, vectors = TokenLoss(Attention().double(), by_length), orthonormal(60, len(theta))
    data = batch, torch.tensor(TARGETS)
    assert token_loss.check(theta, data).tolist() == TARGETS
    for mode in ("forward", "reverse"):
        found = project(token_loss, theta, data, vectors, mode=mode).gradient
        torch.testing.assert_close(found, token_gradients(token_loss, theta, data) @ vectors.T, **EXACT)
    with pytest.raises(ValueError, match="depends on the other examples"):  # all examples share a tuple
        token_loss.check(theta, (batch[2:], tuple(TARGETS[2:])))


def test_shapes_that_agree_by_chance_in_the_first_examples_do_not_stand_for_all():
    # torch runs repeat_interleave example by example under vmap, and stacks results of one size.
    def loss(model, batch):
        return batch.repeat_interleave(batch.long().flatten()).float() * model.weight.sum()

    token_loss = TokenLoss(nn.Linear(1, 1), loss)
    batch = torch.tensor([[1, 2], [3, 0], [2, 1], [0, 3], [1, 1], [2, 2], [1, 1], [4, 0]])
    assert count(token_loss, torch.ones(2), batch)[1].tolist() == [3, 3, 3, 3, 2, 4, 2, 4]
    vectors, theta = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    double = TokenLoss(nn.Linear(1, 1).double(), lambda m, b: loss(m, b).double())
    for mode in ("forward", "reverse"):
        expected = token_gradients(double, theta, batch) @ vectors.T
        torch.testing.assert_close(project(double, theta, batch, vectors, mode=mode).gradient, expected, **EXACT)


def test_sum_that_is_divisible_by_chance_is_counted_right():
    # 1, 2 and 3 targets: three examples with six losses have not two each.
    _, counts = count(*ragged()[:2], PADDED[[2, 3, 4]])
    assert counts.tolist() == [1, 2, 3]


# Padding


def padded_loss(model, batch):
    logits = model(batch["input_ids"][:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none")


LABELLED = {"input_ids": PADDED, "labels": PADDED.where(PADDED != 0, -100)}


def test_masked_loss_drops_padding_and_nothing_else():
    token_loss, theta, batch = ragged(torch.float32)
    masked = TokenLoss(token_loss.model, MaskedLoss(padded_loss, lambda b: b["labels"][:, 1:] != -100))
    torch.testing.assert_close(masked(theta, LABELLED), token_loss(theta, batch))
    assert masked.check(theta, LABELLED).tolist() == TARGETS


def test_losses_that_are_exactly_zero_are_told_with_the_helper():
    token_loss, theta, _ = ragged(torch.float32)
    with pytest.warns(UserWarning, match=r"56% of the losses of batch are exactly 0\.0.*ignore_index.*MaskedLoss"):
        counts = TokenLoss(token_loss.model, padded_loss).check(theta, LABELLED)
    assert counts.tolist() == 9 * [3]


def test_mask_of_another_size_or_kind_is_refused():
    token_loss, theta, _ = ragged(torch.float32)
    for mask, told in (
        (lambda b: b["labels"] != -100, r"mask gives \(36,\) of torch.bool for losses of shape \(27,\)"),
        (lambda b: b["labels"][:, 1:], r"of torch.int64"),
    ):
        with pytest.raises(ValueError, match=told):
            TokenLoss(token_loss.model, MaskedLoss(padded_loss, mask))(theta, LABELLED)


# What is taken for a batch

IDS, LABELS = np.arange(12).reshape(4, 3), np.arange(4)


class Encoding(UserDict):
    """As a BatchEncoding."""


@pytest.mark.parametrize(
    "data",
    [
        {"ids": IDS, "labels": LABELS},
        UserDict(ids=torch.tensor(IDS), labels=torch.tensor(LABELS)),
        Encoding(ids=IDS.tolist(), labels=LABELS.tolist()),
        MappingProxyType({"ids": IDS, "labels": LABELS}),
        OrderedDict(ids=IDS.astype(">i8"), labels=LABELS),
        {"ids": IDS, "labels": LABELS, "text": ["a", "b", "c"], "scale": 0.5, "task": None, "size": np.float32(2)},
        {"ids": IDS, "labels": LABELS, "temperature": torch.tensor(2.0)},
        DataLoader([{"ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)], batch_size=3),
        {"nested": UserDict(ids=IDS), "labels": LABELS},
    ],
    ids=lambda data: type(data).__name__,
)
def test_whatever_can_be_a_batch_is_made_one(data):
    batch = as_batch(data)
    assert n_examples(batch) == 4
    parts = list(split_examples(batch, 3))
    ids = torch.cat([part["nested"]["ids"] if "nested" in part else part["ids"] for part in parts])
    assert ids.tolist() == IDS.tolist()
    assert torch.cat([part["labels"] for part in parts]).tolist() == LABELS.tolist()
    if "text" in batch:
        assert parts[1]["text"] == ["a", "b", "c"]
        assert (parts[1]["scale"], parts[1]["task"], parts[1]["size"]) == (0.5, None, 2.0)


def test_batch_encoding_of_transformers_is_taken():
    transformers = pytest.importorskip("transformers")
    data = transformers.BatchEncoding({"input_ids": [[1, 2, 3], [3, 4, 1]], "attention_mask": [[1, 1, 1], [1, 1, 0]]})
    assert as_batch(data)["input_ids"].tolist() == [[1, 2, 3], [3, 4, 1]]


def test_list_of_sequences_of_one_length_is_a_tensor_and_read_only_memory_is_copied():
    assert as_batch([[1, 2], [3, 4], [5, 6]]).tolist() == [[1, 2], [3, 4], [5, 6]]
    values = np.ones((2, 2))
    values.flags.writeable = False
    assert as_batch(values).dtype == torch.float64


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"ids": torch.ones(4, 3), "place": torch.ones(1, 3)}, r"batch\['ids'\] has 4, batch\['place'\] has 1"),
        ((torch.ones(4, 3), torch.ones(3)), r"batch\[0\] has 4, batch\[1\] has 3.*polca_lib\.Shared"),
        ([torch.ones(5), torch.ones(7), torch.ones(3)], r"batch\[0\] has 5, batch\[1\] has 7, batch\[2\] has 3.*pad"),
        ([[1, 2, 3], [1, 2]], "lists of numbers that are no tensor.*pad them"),
        ({"ids": [[1, 2, 3], [1, 2]]}, "lists of numbers that are no tensor.*pad them"),
        ([{"ids": [1, 2]}, {"ids": [3, 4]}], "a list of 2 dicts"),
        (["a text", "another"], "no tensor, only str"),
        (None, "no tensor, only NoneType"),
        ({}, "no tensor, only nothing"),
        (torch.ones(0, 3), "has no example"),
        (np.ones((0, 3)), "has no example"),
        (3, "no tensor, only int"),
        (torch.tensor(3.0), "no tensor, only Shared"),
        (pd.DataFrame({"ids": [1, 2]}), r"holds pandas\.DataFrame"),
        (TensorDataset(torch.ones(3)), r"holds torch\.utils\.data\.dataset\.TensorDataset"),
        ((row for row in IDS), r"holds builtins\.generator"),
        ({"ids": IDS, "odd": np.array([object()])}, r"holds numpy\.ndarray"),
        (torch.eye(3).to_sparse(), r"a tensor of layout torch\.sparse_coo"),
        (nested, "a tensor of layout"),
        (DataLoader(TensorDataset(torch.arange(100)), shuffle=True), "DataLoader that gives other examples each time"),
        (DataLoader(torch.arange(100), sampler=SubsetRandomSampler(range(100))), "gives other examples each time"),
        (DataLoader([]), "no tensor, only nothing"),
        (
            DataLoader([torch.ones(2), torch.ones(3)], batch_size=1),
            "DataLoader whose batches can't be joined.*Sizes of tensors must match.*pad all to one length",
        ),
        (DataLoader([(1, "a"), (2, "b")], batch_size=1), "can't be joined.*'a' is not the same in all.*leave out text"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_batch_is_refused_by_what_it_is(data, told):
    with pytest.raises(ValueError, match=told):
        as_batch(data() if callable(data) else data)


class Positions(nn.Module):
    """Embeds tokens and positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.out = nn.Embedding(5, 4), nn.Embedding(4, 4), nn.Linear(4, 5)

    def forward(self, ids, positions):
        return self.out((self.tokens(ids) + self.positions(positions)).cumsum(1).tanh())


def positions_loss(model, batch):
    logits = model(batch["ids"][:, :-1], batch["position_ids"][:, :-1]) / (batch["scale"] or 1)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")


def positions(examples=6):
    ids = torch.randint(5, (examples, 4), generator=torch.Generator().manual_seed(0))
    token_loss = TokenLoss(Positions().double(), positions_loss)
    theta = torch.randn(token_loss.n_parameters, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return token_loss, theta, {"ids": ids, "position_ids": Shared(torch.arange(4)[None]), "scale": None}


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_shared_tensors_and_constants_reach_the_loss_whole(mode):
    token_loss, theta, batch = positions()
    repeated = {**batch, "position_ids": torch.arange(4).repeat(6, 1)}
    token_loss.check(theta, batch)
    vectors = orthonormal(30, len(theta))
    for precision in ("float32", "bfloat16"):
        found = project(token_loss, theta, batch, vectors, mode=mode, precision=precision)
        expected = project(token_loss, theta, repeated, vectors, mode=mode, precision=precision)
        torch.testing.assert_close(found.gradient, expected.gradient, **EXACT)
    exact = token_gradients(token_loss, theta, repeated) @ vectors.T
    torch.testing.assert_close(project(token_loss, theta, batch, vectors, mode=mode).gradient, exact, **EXACT)
    curved = project(token_loss, theta, batch, vectors[:3], curvature=True).curvature
    torch.testing.assert_close(curved, token_curvatures(token_loss, theta, repeated, vectors[:3]), **EXACT)


@pytest.mark.parametrize("order", [1, 2])
def test_shared_tensors_and_constants_go_through_a_trace(order, monkeypatch):
    monkeypatch.setattr(strategies, "_TRACED", 0)
    token_loss, theta, batch = positions()
    vectors = orthonormal(3, len(theta))
    strategy = choose(token_loss, theta, batch, vectors, mode="forward", order=order)
    assert strategy.traced
    found = differentiate(strategy, token_loss, theta, batch, vectors)[1]
    repeated = {**batch, "position_ids": torch.arange(4).repeat(6, 1)}
    torch.testing.assert_close(found[0], token_gradients(token_loss, theta, repeated) @ vectors.T, **EXACT)
    if order == 2:
        torch.testing.assert_close(found[1], token_curvatures(token_loss, theta, repeated, vectors), **EXACT)


def test_both_batches_pass_the_same_door(tmp_path):
    token_loss, theta, batch = positions(64)
    wrong = {**batch, "position_ids": torch.arange(4)[None]}
    told = r"\['ids'\] has 64, .*\['position_ids'\] has 1.*Shared"
    dense = torch.func.hessian(lambda at: token_loss(at, batch).mean())(theta)
    torch.testing.assert_close(HessianOperator(token_loss, theta, batch)(theta), dense @ theta, rtol=1e-8, atol=1e-10)
    settings = {"checkpoints": 3, "basis": BasisSettings(n_vectors=2), "projection": ProjectionSettings()}
    for refused in (
        lambda: HessianOperator(token_loss, theta, wrong),
        lambda: project(token_loss, theta, wrong, theta[None]),
        lambda: token_loss.check(theta, wrong),
        lambda: compute_basis(tmp_path / "b", BasisSettings(n_vectors=1), Fixed(token_loss, theta), wrong, steps=[0]),
        lambda: plan(token_loss, wrong, **settings),
        lambda: plan(token_loss, batch, hessian_batch=wrong, **settings),
    ):
        with pytest.raises(ValueError, match=told):
            refused()
    assert plan(token_loss, batch, hessian_batch=UserDict(batch), **settings).tokens == 64 * 3


class Fixed:
    """One checkpoint."""

    device, steps = "cpu", [0]

    def __init__(self, token_loss, theta):
        self.token_loss, self._theta = token_loss, theta

    def theta(self, step):
        return self._theta


def test_plan_counts_ragged_losses_on_a_sample_of_examples():
    token_loss, _, batch = ragged(torch.float32)
    settings = {"checkpoints": 3, "basis": BasisSettings(n_vectors=2), "projection": ProjectionSettings()}
    assert plan(token_loss, batch, **settings).tokens == sum(TARGETS)
    assert plan(token_loss, batch.repeat(10, 1), **settings).tokens == pytest.approx(10 * sum(TARGETS), rel=0.2)


def test_hash_of_a_batch_holds_what_the_loss_gets():
    tensors = {"ids": torch.ones(3, 2)}
    hashes = {
        hash_batch({**tensors, **more}) for more in ({}, {"scale": 1}, {"scale": 1.0}, {"scale": "1"}, {"text": None})
    }
    hashes |= {hash_batch({**tensors, "p": Shared(torch.ones(3, 2))}), hash_batch({**tensors, "p": torch.ones(3, 2)})}
    assert len(hashes) == 7


# Losses that are not finite


def test_loss_that_is_not_finite_is_named_by_example_position_and_text():
    token_loss, theta, batch = ragged(torch.float32)

    def masked_row(model, tokens):
        losses = ragged_loss(model, tokens)
        return (
            losses
            + torch.where((tokens[:, 0] == 4)[:, None] & (torch.arange(3) == 1), torch.nan, 0.0)[tokens[:, 1:] != 0]
        )

    broken = TokenLoss(token_loss.model, masked_row)
    texts = [f"word{i}" for i in range(sum(TARGETS))]
    with pytest.raises(ValueError, match=r"nan for example 4, position 1 \('word4'\) of validation, .* 1 of 12 tokens"):
        broken.check(theta, batch, "validation", texts)
    with pytest.raises(ValueError, match="check the model or its first checkpoint, as no loss is finite"):
        token_loss.check(theta * torch.nan, batch)
