import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import ModelSettings

operands = st.integers(0, 999)
pair_lists = st.lists(st.tuples(operands, operands), min_size=1, max_size=20).map(np.array)


def schoolbook(a, b):
    """Answer digits and the carry into each of the four places, most significant first, by adding column by column."""
    digits, carries, carry = [], [], 0
    for place in range(4):
        carries.append(carry > 0)
        carry, digit = divmod(a // 10**place % 10 + b // 10**place % 10 + carry, 10)
        digits.append(digit)
    return digits[::-1], carries[::-1]


@pytest.mark.parametrize(
    ("pair", "tokens"),
    [
        ((0, 0), [0, 0, 0, 10, 0, 0, 0, 11, 0, 0, 0, 0]),
        ((7, 5), [0, 0, 7, 10, 0, 0, 5, 11, 0, 0, 1, 2]),
        ((581, 493), [5, 8, 1, 10, 4, 9, 3, 11, 1, 0, 7, 4]),
        ((999, 999), [9, 9, 9, 10, 9, 9, 9, 11, 1, 9, 9, 8]),
    ],
)
def test_known_sums_are_encoded_digit_by_digit(pair, tokens):
    assert arithmetic.encode(np.array([pair])).tolist() == [tokens]


@given(pair_lists)
def test_digits_and_carries_are_those_of_schoolbook_addition(pairs):
    table = arithmetic.token_table(pairs)
    expected = [schoolbook(a, b) for a, b in pairs.tolist()]
    assert table["digit"].tolist() == [digit for digits, _ in expected for digit in digits]
    assert table["carry"].tolist() == [carry for _, carries in expected for carry in carries]


@given(pair_lists)
def test_table_rows_are_the_answer_tokens_in_order(pairs):
    table, tokens = arithmetic.token_table(pairs), arithmetic.encode(pairs).numpy()
    assert (tokens[table["example"], table["position"]] == table["digit"]).all()
    assert table["place"].tolist() == ["1000s", "100s", "10s", "1s"] * len(pairs)


def test_skill_is_place_and_carry():
    table = arithmetic.token_table(np.array([[581, 493]]))
    assert table["skill"].tolist() == ["1000s, carry", "100s, carry", "10s, no carry", "1s"]
    assert set(table["skill"]) < set(arithmetic.SKILLS)
    assert table["text"].unique().tolist() == ["581+493=1074"]


def test_samples_are_determined_by_the_seed():
    one, same, other = (arithmetic.sample_pairs(seed, 50, 50, 50) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert not any((a == b).all() for a, b in zip(one, other, strict=True))


def test_longer_training_leaves_the_other_samples_and_the_earlier_training_pairs_as_they_are():
    short, long = (arithmetic.sample_pairs(0, 30, 20, train) for train in (100, 1000))
    assert (short.validation == long.validation).all()
    assert (short.hessian == long.hessian).all()
    assert (short.train == long.train[:100]).all()


def test_no_sample_is_drawn_from_another():
    samples = arithmetic.sample_pairs(0, 1000, 1000, 1000)
    assert [len(part) for part in samples] == [1000] * 3
    shared = [arithmetic.count_shared(a, b) for a, b in itertools.combinations(samples, 2)]
    assert max(shared) < 10  # 1000 draws from 10^6 pairs meet 1000 others about once by chance


def test_size_of_a_sample_leaves_the_others_as_they_are():
    one, other = arithmetic.sample_pairs(0, 30, 20, 100), arithmetic.sample_pairs(0, 60, 10, 100)
    assert (one.train == other.train).all()
    assert (one.validation == other.validation[:30]).all()
    assert (one.hessian[:10] == other.hessian).all()


def test_operands_cover_0_to_999():
    pairs = arithmetic.sample_pairs(0, 20_000, 0, 0).validation
    assert (pairs.min(), pairs.max()) == (0, 999)


# Few values and swapped operands, so that equal and mirrored pairs are common.
few = arrays(np.int64, st.tuples(st.integers(1, 15), st.just(2)), elements=st.sampled_from([0, 1, 2, 10, 100, 999]))


@given(few, few)
def test_count_shared_is_that_of_a_double_loop(pairs, others):
    expected = sum(any(a == c and b == d for c, d in others) for a, b in pairs)
    assert arithmetic.count_shared(pairs, others) == expected


def test_answer_loss_is_the_cross_entropy_computed_by_hand():
    tokens = arithmetic.encode(np.array([[581, 493], [7, 5]]))
    logits = torch.randn(2, 11, 10, dtype=torch.float64)
    fed = []

    def model(inputs):
        fed.append(inputs)
        return logits

    losses = arithmetic.answer_loss(model, tokens)
    expected = [
        math.log(sum(math.exp(value) for value in logits[example, at - 1].tolist()))
        - logits[example, at - 1, tokens[example, at]].item()
        for example in range(2)
        for at in range(8, 12)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(fed[0], tokens[:, :11])


def test_feeding_the_twelfth_token_too_changes_no_loss():
    model = build_model(ModelSettings(n_layers=1, d_model=8, n_heads=2, d_mlp=16), seed=0).double()
    tokens = arithmetic.encode(arithmetic.sample_pairs(0, 20, 0, 0).validation)
    logits = model(tokens)[:, 7:11]
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 8:, None]).flatten()
    torch.testing.assert_close(arithmetic.answer_loss(model, tokens), expected, rtol=1e-12, atol=1e-12)


def test_digit_loss_covers_every_digit_and_no_symbol():
    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 10)
            return logits.scatter(2, tokens[:, :, None].clamp(max=9), 5.0)  # it bets on the token it has just seen

    batch = arithmetic.encode(np.array([[111, 345], [907, 38]]))
    losses = arithmetic.digit_loss(Uniform(), batch).reshape(2, 9)
    targets = [(i, batch[:, i]) for i in range(1, 12) if i not in (3, 7)]
    for column, (position, target) in enumerate(targets):
        hit = target == batch[:, position - 1].clamp(max=9)
        logits = torch.where(hit, 5.0, 0.0)
        expected = torch.log(torch.tensor(9 + np.exp(5.0))) - logits
        torch.testing.assert_close(losses[:, column], expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[:, -4:].flatten(), arithmetic.answer_loss(Uniform(), batch))
