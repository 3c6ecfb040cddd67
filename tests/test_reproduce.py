"""Studies: made, stopped, resumed, kept, judged; and those that the repository keeps."""

import numpy as np
import pandas as pd
import pytest
from cases import TINY_RUN

from polca_lib import decomposition, evidence, reproduce
from polca_lib.clustering import composition
from polca_lib.evidence import TABLES
from polca_lib.pipeline import Run
from polca_lib.reproduce import Kept, complete, folder
from polca_lib.study import Study
from polca_lib.verdicts import CLAIMS, COLUMNS, JUDGED, Claim, judge

KEPT = sorted(path.parent.name for path in folder("").glob("*/provenance.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLCA_STUDIES", str(path))
        patch.setitem(evidence.PAPER_TERM, "examples", 4)
        yield path


@pytest.fixture(scope="module")
def study(run):
    return Study(run, bases=("hessian", "trajectory", "random", "parameters"), ablation_curvature=2, variants=False)


@pytest.fixture(scope="module")
def kept(place, study):
    """A whole study in miniature, stopped in the middle and resumed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "null", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            complete(study, "tiny")
    before = {path.name: path.stat().st_mtime_ns for path in (place / "tiny").glob("*.csv")}
    assert 0 < len(before) < len(TABLES)
    complete(study, "tiny")
    assert all((place / "tiny" / name).stat().st_mtime_ns == time for name, time in before.items())
    return Kept("tiny")


def test_study_has_every_table_and_says_what_made_it(kept):
    assert {path.stem for path in kept.path.glob("*.csv")} == set(TABLES)
    for name in TABLES:
        table = kept.table(name)
        assert len(table) > 0, name
        assert (table["study"] == "tiny").all()
    assert kept.provenance["tables"].keys() == {*TABLES, "clusters"}
    assert kept.provenance["stages"]["preset"] == "smoke"
    assert kept.settings["training.steps"] == TINY_RUN["training.steps"]


def test_closure_table_has_what_the_projections_give(kept, run):
    table = kept.table("closure").set_index(["basis", "order", "cadence"])
    for order in decomposition.ORDERS:
        expected = decomposition.closure(run.projections, order).attrs
        row = table.loc[("hessian", order, 10)]
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)
    assert np.isnan(table.loc[("hessian", "first", 20), "share_inside"])


def test_clusters_are_kept_with_what_they_are_made_of(kept, study):
    summary = kept.clusters
    for (order, scaling), labels in study.labels.items():
        if scaling == "zscore":
            continue
        for vector in labels["vector"].values:
            counts = summary["tokens"].sel(kind=f"{order}, {scaling}", vector=vector).to_pandas()
            expected = composition(labels.sel(vector=vector))
            for number in range(1, counts.index.max() + 1):
                own = expected.loc[number] if number in expected.index else pd.Series(dtype=int)
                np.testing.assert_array_equal(counts.loc[number], own.reindex(counts.columns, fill_value=0))


def test_term_is_against_that_of_each_tokens_own_curvature(kept, run):
    term = kept.table("second_order_term").set_index("term")
    some = run.projections.isel(token=slice(0, 16))
    true = (decomposition.polca(some, "exact") - decomposition.polca(some, "first")).values
    np.testing.assert_allclose(term["rms_true"], np.sqrt(np.mean(true**2)), rtol=1e-3)
    ours = (decomposition.polca(run.projections, "second") - decomposition.polca(run.projections, "first")).values[
        :, :16
    ]
    np.testing.assert_allclose(term.loc["second", "rmse"], np.sqrt(np.mean((ours - true) ** 2)), rtol=1e-3)


def test_claims_and_finite_differences_of_each_vector_stand_side_by_side(kept, study):
    along = kept.table("along").set_index(["order", "vector"])
    true = study.along_each.values
    for vector in (1, 2):
        delivered = true[..., vector - 1].sum(axis=0).mean()
        np.testing.assert_allclose(along.loc[("first", vector), "delivered"], delivered, rtol=1e-3)
        claimed = decomposition.polca(study.main, "first").sel(vector=vector).values[:, : true.shape[1]]
        np.testing.assert_allclose(along.loc[("first", vector), "claimed"], claimed.sum(axis=0).mean(), rtol=1e-3)


def test_like_tokens_are_outside_the_cluster_and_of_its_places(kept, study):
    table, undone = kept.table("causal_clusters"), study.undone
    place = study.run.tokens["place"].to_numpy()
    assert len(table) > 0
    for row in table.itertuples():
        inside = study.labels[row.order, row.scaling].sel(vector=row.vector).values == row.cluster
        change = undone["own"][row.vector - 1]
        of_place = pd.Series(change[~inside]).groupby(place[~inside]).mean()
        expected = np.mean([of_place[name] for name in place[inside]])
        np.testing.assert_allclose(row.like, expected, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(row.inside, change[inside].mean(), rtol=1e-3, atol=1e-7)
        assert 1 <= row.rank <= row.of == 2


def test_area_is_the_chance_that_a_carry_is_hurt_more(kept, study):
    tokens, changes = study.run.tokens, study.undone["own"]
    rows = kept.table("causal").query("kind == 'own'")
    for (_, row), change in zip(rows.iterrows(), changes, strict=True):
        own = tokens["place"] == "10s"
        carry, rest = change[own & tokens["carry"]], change[own & ~tokens["carry"]]
        pairs = (carry[:, None] > rest).mean() + (carry[:, None] == rest).mean() / 2
        np.testing.assert_allclose(row["auc, 10s"], pairs, rtol=1e-4)


def test_other_settings_in_the_same_folder_and_unknown_tables_are_refused(kept, run):
    other = Run.from_preset("smoke", **{**TINY_RUN, "seed": 1})
    with pytest.raises(ValueError, match=r"holds a study of other settings"):
        complete(Study(other), "tiny")
    with pytest.raises(ValueError, match=r"tables \['lossess'\] are unknown; allowed: losses, "):
        complete(Study(run), "tiny", ["lossess"])


def test_unknown_study_is_refused_with_those_there_are(kept):
    with pytest.raises(FileNotFoundError, match=r"holds no study; there are tiny"):
        Kept("tinny")


def test_verdicts_follow_from_the_rule_of_the_claim():
    def claim(ours, holds, **more):
        return Claim("c", "s", "t", measure=lambda _: ours, holds=lambda _: holds, means="m", page="p", **more)

    for ours, holds, paper, larger, verdict in (
        (0.93, False, 0.9, True, "reproduced"),
        (0.97, True, 0.9, True, "stronger here"),
        (0.97, True, 0.9, False, "partly"),
        (0.97, True, 0.9, None, "partly"),
        (0.7, True, 0.9, True, "partly"),
        (0.7, True, 0.9, False, "stronger here"),
        (0.7, False, 0.9, True, "not reproduced"),
        (np.nan, True, 0.9, True, "not reproduced"),
        (0.2, True, None, None, "reproduced"),
        (0.2, False, None, None, "not reproduced"),
    ):
        assert claim(ours, holds, paper=paper, larger_is_stronger=larger).judge(None) == verdict


def test_every_claim_is_judged_on_a_study_and_the_median_stands_with_its_range(kept):
    found = judge([kept])
    assert found["claim"].tolist() == [claim.name for claim in CLAIMS]
    assert found["claim"].is_unique
    claim = Claim("c", "s", "t", 0.6, in_turn([0.1, 0.5, 0.2]), lambda _: False, "m", "p")
    row = judge([kept, kept, kept], [claim]).iloc[0]
    assert (row["low"], row["ours"], row["high"], row["seeds"]) == (0.1, 0.2, 0.5, 3)
    assert row["verdict"] == "not reproduced"


def test_what_a_study_does_not_have_is_not_run(kept):
    found = judge([kept]).set_index("claim")
    assert found.loc["shuffled basis: homogeneity", "verdict"] == "not run"
    assert np.isnan(found.loc["shuffled basis: homogeneity", "ours"])
    assert found.loc["LCA: hidden", "verdict"] != "not run"


def in_turn(values):
    """A measure. Each study is asked twice: for its number and for its verdict."""
    asked = iter([*values, *values])
    return lambda _: next(asked)


@pytest.mark.parametrize("name", KEPT)
def test_kept_studies_are_whole_and_say_where_they_come_from(name):
    kept = Kept(name)
    assert kept.provenance["software"]["commit"]
    assert {"preset", "seed", "device"} <= kept.provenance["stages"].keys()
    for table in kept.provenance["tables"]:
        if table != "clusters":
            assert len(kept.table(table)) > 0


def test_kept_verdicts_are_those_that_the_kept_studies_give():
    stored = pd.read_csv(reproduce.ROOT / "data" / "paper" / "verdicts.csv")
    found = judge(map(Kept, JUDGED))
    assert stored.columns.tolist() == COLUMNS
    pd.testing.assert_frame_equal(stored, found[COLUMNS], check_dtype=False, rtol=1e-4)
