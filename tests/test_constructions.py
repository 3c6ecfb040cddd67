"""Known constructions: what nearest trajectories tell of them. Tables of clusters are in test_labeling.py."""

import numpy as np
import pytest
import xarray as xr

from polca_lib.constructions import neighbours_agree

STEPS = np.arange(10)


def trajectories(curves):
    return xr.DataArray(np.array(curves).T, dims=("step", "token"), coords={"step": STEPS})


def test_constructions_with_curves_of_their_own_are_told_and_those_without_are_not():
    rng = np.random.default_rng(0)
    kinds = np.repeat(["early", "late", "one", "two"], 60)
    shape = {"early": STEPS < 3, "late": STEPS < 7, "one": STEPS < 0, "two": STEPS < 0}
    curves = trajectories([shape[kind] + 0.1 * rng.standard_normal(10) for kind in kinds])
    told = neighbours_agree(curves, kinds, np.tile(np.arange(20), 12))
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
    assert neighbours_agree(curves, kinds, np.arange(400) % 5)["mean"] > 0.95
    assert neighbours_agree(curves, kinds, group)["mean"] < 0.8


def test_all_vectors_count_alike():
    rng = np.random.default_rng(2)
    kinds = np.repeat(["a", "b"], 100)
    loud = trajectories(1000 * rng.standard_normal((200, 10)))
    quiet = trajectories([(STEPS < 5) * (kind == "a") + 0.1 * rng.standard_normal(10) for kind in kinds])
    both = xr.concat([loud, quiet], dim="vector").assign_coords(vector=[1, 2])
    assert neighbours_agree(both, kinds, np.arange(200) % 10)["mean"] > 0.9
