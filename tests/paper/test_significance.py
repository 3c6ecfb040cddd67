import itertools

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from polca_paper.homogeneity import homogeneity_table, most_homogeneous
from polca_paper.significance import (
    cadence,
    carry_clusters,
    check_on_other_half,
    permutation_null,
    rand_indices,
    settings_grid,
)
from sklearn.metrics import adjusted_rand_score

from polca_lib.method.clustering import DROPPED, OUTLIER
from polca_lib.tasks.settings import RunSettings

CONFIG = RunSettings.from_preset("smoke").clustering.model_copy(
    update={"min_cluster_size": 10, "min_samples_divisor": 10}
)


def labelled(labels, place, carry, digit=None):
    """Labels (vector, token) with the coordinates of a token table."""
    labels = np.atleast_2d(labels)
    n = labels.shape[1]
    return xr.DataArray(
        labels,
        dims=("vector", "token"),
        coords={
            "vector": np.arange(1, len(labels) + 1),
            "token": np.arange(n),
            "place": ("token", np.array(place)),
            "carry": ("token", np.array(carry, bool)),
            "digit": ("token", np.zeros(n, int) if digit is None else np.array(digit)),
            "example": ("token", np.arange(n)),
            "skill": ("token", np.array([f"{p}, {c}" for p, c in zip(place, carry, strict=True)])),
        },
    )


def many(seed=0, n=60, vectors=3):
    rng = np.random.default_rng(seed)
    place = rng.choice(["1000s", "100s", "10s", "1s"], n)
    carry = (rng.random(n) < 0.4) & (place != "1s")
    return labelled(rng.integers(-2, 4, (vectors, n)), place, carry, rng.integers(0, 3, n))


def brute_force(labels, rule):
    """The maximum by the table that the book prints, and the number of vectors over 0.9."""
    table = homogeneity_table(labels)
    counted = table if rule == "v1" else table[table["counts_v3"].astype(bool)]
    best = most_homogeneous(table, 1, rule=rule)["homogeneity"].max()
    return 0.0 if np.isnan(best) else best, counted.loc[counted["homogeneity"] > 0.9, "vector"].nunique()


@pytest.mark.parametrize("rule", ["v1", "v3"])
def test_every_draw_is_what_the_homogeneity_table_says_of_the_shuffled_labels(rule, monkeypatch):
    labels, drawn = many(), []
    permuted = np.random.Generator.permuted

    class Watched:
        def __init__(self, seed):
            self.own = np.random.Generator(np.random.PCG64(seed))

        def permuted(self, values, axis):
            drawn.append(permuted(self.own, values, axis=axis))
            return drawn[-1]

    monkeypatch.setattr("polca_paper.significance.np.random.default_rng", Watched)
    null = permutation_null(labels, draws=20).sel(rule=rule)
    strata = pd.Series(labels["place"].values)
    groups = list(strata.groupby(pd.Series(list(zip(strata, strict=True)))).indices.values())
    assert len(groups) == len(drawn)
    for draw in range(20):
        shuffled = np.zeros(labels.sizes["token"], bool)
        for tokens, values in zip(groups, drawn, strict=True):
            shuffled[tokens] = values[draw]
        maximum, over = brute_force(labels.assign_coords(carry=("token", shuffled)), rule)
        assert null["maximum"][draw] == pytest.approx(maximum, abs=1e-6)
        assert null["vectors_over_null"][draw] == over
    maximum, over = brute_force(labels, rule)
    assert null["observed"] == pytest.approx(maximum, abs=1e-6)
    assert null["vectors_over"] == over


def test_p_is_that_of_all_permutations_of_a_small_case():
    # Two clusters of three in one place, three carries among six: C(6, 3) = 20 ways, in two of which one has all.
    labels = labelled([1, 1, 1, 2, 2, 2], ["10s"] * 6, [1, 1, 1, 0, 0, 0])
    ways = [
        max(sum(i in chosen for i in part) / 3 for part in ((0, 1, 2), (3, 4, 5)))
        for chosen in itertools.combinations(range(6), 3)
    ]
    exact = np.mean([way >= 1 for way in ways])
    null = permutation_null(labels, draws=4000)
    assert exact == 0.1
    assert float(null["p"].sel(rule="v1")) == pytest.approx(exact, abs=0.02)
    assert float(null["observed"].sel(rule="v3")) == 1


def test_a_cluster_of_one_place_earns_nothing_and_with_the_digit_kept_neither_does_the_digit():
    # In the 1000s place the digit is the carry; one cluster has all of them.
    carry = np.array([1] * 10 + [0] * 10 + [0] * 20)
    place = np.array(["1000s"] * 20 + ["1s"] * 20)
    everything = labelled(np.where(place == "1000s", 1, 2), place, carry, carry)
    null = permutation_null(everything, draws=50)
    assert (null["maximum"].sel(rule="v1") == 0.5).all()
    assert float(null["p"].sel(rule="v1")) == 1
    by_digit = labelled(np.where(carry == 1, 1, 2), place, carry, carry)
    assert float(permutation_null(by_digit, draws=50)["p"].sel(rule="v1")) < 0.05
    kept = permutation_null(by_digit, draws=50, within=("place", "digit"))
    assert float(kept["p"].sel(rule="v1")) == 1
    assert kept.attrs["within"] == "place, digit"


def test_no_cluster_at_all_is_no_evidence():
    null = permutation_null(labelled([[OUTLIER] * 4, [DROPPED] * 4], ["10s"] * 4, [1, 0, 1, 0]), draws=10)
    assert (null["observed"] == 0).all()
    assert (null["p"] == 1).all()


