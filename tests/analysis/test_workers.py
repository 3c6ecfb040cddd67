from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from cases import (
    fail_at,
    folder_bytes,
    mlp_batch,
    mlp_loss,
    orthonormal,
    problem,
    project_run,
    tiny_checkpoints,
    tiny_config,
    token_curvatures,
    token_gradients,
    token_hessians,
)
from hypothesis import given
from hypothesis import strategies as st

import polca_lib.analysis.workers as worker
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.analysis.workers import NonFiniteProjection, project_runs
from polca_lib.derivatives.projection import project
from polca_lib.derivatives.strategy import choose
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.basis import compute_basis
from polca_lib.method.vectors import read_vectors
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import ModelSettings

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def test_derivatives_are_those_of_one_backward_pass_per_token_and_of_dense_hessians(case):
    token_loss, theta, batch = case
    vectors = orthonormal(5, len(theta))
    result = project(token_loss, theta, batch, vectors, curvature=True)
    curvature = torch.einsum("vi,tij,vj->tv", vectors, token_hessians(token_loss, theta, batch), vectors)
    torch.testing.assert_close(result.loss, token_loss(theta, batch), **EXACT)
    torch.testing.assert_close(result.gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    torch.testing.assert_close(result.curvature, curvature, **EXACT)


def against_backward_passes(token_loss, theta, batch):
    vectors = orthonormal(3, len(theta))
    result = project(token_loss, theta, batch, vectors, curvature=True)
    torch.testing.assert_close(result.gradient, token_gradients(token_loss, theta, batch) @ vectors.T, **EXACT)
    torch.testing.assert_close(result.curvature, token_curvatures(token_loss, theta, batch, vectors), **EXACT)


def test_derivatives_go_right_through_native_layer_norm():
    # Forward mode nested in itself is wrong in F.layer_norm (pytorch issue 196700).
    against_backward_passes(*problem("layer norm"))


def transformer(config, dtype):
    """The paper's model at a point a little away from where it starts, and its loss."""
    # Not .double(): the model would still round to float32 inside, as its own configuration says.
    token_loss = TokenLoss(build_model(config, seed=0).to(dtype), arithmetic.answer_loss)
    theta = token_loss.flatten(token_loss.parameters)
    return token_loss, theta + 0.5 * torch.randn(len(theta), generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("activation", get_args(ModelSettings.model_fields["activation"].annotation))
def test_derivatives_are_right_for_the_transformer_with_every_activation(activation):
    config = ModelSettings(n_layers=1, d_model=4, n_heads=2, d_mlp=4, activation=activation)
    arguments = *transformer(config, torch.float64), arithmetic.encode(np.array([[581, 493], [7, 5]]))
    against_backward_passes(*arguments)
    vectors = orthonormal(3, len(arguments[1]))
    expected = token_gradients(*arguments) @ vectors.T
    for mode in ("forward", "reverse"):
        torch.testing.assert_close(project(*arguments, vectors, mode=mode).gradient, expected, **EXACT)


SMALL = problem("attention")
VECTORS = orthonormal(6, len(SMALL.theta))
FORWARD = choose(*SMALL, VECTORS, order=2)
WHOLE = project(*SMALL, VECTORS, curvature=True)


@given(st.integers(1, 9), st.integers(1, 8))
def test_results_do_not_depend_on_the_chunks(pass_examples, chunk_vectors):
    sizes = {"pass_examples": pass_examples, "chunk_vectors": chunk_vectors}
    parts = project(*SMALL, VECTORS, curvature=True, strategy=replace(FORWARD, **sizes))
    for part, expected in zip(parts, WHOLE, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-11, atol=1e-12)


def test_curvature_is_left_out_unless_asked_for():
    assert project(*SMALL, VECTORS).curvature is None


@pytest.mark.parametrize("shape", [(2, 92), (93,), (2, 3, 93)])
def test_vectors_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"vectors have shape \(.*allowed: \(any, 93\)"):
        project(*SMALL, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sideways"}, "mode = 'sideways'; allowed: auto, forward, reverse"),
        ({"precision": "float64"}, "precision = 'float64'; allowed: float32, bfloat16, auto"),
        ({"mode": "reverse", "curvature": True}, "gives no second derivatives"),
        ({"memory": 0}, "memory = 0; allowed: a positive number of bytes"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        project(*SMALL, VECTORS, **settings)


@pytest.fixture(scope="module")
def moderate():
    """A transformer of moderate size in float32, ten examples of four tokens, and eight vectors."""
    pairs = np.random.default_rng(0).integers(1000, size=(10, 2))
    config = ModelSettings(n_layers=1, d_model=64, n_heads=4, d_mlp=256)
    token_loss = TokenLoss(build_model(config, seed=0), arithmetic.answer_loss)
    theta = token_loss.flatten(token_loss.parameters)
    return token_loss, theta, arithmetic.encode(pairs), orthonormal(8, len(theta)).float()


def test_error_of_products_in_bfloat16_is_small_and_that_of_the_first_four_examples(moderate):
    rounded = project(*moderate, mode="reverse", precision="bfloat16")
    exact = project(*moderate, mode="reverse")
    difference = (rounded.gradient - exact.gradient)[:16].square().mean() / exact.gradient[:16].square().mean()
    assert 1e-4 < rounded.error < 0.05
    assert rounded.error == pytest.approx(difference.sqrt().item(), rel=1e-2)
    assert exact.error == 0.0
    torch.testing.assert_close(rounded.loss, exact.loss)


def test_forward_mode_is_never_rounded(moderate):
    rounded, exact = (project(*moderate, mode="forward", precision=p) for p in ("bfloat16", "float32"))
    assert rounded.error == exact.error == 0.0
    assert torch.equal(rounded.gradient, exact.gradient)
    assert project(*moderate, precision="bfloat16", curvature=True).error == 0.0


STEPS = list(range(0, 81, 20))
BATCH = mlp_batch(5, torch.float32)
TOKENS = pd.DataFrame(
    {
        "place": ["10s", "1s"] * 5,
        "digit": np.arange(10),
        "carry": [True, False] * 5,
        "text": [f"t{i}" for i in range(10)],
    }
)


def make(path, **settings):
    """Checkpoints and a basis of three vectors, or as the settings say."""
    checkpoints = tiny_checkpoints(path / "checkpoints")
    config = tiny_config(**{"basis.n_vectors": 3, **{name.replace("__", "."): v for name, v in settings.items()}})
    basis = compute_basis(path / "basis.zarr", config.basis, checkpoints, BATCH, steps=config.basis_steps)
    return checkpoints, basis


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


def project_all(folder, made, memory=None, **settings):
    folder.mkdir(exist_ok=True)
    checkpoints, basis = made
    settings = ProjectionSettings(**{"curvature": True, **settings})
    return project_run(folder / "projections.zarr", checkpoints, STEPS, BATCH, TOKENS, basis, settings, memory)


@pytest.mark.parametrize("kind", ["hessian", "random", "parameters"])
def test_stored_derivatives_are_those_at_each_checkpoint(tmp_path, kind):
    checkpoints, basis = made = make(tmp_path, basis__kind=kind)
    dataset = project_all(tmp_path / "run", made)
    token_loss, _, batch = problem("mlp", examples=5)
    vectors = read_vectors(basis).double()
    for step in STEPS:
        theta = checkpoints.theta(step).double()
        at = dataset.sel(step=step)
        curvature = torch.einsum("vi,tij,vj->tv", vectors, token_hessians(token_loss, theta, batch), vectors)
        np.testing.assert_allclose(at["loss"], token_loss(theta, batch), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(at["gradient"], token_gradients(token_loss, theta, batch) @ vectors.T, atol=1e-5)
        np.testing.assert_allclose(at["curvature"], curvature, atol=1e-4)


def test_movement_and_distance_are_those_to_the_next_checkpoint(tmp_path, made):
    dataset = project_all(tmp_path / "run", made)
    checkpoints, basis = made
    theta = np.stack([checkpoints.theta(step).numpy() for step in STEPS]).astype(np.float64)
    change = np.diff(theta, axis=0)
    np.testing.assert_allclose(dataset["movement"][:-1], change @ read_vectors(basis).numpy().T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dataset["distance"][:-1], np.linalg.norm(change, axis=1), rtol=1e-5)
    assert np.isnan(dataset["movement"][-1]).all()
    assert np.isnan(dataset["distance"][-1])


def test_columns_of_the_token_table_become_coordinates(tmp_path, made):
    dataset = project_all(tmp_path / "run", made)
    for name, column in TOKENS.items():
        assert dataset[name].dims == ("token",)
        assert dataset[name].values.tolist() == column.tolist()
    assert dataset["carry"].dtype == bool
    assert dataset["birth_step"].values.tolist() == [20, 40, 60]
    assert dataset["step"].values.tolist() == STEPS


def test_run_without_curvature_stores_none(tmp_path, made):
    assert "curvature" not in project_all(tmp_path / "run", made, curvature=False)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("place", ["project", "write"])
def test_projections_killed_and_resumed_have_the_bytes_of_those_that_were_not(tmp_path, made, monkeypatch, place, n):
    with monkeypatch.context() as patch:
        owner = worker if place == "project" else PieceStore
        patch.setattr(owner, place, fail_at(getattr(owner, place), n))
        with pytest.raises(KeyboardInterrupt):
            project_all(tmp_path / "killed", made)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(worker, "project", lambda *a, **k: (calls.append(1), project(*a, **k))[1])
        project_all(tmp_path / "killed", made)
    project_all(tmp_path / "whole", made)
    assert len(calls) == len(STEPS) - (n - 1)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def break_checkpoint(checkpoints, step):
    """Put a NaN into a checkpoint; returns what it was."""
    sound = checkpoints.file(step).read_bytes()
    theta = checkpoints.theta(step).clone()
    theta[3] = torch.nan
    checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
    return sound


def test_checkpoint_that_is_not_finite_is_named_and_what_came_before_stays(tmp_path, made):
    break_checkpoint(made[0], 40)
    with pytest.raises(NonFiniteProjection, match=r"step-00000040\.safetensors"):
        project_all(tmp_path / "run", made)
    store = PieceStore.open(tmp_path / "run" / "projections.zarr")
    assert 0 not in store.missing()
    assert 2 in store.missing()


def test_projections_are_whole_once_a_broken_checkpoint_is_mended(tmp_path, made):
    sound = break_checkpoint(made[0], 40)
    with pytest.raises(NonFiniteProjection):
        project_all(tmp_path / "mended", made)
    made[0].file(40).write_bytes(sound)
    project_all(tmp_path / "mended", made)
    project_all(tmp_path / "whole", made)
    assert folder_bytes(tmp_path / "mended") == folder_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"curvature": False}, {"curvature": False, "mode": "reverse"}], ids=str)
@pytest.mark.parametrize("kind", ["hessian", "random"])
@pytest.mark.filterwarnings("ignore:basis vector .* rounding")  # more vectors than the small Hessian has directions
def test_vectors_for_which_there_is_no_room_are_read_in_blocks_with_the_same_results(
    tmp_path, monkeypatch, kind, settings
):
    blocks = []

    def read(basis, start, stop, **place):
        blocks.append(stop - start)
        return read_vectors(basis, start, stop, **place)

    monkeypatch.setattr(worker, "read_vectors", read)
    made = make(tmp_path, basis__kind=kind, basis__k=7, basis__n_vectors=28, basis__tolerance=0.5)
    whole = project_all(tmp_path / "whole", made, **settings)
    assert blocks == [28]
    blocks.clear()
    parts = project_all(tmp_path / "parts", made, memory=6500, **settings)
    # 6500 bytes, of which half for vectors of 124 bytes; read at each of the five checkpoints for derivatives, and at
    # all but the last for the movement inside. A block that is still there is not read again.
    assert blocks == 4 * [26, 2, 26, 2] + [26, 2]
    assert set(parts) == set(whole)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_settings_say_how_to_differentiate_and_what_error_that_has(tmp_path, made):
    exact = project_all(tmp_path / "exact", made)
    reverse = project_all(tmp_path / "reverse", made, curvature=False, mode="reverse")
    rounded = project_all(tmp_path / "rounded", made, curvature=False, mode="reverse", precision="bfloat16")
    np.testing.assert_allclose(reverse["gradient"], exact["gradient"], rtol=1e-4, atol=1e-5)
    assert exact["product_error"].dims == ("step", "vector")
    assert (exact["product_error"] == 0).all()
    assert (reverse["product_error"] == 0).all()
    for step in STEPS:
        ours, theirs = (dataset["gradient"].sel(step=step).values[:8] for dataset in (rounded, exact))
        error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
        stated = rounded["product_error"].sel(step=step)
        assert ((stated > 0) & (stated < 0.05)).all()
        np.testing.assert_allclose(stated, error, rtol=0.02)


def test_auto_takes_the_faster_precision_and_goes_on_with_it(tmp_path, made, monkeypatch):
    how = {"curvature": False, "mode": "reverse"}
    rounded = project_all(tmp_path / "rounded", made, precision="bfloat16", **how)
    monkeypatch.setattr(worker, "faster_precision", lambda device: "bfloat16")
    found = project_all(tmp_path / "auto", made, precision="auto", **how)
    assert (found.attrs["precision"], rounded.attrs.get("precision")) == ("bfloat16", None)
    np.testing.assert_array_equal(found["gradient"], rounded["gradient"])
    np.testing.assert_array_equal(found["product_error"], rounded["product_error"])
    # Resumed where float32 is faster, it stays as it began.
    before, store = folder_bytes(tmp_path / "auto"), PieceStore.open(tmp_path / "auto" / "projections.zarr")
    (store.path / "gradient" / "2.0.0").unlink()
    monkeypatch.setattr(worker, "faster_precision", lambda device: "float32")
    with pytest.warns(UserWarning, match="will be recomputed"):
        project_all(tmp_path / "auto", made, precision="auto", **how)
    assert folder_bytes(tmp_path / "auto") == before
    # A new one is in full precision, and can't share a pass with the other.
    exact = project_all(tmp_path / "exact", made, **how)
    full = project_all(tmp_path / "full", made, precision="auto", **how)
    assert full.attrs["precision"] == "float32"
    np.testing.assert_array_equal(full["gradient"], exact["gradient"])
    (checkpoints, basis), settings = made, ProjectionSettings(precision="auto", **how)
    paths = [tmp_path / name / "projections.zarr" for name in ("auto", "full")]
    with pytest.raises(ValueError, match=r"2 bases were begun in \['bfloat16', 'float32'\].*in turn"):
        project_runs(paths, checkpoints, STEPS, BATCH, TOKENS, [basis, basis], [settings, settings])


@pytest.mark.parametrize("memory", [None, 1500])
def test_float16_halves_the_files_and_says_what_it_costs(tmp_path, made, memory):
    whole = project_all(tmp_path / "whole", made, memory)
    halved = project_all(tmp_path / "halved", made, memory, storage="float16")
    for name in set(whole.data_vars) - {"product_error"}:
        factor = 2 if name in ("gradient", "curvature") else 1
        expected = whole[name].values.astype("float16" if factor == 2 else "float32")
        assert halved[name].dtype == "float32"
        np.testing.assert_array_equal(halved[name], expected)
        # Each file ends with four bytes of a checksum.
        files = [(tmp_path / run / "projections.zarr" / name).glob("[0-9]*") for run in ("whole", "halved")]
        bytes_of = [sum(file.stat().st_size - 4 for file in group) for group in files]
        assert bytes_of[0] == factor * bytes_of[1] > 0
    assert ((halved["product_error"] > 0) & (halved["product_error"] < 2**-11)).all()
    if memory is None:  # then one piece holds all vectors of a checkpoint
        squares = [
            (each**2).sum(("token", "vector")) for each in (halved["gradient"] - whole["gradient"], whole["gradient"])
        ]
        np.testing.assert_allclose(halved["product_error"].isel(vector=0), np.sqrt(squares[0] / squares[1]), rtol=1e-3)


def test_damage_to_float16_is_found_and_mended(tmp_path, made):
    project_all(tmp_path, made, storage="float16")
    before, store = folder_bytes(tmp_path), PieceStore.open(tmp_path / "projections.zarr")
    file = store.path / "gradient" / "2.0.0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert store.damaged() == {2: [file]}
    with pytest.warns(UserWarning, match="will be recomputed"):
        project_all(tmp_path, made, storage="float16")
    assert folder_bytes(tmp_path) == before


def test_derivatives_that_float16_does_not_hold_are_refused(tmp_path, made):
    checkpoints, basis = made
    large = TokenLoss(checkpoints.token_loss.model, lambda model, batch: 1e6 * mlp_loss(model, batch))
    made = CheckpointFolder(checkpoints.path, large), basis
    with pytest.raises(NonFiniteProjection, match=r"gradient up to .* float16 holds 65504 at most; .* 'float32'"):
        project_all(tmp_path / "run", made, storage="float16")
    project_all(tmp_path / "run32", made)


def test_memory_too_small_for_one_example_is_refused_with_what_to_do(tmp_path, made):
    with pytest.raises(ValueError, match=r"one example takes .* raise memory"):
        project_all(tmp_path / "run", made, memory=500)


@pytest.mark.slow
def test_bases_projected_together_have_the_results_of_each_alone(tmp_path):
    made = [make(tmp_path / kind, basis__kind=kind) for kind in ("hessian", "random", "trajectory")]
    settings = [ProjectionSettings(curvature=kind < 2, curvature_examples=2, mode="reverse") for kind in range(3)]
    checkpoints, bases = made[0][0], [basis for _, basis in made]
    paths = [tmp_path / f"together-{index}.zarr" for index in range(3)]
    # The second is there already: what is missing of the others is computed all the same.
    project_run(paths[1], checkpoints, STEPS, BATCH, TOKENS, bases[1], settings[1])
    before = folder_bytes(paths[1])
    together = project_runs(paths, checkpoints, STEPS, BATCH, TOKENS, bases, settings)
    assert folder_bytes(paths[1]) == before
    for found, (_, basis), own, name in zip(together, made, settings, "abc", strict=True):
        alone = project_run(tmp_path / f"{name}.zarr", checkpoints, STEPS, BATCH, TOKENS, basis, own)
        assert set(found) == set(alone)
        for variable in alone:
            np.testing.assert_allclose(found[variable], alone[variable], rtol=1e-4, atol=1e-5, err_msg=variable)
    assert "curvature" not in together[2]


def test_curvature_of_a_sample_is_that_of_its_tokens(tmp_path, made):
    whole = project_all(tmp_path / "whole", made)
    sampled = project_all(tmp_path / "sampled", made, curvature_examples=2)
    tokens = sampled.sizes["sample"]
    assert tokens == 4  # two tokens an example
    np.testing.assert_allclose(sampled["curvature"], whole["curvature"][:, :tokens], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sampled["gradient"], whole["gradient"], rtol=1e-4, atol=1e-5)


def test_bases_that_do_not_go_together_are_refused(tmp_path, made):
    checkpoints, basis = made
    for settings in ([{"mode": "reverse", "curvature": False}, {"curvature": False}], [{"curvature": True}] * 2):
        with pytest.raises(ValueError, match="can't be projected together"):
            project_runs(
                [tmp_path / "1", tmp_path / "2"], checkpoints, STEPS, BATCH, TOKENS, [basis, basis],
                [ProjectionSettings(**each) for each in settings],
            )  # fmt: skip
