import collections

import hdbscan
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from cases import sigmoid_drop
from hypothesis import given
from hypothesis import strategies as st
from polca_paper.homogeneity import homogeneity_table, most_homogeneous

from polca_lib.method import clustering
from polca_lib.method.clustering import (
    DROPPED,
    OUTLIER,
    cluster_tokens,
    composition,
    is_decreasing,
    medoid,
    moves,
    scale,
)  # fmt: skip
from polca_lib.method.decomposition import projected_loss
from polca_lib.method.settings import ClusteringSettings

STEPS = np.arange(0, 401, 20)
CONFIG = ClusteringSettings(scaling="raw", min_cluster_size=20)


def curves(values, **coords):
    """(token, step) values as trajectories."""
    return xr.DataArray(
        np.asarray(values).T, dims=("step", "token"), coords={"step": STEPS[: len(values[0])], **coords}
    )


def family(centre, n, size=1.0, seed=0):
    noise = 0.01 * np.random.default_rng(seed).standard_normal((n, len(STEPS)))
    return sigmoid_drop(STEPS, centre) * np.broadcast_to(size, n)[:, None] + noise


def two_families(early=70, late=50, rising=30):
    return curves(np.concatenate([family(100, early), family(300, late, seed=1), family(200, rising, -0.5, seed=2)]))


def test_two_families_are_recovered_numbered_by_size_and_rising_tokens_are_dropped():
    labels = cluster_tokens(two_families(), CONFIG)
    assert labels.dims == ("token",)
    assert (labels[120:] == DROPPED).all()
    assert set(labels.values[:70]) <= {1, OUTLIER}
    assert set(labels.values[70:120]) <= {2, OUTLIER}
    assert (labels == 1).sum() > 50
    assert (labels == 2).sum() > 35


def test_the_larger_family_is_number_one_wherever_it_stands():
    labels = cluster_tokens(two_families(early=50, late=70), CONFIG)
    assert set(labels.values[:50]) <= {2, OUTLIER}
    assert set(labels.values[50:120]) <= {1, OUTLIER}


def test_filters_can_be_switched_off():
    labels = cluster_tokens(two_families(rising=60), CONFIG, only_falling=False)
    assert not (labels == DROPPED).any()
    assert (labels[120:] >= 1).sum() > 40
    assert labels.max() == 3


def test_each_vector_is_clustered_by_itself_and_a_rising_one_wholly_dropped():
    falling = two_families()
    # Most tokens rise, so that the mean does; 30 fall all the same.
    rising = -falling
    both = xr.concat([falling, rising], dim="vector").assign_coords(vector=[4, 9])
    labels = cluster_tokens(both, CONFIG)
    assert labels.dims == ("vector", "token")
    assert labels["vector"].values.tolist() == [4, 9]
    assert (labels.sel(vector=4).values == cluster_tokens(falling, CONFIG).values).all()
    assert is_decreasing(rising).any()
    assert (labels.sel(vector=9) == DROPPED).all()


def test_token_falls_if_it_ends_below_its_start_and_standing_still_is_no_fall():
    values = curves([[0, 5, -1], [0, -5, 0], [0, -5, 1], [2, 0, 1]])
    assert is_decreasing(values).values.tolist() == [True, False, False, True]


def test_coordinates_of_the_tokens_stay_on_the_labels():
    values = two_families().assign_coords(place=("token", np.resize(["10s", "1s"], 150)))
    labels = cluster_tokens(values, CONFIG)
    assert (labels["place"] == values["place"]).all()
    assert labels.dtype.kind == "i"


def test_too_few_kept_tokens_make_no_cluster():
    labels = cluster_tokens(curves(family(100, 19)), CONFIG)
    assert (labels == OUTLIER).all()


def test_one_shapeless_cloud_makes_no_cluster():
    # Two clusters of 20 can't be cut from 39 tokens, and all tokens together do not count as one.
    labels = cluster_tokens(curves(family(100, 39)), CONFIG)
    assert (labels == OUTLIER).all()


