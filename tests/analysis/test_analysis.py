"""POLCA on any run: results are those of brute force, what is kept is found again, strangers are refused."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from cases import MIXED, Cube, Mlp, folder_bytes, mlp_batch, mlp_loss, problem, tiny_checkpoints, token_gradients
from upath import UPath

from polca_lib.analysis.analysis import Analysis, project_together
from polca_lib.analysis.status import status
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.checkpoint_spacing import advice
from polca_lib.method.vectors import read_vectors
from polca_lib.report.findings import checkpoint_spacing
from polca_lib.storage.artefacts import ArtefactMismatch, DamagedFile
from polca_lib.storage.checkpoints import CheckpointFolder, ChecksummedCheckpoints
from polca_lib.storage.pieces import PieceStore

BATCH, SAMPLE = mlp_batch(20, torch.float32), mlp_batch(7, torch.float32, seed=1)
TOKENS = pd.DataFrame({"kind": np.tile(["one", "two"], 20)})
SETTINGS = {"basis": {"n_vectors": 3, "tolerance": 1e-4}, "clustering": {"min_cluster_size": 5}, "threads": 1}


@pytest.fixture
def checkpoints(tmp_path):
    return tiny_checkpoints(tmp_path / "checkpoints", range(0, 81, 10))


def analyse(folder, checkpoints, **settings):
    batches = {"hessian": SAMPLE, "tokens": TOKENS}
    return Analysis(folder, checkpoints, BATCH, **{**batches, **SETTINGS, **settings})


def test_curves_are_the_sums_that_brute_force_gives(tmp_path, checkpoints):
    run = analyse(tmp_path / "run", checkpoints, clustering={"order": "first", "min_cluster_size": 5})
    token_loss, _, _ = problem("mlp")
    vectors = read_vectors(run.basis).double()
    thetas = [checkpoints.theta(step).double() for step in run.steps]
    total, expected = torch.zeros(40, 3, dtype=torch.float64), []
    for one, two in pairwise(thetas):
        gradients = token_gradients(token_loss, one, mlp_batch(20))
        total = total + (gradients @ vectors.T) * (vectors @ (two - one))
        expected.append(total)
    assert run.curves.dims == ("step", "token", "vector")
    np.testing.assert_allclose(run.curves[1:], torch.stack(expected), atol=1e-4)
    assert (run.curves[0] == 0).all()
    assert run.curves["kind"].values.tolist() == TOKENS["kind"].tolist()


def test_plan_tells_whether_checkpoints_see_what_is_learned_once_losses_are_at_hand(tmp_path, checkpoints, monkeypatch):
    speed = {"operations_per_second": 1e9}
    run = analyse(tmp_path / "run", checkpoints)
    assert "checkpoints not measured: losses at the checkpoints are not computed yet" in str(run.plan(**speed))
    assert not (tmp_path / "run").exists()
    _ = run.projections
    again = analyse(tmp_path / "run", checkpoints)
    monkeypatch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
    told = advice(checkpoint_spacing(run.projections))
    assert re.search(r"(all tokens|kind one|kind two) makes? \d+% of (its|their) loss drop between steps \d+", told)
    assert again.plan(**speed).spacing == told
    assert f"checkpoints {told}" in str(again.plan(**speed))
    # Losses of other settings say nothing about this run.
    other = analyse(tmp_path / "run", checkpoints, steps=[0, 20, 40, 80])
    assert other.plan(**speed).spacing.startswith("not measured")


def test_folder_that_is_there_is_read_rather_than_computed_again(tmp_path, checkpoints, monkeypatch):
    first = analyse(tmp_path / "run", checkpoints)
    labels, table = first.labels, first.breakthroughs
    before = {n: b for n, b in folder_bytes(tmp_path / "run").items() if not n.endswith(("seconds.txt", ".lock"))}
    monkeypatch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
    again = analyse(tmp_path / "run", checkpoints)
    assert again.labels.equals(labels)
    pd.testing.assert_frame_equal(again.breakthroughs, table)
    after = {n: b for n, b in folder_bytes(tmp_path / "run").items() if not n.endswith(("seconds.txt", ".lock"))}
    assert after == before


def test_changed_setting_computes_what_depends_on_it_alone(tmp_path, checkpoints):
    analyse(tmp_path / "run", checkpoints).labels  # noqa: B018
    analyse(tmp_path / "run", checkpoints, clustering={"min_cluster_size": 6}).labels  # noqa: B018
    stages = [row["stage"] for row in status(tmp_path / "run")]
    assert stages == ["basis", "projection", "clusters", "clusters"]
    analyse(tmp_path / "run", checkpoints, steps=[0, 20, 40, 80]).labels  # noqa: B018
    stages = [row["stage"] for row in status(tmp_path / "run")]
    assert stages == 2 * ["basis"] + 2 * ["projection"] + 3 * ["clusters"]


def test_other_data_are_not_taken_for_the_same(tmp_path, checkpoints):
    keys = set()
    for batch, tokens in ((BATCH, TOKENS), (mlp_batch(20, torch.float32, seed=5), TOKENS), (BATCH, TOKENS[::-1])):
        run = Analysis(tmp_path / "run", checkpoints, batch, hessian=SAMPLE, tokens=tokens, **SETTINGS)
        keys.add(run._projection.key)
    assert len(keys) == 3


@pytest.mark.parametrize("kind", ["trajectory", "random", "parameters"])
def test_bases_without_a_hessian_need_no_sample(tmp_path, checkpoints, kind):
    run = analyse(tmp_path / "run", checkpoints, hessian=None, basis={"kind": kind, "n_vectors": 3})
    assert run.projections.sizes["vector"] == 3
    with pytest.raises(ValueError, match=r"basis\.kind = 'hessian' needs a batch for the Hessian, .* without: traj"):
        analyse(tmp_path / "run", checkpoints, hessian=None)


@pytest.mark.slow
def test_run_in_an_object_store_has_the_results_of_one_on_disk(tmp_path, checkpoints):
    remote = analyse("memory://analysis/run", checkpoints)
    local = analyse(tmp_path / "run", checkpoints)
    assert remote.labels.equals(local.labels)
    assert remote.projections.load().equals(local.projections.load())
    assert [row["done"] for row in status(UPath("memory://analysis/run"))] == [3, 9, 3]
    assert remote.report(tmp_path / "report.html").stat().st_size > 1e6


def test_tokens_are_numbered_by_example_if_nothing_is_known_of_them(tmp_path, checkpoints):
    run = analyse(tmp_path / "run", checkpoints, tokens=None)
    assert run.projections["example"].values.tolist() == np.repeat(np.arange(20), 2).tolist()


def test_table_that_does_not_fit_is_refused_with_the_number_of_rows(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="tokens has 39 rows; allowed: 40, because each of 20 examples gives 2 losses"):
        analyse(tmp_path / "run", checkpoints, tokens=TOKENS[:-1]).tokens  # noqa: B018


@pytest.mark.parametrize("name", MIXED)
def test_loss_of_an_example_that_depends_on_the_others_is_refused(tmp_path, name):
    token_loss, theta, batch = problem(name, dtype=torch.float32)
    checkpoints = CheckpointFolder(tmp_path, token_loss)
    for step in (0, 10):
        checkpoints.save(step, token_loss.unflatten(theta + step))
    with pytest.raises(ValueError, match="example"):
        Analysis(tmp_path / "run", checkpoints, batch, hessian=batch, basis={"n_vectors": 1}).tokens  # noqa: B018


def test_loss_that_was_changed_since_a_run_began_is_refused(tmp_path, checkpoints, monkeypatch):
    write = PieceStore.write
    calls = []

    def stop(self, piece, **values):
        if "loss" in values and calls.append(1) is None and len(calls) == 3:
            raise KeyboardInterrupt
        write(self, piece, **values)

    with monkeypatch.context() as patch:
        patch.setattr(PieceStore, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            analyse(tmp_path / "run", checkpoints).projections  # noqa: B018
    other = TokenLoss(Mlp(), lambda model, batch: 2 * mlp_loss(model, batch))
    changed = CheckpointFolder(checkpoints.path, other)
    with pytest.raises(ArtefactMismatch, match=r"the model or its loss gives loss .* for token 0.*step-00000000"):
        analyse(tmp_path / "run", changed).projections  # noqa: B018
    analyse(tmp_path / "run", checkpoints).projections  # noqa: B018


def test_checkpoint_that_changes_after_it_was_read_is_refused(tmp_path, checkpoints):
    remembered = ChecksummedCheckpoints(checkpoints, tmp_path / "remembered")
    theta = remembered.theta(20)
    assert torch.equal(remembered.theta(20), theta)
    checkpoints.save(20, checkpoints.token_loss.unflatten(theta * 1.0001))
    with pytest.raises(DamagedFile, match=r"step-00000020\.safetensors is not what it was when it was first read"):
        remembered.theta(20)


def test_trajectory_basis_is_that_of_all_checkpoints_in_memory(tmp_path, checkpoints):
    run = analyse(tmp_path / "run", checkpoints, basis={"kind": "trajectory", "n_vectors": 4})
    points = np.stack([checkpoints.theta(step).double().numpy() for step in run.steps])
    principal = np.linalg.svd(points - points.mean(axis=0))[2][:4]
    found = read_vectors(run.basis).double().numpy()
    np.testing.assert_allclose(np.abs(np.diag(found @ principal.T)), 1, atol=1e-4)


def test_memory_for_little_gives_the_same_basis_of_the_trajectory(tmp_path, checkpoints):
    whole = analyse(tmp_path / "whole", checkpoints, basis={"kind": "trajectory", "n_vectors": 4})
    # 31 parameters of 4 bytes: room for two checkpoints and a direction.
    tight = analyse(tmp_path / "tight", checkpoints, basis={"kind": "trajectory", "n_vectors": 4}, memory=3 * 31 * 4)
    both = read_vectors(whole.basis) @ read_vectors(tight.basis).T
    np.testing.assert_allclose(both.abs(), np.eye(4), atol=1e-4)


def test_bases_are_projected_together_also_if_one_is_there_twice(tmp_path, checkpoints):
    run = analyse(tmp_path / "run", checkpoints)
    random, again, same = run.on_basis("random"), run.on_basis("random"), run.on_basis("hessian")
    both = project_together([run, random, again, same])
    assert both[1].equals(both[2])
    assert both[0].equals(both[3])
    alone = analyse(tmp_path / "alone", checkpoints, basis={**SETTINGS["basis"], "kind": "random"})
    np.testing.assert_allclose(both[1]["gradient"], alone.projections["gradient"], rtol=1e-4, atol=1e-5)
    assert [row["stage"] for row in status(tmp_path / "run")] == 2 * ["basis"] + 2 * ["projection"]


def test_another_loss_for_the_hessian_is_needed_and_used(tmp_path, checkpoints):
    basis = {**SETTINGS["basis"], "targets": "all"}
    with pytest.raises(ValueError, match=r"basis\.targets = 'all' needs hessian_loss"):
        analyse(tmp_path / "run", checkpoints, basis=basis)
    run = analyse(tmp_path / "run", checkpoints, basis=basis, hessian_loss=lambda m, b: 2 * mlp_loss(m, b))
    plain = analyse(tmp_path / "run", checkpoints)
    np.testing.assert_allclose(run.basis["eigenvalue"], 2 * plain.basis["eigenvalue"], rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": {"n_vectors": 9}}, r"basis\.n_vectors = 9 needs 9 checkpoints after the first .* there are 8"),
        ({"basis": {"kind": "trajectory", "k": 4, "n_vectors": 9}}, r"at most 8 directions in 9 checkpoints; 9 were"),
        (
            {"basis": {"kind": "random", "n_vectors": 32}},
            r"basis\.n_vectors = 32; allowed: 1 to 31, the number of para",
        ),
        ({"basis": {"k": 8, "n_vectors": 40}}, r"basis\.n_vectors = 40; allowed: 1 to 31, the number of parameters"),
        (
            {"clustering": {"breakthrough_window": 15}},
            r"clustering\.breakthrough_window = 15 is not a multiple of .* 10",
        ),
        ({"clustering": {"breakthrough_window": 50}}, r"clustering\.breakthrough_window = 50 needs 100 .* at most 40"),
        ({"clustering": {"hidden_after": 81}}, r"clustering\.hidden_after = 81; allowed: at most 80, the last step"),
    ],
)
def test_settings_that_no_run_of_this_length_can_meet_are_refused_at_the_door(tmp_path, checkpoints, settings, message):
    with pytest.raises(ValueError, match=message):
        analyse(tmp_path / "run", checkpoints, **settings)
    assert not (tmp_path / "run").exists()


def test_tokens_that_do_not_fit_are_refused_before_the_basis_is_computed(tmp_path, checkpoints):
    for settings, message in (
        ({"tokens": TOKENS[:-1]}, "tokens has 39 rows"),
        ({"clustering": {"min_cluster_size": 41}}, r"clustering\.min_cluster_size = 41; allowed: at most 40"),
    ):
        run = analyse(tmp_path / "run", checkpoints, **settings)
        with pytest.raises(ValueError, match=message):
            run.labels  # noqa: B018
        assert run.stored("basis") is None


def test_missing_second_derivatives_are_refused_before_the_basis_is_computed(tmp_path):
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", range(0, 81, 10))
    checkpoints.token_loss = TokenLoss(Mlp(), lambda model, batch: Cube.apply(mlp_loss(model, batch)))
    trapezoid = analyse(tmp_path / "run", checkpoints, basis={"kind": "trajectory", "n_vectors": 2})
    assert trapezoid.labels.shape == (2, 40)
    second = trapezoid.on_basis("random", curvature=True)
    with pytest.raises(ValueError, match="second derivatives"):
        _ = second.basis
    assert second.stored("basis") is None


def two_directions(path):
    """Nine checkpoints of a walk in two directions, a long and a short one, in float32."""
    path.mkdir()
    checkpoints = CheckpointFolder(path, TokenLoss(Mlp(), mlp_loss))
    torch.manual_seed(0)
    start, long, short = torch.randn(3, checkpoints.token_loss.n_parameters)
    for index, step in enumerate(range(0, 81, 10)):
        theta = start + 0.1 * index * long + 1e-4 * (index - 4) ** 2 * short
        checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
    return checkpoints


def test_trajectory_of_two_directions_gives_two_vectors_and_says_so(tmp_path):
    checkpoints = two_directions(tmp_path / "checkpoints")
    run = analyse(tmp_path / "run", checkpoints, hessian=None, basis={"kind": "trajectory", "n_vectors": 8})
    with pytest.warns(UserWarning, match=r"basis\.n_vectors = 8, but the 9 checkpoints move in 2 directions"):
        assert run.labels.shape == (2, 40)
    assert run.provenance()["value"]["basis: vectors"] == "2 of 8"
    assert run.findings.completeness.attrs["share"] == pytest.approx(1, abs=0.1)
    again = analyse(tmp_path / "run", checkpoints, hessian=None, basis={"kind": "trajectory", "n_vectors": 8})
    assert again.labels.equals(run.labels)


def test_basis_made_at_the_former_default_tolerance_opens_and_says_so(tmp_path, checkpoints, monkeypatch):
    former = analyse(tmp_path / "run", checkpoints, basis={"n_vectors": 3, "tolerance": 0.01})
    vectors = read_vectors(former.basis)
    with monkeypatch.context() as patch:
        patch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
        opened = analyse(tmp_path / "run", checkpoints, basis={"n_vectors": 3})
        assert torch.equal(read_vectors(opened.basis), vectors)
    assert opened.provenance()["value"]["basis: tolerance"] == "0.01"
    # Asked for, or in another folder, the tolerance is 0.001.
    for other in (
        analyse(tmp_path / "run", checkpoints, basis={"n_vectors": 3, "tolerance": 0.001}),
        analyse(tmp_path / "other", checkpoints, basis={"n_vectors": 3}),
    ):
        assert (other.basis["residual"] <= 0.001).all()
        assert other.tolerance == 0.001
        assert other.provenance()["value"]["basis: tolerance"] == "0.001"


@pytest.mark.parametrize("kind", ["random", "trajectory"])
def test_equal_checkpoints_are_told_in_run_and_report_and_a_run_of_equals_is_refused(tmp_path, kind):
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", range(0, 41, 10))
    weights = checkpoints.token_loss.unflatten(checkpoints.theta(10))
    checkpoints.save(30, weights)
    run = analyse(tmp_path / "run", checkpoints, basis={"kind": kind, "n_vectors": 1})
    with pytest.warns(UserWarning, match=r"checkpoints hold the same weights: steps \[10, 30\]$"):
        _ = run.projections
    assert run.provenance().loc["notes on checkpoints", "value"] == "the same weights at steps 10, 30"
    # Those that are chosen are equal; then all of them are.
    told = r"all checkpoints hold the same weights: no change|have equal weights but for rounding, so no direction"
    for step, steps in ((20, [10, 20, 30]), (0, None), (40, None)):
        checkpoints.save(step, weights)
        equal = analyse(tmp_path / f"equal{step}", checkpoints, steps=steps, basis={"kind": kind, "n_vectors": 1})
        if step:
            with pytest.raises(ValueError, match=told):
                _ = equal.projections


def test_checkpoints_of_somebody_s_own_class_have_no_notes(tmp_path, checkpoints):
    """Such a class need not know of notes."""

    class Own:
        token_loss, device, steps = checkpoints.token_loss, "cpu", checkpoints.steps
        theta, name, identity = checkpoints.theta, checkpoints.name, checkpoints.identity

    run = analyse(tmp_path / "run", Own())
    _ = run.projections
    assert "notes on checkpoints" not in run.provenance().index


@pytest.mark.parametrize("kind", ["final", "trajectory", "parameters"])
def test_basis_of_chosen_steps_reads_no_other_checkpoint(tmp_path, kind):
    checkpoints = tiny_checkpoints(tmp_path / "checkpoints", range(0, 81, 10))
    broken = {name: torch.full_like(value, float("nan")) for name, value in checkpoints.token_loss.parameters.items()}
    for step in (0, 80):
        checkpoints.save(step, broken)
    run = analyse(tmp_path / "run", checkpoints, steps=range(10, 71, 10), basis={"kind": kind, "n_vectors": 2})
    assert set(run.basis["birth_step"].values) == {70}
    assert run.labels.shape == (2, 40)
