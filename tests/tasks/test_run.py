import os
import shutil

import numpy as np
import pytest
import torch
from cases import TINY_RUN, fail_at, flip_bit, folder_bytes, token_gradients

from polca_lib.derivatives.hessian import HessianOperator
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.decomposition import coarsen, movement_share
from polca_lib.method.vectors import read_vectors
from polca_lib.storage.artefacts import ArtefactMismatch, DamagedFile
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks import arithmetic
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings

pytestmark = pytest.mark.slow


def tiny(**overrides):
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    return Run.from_preset("smoke", **{**TINY_RUN, **overrides})


def no_loss(*_):
    raise AssertionError("a loss was computed, though all was stored")


@pytest.fixture
def nothing_may_be_computed(monkeypatch):
    monkeypatch.setattr(arithmetic.Addition, "loss", staticmethod(no_loss))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run in a folder of its own: other tests add to the shared one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLCA_RUNS", str(tmp_path_factory.mktemp("run")))
        run = Run.from_preset("smoke", **TINY_RUN)
        _ = run.projections
        yield run


def stages(run):
    return {path.name for path in run.folder.iterdir()}


def arrays(run):
    """All files but the logs of time."""
    return {name: content for name, content in folder_bytes(run.folder).items() if not name.endswith("seconds.txt")}


def test_runs_lie_where_the_environment_says(run):
    assert str(run.folder) == os.environ["POLCA_RUNS"]
    assert {name.split("-")[0] for name in stages(run)} == {"training", "basis", "projection"}


def test_projections_cover_every_checkpoint_token_and_vector(run):
    assert dict(run.projections.sizes) == {"step": 5, "token": 48, "vector": 2}
    assert run.projections["step"].values.tolist() == [0, 10, 20, 30, 40]
    assert run.projections["birth_step"].values.tolist() == [20, 40]
    assert run.projections["skill"].values.tolist() == run.tokens["skill"].tolist()


@pytest.mark.parametrize("step", [0, 30])
def test_stored_losses_and_gradients_are_those_of_the_checkpoints(run, step):
    token_loss, theta = run.checkpoints.token_loss, run.checkpoints.theta(step)
    batch = run.task.validation
    at = run.projections.sel(step=step)
    vectors = read_vectors(run.basis)
    np.testing.assert_allclose(at["loss"], token_loss(theta, batch), rtol=1e-4)
    np.testing.assert_allclose(at["gradient"], token_gradients(token_loss, theta, batch) @ vectors.T, atol=1e-4)


def test_second_run_loads_all_stages_without_computing_a_loss(run, nothing_may_be_computed):
    before = arrays(run)
    again = tiny()
    assert again.projections.identical(run.projections)
    assert again.basis.identical(run.basis)
    assert arrays(run) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"clustering__order": "trapezoid", "clustering__min_cluster_size": 5, "clustering__breakthrough_window": 20},
        {"memory": 10**9},
    ],
)
def test_settings_of_no_stage_reuse_everything(run, nothing_may_be_computed, settings):
    before = stages(run)
    assert tiny(**settings).projections.identical(run.projections)
    assert stages(run) == before


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ({"projection__curvature": False}, ["projection"]),
        ({"basis__kind": "random"}, ["basis", "projection"]),
        ({"data__validation_examples": 13}, ["projection"]),
        ({"data__hessian_examples": 9}, ["basis", "projection"]),
        ({"seed": 1}, ["basis", "projection", "training"]),
        ({"training__learning_rate": 1e-3}, ["basis", "projection", "training"]),
    ],
)
def test_changed_setting_computes_anew_what_depends_on_it_and_leaves_the_rest(run, override, new):
    before, contents = stages(run), arrays(run)
    other = tiny(**override)
    assert not other.projections.identical(run.projections)
    made = sorted(name.split("-")[0] for name in stages(run) - before)
    assert made == new
    after = arrays(run)
    assert all(after[name] == content for name, content in contents.items())


