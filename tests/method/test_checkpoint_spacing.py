import numpy as np
import pytest
import xarray as xr

from polca_lib.method.checkpoint_spacing import advice, is_fit, largest_shares

STEPS = [0, 1, 5, 20, 100]


def losses(*curves, tokens=10):
    """Losses of as many kinds as there are curves: tokens of one kind differ, but have the curve as their mean."""
    offsets = np.linspace(-0.3, 0.3, tokens)
    values = [np.add.outer(curve, offsets) for curve in curves]
    kinds = np.repeat([chr(ord("a") + i) for i in range(len(curves))], tokens)
    return xr.DataArray(np.concatenate(values, 1), dims=("step", "token"), coords={"step": STEPS}), kinds


EVEN = [4, 3.9, 3.8, 3.7, 3.6]
STEEP = [4, 3.5, 1, 0.5, 0]


def test_share_is_the_largest_drop_of_the_mean_over_the_whole_drop():
    table = largest_shares(*losses(STEEP, EVEN))
    assert table.index.tolist() == ["a", "b"]
    assert table["share"].tolist() == pytest.approx([2.5 / 4, 1 / 4])
    assert table["drop"].tolist() == pytest.approx([4, 0.4])
    assert table.loc["a", ["tokens", "start", "end", "judged"]].tolist() == [10, 1, 5, True]


def test_whole_drop_ends_at_the_lowest_loss_of_a_kind_that_rises_again():
    table = largest_shares(*losses([3, 2, 1, 2, 2.5]))
    assert table["drop"].tolist() == pytest.approx([2])
    assert table["share"].tolist() == pytest.approx([0.5])


def test_kinds_are_judged_by_themselves_not_by_their_mean():
    # Each kind drops at once, but the mean over both falls in two equal parts.
    both = losses([3, 1, 1, 1, 1], [3, 3, 3, 3, 1])
    assert largest_shares(*both)["share"].tolist() == pytest.approx([1, 1])
    assert largest_shares(both[0], np.full(20, "all"))["share"].tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("curve", "tokens"), [([1, 2, 3, 4, 5], 10), ([4, 3.95, 3.95, 3.95, 3.95], 10), ([4, 1, 1, 1, 1], 9)]
)
def test_kinds_that_rise_hardly_fall_or_are_rare_are_not_judged(curve, tokens):
    table = largest_shares(*losses(curve, tokens=tokens))
    assert not table["judged"].any()
    assert not is_fit(table)
    assert advice(table) == "not judged: the loss of no frequent kind of token falls by 0.1 nats"


def test_kind_of_less_than_a_hundredth_of_the_tokens_is_not_judged():
    values, kinds = losses(EVEN, STEEP, tokens=1200)
    kinds[:-11] = "a"
    assert largest_shares(values, kinds)["judged"].to_dict() == {"a": True, "b": False}


def test_share_of_a_loss_that_never_falls_is_not_a_number():
    assert np.isnan(largest_shares(*losses([1, 2, 3, 4, 5]))["share"].iloc[0])


def fine(start, end):
    """A curve of 21 checkpoints that falls evenly."""
    steps = np.arange(21)
    curves = np.linspace(start, end, 21)[:, None] + np.zeros((1, 10))
    return xr.DataArray(curves, dims=("step", "token"), coords={"step": steps * 10})


def test_run_is_fit_if_every_share_is_below_a_tenth():
    table = largest_shares(fine(4, 2), np.full(10, "word"))
    assert is_fit(table)
    assert advice(table).startswith("fit for POLCA: word makes 5% of its loss drop between steps ")
    # A tenth itself is too much.
    edge = fine(4, 2)[::2]
    assert largest_shares(edge, np.full(10, "word"))["share"].iloc[0] == pytest.approx(0.1)
    assert not is_fit(largest_shares(edge, np.full(10, "word")).assign(share=0.1))


def test_advice_names_the_worst_kind_its_interval_and_what_to_do_on_one_line():
    values, kinds = losses(EVEN, STEEP)
    told = advice(largest_shares(values, np.where(kinds == "b", "a\nb", kinds)))
    assert told == (
        "not fit for POLCA: a b makes 62% of its loss drop between steps 1 and 5 (allowed: below 10%); "
        "save more checkpoints there, or train more slowly"
    )


def test_wrong_sizes_are_refused():
    values, kinds = losses(EVEN)
    with pytest.raises(ValueError, match="losses has 1 checkpoints; allowed: 2 or more"):
        largest_shares(values[:1], kinds)
    with pytest.raises(ValueError, match="kinds has 9 values; allowed: 10"):
        largest_shares(values, kinds[:9])
