"""Stores of pieces: written in any order, cut short, damaged, by several processes."""

import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from cases import flip_bit, folder_bytes
from upath import UPath

from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.pieces import PieceStore

TEMPLATE = xr.Dataset(coords={"step": [0, 20, 40], "token": [0, 1], "text": ("token", ["a", "bc"])})
VARIABLES = {"loss": (("step", "token"), "float32"), "distance": (("step",), "float64")}


def open_store(path):
    return PieceStore(path / "x.zarr", TEMPLATE, VARIABLES, dim="step")


BLOCKS = {"gradient": (("step", "token", "vector"), "float32"), **VARIABLES}
WITH_VECTORS = TEMPLATE.assign_coords(vector=np.arange(5))


def open_blocks(path, size=2):
    return PieceStore(path / "x.zarr", WITH_VECTORS, BLOCKS, dim="step", block=("vector", size))


def fill_blocks(store, pieces=None):
    """Every number says where it lies."""
    whole = np.arange(30, dtype=np.float32).reshape(3, 2, 5)
    for number in store.missing() if pieces is None else pieces:
        index, part = divmod(number, store.parts)
        if part < store.parts - 1:
            store.write(number, gradient=whole[index][:, store.blocks[part]])
        else:
            store.write(number, **piece(index))
    return whole


def piece(i):
    return {"loss": np.array([i, i + 0.5], dtype=np.float32), "distance": np.float64(10 * i)}


def test_pieces_read_back_with_their_coordinates(tmp_path):
    store = open_store(tmp_path)
    for i in (2, 0, 1):
        store.write(i, **piece(i))
    dataset = store.dataset()
    assert set(dataset.data_vars) == {"loss", "distance"}
    assert dataset["loss"].sel(step=40).values.tolist() == [2, 2.5]
    assert dataset["distance"].values.tolist() == [0, 10, 20]
    assert dataset["text"].values.tolist() == ["a", "bc"]
    assert dataset["loss"].dtype == np.float32


def test_dimension_without_a_coordinate_integers_and_attributes_are_kept(tmp_path):
    template = xr.Dataset(coords={"step": [0, 20]}, attrs={"seed": 3})
    variables = {"theta": (("step", "parameter"), "float32"), "axis": (("step",), "int64")}
    store = PieceStore(tmp_path / "x.zarr", template, variables, dim="step", sizes={"parameter": 3})
    for index in store.missing():
        store.write(index, theta=np.arange(3), axis=2**60 + index)
    dataset = PieceStore.load(tmp_path / "x.zarr")
    assert dataset["theta"].values.tolist() == [[0, 1, 2]] * 2
    assert dataset["axis"].values.tolist() == [2**60, 2**60 + 1]
    assert dataset.attrs == {"seed": 3}
    assert set(dataset.coords) == {"step"}


def test_missing_pieces_are_those_not_written_also_after_reopening(tmp_path):
    store = open_store(tmp_path)
    assert store.missing() == [0, 1, 2]
    store.write(1, **piece(1))
    assert open_store(tmp_path).missing() == [0, 2]
    assert np.isnan(open_store(tmp_path).dataset()["loss"].sel(step=[0, 40])).all()


def test_piece_whose_write_was_cut_short_is_still_missing(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(KeyError):
        store.write(0, loss=piece(0)["loss"], no_such_variable=1)
    assert open_store(tmp_path).missing() == [0, 1, 2]


@pytest.mark.parametrize("name", ["loss", "distance"])
def test_lost_piece_is_missing_rather_than_read_as_empty(tmp_path, name):
    store = open_store(tmp_path)
    for index in store.missing():
        store.write(index, **piece(index))
    next(p for p in (store.path / name).iterdir() if p.name.startswith("1")).unlink()
    assert PieceStore.load(store.path) is None
    with pytest.warns(UserWarning, match="1 files are damaged"):
        store.repair_pieces()
    assert store.missing() == [1]


def test_variable_that_is_not_given_is_empty_rather_than_lost(tmp_path):
    store = open_store(tmp_path)
    for index in store.missing():
        store.write(index, loss=piece(index)["loss"])
    assert bool(PieceStore.load(store.path)["distance"].isnull().all())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss": np.ones(6)}, r"loss of step 20 of .*has shape \(6,\) and dtype float64; allowed: shape \(2,\)"),
        ({"loss": np.ones(1)}, r"has shape \(1,\).*allowed: shape \(2,\)"),
        ({"loss": 1.0}, r"has shape \(\) .*allowed: shape \(2,\)"),
        ({"loss": np.ones((1, 2))}, r"has shape \(1, 2\)"),
        ({"distance": np.ones(1)}, r"distance of step 20 of .* has shape \(1,\).*allowed: shape \(\)"),
        ({"loss": np.ones(2), "distance": np.array("1")}, "dtype <U1; allowed"),
    ],
)
def test_values_that_are_not_exactly_of_the_shape_of_a_piece_are_refused(tmp_path, values, told):
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=told):
        store.write(1, **values)
    assert 1 in store.missing()
    assert np.isnan(store.dataset()["loss"].values).all()