@pytest.mark.parametrize(("before", "owner"), [("checkpoints", HessianOperator), ("basis", TokenLoss)])
def test_run_killed_in_a_stage_finishes_to_the_same_bytes(run, tmp_path, monkeypatch, before, owner):
    killed = Run(run.settings, tmp_path)
    getattr(killed, before)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "__call__", fail_at(owner.__call__, 3))
        with pytest.raises(KeyboardInterrupt):
            _ = killed.projections
    again = Run(run.settings, tmp_path)
    assert again.projections.identical(run.projections)
    for file, content in arrays(again).items():
        assert (run.folder / file).read_bytes() == content


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A run whose checkpoints stand at a list of steps."""
    settings = {**TINY_RUN, "training.checkpoints": (0, 1, 3, 8, 20, 33, 40), "training.state_every": 7}
    return Run(RunSettings.from_preset("smoke", **settings), tmp_path_factory.mktemp("uneven"))


def test_run_with_uneven_checkpoints_is_analysed_to_the_end(uneven, recwarn):
    steps = [0, 1, 3, 8, 20, 33, 40]
    assert uneven.checkpoints.steps == uneven.projections["step"].values.tolist() == steps
    assert uneven.projections["birth_step"].values.tolist() == [20, 40]
    start, end, vectors = uneven.checkpoints.theta(0), uneven.checkpoints.theta(40), read_vectors(uneven.basis)
    moved = uneven.projections["movement"].isel(step=slice(-1)).sum("step")
    np.testing.assert_allclose(moved, vectors @ (end - start), atol=1e-6)
    assert ((movement_share(uneven.projections) > 0) & (movement_share(uneven.projections) < 1)).all()
    found = uneven.findings.summary()
    assert (found["checkpoints"], found["last_step"]) == (7, 40)
    assert not [warning for warning in recwarn if "breakthroughs are left out" in str(warning.message)]


def test_uneven_projections_are_thinned_to_those_of_a_run_with_fewer_checkpoints(uneven):
    fewer = uneven.with_settings(uneven.settings.model_copy(update={"steps": (0, 3, 20, 40)}))
    coarse = coarsen(uneven.projections, 2)
    assert coarse["step"].values.tolist() == [0, 3, 20, 40]
    for name in ("loss", "gradient", "movement"):
        np.testing.assert_allclose(coarse[name], fewer.projections[name], rtol=1e-4, atol=1e-5)


def test_killed_run_with_log_checkpoints_finishes_to_the_same_bytes(tmp_path):
    log = {**TINY_RUN, "training.checkpoints": "log", "training.n_checkpoints": 8}
    log |= {"basis.every": None, "basis.n_vectors": 2, "clustering.breakthrough_window": 4}
    whole, killed = (Run(RunSettings.from_preset("smoke", **log), tmp_path / name) for name in ("whole", "killed"))
    _ = whole.labels
    with pytest.MonkeyPatch.context() as patch:
        loss = killed.task.loss
        patch.setattr(arithmetic.Addition, "loss", staticmethod(fail_at(loss, 27)))
        with pytest.raises(KeyboardInterrupt):
            _ = Run(killed.settings, tmp_path / "killed").labels
    assert 0 < len(list(killed.checkpoints.path.glob("step-*"))) < 8
    _ = killed.labels
    assert arrays(killed) == arrays(whole)


def test_damaged_basis_is_named_and_mended_as_in_any_analysis(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy")
    mine = Run(run.settings, tmp_path / "copy")
    flip_bit(mine._basis.path / "basis.zarr" / "vectors" / "1.0", -1)
    shutil.rmtree(mine._projection.path)
    with pytest.raises(DamagedFile, match=r"basis\.zarr/vectors is damaged.*polca paper run"):
        _ = mine.projections
    again = Run(run.settings, tmp_path / "copy", verify=True)
    with pytest.warns(UserWarning, match="1 files are damaged and will be recomputed"):
        _ = again.basis
    assert again.projections.identical(run.projections)
    assert read_vectors(again.basis).equal(read_vectors(run.basis))


def test_run_whose_loss_changed_does_not_project_on_its_old_basis(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / "copy")
    mine = Run(run.settings, tmp_path / "copy")
    shutil.rmtree(mine._projection.path)
    loss = arithmetic.Addition.loss
    monkeypatch.setattr(arithmetic.Addition, "loss", staticmethod(lambda model, batch: 2 * loss(model, batch)))
    with pytest.raises(ArtefactMismatch, match=r"basis-.* was begun with another loss"):
        _ = Run(run.settings, tmp_path / "copy").projections


def test_same_settings_elsewhere_give_the_same_bytes(run, tmp_path):
    again = Run(run.settings, tmp_path)
    assert again.projections.identical(run.projections)
    for name, content in arrays(again).items():
        assert (run.folder / name).read_bytes() == content


def test_stage_with_another_manifest_is_refused(run, tmp_path):
    mine = Run(run.settings, tmp_path)
    _ = mine.checkpoints
    (folder,) = tmp_path.iterdir()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 3'))
    with pytest.raises(ArtefactMismatch, match=r"config\.seed = 3, but config\.seed = 0"):
        _ = Run(run.settings, tmp_path).checkpoints


def test_samples_have_the_configured_sizes(run):
    assert [len(pairs) for pairs in run.task.samples] == [12, 8, 40 * 8]


def test_provenance_says_preset_seed_device_and_commit_of_each_stage(run):
    table = run.provenance()["value"]
    assert table["preset"] == "smoke"
    assert table["seed"] == "0"
    assert table["device"] == "cpu"
    for stage in ("training", "basis", "projection"):
        assert table[f"{stage}: commit"]
        assert table[f"{stage}: wall time"].endswith(" s")
    assert table["torch"] == torch.__version__


def test_basis_made_at_the_former_default_tolerance_opens_and_says_so(monkeypatch):
    given = {n: v for n, v in TINY_RUN.items() if n != "basis.tolerance"}
    former = Run.from_preset("smoke", **given, **{"basis.tolerance": 0.01})
    _ = former.basis
    monkeypatch.setattr(PieceStore, "write", lambda *a, **k: pytest.fail("a piece was computed again"))
    run = Run.from_preset("smoke", **given)
    assert run.basis.identical(former.basis)
    assert run.provenance()["value"]["basis: tolerance"] == "0.01"


def test_provenance_of_a_run_not_yet_started_is_its_settings_alone():
    table = tiny(seed=5).provenance()["value"]
    assert table["seed"] == "5"
    assert not any("commit" in name for name in table.index)


def test_run_on_another_basis_keeps_the_training_and_changes_only_basis_and_projection(run):
    other = run.on_basis("parameters", curvature=False)
    assert other.checkpoints.path == run.checkpoints.path
    assert torch.equal(read_vectors(other.basis).sum(1), torch.ones(2))
    assert torch.equal(read_vectors(other.basis).count_nonzero(1), torch.ones(2).long())
    assert "curvature" not in other.projections
    assert other.settings.clustering.order == "trapezoid"  # which needs no curvature
    changed = {name: getattr(other.settings, name) for name in ("basis", "projection", "clustering")}
    assert run.settings.model_copy(update=changed) == other.settings
    assert run.settings.basis.kind == "hessian"
