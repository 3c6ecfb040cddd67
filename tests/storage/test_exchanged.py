"""Checksums know the place of what they are of: sound files in the wrong place are not accepted."""

import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from cases import Mlp, flip_bit, folder_bytes, mlp_batch, mlp_loss, tiny_checkpoints
from safetensors.torch import save
from upath import UPath

from polca_lib.analysis.analysis import Analysis
from polca_lib.analysis.status import status
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage import pieces
from polca_lib.storage.artefacts import Artefact, DamagedFile
from polca_lib.storage.checkpoint_folders import SafetensorsFolder
from polca_lib.storage.checkpoints import CheckpointFolder, ChecksummedCheckpoints, load_tensors, save_tensors
from polca_lib.storage.hashing import hash_tensors
from polca_lib.storage.pieces import PieceStore

TEMPLATE = xr.Dataset(coords={"step": [0, 20, 40], "vector": np.arange(5)})
VARIABLES = {"gradient": (("step", "vector"), "float32"), "loss": (("step",), "float64")}


def exchange(one, other):
    """Two files or folders change places."""
    aside = one.with_name(f"{one.name}-aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


# Checkpoints.


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoints(tmp_path / "checkpoints", (0, 20, 40))


def test_exchanged_checkpoints_are_refused(folder):
    theta = folder.theta(20)
    exchange(folder.file(20), folder.file(40))
    with pytest.raises(DamagedFile, match=r"step-00000020\.safetensors holds step 40, but step 20 belongs there"):
        folder.theta(20)
    exchange(folder.file(20), folder.file(40))
    assert torch.equal(folder.theta(20), theta)


def test_exchanged_checkpoints_of_another_format_are_refused_once_they_were_read(folder, tmp_path):
    tensors = {step: folder.token_loss.unflatten(folder.theta(step)) for step in (20, 40)}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for step, values in tensors.items():
        content = save({name: value.contiguous() for name, value in values.items()})
        (theirs / f"step-{step}.safetensors").write_bytes(content)
    checkpoints = ChecksummedCheckpoints(SafetensorsFolder(theirs, folder.token_loss), tmp_path / "read")
    assert torch.equal(checkpoints.theta(20), folder.theta(20))
    exchange(theirs / "step-20.safetensors", theirs / "step-40.safetensors")
    with pytest.raises(DamagedFile, match=r"step-20\.safetensors is not what it was when it was first read"):
        checkpoints.theta(20)


def test_checkpoint_of_version_02_is_read_and_verified(folder):
    theta, file = folder.theta(20), folder.file(20)
    tensors = {name: p.contiguous() for name, p in folder.token_loss.unflatten(theta).items()}
    file.write_bytes(save(tensors, metadata={"sha256": hash_tensors(tensors)}))
    assert torch.equal(folder.theta(20), theta)
    for position in (-1, 8 + 20):
        flip_bit(file, position)
        with pytest.raises(DamagedFile, match="is damaged"):
            folder.theta(20)
        flip_bit(file, position)


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(6, dtype=torch.int32), torch.zeros(3, 2)])
def test_equal_bytes_of_another_dtype_or_shape_have_another_checksum(other):
    first = torch.zeros(6)
    assert hash_tensors({"a": first}) == hash_tensors({"a": other})  # version 0.2 and earlier
    assert hash_tensors({"a": first}, {}) != hash_tensors({"a": other}, {})


def test_what_tensors_are_about_is_verified(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.ones(2)}, step=3, run="one")
    assert load_tensors(tmp_path / "x", step=3).keys() == {"a"}
    with pytest.raises(DamagedFile, match="holds run one, but run two belongs there"):
        load_tensors(tmp_path / "x", step=3, run="two")


# Pieces.


def write(path, block=2, pieces=None):
    store = PieceStore(path / "x.zarr", TEMPLATE, VARIABLES, dim="step", block=("vector", block))
    for number in store.missing() if pieces is None else pieces:
        index, part = divmod(number, store.parts)
        if part < store.parts - 1:
            store.write(number, gradient=10.0 * index + np.arange(5)[store.blocks[part]])
        else:
            store.write(number, loss=np.float64(index))
    return store