def test_blocks_of_another_width_are_refused_and_those_of_the_last_are_narrower(tmp_path):
    store = open_blocks(tmp_path)
    sizes = [len(range(5)[block]) for block in store.blocks]
    with pytest.raises(ValueError, match=r"of step \d+, vectors .* has shape"):
        store.write(len(sizes) - 1, gradient=np.ones((2, sizes[0])))
    assert not store.done().any()


def test_integers_and_booleans_can_not_be_missing_nor_be_floats(tmp_path):
    template = xr.Dataset(coords={"vector": [1, 2]})
    kinds = {"axis": (("vector",), "int64"), "kept": (("vector",), "bool"), "value": (("vector",), "float32")}
    store = PieceStore(tmp_path / "x.zarr", template, kinds, dim="vector")
    for values, told in (
        ({"axis": 3}, "kept of vector 1 .* is missing; allowed: .* bool"),
        ({"axis": 3.5, "kept": True}, "axis of vector 1 .* dtype float64; allowed: .* int64"),
        ({"axis": np.nan, "kept": True}, "axis of vector 1 .* dtype float64"),
    ):
        with pytest.raises(ValueError, match=told):
            store.write(0, **values)
    store.write(0, axis=3, kept=True)
    assert np.isnan(store.dataset()["value"].values[0])


@pytest.mark.parametrize("name", ["step", "text", "loss", "distance", "_done"])
def test_start_that_was_cut_short_heals(tmp_path, monkeypatch, name):
    create = zarr.Group.create_array

    def cut_short(group, array, **arguments):
        if array == name:
            raise KeyboardInterrupt
        return create(group, array, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "create_array", cut_short)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path / "cut")
    for folder in ("cut", "whole"):
        open_store(tmp_path / folder).write(1, **piece(1))
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "whole")


def test_store_is_loaded_only_once_it_is_whole(tmp_path):
    path = tmp_path / "x.zarr"
    assert PieceStore.load(path) is None
    store = open_store(tmp_path)
    for i in range(3):
        assert PieceStore.load(path) is None
        store.write(i, **piece(i))
    assert PieceStore.load(path).identical(store.dataset())


def test_store_whose_folder_was_deleted_starts_anew(tmp_path):
    open_store(tmp_path).write(1, **piece(1))
    shutil.rmtree(tmp_path / "x.zarr")
    assert PieceStore.load(tmp_path / "x.zarr") is None
    assert open_store(tmp_path).missing() == [0, 1, 2]


