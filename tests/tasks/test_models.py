import pytest
import torch

from polca_lib.tasks.models import ARITHMETIC, ENGLISH, build_model
from polca_lib.tasks.settings import ModelSettings

TINY = ModelSettings(n_layers=1, d_model=8, n_heads=2, d_mlp=16)


@pytest.mark.parametrize(("config", "printed"), [(ARITHMETIC, 9_475_594), (ENGLISH, 40_274_737)])
def test_parameter_counts_are_those_printed_in_the_paper(config, printed):
    assert sum(p.numel() for p in build_model(config, seed=0).parameters()) == printed


def test_seed_determines_the_weights():
    one, same, other = (dict(build_model(TINY, seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed.W_E"], other["embed.W_E"])


def test_logits_are_over_the_ten_digits_at_every_position():
    assert build_model(TINY, 0)(torch.zeros(3, 11, dtype=torch.long)).shape == (3, 11, 10)


def test_model_is_causal_and_in_evaluation_mode():
    model = build_model(TINY, 0)
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 9]])
    one, other = model(tokens)
    assert not model.training
    assert torch.equal(one[:3], other[:3])
    assert not torch.equal(one[3], other[3])
