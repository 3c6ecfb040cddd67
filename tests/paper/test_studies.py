"""Studies: made, stopped, resumed, kept, judged; and those that the repository keeps."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from cases import TINY_RUN
from polca_paper import claims, evidence
from polca_paper.claims import CLAIMS, Claim, Sentence
from polca_paper.evidence import TABLES
from polca_paper.saved_study import PAPER, SavedStudy, study_folder
from polca_paper.studies import complete
from polca_paper.study import Study
from polca_paper.verdicts import COLUMNS, JUDGED, first_run, judge

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method import decomposition
from polca_lib.method.clustering import DROPPED, composition
from polca_lib.tasks import arithmetic
from polca_lib.tasks.arithmetic import SKILLS
from polca_lib.tasks.run import Run

KEPT = sorted(path.parent.name for path in study_folder("").glob("*/provenance.json"))


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
    before = {path.name: path.stat().st_mtime_ns for path in (place / "addition" / "tiny").glob("*.csv")}
    assert 0 < len(before) < len(TABLES)
    complete(study, "tiny")
    assert all((place / "addition" / "tiny" / name).stat().st_mtime_ns == time for name, time in before.items())
    return SavedStudy("tiny")


def test_study_has_every_table_and_says_what_made_it(kept):
    assert {path.stem for path in kept.path.glob("*.csv")} == set(TABLES)
    for name in TABLES:
        table = kept.table(name)
        assert len(table) > 0, name
        assert (table["study"] == "tiny").all()
    assert kept.provenance["tables"].keys() == {*TABLES, "clusters"}
    assert kept.provenance["stages"]["preset"] == "smoke"
    assert kept.settings.training.steps == TINY_RUN["training.steps"]


def test_closure_table_has_what_the_projections_give(kept, run):
    table = kept.table("completeness").set_index(["basis", "order", "cadence"])
    for order in decomposition.ORDERS:
        expected = decomposition.completeness(run.projections, order).attrs
        row = table.loc[("hessian", order, 10)]
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)
    assert np.isnan(table.loc[("hessian", "first", 20), "share_inside"])


def test_study_of_version_0_1_is_read_and_finished_by_its_former_names(kept, study):
    before, file = kept.table("completeness"), kept.path / "completeness.csv"
    file.rename(kept.path / "closure.csv")
    try:
        complete(study, "tiny")
        assert not file.exists()  # nothing was computed again
        pd.testing.assert_frame_equal(SavedStudy("tiny").table("completeness"), before)
    finally:
        (kept.path / "closure.csv").rename(file)


def test_study_is_finished_at_the_tolerance_it_was_begun_with(kept, study):
    before, given = kept.table("rand"), {n: v for n, v in TINY_RUN.items() if n != "basis.tolerance"}
    later = Study(Run.from_preset("smoke", **given), study.bases, ablation_curvature=2, variants=False)
    assert later.run.settings.basis.tolerance is None
    (kept.path / "rand.csv").unlink()
    complete(later, "tiny", ["rand"])
    assert later.run.tolerance == TINY_RUN["basis.tolerance"]
    pd.testing.assert_frame_equal(SavedStudy("tiny").table("rand"), before)


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


def test_a_table_of_a_run_made_anew_says_so(kept, study, monkeypatch):
    before = kept.provenance["stages"]
    again = {**study.run.provenance()["value"], "training: wall time": "77 s"}
    monkeypatch.setattr(study.run, "provenance", lambda: pd.DataFrame({"value": again}))
    (kept.path / "rand.csv").unlink()
    complete(study, "tiny", ["rand"])
    found = SavedStudy("tiny").provenance
    assert found["stages"] == before
    assert found["tables"]["rand"]["stages"] == {"training: wall time": "77 s"}
    assert "stages" not in found["tables"]["null"]


def test_curvature_of_a_vector_rests_on_the_tokens_that_have_it(kept, run):
    table = kept.table("concentration")
    np.testing.assert_allclose(table["curvature"], run.basis["eigenvalue"], rtol=0.05)
    row, loss = table.iloc[1], run.checkpoints.token_loss
    theta, batch = run.checkpoints.theta(int(row.birth_step)), run.task.hessian
    vector, h = torch.from_numpy(run.basis["vectors"].values[1]).double(), 1e-3
    loss = TokenLoss(deepcopy(loss.model).double(), arithmetic.answer_loss)
    ahead, here, behind = (loss(theta.double() + x * h * vector, batch).detach() for x in (1, 0, -1))
    curvature = abs((ahead - 2 * here + behind) / h**2).numpy()
    np.testing.assert_allclose(row.tokens, curvature.sum() ** 2 / (curvature**2).sum() / len(curvature), rtol=1e-2)
    np.testing.assert_allclose(row.top, curvature.max() / curvature.sum(), rtol=1e-2)
    np.testing.assert_allclose(row.top_loss, float(here.max() / here.sum()), rtol=1e-3)


def test_allocated_parameters_are_the_largest_at_the_end(kept, run):
    checkpoints, table = run.checkpoints, kept.table("largest_parameters")
    assert np.all(np.diff(abs(table["end"])) <= 0)
    end = checkpoints.token_loss.unflatten(checkpoints.theta(TINY_RUN["training.steps"]))
    start = checkpoints.token_loss.unflatten(checkpoints.theta(0))
    largest = sorted((float(v.abs().max()) for v in end.values()), reverse=True)[0]
    np.testing.assert_allclose(abs(table["end"]).max(), largest, rtol=1e-5)
    for row in table.itertuples():
        where = np.isclose(end[row.tensor].numpy(), row.end, rtol=1e-5)
        assert np.isclose(start[row.tensor].numpy()[where], row.start, rtol=1e-5).any()


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
        label = study.labels[row.order, row.scaling].sel(vector=row.vector).values
        inside, rest = label == row.cluster, (label != row.cluster) & (label != DROPPED)
        change = undone["own"][row.vector - 1]
        of_place = pd.Series(change[rest]).groupby(place[rest]).mean()
        if not set(place[inside]) <= set(of_place.index):
            assert np.isnan(row.like)
            assert np.isnan(row.rank)
            continue
        expected = np.mean([of_place[name] for name in place[inside]])
        np.testing.assert_allclose(row.like, expected, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(row.inside, change[inside].mean(), rtol=1e-3, atol=1e-7)
        assert 1 <= row.rank <= row.of == 2
    assert table["like"].notna().any()


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
    same = {"bases": ("hessian", "trajectory", "random", "parameters"), "ablation_curvature": 2, "variants": False}
    with pytest.raises(ValueError, match=r"holds a study with run\.seed = 0, not 1; give this one another --name"):
        complete(Study(other, **same), "tiny")
    with pytest.raises(ValueError, match=r"holds a study with ablation_curvature = 2, not 3"):
        complete(Study(run, **{**same, "ablation_curvature": 3}), "tiny")
    with pytest.raises(ValueError, match=r"bases = \['hesian'\] are unknown; allowed: hessian, shuffled"):
        Study(run, bases=("hessian", "hesian"))
    with pytest.raises(ValueError, match=r"tables \['lossess'\] are unknown; allowed: losses, "):
        complete(Study(run), "tiny", ["lossess"])


def test_unknown_study_is_refused_with_those_there_are(kept):
    with pytest.raises(FileNotFoundError, match=r"holds no study; there are tiny"):
        SavedStudy("tinny")


def test_verdicts_follow_from_the_rule_of_the_claim():
    def claim(ours, holds, **more):
        sentence = Sentence(None if holds is None else lambda _: holds, "m")
        return Claim("c", "s", "t", measure=lambda _: ours, sentence=sentence, **more)

    for ours, holds, paper, larger, verdict in (
        (0.93, True, 0.9, True, "reproduced"),
        (0.93, None, 0.9, True, "reproduced"),
        (0.93, False, 0.9, True, "partly"),
        (0.7, None, 0.9, True, "not reproduced"),
        (0.97, True, 0.9, True, "stronger here"),
        (0.97, True, 0.9, False, "partly"),
        (0.97, True, 0.9, None, "partly"),
        (0.7, True, 0.9, True, "partly"),
        (0.7, True, 0.9, False, "stronger here"),
        (0.7, False, 0.9, True, "not reproduced"),
        (np.nan, True, 0.9, True, "partly"),
        (np.nan, True, 0.9, False, "partly"),
        (np.nan, None, 0.9, None, "not reproduced"),
        (np.nan, False, 0.9, True, "not reproduced"),
        (0.2, True, None, None, "reproduced"),
        (0.2, False, None, None, "not reproduced"),
    ):
        assert claim(ours, holds, paper=paper, larger_is_stronger=larger).judge(None) == verdict


def test_every_claim_is_judged_on_a_study_and_the_median_stands_with_its_range(kept):
    found = judge([kept])
    assert found["claim"].tolist() == [claim.name for claim in CLAIMS]
    assert found["claim"].is_unique
    claim = Claim("c", "s", "t", 0.6, in_turn([0.1, 0.5, 0.2]), Sentence(lambda _: False, "m"))
    row = judge([kept, kept, kept], [claim]).iloc[0]
    assert (row["low"], row["ours"], row["high"], row["seeds"]) == (0.1, 0.2, 0.5, 3)
    assert (row["verdict"], row["each"], row["measured"]) == ("not reproduced", "3 not reproduced", 3)
    assert row["preset"].startswith("smoke; basis.every = 20; basis.max_products = 200; ")


class Made:
    """A study of rows made up for a test."""

    name, scaling = "made", "raw"

    def __init__(self, path, clusters=None, **tables):
        self.path, self.clusters, self._tables = path, clusters, tables
        self.has, self.has_clusters = tables.__contains__, clusters is not None

    def table(self, name):
        return pd.DataFrame(self._tables[name])


CLAIM = {claim.name: claim for claim in CLAIMS}


def made_clusters(counts):
    """Clusters of vectors 1, 2, ... by order second: a dictionary of tokens by skill for each."""
    skills = list(SKILLS)
    data = np.zeros((1, len(counts), 3, len(skills)), int)
    for vector, clusters in enumerate(counts):
        for number, tokens in enumerate(clusters):
            for skill, count in tokens.items():
                data[0, vector, number, skills.index(skill)] = count
    coords = {"kind": ["second, raw"], "vector": range(1, len(counts) + 1), "cluster": [1, 2, 3], "skill": skills}
    return xr.Dataset({"tokens": (tuple(coords), data)}, coords=coords)


def test_a_cluster_of_the_digit_one_is_no_carry_cluster_of_vector_2(tmp_path):
    digit = made_clusters([[], [{"1000s, carry": 83, "10s, carry": 1}]])
    assert CLAIM["vector 2: carry"].judge(Made(tmp_path, digit)) == "not reproduced"
    carry = made_clusters([[], [{"100s, carry": 60, "10s, carry": 30, "10s, no carry": 10}]])
    assert CLAIM["vector 2: carry"].judge(Made(tmp_path, carry)) == "reproduced"
    assert CLAIM["vector 2: carry"].judge(Made(tmp_path, made_clusters([[]]))) == "not run"


def test_digits_need_more_than_one_place(tmp_path):
    one = made_clusters([[{"1s": 90}, {"1s": 50, "10s, carry": 5}]])
    assert CLAIM["vector 1: digits"].judge(Made(tmp_path, one)) == "not reproduced"
    two = made_clusters([[{"1s": 90}, {"10s, carry": 50, "1s": 5}]])
    assert CLAIM["vector 1: digits"].judge(Made(tmp_path, two)) == "reproduced"
    mixed = made_clusters([[{"1s": 50, "10s, carry": 50}, {"10s, carry": 50, "1s": 40}]])
    assert CLAIM["vector 1: digits"].judge(Made(tmp_path, mixed)) == "not reproduced"
    assert CLAIM["vector 1: digits"].judge(Made(tmp_path, made_clusters([[]]))) == "not reproduced"


def test_bases_are_compared_by_an_order_that_both_have(tmp_path):
    def rows(**values):
        return [
            {"basis": basis, "order": order, "scaling": "raw", "homogeneity_v3_1": value}
            for (basis, order), value in ((name.split("_"), value) for name, value in values.items())
        ]

    claim = CLAIM["random basis: homogeneity"]
    own = Made(tmp_path, bases=rows(hessian_second=0.1, hessian_first=0.95, random_first=0.9))
    assert claim.measure(own) == 0.9
    assert claim.judge(own) == "reproduced"
    assert claim.judge(Made(tmp_path, bases=rows(hessian_second=0.1, random_second=0.9, random_first=0.2))) == "partly"
    assert claim.judge(Made(tmp_path, bases=rows(hessian_second=0.1, random_first=0.9))) == "not run"
    assert claim.judge(Made(tmp_path, bases=rows(hessian_first=0.1))) == "not run"


def test_no_clusters_are_no_evidence_that_the_loss_hides_carries(tmp_path):
    row = {"scaling": "raw", "trajectory": "exact loss", "homogeneity_v3_1": np.nan}
    claim = CLAIM["carry not in the loss"]
    assert claim.judge(Made(tmp_path, strategies=[{**row, "clusters": 0}])) == "not reproduced"
    assert claim.judge(Made(tmp_path, strategies=[{**row, "clusters": 3}])) == "reproduced"
    found = [{**row, "clusters": 3, "homogeneity_v3_1": 0.85}]
    assert claim.judge(Made(tmp_path, strategies=found)) == "not reproduced"


def test_a_carry_cluster_must_be_over_the_base_rate_and_beyond_both_shuffles(tmp_path):
    claim = CLAIM["POLCA second: homogeneity"]

    def judged(homogeneity, base_rate, *ps):
        row = {"scaling": "raw", "trajectory": "POLCA second", "homogeneity_v3_1": homogeneity, "base_rate": base_rate}
        null = [{"order": "second", "scaling": "raw", "rule": "v3", "p": p} for p in ps]
        return claim.judge(Made(tmp_path, strategies=[row], null=null))

    assert judged(0.97, 0.4, 0.01, 0.01) == "reproduced"
    assert judged(0.7, 0.4, 0.01, 0.01) == "partly"
    assert judged(0.7, 0.4, 0.01, 0.5) == "not reproduced"
    assert judged(0.3, 0.4, 0.01, 0.01) == "not reproduced"
    assert judged(np.nan, 0.4, 0.01, 0.01) == "not reproduced"


def test_what_one_scale_did_not_run_is_taken_from_the_next():
    def rows(*verdicts, **more):
        return pd.DataFrame({"claim": ["a", "b", "c"][: len(verdicts)], "verdict": verdicts, **more})

    found = first_run(
        rows("partly", "not run", "not run", studies="one"), rows("reproduced", "partly", "not run", studies="two")
    )
    assert found["claim"].tolist() == ["a", "b", "c"]
    assert found["verdict"].tolist() == ["partly", "partly", "not run"]
    assert found["studies"].tolist() == ["one", "two", "one"]


def test_a_study_is_judged_by_curves_of_one_scaling(kept, tmp_path):
    raw = {"scaling": "raw", "trajectory": "POLCA second", "homogeneity_v3_1": 0.3, "hidden": 0.1}
    other = {**raw, "scaling": "unit", "homogeneity_v3_1": 0.8, "hidden": 0.2}
    made = Made(tmp_path, strategies=[raw, other])
    for scaling, homogeneity, hidden in (("raw", 0.3, 0.1), ("unit", 0.8, 0.2)):
        made.scaling = scaling
        assert CLAIM["POLCA second: homogeneity"].measure(made) == homogeneity
        assert CLAIM["POLCA second: hidden"].measure(made) == hidden
    one = made_clusters([[{"1s": 90, "10s, carry": 10}]])
    other = made_clusters([[{"1s": 50, "10s, carry": 50}]]).assign_coords(kind=["second, unit"])
    clusters = Made(tmp_path, xr.concat([one, other], dim="kind"))
    for scaling, purity in (("raw", 0.9), ("unit", 0.5)):
        clusters.scaling = scaling
        assert CLAIM["vector 1: digits"].measure(clusters) == purity
    scaled = SavedStudy("tiny", scaling="unit")
    for name in ("digits in the loss", "Fisher: homogeneity", "change in loss: hidden"):
        assert CLAIM[name].judge(scaled) == "does not apply"


def test_the_count_of_parameters_is_asked_of_the_papers_model_alone(kept):
    assert CLAIM["parameters"].judge(kept) == "not run"


def test_variants_have_other_bases_and_no_more_curvature_than_was_asked_for(run):
    study = Study(run, bases=("hessian",), ablation_curvature=16)
    other = study.variant("magnitude", "all")
    assert (other.settings.basis.which, other.settings.basis.targets) == ("magnitude", "all")
    assert other.settings.projection.curvature_examples == 12  # there are no more
    assert other.keys["training"] == run.keys["training"]
    assert other.keys["basis"] != run.keys["basis"]
    without = Study(run, bases=("hessian",), ablation_curvature=0)
    assert not without.variant("largest", "all").settings.projection.curvature
    assert not without.on_basis("random").settings.projection.curvature


def test_what_a_study_does_not_have_is_not_run(kept):
    found = judge([kept]).set_index("claim")
    assert found.loc["shuffled basis: homogeneity", "verdict"] == "not run"
    assert np.isnan(found.loc["shuffled basis: homogeneity", "ours"])
    assert found.loc["LCA: hidden", "verdict"] != "not run"


def in_turn(values):
    """A measure. Each study is asked twice: for its number and for its verdict."""
    asked = iter([*values, *values])
    return lambda _: next(asked)


@pytest.fixture
def own_studies(monkeypatch):
    """Those of the repository."""
    monkeypatch.delenv("POLCA_STUDIES", raising=False)


def test_there_are_kept_studies():
    assert set(JUDGED) <= set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_kept_studies_are_whole_and_say_where_they_come_from(name, own_studies):
    kept = SavedStudy(name)
    assert kept.provenance["software"]["commit"]
    assert {"preset", "seed", "device"} <= kept.provenance["stages"].keys()
    assert kept.provenance["stages"]["basis: tolerance"] == str(kept.settings.basis.tolerance)
    for table in kept.provenance["tables"]:
        if table != "clusters":
            assert len(kept.table(table)) > 0


def test_kept_verdicts_are_those_that_the_kept_studies_give(own_studies):
    stored = (PAPER / "verdicts.csv").read_bytes()
    assert judge(map(SavedStudy, JUDGED))[COLUMNS].to_csv(index=False, float_format="%.6g").encode() == stored


@pytest.mark.parametrize("false", [False, np.False_])
def test_a_number_that_matches_is_no_reproduction_if_what_it_is_cited_for_does_not_hold(false):
    assert claims.verdict(0.5, 0.5, false) == "partly"
    assert claims.verdict(0.5, 0.5, None) == claims.verdict(0.5, 0.5, np.True_) == "reproduced"
    assert (
        claims.verdict(None, 0.5, false) == claims.verdict(0.5, 0.9, false, larger_is_stronger=True) == "not reproduced"
    )
    assert claims.verdict(0.5, 0.9, np.True_, larger_is_stronger=True) == "stronger here"
