"""Known constructions: what nearest trajectories tell of them. Tables of clusters are in test_labeling.py."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from polca_paper.constructions import (
    _permutations,
    ambiguous,
    best_clusters,
    best_found,
    best_readings,
    cluster_readings,
    construction_table,
    excess_hits,
    judge_reading,
    knn_recall,
    majority_recall,
    planted,
)
from sklearn.metrics import adjusted_rand_score

from polca_lib.method.clustering import cluster_tokens
from polca_lib.method.settings import ClusteringSettings

STEPS = np.arange(10)


def trajectories(curves):
    return xr.DataArray(np.array(curves).T, dims=("step", "token"), coords={"step": STEPS})


def test_constructions_with_curves_of_their_own_are_told_and_those_without_are_not():
    rng = np.random.default_rng(0)
    kinds = np.repeat(["early", "late", "one", "two"], 60)
    shape = {"early": STEPS < 3, "late": STEPS < 7, "one": STEPS < 0, "two": STEPS < 0}
    curves = trajectories([shape[kind] + 0.1 * rng.standard_normal(10) for kind in kinds])
    told = knn_recall(curves, kinds, np.tile(np.arange(20), 12))
    assert told["early"] > 0.95
    assert told["late"] > 0.95
    assert 0.3 < told[["one", "two"]].mean() < 0.7
    assert told["mean"] == pytest.approx(told[["early", "late", "one", "two"]].mean())


def test_tokens_of_the_same_group_do_not_vote():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 20)
    kinds = np.array(["odd" if g % 2 else "even" for g in group])
    centre = rng.standard_normal((20, 10))
    curves = trajectories(centre[group] + 0.01 * rng.standard_normal((400, 10)))
    assert knn_recall(curves, kinds, np.arange(400) % 5)["mean"] > 0.95
    assert knn_recall(curves, kinds, group)["mean"] < 0.8


def test_all_vectors_count_alike():
    rng = np.random.default_rng(2)
    kinds = np.repeat(["a", "b"], 100)
    loud = trajectories(1000 * rng.standard_normal((200, 10)))
    quiet = trajectories([(STEPS < 5) * (kind == "a") + 0.1 * rng.standard_normal(10) for kind in kinds])
    both = xr.concat([loud, quiet], dim="vector").assign_coords(vector=[1, 2])
    assert knn_recall(both, kinds, np.arange(200) % 10)["mean"] > 0.9


def test_among_like_tokens_the_token_itself_tells_nothing():
    rng = np.random.default_rng(3)
    # "the" is of either kind, "a" always of the first; curves say which token, and of "the" which kind.
    token = np.repeat(["the", "the", "a"], 100)
    kinds = np.repeat(["one", "two", "one"], 100)
    group = np.arange(300) % 10
    curves = trajectories(
        [
            (STEPS < 5) * (t == "a") + (STEPS > 7) * (k == "two") + 0.05 * rng.standard_normal(10)
            for t, k in zip(token, kinds, strict=True)
        ]
    )
    only_token = trajectories([(STEPS < 5) * (t == "a") + 0.05 * rng.standard_normal(10) for t in token])
    assert knn_recall(curves, kinds, group, among=token)["mean"] > 0.95
    assert 0.3 < knn_recall(only_token, kinds, group, among=token)["mean"] < 0.7
    assert ambiguous(token, kinds, group).tolist() == (token == "the").tolist()
    assert not ambiguous(token, kinds, np.arange(300) % 4).any()  # too few groups for the folds
    assert majority_recall(np.char.add(token, kinds), kinds, group)["mean"] == 1
    assert majority_recall(np.arange(300), kinds, group)["mean"] == 0


def test_the_vote_of_a_key_is_that_of_the_majority_of_its_tokens():
    token, kinds = np.repeat(["the", "a"], [150, 100]), np.repeat(["one", "two", "one"], [100, 50, 100])
    told = majority_recall(token, kinds, np.arange(250) % 10)
    assert told.to_dict() == {"one": 1.0, "two": 0.0, "mean": 0.5}


def test_without_other_groups_nothing_is_told():
    kinds, group, flat = np.array(["a", "b"] * 4), np.zeros(8, int), trajectories(np.ones((8, 10)))
    assert majority_recall(kinds, kinds, group).to_dict() == {"a": 0, "b": 0, "mean": 0}
    assert knn_recall(flat, kinds, group).to_dict() == {"a": 0, "b": 0, "mean": 0}
    # A corpus may have no text with two constructions: no token is left to ask.
    assert not ambiguous(kinds, kinds, np.arange(8)).any()
    assert np.isnan(majority_recall([], [], [])["mean"])
    assert np.isnan(knn_recall(flat, kinds, np.arange(8), among=kinds)["mean"])


def two_vectors():
    """Vector 4 has a cluster of the first twenty tokens, vector 9 one of the next ten."""
    labels = np.full((2, 80), -1)
    labels[0, :20] = labels[1, 20:30] = 1
    labels[1, 60:] = -2
    return xr.DataArray(labels, dims=("vector", "token"), coords={"vector": [4, 9]})


def test_the_best_cluster_for_a_set_its_measures_and_chance_by_hand():
    index = np.arange(80)
    known = pd.DataFrame({"half": index < 40, "second": (index >= 20) & (index < 32), "none": index < 0})
    half, second, none = best_found(two_vectors(), known, draws=99).to_dict("records")
    assert (half["vector"], half["cluster"], half["tokens"], half["known"], half["hits"]) == (4, 1, 20, 40, 20)
    assert (half["precision"], half["recall"], half["lift"]) == (1, 0.5, 2)
    assert half["f1"] == pytest.approx(2 * 20 / 60)
    assert second["vector"] == 9
    assert second["lift"] == pytest.approx(1 / (12 / 60))  # of the sixty that are kept there
    assert second["p"] == 0.01
    assert second["free"] == 1
    assert (none["cluster"], none["tokens"], none["f1"], none["p"]) == (0, 0, 0, 1)


def test_a_cluster_of_one_text_is_no_better_than_chance_among_tokens_of_that_text():
    text = np.repeat(["to", "of"], [20, 60])
    known = pd.DataFrame({"some to": (text == "to") & (np.arange(80) % 2 == 0), "of": text == "of"})
    free = best_found(two_vectors(), known, draws=99).set_index("name")
    like = best_found(two_vectors(), known, text, draws=99).set_index("name")
    assert free.loc["some to", "p"] == 0.01
    assert like.loc["some to", "p"] == 1  # all of "to" lie in the cluster, however they are permuted
    assert like.loc["some to", "null"] == pytest.approx(like.loc["some to", "f1"])
    assert (like.loc["some to", "free"], like.loc["of", "free"]) == (1, 0)


def test_permutations_stay_within_their_groups_and_differ():
    group = np.array([0, 1, 0, 1, 2, 0])
    orders = list(_permutations(group, 50, 0))
    assert all((group[order] == group).all() and sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 12


def test_excess_hits_are_those_of_permutations_within_groups():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 80)
    known = pd.DataFrame({"a": rng.random(80) < 0.4, "b": group == 2})
    labels = two_vectors()
    pairs, z, excess = excess_hits(labels, known, group)
    assert pairs == [(4, 1), (9, 1)]
    inside = np.stack([labels[0].values == 1, labels[1].values == 1])
    member, taken = known["a"].to_numpy(int), inside.T.astype(int)
    draws, hits = np.array([member[order] @ taken for order in _permutations(group, 4000, 0)]), member @ taken
    np.testing.assert_allclose(z[0], (hits - draws.mean(axis=0)) / draws.std(axis=0), atol=0.1)
    np.testing.assert_allclose(excess[0], (hits - draws.mean(axis=0)) / inside.sum(axis=1), atol=0.01)
    assert (z[1] == 0).all()  # the group decides
    np.testing.assert_allclose(excess[1], 0, atol=1e-12)


def test_on_the_other_half_the_cluster_chosen_before_is_judged_and_no_other():
    index, flat = np.arange(80), np.zeros(80)
    labels, first = two_vectors(), index % 2 == 0
    # Of the even tokens the set is the cluster along vector 4, of the odd ones that along vector 9.
    known = pd.DataFrame({"set": np.where(first, index < 20, (index >= 20) & (index < 30))})
    row = judge_reading(labels, known, flat, first)
    assert (row["chosen_beyond"], row["held_out_beyond"], row["found"]) == (1, 0, "")
    same = pd.DataFrame({"set": index < 20})
    row = judge_reading(labels, same, flat, first)
    assert (row["chosen_beyond"], row["held_out_beyond"], row["found"]) == (1, 1, "set")
    assert row["held_out_excess"] == pytest.approx(1 - 20 / 80)
    assert (row["clustered"], row["clusters"]) == (2, 2)
    # Beyond itself nothing is told.
    row = judge_reading(labels, same, index < 20, first)
    assert (row["chosen_beyond"], row["held_out_beyond"], row["chosen_excess"]) == (0, 0, 0)


def test_planted_clusters_are_as_pure_as_asked_and_found_where_the_group_leaves_room():
    rng = np.random.default_rng(0)
    known = pd.DataFrame({"free": rng.random(2000) < 0.2, "told": np.arange(2000) % 10 == 0})
    group = known["told"].to_numpy()  # tells the second set, and nothing of the first
    labels = planted(known, purity=0.5, recall=0.8)
    for row, name in enumerate(known):
        inside = labels[row].values == 1
        assert known[name][inside].mean() == pytest.approx(0.5, abs=0.01)
        assert inside[known[name]].mean() == pytest.approx(0.8, abs=0.01)
    found = judge_reading(labels, known, group, np.arange(2000) < 1000)
    assert (found["held_out_beyond"], found["found"]) == (1, "free")


def test_without_any_cluster_nothing_is_found():
    labels = xr.full_like(two_vectors(), -1)
    known = pd.DataFrame({"set": np.arange(80) < 20})
    row = judge_reading(labels, known, np.arange(80), np.arange(80) < 40)
    assert (row["clusters"], row["chosen_beyond"], row["held_out_beyond"], row["found"]) == (0, 0, 0, "")


def test_joint_clustering_tells_what_needs_two_vectors_and_one_vector_alone_does_not():
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(4), 40)
    fall = -np.linspace(0, 1, 10)[:, None]
    one, two = (fall * (1 + 2 * np.isin(kind, high)) for high in ([0, 1], [0, 2]))
    curves = np.stack([one, two, -one], axis=-1) + 0.02 * rng.standard_normal((10, 160, 3))
    curves = xr.DataArray(curves, dims=("step", "token", "vector"), coords={"step": STEPS, "vector": [1, 2, 3]})
    settings = ClusteringSettings(min_cluster_size=20, breakthrough_window=1)
    labels = cluster_readings(curves, settings, "raw")
    assert {len(set(labels["joint", 15].values[0, kind == k])) for k in range(4)} == {1}
    assert len(np.unique(labels["joint", 15].values)) == 4
    for vector in (1, 2):
        alone = labels["per vector", 15].sel(vector=vector)
        expected = cluster_tokens(curves.sel(vector=vector), settings.model_copy(update={"scaling": "raw"}))
        assert adjusted_rand_score(alone.values, expected.values) == 1
        assert len(np.unique(alone)) == 2
    assert (labels["per vector", 15].sel(vector=3) == -2).all()  # its mean rises
    assert {way for way, _ in cluster_readings(curves.sel(vector=1), settings, "raw")} == {"per vector"}


def test_readings_are_ordered_by_the_half_that_chooses_alone():
    columns = ["study", "scaling", "chosen_beyond", "chosen_excess", "held_out_beyond", "held_out_excess"]
    rows = [(0, "raw", 3, 0.1, 0, 0), (1, "raw", 1, 0.1, 1, 0), (0, "unit", 2, 0.2, 5, 1), (1, "unit", 2, 0.2, 9, 1)]
    table = pd.DataFrame(rows, columns=columns).assign(clustered=1, clusters=1, token_chosen=0, token_beyond=0)
    best = best_readings(table, ["scaling"])
    assert best["scaling"].tolist() == ["unit", "raw"]  # 2 and 2 constructions; the excess decides
    assert best["held_out_least"].tolist() == [5, 0]
    worse = table.assign(token_chosen=[1, 1, 0, 0])  # more beyond the token alone goes before the excess
    assert best_readings(worse, ["scaling"])["scaling"].tolist() == ["raw", "unit"]
    worse = table.assign(chosen_beyond=[9, 9, 0, 0])
    assert best_readings(worse, ["scaling"])["scaling"].tolist() == ["raw", "unit"]


def test_sets_and_groups_that_are_not_one_per_token_are_refused():
    known = pd.DataFrame({"set": np.arange(80) < 20})
    with pytest.raises(ValueError, match="known has 79 rows; allowed: 80, one for each token of labels"):
        best_found(two_vectors(), known[1:])
    with pytest.raises(ValueError, match="group has 3 rows; allowed: 80"):
        best_found(two_vectors(), known, [1, 2, 3])


def test_f1_of_all_tokens_counts_those_that_were_dropped():
    labels = xr.DataArray([1, 1, -1, -2, 1], dims="token")
    row = construction_table(labels, ["x", "x", "x", "x", "y"]).set_index("construction").loc["x"]
    assert row["recall"] == 1
    assert row["recall_all"] == 0.5
    assert row["f1_all"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert best_clusters(construction_table(labels, ["x", "x", "x", "x", "y"]))["construction"].tolist() == ["x", "y"]
