import numpy as np
import pandas as pd
import pytest
import xarray as xr
from polca_paper import readings
from polca_paper.fit import CHOICES, CLUSTERED
from polca_paper.homogeneity import cluster_breakthroughs
from polca_paper.tables import strategy_row

from polca_lib.method import decomposition
from polca_lib.method.settings import ClusteringSettings

pytestmark = pytest.mark.slow

SETTINGS = ClusteringSettings(min_cluster_size=8, breakthrough_window=20)


def projections(vectors=2, tokens=90, steps=66, seed=0, cadence=10):
    """Projections in which groups of tokens fall along each vector, as the library makes them.

    With over 60 steps HDBSCAN looks for the exact spanning tree, with fewer for an approximate one.
    """
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, tokens)
    gradient = rng.normal(0, 0.2, (steps, tokens, vectors)) - (1 + group[:, None])
    loss = 3 - np.arange(steps)[:, None] * 0.2 * (1 + group)
    movement = np.abs(rng.normal(1, 0.1, (steps, vectors)))
    place = np.array(["1000s", "100s", "10s", "1s"])[np.arange(tokens) % 4]
    carry = (group == 1) & (place != "1s")
    return xr.Dataset(
        {
            "gradient": (("step", "token", "vector"), gradient),
            "movement": (("step", "vector"), movement),
            "curvature": (("step", "sample", "vector"), rng.normal(1, 0.1, (steps, 5, vectors))),
            "loss": (("step", "token"), loss + rng.normal(0, 0.05, (steps, tokens))),
        },
        coords={
            "step": np.arange(steps) * cadence, "vector": np.arange(1, vectors + 1), "token": np.arange(tokens),
            "place": ("token", place), "carry": ("token", carry), "example": ("token", np.arange(tokens) // 4),
        },
    )  # fmt: skip


def folders(path):
    return dict.fromkeys(("hessian", "random", "shuffled", "parameters"), path)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    parts = {"hessian": projections(), "random": projections(seed=1), "parameters": projections(seed=2)}
    return parts, *readings.cluster_every_way(parts, SETTINGS, folders(tmp_path_factory.mktemp("vectors")), n_jobs=1)


def test_scalings_that_only_readings_have():
    values = np.array([[0.0, -3.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    assert abs(readings.rescale(values, "maximum")).max(axis=1).tolist() == [1, 0, 1]
    assert np.linalg.norm(readings.rescale(values, "length"), axis=1) == pytest.approx([1, 0, 1])
    each = readings.rescale(values, "each step")
    assert each.mean(axis=0) == pytest.approx([0, 0, 0])
    assert each.std(axis=0) == pytest.approx([0, 1, 1])
    assert (readings.rescale(values, "raw") == values).all()


@pytest.mark.parametrize("order", ["first", "second", "trapezoid"])
@pytest.mark.parametrize("scaling", ["raw", "unit", "zscore"])
@pytest.mark.parametrize(
    ("divisor", "selection", "falls_by"), [(15, "eom", "final"), (30, "leaf", "final"), (60, "eom", "trend")]
)
def test_a_clustering_measures_what_the_books_own_tables_do(clustered, order, scaling, divisor, selection, falls_by):
    parts, clusters, kept = clustered
    curves = decomposition.projected_loss(parts["hessian"], order)
    update = {"scaling": scaling, "min_samples_divisor": divisor, "selection": selection, "falls_by": falls_by}
    labels, table = cluster_breakthroughs(curves, SETTINGS.model_copy(update=update), 30)
    expected = strategy_row(labels, table)
    measured = readings.measure_clusterings(clusters, kept, curves.sizes["token"], 30).set_index([*CLUSTERED, "rule"])
    variant = "trend" if falls_by == "trend" else "plain"
    if variant == "trend" and order != "first":  # not among the readings
        assert not ((clusters["order"] == order) & (clusters["variant"] == variant)).any()
        return
    for rule in ("v1", "v3"):
        key = ("POLCA", order, scaling, f"kept/{divisor}", selection, variant, rule)
        assert (key in measured.index) == (expected["clusters"] > 0)
        if not expected["clusters"]:
            continue
        row = measured.loc[key]
        assert row["clusters"] == expected["clusters"]
        assert row["hidden"] == pytest.approx(expected["hidden"])
        assert row["dropped"] == pytest.approx(expected["dropped"] / curves.sizes["token"])
        for measure in ("homogeneity", "recall", "f1"):
            names = [f"{measure}_{rule}_{rank}" for rank in (1, 2, 3)]
            assert row[[f"{measure} {rank}" for rank in (1, 2, 3)]].to_numpy(float) == pytest.approx(
                expected[names].to_numpy(float), nan_ok=True
            )


def test_every_kind_of_curve_is_clustered_and_no_other(clustered):
    _, clusters, _ = clustered
    assert set(clusters["source"]) == {"POLCA", "exact loss", "change in loss", "Fisher", "random", "LCA"}
    assert set(clusters.loc[clusters["source"] == "LCA", "order"]) == {"first"}
    assert set(clusters.loc[clusters["source"] == "POLCA", "order"]) == set(CHOICES["order"])
    interval = clusters[clusters["variant"] == "per interval"]
    assert "unit" not in set(interval["scaling"])
    assert set(clusters["variant"]) == set(CHOICES["variant"])


def test_vectors_that_are_done_are_not_clustered_again(tmp_path, monkeypatch):
    parts = {"hessian": projections(steps=11)}
    first = readings.cluster_every_way(parts, SETTINGS, folders(tmp_path), n_jobs=1)
    (tmp_path / "POLCA-2.kept.csv").unlink()
    done, real = [], readings._cluster_vector
    monkeypatch.setattr(readings, "_cluster_vector", lambda *a: (done.append(a[:2]), real(*a)))
    again = readings.cluster_every_way(parts, SETTINGS, folders(tmp_path), n_jobs=1)
    assert [(source.name, vector) for source, vector in done] == [("POLCA", 2)]
    for before, after in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_a_basis_projected_at_every_fifth_checkpoint_is_not_coarsened_again(tmp_path):
    parts = {
        "hessian": projections(steps=51, vectors=1),
        "random": projections(seed=1, steps=11, cadence=50, vectors=1),
    }
    clusters, _ = readings.cluster_every_way(
        parts, SETTINGS.model_copy(update={"breakthrough_window": 50}), folders(tmp_path), 1
    )
    random = clusters[clusters["source"] == "random"].set_index([*CLUSTERED[1:5], "vector", "cluster", "variant"])
    plain, fifth = random.xs("plain", level="variant"), random.xs("every fifth", level="variant")
    assert len(fifth) > 0
    pd.testing.assert_frame_equal(plain.loc[fifth.index], fifth)