@pytest.mark.parametrize(("min_samples_from", "expected"), [("kept", 120 // 15), ("all", 150 // 15)])
def test_min_samples_is_the_number_of_tokens_over_the_divisor(monkeypatch, min_samples_from, expected):
    given = {}

    def recorder(values, min_cluster_size, min_samples, selections):
        given.update(min_cluster_size=min_cluster_size, min_samples=min_samples, selections=selections)
        return {(min_samples[0], selections[0]): np.zeros(len(values), dtype=int)}

    monkeypatch.setattr(clustering, "hdbscan_labels", recorder)
    config = ClusteringSettings(scaling="raw", min_cluster_size=20, min_samples_from=min_samples_from, selection="leaf")
    cluster_tokens(two_families(), config)
    assert given == {"min_cluster_size": 20, "min_samples": [expected], "selections": ["leaf"]}


@pytest.mark.parametrize("selection", ["eom", "leaf"])
@pytest.mark.parametrize("min_samples", [2, 7, 200])
@pytest.mark.parametrize("at_once", [120, 119])
def test_labels_are_those_of_hdbscan(monkeypatch, selection, min_samples, at_once):
    monkeypatch.setattr(clustering, "_AT_ONCE", at_once)
    values = np.random.default_rng(0).normal(size=(120, 70)) + np.repeat(np.arange(4), 30)[:, None]
    ours = clustering.hdbscan_labels(values, 8, [2, 7, 200])[min_samples, selection]
    model = hdbscan.HDBSCAN(min_cluster_size=8, min_samples=min_samples, cluster_selection_method=selection)
    assert (ours == model.fit(values).labels_).all()
    assert min_samples == 200 or ours.max() >= 1


def test_unit_scaling_groups_by_timing_whatever_the_size():
    sizes = np.geomspace(0.5, 8, 60)
    values = curves(np.concatenate([family(100, 60, sizes), family(300, 60, sizes, seed=1)]))
    labels = cluster_tokens(values, ClusteringSettings(min_cluster_size=20, scaling="unit")).values
    assert labels.max() == 2
    one, other = labels[:60], labels[60:]
    assert {*one[one > 0]}.isdisjoint(other[other > 0])
    assert (labels > 0).sum() > 90


HAND = np.array([[0.0, -1.0, -2.0], [0.0, 3.0, 4.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("raw", HAND),
        ("unit", [[0, -0.5, -1], [0, 0.75, 1], [0, 0, 0]]),
        (
            "zscore",
            [
                [1.5**0.5, 0, -(1.5**0.5)],
                [-7 / 26**0.5, 2 / 26**0.5, 5 / 26**0.5],
                [0, 0, 0],
            ],
        ),
    ],
)
def test_scaling_of_numbers_worked_out_by_hand(scaling, expected):
    np.testing.assert_allclose(scale(HAND, scaling), expected, atol=1e-12)


def test_unknown_scaling_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"scaling = 'log'.*raw, unit, maximum, zscore"):
        scale(HAND, "log")


@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from(["raw", "unit", "zscore"]))
def test_medoid_has_the_least_total_distance(seed, n, scaling):
    values = np.random.default_rng(seed).standard_normal((n, 5))
    scaled = scale(values, scaling)
    totals = [sum(np.linalg.norm(a - b) for b in scaled) for a in scaled]
    # Of two tokens each is as central as the other.
    assert totals[medoid(curves(values), scaling)] == pytest.approx(min(totals), rel=1e-6)


def test_medoid_of_a_line_is_its_middle():
    assert medoid(curves([[0.0, 9], [0, 1], [0, 3], [0, 2], [0, 7]])) == 2


PLACE = np.array(["10s", "10s", "100s", "1s", "100s", "1000s", "1s", "10s", "10s", "1000s"])
CARRY = np.array([True, True, True, False, False, True, False, True, True, True])
LABELS = np.array([1, 1, 1, 1, 1, 2, 2, 2, OUTLIER, DROPPED])


def labelled(values=LABELS):
    skill = np.where(CARRY, "carry", "no carry")
    return xr.DataArray(
        values, dims="token", coords={"place": ("token", PLACE), "carry": ("token", CARRY), "skill": ("token", skill)}
    )


def test_composition_counts_the_tokens_of_each_kind_in_each_cluster():
    table = composition(labelled(), by="place")
    expected = collections.Counter((c, p) for c, p in zip(LABELS, PLACE, strict=True) if c >= 1)
    assert {(c, p): n for c, row in table.iterrows() for p, n in row.items() if n} == expected
    assert table.index.tolist() == [1, 2]
    assert composition(labelled()).loc[1].to_dict() == {"carry": 3, "no carry": 2}


def test_composition_of_no_clusters_is_empty():
    assert composition(labelled(np.full(10, OUTLIER))).empty


def test_homogeneity_table_by_hand():
    table = homogeneity_table(labelled()).set_index("cluster")
    # Carry tokens in clusters: three in the first, two in the second; those outside do not count.
    assert table["tokens"].tolist() == [5, 3]
    assert table["homogeneity"].tolist() == pytest.approx([3 / 5, 2 / 3])
    assert table["recall"].tolist() == pytest.approx([3 / 5, 2 / 5])
    assert table["f1"].tolist() == pytest.approx([3 / 5, 1 / 2])
    assert table["in_places"].tolist() == pytest.approx([1, 1 / 2])
    assert table["counts_v3"].tolist() == [True, False]
    assert table["vector"].tolist() == [0, 0]


def test_v3_counts_a_cluster_only_with_over_85_percent_of_its_carry_tokens_in_the_10s_and_100s():
    def counts(inside, outside):
        n = inside + outside
        labels = xr.DataArray(
            np.ones(n, int),
            dims="token",
            coords={"place": ("token", ["10s"] * inside + ["1000s"] * outside), "carry": ("token", np.ones(n, bool))},
        )
        return homogeneity_table(labels)["counts_v3"].tolist()

    assert counts(17, 3) == [False]
    assert counts(18, 3) == [True]


def test_cluster_without_carry_has_zero_everything():
    table = homogeneity_table(labelled(np.where(CARRY, OUTLIER, 1)))
    assert table[["homogeneity", "recall", "f1", "in_places"]].to_numpy().tolist() == [[0, 0, 0, 0]]
    assert table["counts_v3"].tolist() == [False]


def test_no_clusters_give_an_empty_table_with_the_same_columns():
    table = homogeneity_table(labelled(np.full(10, DROPPED)))
    assert len(table) == 0
    assert table.columns.tolist() == homogeneity_table(labelled()).columns.tolist()


def test_recall_counts_the_carry_tokens_of_the_same_vector_only():
    other = np.where(CARRY, 1, OUTLIER)
    labels = xr.concat([labelled(), labelled(other)], dim="vector").assign_coords(vector=[2, 5])
    table = homogeneity_table(labels)
    assert table["vector"].tolist() == [2, 2, 5]
    assert table["recall"].tolist() == pytest.approx([3 / 5, 2 / 5, 1])


RANKING = pd.DataFrame(
    {
        "vector": [1, 1, 2, 3, 4],
        "cluster": [1, 2, 1, 1, 1],
        "tokens": [50, 40, 30, 20, 60],
        "homogeneity": [0.9, 0.95, 0.5, 0.99, 0.5],
        "counts_v3": [True, False, True, False, True],
    }
)


@pytest.mark.parametrize(
    ("rule", "n", "expected"),
    [
        ("v1", 3, [(3, 1), (1, 2), (4, 1)]),
        ("v1", 1, [(3, 1)]),
        ("v3", 3, [(1, 1), (4, 1), (2, 1)]),
        ("v3", 9, [(1, 1), (4, 1), (2, 1)]),
    ],
)
def test_most_homogeneous_clusters_are_one_per_vector_and_of_equal_ones_the_larger(rule, n, expected):
    best = most_homogeneous(RANKING, n, rule=rule)
    assert list(zip(best["vector"], best["cluster"], strict=True)) == expected
    assert best.index.tolist() == list(range(len(expected)))


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"rule = 'v2'.*v1, v3"):
        most_homogeneous(RANKING, rule="v2")


def rounding(size, loss):
    """Projections whose curves are two families that fall by ``size`` nats; the loss of all tokens is ``loss``."""
    shapes = two_families(rising=0).values * size  # (step, token)
    movement = np.ones((len(STEPS), 1), np.float32)
    gradient = np.diff(shapes, axis=0, append=shapes[-1:])[:, :, None].astype(np.float32)
    losses = np.full(shapes.shape, loss, np.float32)
    coords = {"step": STEPS, "vector": [1]}
    variables = {"gradient": (("step", "token", "vector"), gradient), "movement": (("step", "vector"), movement)}
    return xr.Dataset({**variables, "loss": (("step", "token"), losses)}, coords)


@pytest.mark.parametrize("scaling", ["raw", "unit", "zscore"])
def test_curves_below_the_rounding_of_their_loss_make_no_clusters(scaling):
    settings = ClusteringSettings(scaling=scaling, min_cluster_size=20, order="first")
    large, small = (projected_loss(rounding(size, 2.3), "first") for size in (0.1, 5e-8))
    assert cluster_tokens(large, settings).max() == 2
    assert moves(large).all()
    assert (cluster_tokens(small, settings) == DROPPED).all()
    assert not moves(small).any()
    # The same curves are movement for tokens whose loss is as small as that.
    assert cluster_tokens(projected_loss(rounding(5e-8, 1e-7), "first"), settings).max() == 2


def test_the_floor_is_that_of_each_token():
    projections = rounding(1e-7, 2.3)
    projections["loss"][:, ::2] = 0.01
    assert moves(projected_loss(projections, "first"))[:, 0].values.tolist() == [True, False] * 60


def test_floor_is_the_rounding_of_loss_and_terms():
    eps, values = 2.0**-23, np.zeros((3, len(STEPS)))
    values[0, 5:], values[1, 5:] = -1.01 * eps * 4, -0.99 * eps * 4
    values[2, 1::2] = 1e6  # swings by as much as it moves: its sum is known
    trajectories = curves(values).assign_coords(largest_loss=("token", [4.0] * 3))
    assert moves(trajectories).values.tolist() == [True, False, True]


def test_exact_loss_that_stays_but_for_its_last_digit_does_not_move():
    values = np.full((30, len(STEPS)), 2.3, np.float32)
    values[:, 10:] = np.nextafter(np.float32(2.3), np.float32(0))
    settings = ClusteringSettings(scaling="zscore", min_cluster_size=5)
    assert is_decreasing(curves(values)).all()
    assert (cluster_tokens(curves(values), settings) == DROPPED).all()


@pytest.mark.parametrize("scaling", ["unit", "zscore"])
def test_changes_of_rounding_are_not_divided_by(scaling):
    noise = np.float32(2.3) * (1 + 1e-8 * np.random.default_rng(0).standard_normal((5, 20)))
    assert abs(scale(noise, scaling)).max() < 1e-6
    small = 1e-9 * sigmoid_drop(STEPS, 200)[None]
    assert abs(scale(small, scaling)).max() > 0.9
