import itertools

import numpy as np
import pandas as pd
import pytest
from polca_paper.homogeneity import homogeneity_table, most_homogeneous
from polca_paper.significance import (
    CLUSTERING,
    SUMMED,
    available_readings,
    beyond_chance,
    deciding_choices,
    specification_curve,
    trajectories,
)

from polca_lib.method.clustering import DROPPED, cluster_tokens
from polca_lib.method.decomposition import coarsen, polca, projected_loss

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def curve(run):
    found = {("largest",): run.projections, ("magnitude",): run.projections.isel(vector=[0])}
    return specification_curve(found, ("which",), run.settings.clustering, factors=(1, 2), draws=20, n_jobs=1)


def test_every_combination_is_there_once(curve, run):
    n_orders = len(available_readings(run.projections))
    per_order = np.prod([len(values) for values in CLUSTERING.values()])
    assert len(curve) == 2 * 2 * n_orders * per_order * 2
    choices = ["which", "cadence", "order", *CLUSTERING, "rule"]
    assert not curve.duplicated(choices).any()
    assert sorted(curve["cadence"].unique()) == [10, 20]


def test_a_row_has_what_its_choices_give_alone(curve, run):
    settings = {"scaling": "unit", "falls_by": "trend", "min_samples_from": "all", "selection": "leaf"}
    config = run.settings.clustering.model_copy(update=settings)
    for order, rule in itertools.product(("first", "trapezoid"), ("v1", "v3")):
        curves = projected_loss(coarsen(run.projections, 2), order)
        table = homogeneity_table(cluster_tokens(curves, config))
        best = most_homogeneous(table, 1, rule=rule)["homogeneity"].max()
        chosen = {**settings, "which": "largest", "cadence": 20, "order": order, "rule": rule}
        row = curve
        for name, value in chosen.items():
            row = row[row[name] == value]
        assert row["homogeneity"].item() == pytest.approx(0.0 if np.isnan(best) else best, abs=1e-6)
        assert 0 < row["p"].item() <= 1
        labels = cluster_tokens(curves, config)
        kept = labels["carry"].values[None] & (labels != DROPPED).values
        assert row["base_rate"].item() == pytest.approx(kept.sum() / (labels != DROPPED).values.sum())


def test_summed_ratio_divides_the_second_order_term_by_the_number_of_tokens(run):
    first, second = (projected_loss(run.projections, order) for order in ("first", "second"))
    n = run.projections.sizes["token"]
    np.testing.assert_allclose(trajectories(run.projections, SUMMED), first + (second - first) / n, rtol=1e-6)


def test_orders_are_those_that_the_curvature_allows(run):
    assert available_readings(run.projections) == ["first", "trapezoid", "second", SUMMED, "exact"]
    assert available_readings(run.projections.drop_vars("curvature")) == ["first", "trapezoid"]
    sampled = run.projections["curvature"].isel(token=slice(0, 4)).rename(token="sample").drop_vars("sample")
    sampled = run.projections.drop_vars("curvature").assign(curvature=sampled.reset_coords(drop=True))
    assert available_readings(sampled) == ["first", "trapezoid", "second", SUMMED]


def test_a_choice_that_alone_decides_has_all_of_the_spread(curve):
    height = np.where(curve["scaling"] == "unit", 0.95, 0.2)
    made = curve.assign(homogeneity=height, p=0.01, p_digit=0.01, base_rate=0.4)
    found = deciding_choices(made)
    assert found.index[0][0] == "scaling"
    assert found.loc[("scaling", "unit"), "over"] == 1
    assert found.loc[("scaling", "raw"), "over"] == found.loc[("scaling", "raw"), "beyond"] == 0
    assert found.loc[("scaling", "unit"), "beyond"] == 1
    assert found.loc[("scaling", "raw"), "spread"] == pytest.approx(0.75)
    np.testing.assert_allclose(found[found.index.get_level_values(0) != "scaling"]["spread"], 0, atol=1e-12)


def test_values_are_compared_over_what_all_of_them_have():
    """One value exists only where everything is high: that must not count for it."""
    rows = [
        {"which": which, "order": order, "homogeneity": height + (order == "exact") * 0.01}
        for which, height in (("largest", 0.9), ("magnitude", 0.1))
        for order in ("first", "exact")
        if (which, order) != ("magnitude", "exact")
    ]
    found = deciding_choices(pd.DataFrame(rows).assign(p=1, p_digit=1, base_rate=0.4))
    assert found.loc[("order", "exact"), "mean"] == pytest.approx(0.91)
    assert found.loc[("order", "first"), "mean"] == pytest.approx(0.9)
    assert found.loc[("which", "largest"), "specifications"] == 1
    assert found.loc[("which", "largest"), "spread"] == pytest.approx(0.8)


def test_beyond_chance_needs_the_base_rate_and_both_shuffles():
    rows = pd.DataFrame(
        {
            "homogeneity": [0.9, 0.3, 0.9, 0.9],
            "base_rate": 0.4,
            "p": [0.01, 0.01, 0.2, 0.01],
            "p_digit": [0.01, 0.01, 0.01, 0.2],
        }
    )
    assert beyond_chance(rows).tolist() == [True, False, False, False]


def test_coarser_projections_are_those_of_a_run_with_fewer_checkpoints(run):
    fine, coarse = run.projections, coarsen(run.projections, 2)
    assert coarse["step"].values.tolist() == fine["step"].values[::2].tolist()
    np.testing.assert_array_equal(coarse["gradient"], fine["gradient"][::2])
    movement = fine["movement"].values[:-1]
    np.testing.assert_allclose(coarse["movement"][:-1], movement[0::2] + movement[1::2], rtol=1e-6)
    assert np.isnan(coarse["movement"][-1]).all()
    expected = fine["gradient"].values[0] * (movement[0] + movement[1])
    np.testing.assert_allclose(polca(coarse, "first")[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="factor = 3 does not divide the 4 intervals"):
        coarsen(fine, 3)
