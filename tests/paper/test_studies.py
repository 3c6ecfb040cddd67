"""Studies: made, stopped, resumed, kept, judged; and those that the repository keeps."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from cases import TINY_RUN
from polca_paper import claims, evidence, fit
from polca_paper.claims import CLAIMS, Claim, Evidence, Sentence
from polca_paper.evidence import TABLES
from polca_paper.saved_study import SavedStudy, study_folder
from polca_paper.studies import complete
from polca_paper.study import Study
from polca_paper.verdicts import JUDGED, judge

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method import decomposition
from polca_lib.method.clustering import DROPPED, composition
from polca_lib.tasks import arithmetic
from polca_lib.tasks.run import Run

pytestmark = pytest.mark.slow

KEPT = sorted(path.parent.name for path in study_folder("").glob("*/provenance.json"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLCA_STUDIES", str(path))
        patch.delenv("LOKY_MAX_CPU_COUNT")  # here, a process for each core, as in any study
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
    def judged(ours, holds, **more):
        sentence = Sentence(None if holds is None else lambda _: holds, "m")
        return Claim("c", "s", "t", measure=lambda _: ours, sentence=sentence, **more).judge(None).verdict

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
        assert judged(ours, holds, paper=paper, larger_is_stronger=larger) == verdict


READING = {**fit.PLAIN_TEXT, "order": "first", "rule": "v1"}


class Made:
    """Evidence whose numbers and tables are made up."""

    def __init__(self, numbers=None, clusterings=None, **tables):
        self.numbers, self._clusterings = pd.Series(numbers or {}, dtype=float), clusterings or {}
        self.reading, self._tables, self.studies = READING, tables, []
        self.number = lambda name: Evidence.number(self, name)

    def clustering(self, source, column):
        return self._clusterings[source, column]

    def table(self, name, **where):
        rows = pd.DataFrame(self._tables[name])
        return rows[[all(row[k] == v for k, v in where.items()) for _, row in rows.iterrows()]]


CLAIM = {claim.name: claim for claim in CLAIMS}


def test_numbers_of_one_row_are_one_claim_and_most_of_them_decide():
    claim = CLAIM["purer than random"]
    printed = fit.printed_numbers().set_index("number")["printed"]
    assert len(claim.printed) == 6
    assert not any("f1" in name for name in claim.printed)  # F1 follows from the others
    same = dict(printed[list(claim.printed)])
    for missed, pure, p, verdict in (
        (2, 0.95, 0.01, "reproduced"),
        (3, 0.95, 0.01, "partly"),
        (0, 0.5, 0.01, "partly"),
        (0, 0.95, 0.2, "partly"),  # purer than the other, but no purer than its place and digit make it
        (4, 0.5, 0.01, "not reproduced"),
    ):
        numbers = {name: value - (0.2 if i < missed else 0) for i, (name, value) in enumerate(same.items())}
        null = [{"order": "first", "scaling": "raw", "rule": "v1", "p": p}]
        judged = claim.judge(Made({**numbers, "POLCA: homogeneity 1": pure}, null=null))
        assert judged.verdict == verdict
        assert judged.within == 6 - missed
        assert judged.of == 6


def test_a_number_is_not_run_or_missed_for_want_of_clusters():
    claim = CLAIM["vector 2: carry"]
    assert claim.judge(Made()).verdict == "not run"
    assert claim.judge(Made({"vector 2: homogeneity": np.inf})).verdict == "not reproduced"
    assert claim.judge(Made({"vector 2: homogeneity": 0.9})).verdict == "reproduced"
    assert claim.judge(Made({"vector 2: homogeneity": 1.0})).verdict == "stronger here"
    assert claim.judge(Made({"vector 2: homogeneity": 0.82})).verdict == "partly"


def test_in_the_plain_text_orders_are_compared_by_the_second_as_it_is_written(monkeypatch):
    monkeypatch.delenv("POLCA_STUDIES", raising=False)
    kept = [SavedStudy(name) for name in JUDGED["paper"][0]]
    agreement = SavedStudy("paper-0").table("agreement").set_index(["order", "cadence"])["cosine"]
    for reading, order in ((fit.PLAIN_TEXT, "second"), (fit.PLAIN_TEXT | {"scaling": "maximum"}, fit.SUMMED)):
        ours = Evidence(kept, reading).number("second order: 1 - cosine")
        assert ours == pytest.approx(1 - agreement.loc[(order, 20)])


def test_no_clusters_are_no_evidence_that_the_loss_hides_carries():
    claim = CLAIM["carry not in the loss"]
    printed = fit.printed_numbers().set_index("number")["printed"]
    same = dict(printed[list(claim.printed)])

    def judged(clusters, homogeneity):
        numbers = {**same, "exact loss: homogeneity 1": homogeneity, "exact loss: recall 1": 0.1}
        return claim.judge(Made(numbers, {("exact loss", "clusters"): clusters})).verdict

    assert judged(0, np.inf) == "not reproduced"
    assert judged(3, 0.3) == "partly"
    assert judged(3, 0.85) == "not reproduced"


def test_a_carry_cluster_must_be_pure_and_beyond_both_shuffles():
    claim = CLAIM["carry clusters"]

    def judged(homogeneity, *ps):
        numbers = dict.fromkeys(claim.printed, 0.1) | {"POLCA: homogeneity 1": homogeneity}
        null = [{"order": "first", "scaling": "raw", "rule": "v1", "p": p} for p in ps]
        return claim.judge(Made(numbers, null=null)).holds

    assert judged(0.97, 0.01, 0.01)
    assert not judged(0.97, 0.01, 0.5)
    assert not judged(0.7, 0.01, 0.01)
    assert not judged(np.inf, 0.01, 0.01)


def test_every_claim_is_judged_by_reading_and_scale_and_the_median_stands_with_its_range(kept):
    studies = {"tiny": [[kept], [kept], [kept]], "none": [[]]}
    found = judge(studies, {"plain": READING})
    assert found["claim"].tolist() == 2 * [claim.name for claim in CLAIMS]
    assert (found.loc[found["scale"] == "none", "verdict"] == "not run").all()
    tiny = found[found["scale"] == "tiny"].set_index("claim")
    assert tiny.loc["purer than shuffled", "verdict"] == "not run"
    assert np.isnan(tiny.loc["purer than shuffled", "ours"])
    assert tiny.loc["parameters", "verdict"] == "not run"  # is asked of the paper's model alone
    assert tiny.loc["tokens dropped", "verdict"] != "not run"
    claim = Claim("c", "s", "t", Sentence(lambda _: False, "m"), measure=in_turn([0.1, 0.5, 0.2]), paper=0.6)
    row = judge({"tiny": studies["tiny"]}, {"plain": READING}, [claim]).iloc[0]
    assert (row["low"], row["ours"], row["high"], row["seeds"]) == (0.1, 0.2, 0.5, 3)
    assert (row["verdict"], row["each"]) == ("not reproduced", "3 not reproduced")


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


def in_turn(values):
    """A measure that gives one value after another."""
    asked = iter(values)
    return lambda _: next(asked)


@pytest.fixture
def own_studies(monkeypatch):
    """Those of the repository."""
    monkeypatch.delenv("POLCA_STUDIES", raising=False)


def test_there_are_kept_studies():
    assert {name for seeds in JUDGED.values() for names in seeds for name in names} <= set(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_kept_studies_are_whole_and_say_where_they_come_from(name, own_studies):
    kept = SavedStudy(name)
    assert kept.provenance["software"]["commit"]
    assert {"preset", "seed", "device"} <= kept.provenance["stages"].keys()
    assert kept.provenance["stages"]["basis: tolerance"] == str(kept.settings.basis.tolerance)
    for table in kept.provenance["tables"]:
        if table != "clusters":
            assert len(kept.table(table)) > 0


@pytest.mark.parametrize("false", [False, np.False_])
def test_a_number_that_matches_is_no_reproduction_if_what_it_is_cited_for_does_not_hold(false):
    assert claims.verdict(True, bool(false)) == "partly"
    assert claims.verdict(True, None) == claims.verdict(True, True) == "reproduced"
    assert claims.verdict(None, False) == claims.verdict(False, False, stronger=True) == "not reproduced"
    assert claims.verdict(False, True, stronger=True) == "stronger here"
