"""A witness tells another loss from another machine."""

import json
import re

import pytest
import torch
from cases import mlp_loss, problem
from torch import nn

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.witness import Witness


@pytest.fixture
def case():
    return problem("mlp", dtype=torch.float32)


def of(case, loss=mlp_loss, dtype=torch.float32):
    token_loss = TokenLoss(case.token_loss.model.to(dtype), loss)
    return Witness.of(
        token_loss, case.theta.to(dtype), tuple(t.to(dtype) if t.is_floating_point() else t for t in case.batch), 0
    )


def test_losses_are_those_of_three_examples_and_slopes_are_differences_of_losses(case):
    witness = of(case, dtype=torch.float64)
    assert len(witness.losses) == len(witness.slopes) == 6
    token_loss, theta = TokenLoss(case.token_loss.model, mlp_loss), case.theta.double()
    batch = case.batch[0][:3].double(), case.batch[1][:3]
    torch.testing.assert_close(torch.tensor(witness.losses).double(), token_loss(theta, batch), atol=1e-6, rtol=1e-6)
    line = torch.linspace(-1, 1, 102, dtype=torch.float64)[: len(theta)]
    difference = (token_loss(theta + 1e-5 * line, batch) - token_loss(theta - 1e-5 * line, batch)) / 2e-5
    torch.testing.assert_close(torch.tensor(witness.slopes).double(), difference, atol=1e-5, rtol=1e-5)


def smooth(model, batch):
    return nn.functional.cross_entropy(
        model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none", label_smoothing=0.01
    )


def detached(model, batch):
    """The same values, another gradient."""
    logits = model(batch[0]).flatten(0, 1)
    logits = logits - logits.logsumexp(-1, keepdim=True).detach()
    return nn.functional.nll_loss(logits, batch[1].flatten(), reduction="none")


OTHERS = {
    "loss .*, not .*, for token": smooth,
    "slope .*, not .*, for token": detached,
    "3 token losses, not 6": lambda model, batch: mlp_loss(model, batch)[1::2],
    "loss": lambda model, batch: mlp_loss(model, batch).flip(0),
    "loss nan, not": lambda model, batch: mlp_loss(model, batch) * torch.nan,
}


@pytest.mark.parametrize("told", OTHERS)
def test_another_loss_is_told(case, told):
    assert re.match(told, of(case).difference(of(case, OTHERS[told])))


def test_the_same_in_another_precision_is_the_same(case):
    assert of(case).difference(of(case, dtype=torch.float64)) is None
    nowhere = OTHERS["loss nan, not"]
    assert of(case, nowhere).difference(of(case, nowhere)) is None


def test_examples_without_a_loss_are_passed_over(case):
    def ragged(model, batch):
        return mlp_loss(model, batch)[: 0 if batch[0].equal(case.batch[0][:1]) else 2]

    assert len(of(case, ragged).losses) == 6


def test_damaged_file_is_no_witness(case, tmp_path):
    witness, file = of(case), tmp_path / "witness.json"
    assert Witness.read(file) is None
    file.write_text(json.dumps(witness._asdict()))
    assert Witness.read(file) == witness
    for content in ("", "[]", "{}", '{"step": 0}'):
        file.write_text(content)
        assert Witness.read(file) is None