@pytest.mark.parametrize("damage", ["flipped", 1, 400])
def test_damaged_piece_is_not_read_as_if_it_were_sound(tmp_path, damage):
    template = xr.Dataset(coords={"step": [0], "parameter": np.arange(500)})
    store = PieceStore(tmp_path / "x.zarr", template, {"vectors": (("step", "parameter"), "float32")}, dim="step")
    store.write(0, vectors=np.random.default_rng(0).standard_normal(500))
    (file,) = (tmp_path / "x.zarr" / "vectors").glob("[0-9]*")
    if damage == "flipped":
        flip_bit(file, file.stat().st_size // 2)
    else:
        file.write_bytes(file.read_bytes()[:-damage])
    with pytest.raises((ValueError, RuntimeError, OSError)):
        store.dataset().load()


def test_blocks_along_a_second_dimension_are_pieces_of_their_own(tmp_path):
    store = open_blocks(tmp_path)
    assert (store.parts, store.pieces) == (4, 12)  # vectors 0-1, 2-3, 4; and what has no vector
    assert store.blocks == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert PieceStore.load(store.path) is None
    whole = fill_blocks(store, reversed(store.missing()))
    dataset = PieceStore.load(store.path)
    assert dataset["gradient"].values.tolist() == whole.tolist()
    assert dataset["distance"].values.tolist() == [0, 10, 20]
    with pytest.raises(KeyError, match=r"loss.*are not variables of piece 0"):
        store.write(0, loss=np.zeros(2))


def test_variables_are_in_alphabetical_order_whoever_lists_them(tmp_path):
    store = open_blocks(tmp_path)
    fill_blocks(store)
    names = list(PieceStore.load(store.path).data_vars)
    assert names == sorted(names)


def test_store_stays_cut_as_it_was_begun(tmp_path):
    fill_blocks(open_blocks(tmp_path, size=2), [0, 3, 5])
    again = open_blocks(tmp_path, size=5)
    assert again.parts == 4
    assert again.missing() == [1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert PieceStore.open(again.path).parts == 4


def test_one_block_is_no_cut(tmp_path):
    assert open_blocks(tmp_path, size=5).parts == 1
    assert open_blocks(tmp_path, size=5).pieces == 3


def damage_file(file, damage):
    if damage == "flipped":
        flip_bit(file, file.stat().st_size - 1)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        file.unlink()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost"])
@pytest.mark.parametrize(
    ("file", "number"), [("gradient/1.0.2", 6), ("loss/2.0", 11), ("distance/0", 3)], ids=["block", "row", "number"]
)
def test_damaged_piece_is_named_and_counts_as_missing_once_healed(tmp_path, damage, file, number):
    store = open_blocks(tmp_path)
    fill_blocks(store)
    before = folder_bytes(tmp_path)
    damage_file(store.path / file, damage)
    assert store.damaged() == {number: [store.path / file]}
    with pytest.warns(UserWarning, match=f"1 files are damaged.*{file}"):
        assert store.repair_pieces() == [store.path / file]
    assert store.missing() == [number]
    fill_blocks(store)
    assert folder_bytes(tmp_path) == before
    assert store.damaged() == {}


def test_damaged_mark_counts_as_missing(tmp_path):
    store = open_blocks(tmp_path)
    fill_blocks(store)
    before = folder_bytes(tmp_path)
    flip_bit(store.path / "_done" / "4", -1)
    assert store.missing() == [4]
    assert PieceStore.load(store.path) is None
    fill_blocks(store)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("file", ["text/0", "step/0", ".zattrs", "loss/.zarray", ".zgroup"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost"])
def test_damaged_coordinates_and_metadata_are_made_again(tmp_path, file, damage):
    fill_blocks(open_blocks(tmp_path))
    before = folder_bytes(tmp_path)
    damage_file(tmp_path / "x.zarr" / file, damage)
    with pytest.raises(DamagedFile, match=f"{file} is damaged"):
        PieceStore.open(tmp_path / "x.zarr")
    assert PieceStore.load(tmp_path / "x.zarr") is None
    assert open_blocks(tmp_path).missing() == []
    assert folder_bytes(tmp_path) == before


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    store = open_blocks(tmp_path)
    fill_blocks(store)
    before = folder_bytes(tmp_path)
    (store.path / "loss" / "1.0.1a2b.partial").write_bytes(b"half")
    store.repair_pieces()
    assert folder_bytes(tmp_path) == before


def test_store_in_an_object_store_has_the_bytes_of_one_on_disk(tmp_path):
    remote = UPath("memory://pieces")
    store = open_blocks(remote)
    whole = fill_blocks(store)
    fill_blocks(open_blocks(tmp_path))
    files = {file.relative_to(remote).as_posix(): file.read_bytes() for file in remote.rglob("*") if file.is_file()}
    assert files == folder_bytes(tmp_path)
    assert PieceStore.load(store.path)["gradient"].values.tolist() == whole.tolist()
    file = store.path / "gradient" / "1.0.2"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="damaged"):
        store.repair_pieces()
    assert PieceStore.open(store.path).missing() == [6]
