import numpy as np
import pandas as pd
import pytest
import xarray as xr
from cases import sigmoid_drop
from polca_paper.homogeneity import cluster_breakthroughs

from polca_lib.method.breakthroughs import breakthrough_step, flat_after, hidden_threshold, mark_hidden
from polca_lib.method.clustering import DROPPED, OUTLIER
from polca_lib.method.settings import ClusteringSettings

STEPS = np.arange(0, 401, 20)


def trajectories(*curves, steps=STEPS):
    return xr.DataArray(np.stack(curves, axis=1), dims=("step", "token"), coords={"step": steps})


def hinge(start, end):
    """Flat, then a straight fall from ``start`` to ``end``, then flat."""
    return np.interp(STEPS, [start, end], [0.0, -1.0])


@pytest.mark.parametrize("window", [20, 60])
def test_breakthrough_of_a_straight_fall_is_where_it_starts(window):
    curves = trajectories(hinge(100, 220), hinge(200, 300))
    assert breakthrough_step(curves, window).values.tolist() == [100, 200]


def test_breakthrough_of_a_sigmoid_drop_is_before_its_middle_and_the_printed_argmax_after():
    curve = sigmoid_drop(STEPS, centre=200, width=30)
    shift = 60 // 20
    printed = curve[2 * shift :] - 2 * curve[shift:-shift] + curve[: -2 * shift]
    start = breakthrough_step(trajectories(curve), 60).item()
    end = STEPS[shift:-shift][printed.argmax()]
    assert start == STEPS[shift:-shift][printed.argmin()]
    assert start < 200 < end
    assert 200 - start == end - 200


def test_later_drops_have_later_breakthroughs():
    curves = trajectories(*(sigmoid_drop(STEPS, centre) for centre in (120, 200, 280)))
    steps = breakthrough_step(curves, 40).values
    assert (np.diff(steps) == 80).all()


def test_breakthroughs_do_not_depend_on_size_or_order_of_dimensions():
    curves = trajectories(hinge(100, 220), 7 * hinge(200, 300) + 3)
    assert breakthrough_step(curves.transpose("token", "step"), 40).values.tolist() == [100, 200]


@pytest.mark.parametrize("window", [10, 30, 0])
def test_window_that_is_no_multiple_of_the_cadence_is_refused(window):
    with pytest.raises(ValueError, match=rf"window = {window} .*cadence of 20"):
        breakthrough_step(trajectories(hinge(100, 200)), window)


def test_window_that_is_too_long_is_refused_and_the_longest_one_works():
    curve = trajectories(hinge(200, 300))
    with pytest.raises(ValueError, match=r"window = 220 needs 440 steps.*400; allowed: at most 200"):
        breakthrough_step(curve, 220)
    assert breakthrough_step(curve, 200).item() == 200


TABLE = pd.DataFrame({"vector": [0, 0], "cluster": [1, 2]})


def test_cluster_is_hidden_if_its_mean_breakthrough_is_past_tau():
    curves = trajectories(hinge(100, 220), hinge(200, 300), hinge(240, 300), hinge(60, 300))
    labels = xr.DataArray([1, 2, 2, -1], dims="token")
    marked = mark_hidden(TABLE, labels, curves, window=20, hidden_after=219)
    assert marked["breakthrough"].tolist() == [100, 220]
    assert marked["hidden"].tolist() == [False, True]
    assert mark_hidden(TABLE, labels, curves, window=20, hidden_after=220)["hidden"].tolist() == [False, False]


def test_beside_a_hidden_cluster_stands_how_many_tokens_drop_so_late():
    curves = trajectories(hinge(100, 220), hinge(200, 300), hinge(240, 300), hinge(240, 300))
    labels = xr.DataArray([OUTLIER, 2, 2, DROPPED], dims="token")  # an outlier is kept, a dropped token is not
    marked = mark_hidden(TABLE.tail(1), labels, curves, window=20, hidden_after=210)
    assert marked["hidden"].tolist() == [True]
    assert marked["late"].tolist() == pytest.approx([1 / 3])


def test_clusters_are_looked_up_in_their_own_vector():
    one, two = trajectories(hinge(100, 220), hinge(200, 300)), trajectories(hinge(140, 220), hinge(60, 300))
    curves = xr.concat([one, two], dim="vector").assign_coords(vector=[3, 7])
    labels = xr.DataArray([[1, 2], [2, 1]], dims=("vector", "token"), coords={"vector": [3, 7]})
    table = pd.DataFrame({"vector": [3, 3, 7, 7], "cluster": [1, 2, 1, 2]})
    assert mark_hidden(table, labels, curves, 20, 0)["breakthrough"].tolist() == [100, 200, 60, 140]


def test_no_clusters_give_an_empty_table_with_the_same_columns():
    labels = xr.DataArray([-1, -2], dims="token")
    marked = mark_hidden(TABLE.head(0), labels, trajectories(hinge(100, 220), hinge(60, 80)), 20, 0)
    assert marked.columns.tolist() == ["vector", "cluster", "breakthrough", "hidden", "late"]
    assert len(marked) == 0


def curve(*values):
    return xr.DataArray(list(values), dims="step", coords={"step": 10 * np.arange(len(values))})


@pytest.mark.parametrize(
    ("values", "drop", "expected"),
    [
        ((8, 4, 2, 1, 0), 7 / 8, 30),
        ((8, 4, 2, 1, 0), 1 / 2, 10),
        ((8, 4, 2, 1, 0), 1.0, 40),
        # The lowest value counts, not the last.
        ((9, 5, 1, 3, 4), 7 / 8, 20),
    ],
)
def test_curve_is_flat_once_it_has_made_that_share_of_its_fall(values, drop, expected):
    assert flat_after(curve(*values), drop) == expected


@pytest.mark.parametrize("values", [(1, 2, 3), (1, 1, 1)])
def test_curve_that_never_falls_has_no_flat_part(values):
    with pytest.raises(ValueError, match=r"never falls.*hidden_after"):
        flat_after(curve(*values))


@pytest.mark.parametrize(("configured", "expected"), [(None, 30), (170, 170)])
def test_threshold_is_as_configured_or_where_the_mean_loss_has_gone_flat(configured, expected):
    mean = curve(8, 4, 2, 1, 0)
    loss = xr.concat([mean + 3, mean - 3], dim="token")
    assert hidden_threshold(loss, ClusteringSettings(hidden_after=configured)) == expected


@pytest.mark.parametrize("only_falling", [True, False])
def test_clusters_are_found_tabulated_and_marked_at_the_start_of_their_drops(only_falling):
    early, late, rising = (np.outer(np.linspace(1, 1.05, 30), hinge(at, at + 80)) for at in (100, 240, 160))
    carry = np.repeat([True, False, True], 30)
    curves = trajectories(*early, *late, *-rising).assign_coords(
        carry=("token", carry), place=("token", np.repeat("10s", 90))
    )
    config = ClusteringSettings(scaling="raw", min_cluster_size=15, breakthrough_window=40)
    labels, table = cluster_breakthroughs(curves, config, 200, only_falling=only_falling)
    found = {row.breakthrough: (row.hidden, row.homogeneity) for row in table.itertuples()}
    assert found[100] == (False, 1.0)
    assert found[240] == (True, 0.0)
    assert len(table) == labels.max() == (2 if only_falling else 3)