@pytest.mark.parametrize(
    ("files", "numbers"),
    [
        ([("gradient/0.0", "gradient/0.1")], [0, 1]),
        ([("gradient/0.0", "gradient/2.0")], [0, 8]),
        ([("loss/0", "loss/1")], [3, 7]),
        ([("_sha256/0.0", "_sha256/1.0")], [0, 1]),
        ([("gradient/0.0", "gradient/1.0"), ("_sha256/0.0", "_sha256/4.0")], [0, 4]),  # with their checksums
    ],
)
def test_exchanged_pieces_are_found_and_made_anew(tmp_path, files, numbers):
    store = write(tmp_path)
    before = folder_bytes(tmp_path)
    assert store.damaged() == {}
    for one, other in files:
        exchange(store.path / one, store.path / other)
    assert sorted(PieceStore.open(store.path).damaged()) == numbers
    with pytest.warns(UserWarning, match="are damaged"):
        store.repair_pieces()
    assert store.missing() == numbers
    write(tmp_path)
    assert folder_bytes(tmp_path) == before


def test_damaged_checksum_of_a_piece_is_damage(tmp_path):
    store = write(tmp_path)
    flip_bit(store.path / "_sha256" / "5.0", -1)
    assert list(store.damaged()) == [5]
    (store.path / "_sha256" / "5.0").unlink()
    assert list(store.damaged()) == [5]


def older(path, monkeypatch):
    """A store as version 0.2 wrote it."""
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "key_of", lambda folder: None)
        layout = pieces.StoreLayout(TEMPLATE, VARIABLES, "step", {}, ("vector", 2))
        patch.setattr(pieces, "create", lambda path, _, create=pieces.create: create(path, layout))
        patch.setattr(layout.__class__, "_replace", lambda self, **_: self)
        return write(path)


def test_store_of_version_02_is_read_healed_and_verified_as_before(tmp_path, monkeypatch):
    store = older(tmp_path, monkeypatch)
    assert not (store.path / "_sha256").exists()
    assert "key" not in json.loads((store.path / ".zattrs").read_text())
    before = folder_bytes(tmp_path)
    exchange(store.path / "gradient/0.0", store.path / "gradient/1.0")
    assert store.damaged() == {}  # it has no checksums of pieces
    exchange(store.path / "gradient/0.0", store.path / "gradient/1.0")
    flip_bit(store.path / "gradient/0.0", -1)
    assert list(store.damaged()) == [0]
    with pytest.warns(UserWarning, match="damaged"):
        store.repair_pieces()
    write(tmp_path)
    for file in (".zattrs", "step/0"):
        flip_bit(store.path / file, 3)
        with pytest.warns(UserWarning, match="restored"):
            write(tmp_path)
    (tmp_path / "x.zarr.ready").unlink()
    assert write(tmp_path, block=3).missing() == []
    after = folder_bytes(tmp_path)
    after["x.zarr.ready"] = before["x.zarr.ready"]
    assert after == before


@pytest.mark.parametrize("remote", [False, True])
def test_pieces_stay_as_they_are_divided_if_only_the_checksums_are_lost(tmp_path, remote):
    folder = UPath("memory://ready") if remote else tmp_path
    write(folder, block=2, pieces=[0, 1, 5])
    (folder / "x.zarr.ready").unlink()
    store = write(folder, block=3, pieces=[])
    assert store.parts == 4
    assert store.missing() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert store.damaged() == {}
    write(folder, block=4)
    assert store.dataset()["gradient"].values.tolist() == [[10 * i + j for j in range(5)] for i in range(3)]


def test_pieces_whose_division_is_lost_are_refused(tmp_path):
    store = write(tmp_path)
    (tmp_path / "x.zarr.ready").unlink()
    (store.path / ".zattrs").unlink()
    with pytest.raises(
        DamagedFile, match=r"\.zattrs and .*\.ready are lost or damaged; restore one of them, or delete"
    ):
        write(tmp_path, block=3)


