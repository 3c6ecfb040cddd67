"""Known constructions: what nearest trajectories tell of them. Tables of clusters are in test_labeling.py."""

import numpy as np
import pytest
import xarray as xr
from polca_paper.constructions import ambiguous, construction_table, knn_recall, majority_recall

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


def test_f1_of_all_tokens_counts_those_that_were_dropped():
    labels = xr.DataArray([1, 1, -1, -2, 1], dims="token")
    row = construction_table(labels, ["x", "x", "x", "x", "y"]).set_index("construction").loc["x"]
    assert row["recall"] == 1
    assert row["recall_all"] == 0.5
    assert row["f1_all"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