def test_rand_index_is_over_clustered_tokens_and_empty_where_there_is_one_cluster():
    labels = many()
    found = rand_indices(labels)
    for vector in labels["vector"].values:
        own = labels.sel(vector=vector)
        own = own[own >= 1]
        for name in ("place", "carry", "skill"):
            expected = adjusted_rand_score(own[name].values.astype(str), own.values)
            assert found.loc[vector, name] == pytest.approx(expected)
    assert rand_indices(labelled([1, 1, -1, 1], ["10s"] * 4, [1, 0, 1, 0])).isna().all(axis=None)


def two_groups(n=80, seed=0):
    """Curves that fall early or late; carries fall late. Tokens of an example stay in one half."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, 21)
    carry = rng.random(n) < 0.5
    centre = np.where(carry, 0.7, 0.3) + 0.01 * rng.standard_normal(n)
    curves = -1 / (1 + np.exp(-(time[:, None] - centre) / 0.03))
    curves -= curves[0]
    labels = labelled(np.zeros(n, int), np.where(np.arange(n) % 2, "10s", "100s"), carry)
    return labels[0].drop_vars("vector").expand_dims(step=20 * np.arange(21)).copy(data=curves)


def test_clusters_of_half_of_the_examples_hold_on_the_other_half():
    curves = two_groups()
    curves = xr.concat([curves, -curves], dim=pd.Index([1, 2], name="vector"))
    found = check_on_other_half(curves, CONFIG, seed=1)
    assert found["vector"].unique().tolist() == [1]  # the mean along the other rises
    assert len(found) == 2
    assert sorted(found["homogeneity_fitted"]) == sorted(found["homogeneity_held_out"]) == [0, 1]
    assert found["tokens_fitted"].sum() <= 40
    assert (found["tokens_held_out"] > 5).all()
    np.testing.assert_allclose(found["agreement"], 1)


def test_held_out_tokens_show_a_cluster_that_is_chance():
    curves = two_groups()
    shuffled = np.random.default_rng(2).permutation(curves["carry"].values)
    found = check_on_other_half(curves.assign_coords(carry=("token", shuffled)), CONFIG)
    assert len(found) >= 2
    assert (found["homogeneity_held_out"] < 0.9).all()
    assert (found["homogeneity_held_out"] > 0.1).all()


def test_a_vector_that_holds_on_one_half_only_has_rows_that_say_so():
    curves = two_groups()
    fitted = np.random.default_rng(1).permutation(np.unique(curves["example"]))[:40]
    rising = curves.copy(data=np.where(np.isin(curves["example"], fitted), curves.values, -curves.values))
    found = check_on_other_half(rising, CONFIG, seed=1)
    assert len(found) == 2
    assert (found["tokens_held_out"] == 0).all()
    assert found["homogeneity_held_out"].isna().all()


def test_v3_rule_with_shuffles_within_places_alone_rewards_telling_the_1000s_apart():
    """Half of the tokens of the cluster in the 10s and 100s take a carry, as everywhere: that is no carry cluster."""
    place = np.repeat(["10s", "1000s", "1000s", "10s"], [300, 80, 200, 300])
    carry = np.concatenate([np.arange(300) % 2, np.zeros(80), np.ones(200), np.arange(300) % 2]).astype(bool)
    digit = np.where(place == "1000s", carry, 5)
    labels = labelled(np.repeat([1, OUTLIER], [380, 500]), place, carry, digit)
    assert float(permutation_null(labels, 200)["p"].sel(rule="v3")) < 0.05
    assert float(permutation_null(labels, 200, within=("place", "digit"))["p"].sel(rule="v3")) > 0.3


def test_grid_has_what_each_setting_gives_alone():
    curves = two_groups()
    grid = settings_grid(curves, CONFIG, sizes=(10, 60), divisors=(10, 20))
    assert len(grid) == 4
    fits = grid[grid["min_cluster_size"] == 10]
    assert (fits["v1"] == 1).all()
    assert (fits["clusters"] == 2).all()
    assert (fits["vectors_over"] == 1).all()
    too_large = grid[grid["min_cluster_size"] == 60]
    assert too_large["v1"].isna().all()
    assert (too_large["clusters"] == 0).all()


@pytest.mark.parametrize(("steps", "mean"), [([0, 20, 40], 20), ([0, 1, 2, 4, 8, 160], 32), ([0, 1, 2], 1)])
def test_cadence_is_the_mean_gap_between_checkpoints(steps, mean):
    assert cadence(xr.Dataset(coords={"step": steps})) == mean


def test_carry_clusters_count_and_are_beyond_all_kept_tokens_and_shuffles():
    null = pd.DataFrame(
        [
            ("a", "first", "unit", "place, digit", "v3", 0.4, 0.5),
            ("a", "first", "unit", "place", "v3", 0.4, 0.1),
            ("a", "first", "unit", "place, digit", "v1", 0.4, 0.99),
            ("a", "first", "raw", "place, digit", "v3", 0.4, 0.2),
        ],
        columns=["study", "order", "scaling", "within", "rule", "base_rate", "null_95"],
    )
    rows = [("unit", 0.6, True), ("unit", 0.6, False), ("unit", 0.45, True), ("raw", 0.3, True), ("raw", 0.45, True)]
    clusters = pd.DataFrame(rows, columns=["scaling", "homogeneity", "counts_v3"], index=[3, 5, 7, 9, 11])
    clusters = clusters.assign(study="a", order="first", vector=1)
    found = carry_clusters(clusters, null)
    assert found.index.tolist() == [3, 11]
    assert found["homogeneity"].tolist() == [0.6, 0.45]
    # A study without a null has no cluster beyond it.
    assert carry_clusters(clusters.assign(study="b"), null).empty