def test_repair_leaves_nothing_beside_the_store_in_an_object_store():
    folder = UPath("memory://beside")
    store = write(folder)
    (store.path / "step" / "0").write_bytes(b"?")
    with pytest.warns(UserWarning, match="restored"):
        write(folder)
    assert {file.name for file in folder.iterdir()} == {"x.zarr", "x.zarr.ready"}


# Folders.

BATCH = mlp_batch(20, torch.float32)


def analyse(tmp_path, folder, **settings):
    basis = {"n_vectors": 3, "kind": "random"}
    return Analysis(tmp_path / "run", folder, BATCH, **{"basis": basis, "threads": 1, **settings})


def test_basis_of_another_seed_under_a_kept_manifest_is_refused(tmp_path, folder):
    one, other = (analyse(tmp_path, folder, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.basis["mixing"], other.basis["mixing"]) or one.basis.attrs != other.basis.attrs
    for name in ("basis.zarr", "basis.zarr.ready"):
        exchange(one._basis.path / name, other._basis.path / name)
    with pytest.raises(
        DamagedFile, match=r"basis\.zarr belongs to another stage or other settings than .*manifest\.json"
    ):
        analyse(tmp_path, folder, seed=0).projections  # noqa: B018
    assert all("belongs to another" in row["problem"] for row in status(tmp_path / "run") if row["stage"] == "basis")
    # Without the checksums of the metadata, too.
    (one._basis.path / "basis.zarr.ready").unlink()
    with pytest.raises(DamagedFile, match="belongs to another stage"):
        analyse(tmp_path, folder, seed=0).basis  # noqa: B018
    shutil.rmtree(one._basis.path / "basis.zarr")
    assert analyse(tmp_path, folder, seed=0).basis.attrs["seed"] == 0


def test_store_is_bound_to_the_key_of_its_artefact(tmp_path):
    artefact = Artefact.open(tmp_path / "a", "basis", {"seed": 0}, {})
    store = write(artefact.path)
    assert json.loads((store.path / ".zattrs").read_text())["key"] == artefact.key
    shutil.copytree(artefact.path, tmp_path / "elsewhere")
    assert PieceStore.open(tmp_path / "elsewhere" / "x.zarr").damaged() == {}  # a copy of the folder is the same stage


def test_damage_that_is_found_on_reading_is_named_with_what_to_do_and_mended(tmp_path, folder):
    hessian = {"hessian": BATCH, "basis": {"n_vectors": 2, "tolerance": 0.1}}
    run = analyse(tmp_path, folder, **hessian)
    expected = run.basis["vectors"].values
    flip_bit(run._basis.path / "basis.zarr" / "vectors" / "1.0", -1)
    again = analyse(tmp_path, folder, **hessian)
    np.testing.assert_array_equal(again.basis["vectors"][0], expected[0])
    with pytest.raises(
        DamagedFile, match=r"basis\.zarr/vectors is damaged.*polca run, polca paper run or verify = True"
    ):
        again.projections  # noqa: B018
    with pytest.warns(UserWarning, match="1 files are damaged and will be recomputed"):
        np.testing.assert_array_equal(analyse(tmp_path, folder, **hessian, verify=True).basis["vectors"], expected)


@pytest.mark.parametrize(
    "at", [np.s_[1], np.s_[::-1], np.s_[:, [4, 0, 2]], np.s_[[2, 0]], np.s_[1:3, ::2], np.s_[0, 3]]
)
def test_variables_are_read_like_arrays(tmp_path, at):
    values = np.array([[10.0 * i + j for j in range(5)] for i in range(3)], np.float32)
    found = write(tmp_path).dataset()["gradient"][at]
    np.testing.assert_array_equal(found, values[at])


def test_another_model_of_equal_bytes_is_another_stage(tmp_path, folder):
    """Frozen numbers of another dtype count as others."""
    model = Mlp()
    model.register_buffer("kind", torch.zeros(2, dtype=torch.int32))
    other = Mlp()
    other.register_buffer("kind", torch.zeros(2))
    keys = {
        analyse(tmp_path, CheckpointFolder(folder.path, TokenLoss(each, mlp_loss)))._basis.key
        for each in (model, other)
    }
    assert len(keys) == 2
