import json
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
import zarr
from cases import flip_bit, folder_bytes

from polca_lib.artefacts import (
    Artefact,
    ArtefactMismatch,
    DamagedFile,
    PieceStore,
    fingerprint,
    software,
    write_atomically,
)

CONFIG = {"training": {"steps": 100, "betas": [0.9, 0.95]}, "seed": 0}


def open_artefact(path, config=CONFIG, parents=None):
    return Artefact.open(path, "training", config, parents or {})


def test_same_configuration_opens_the_same_folder_without_changing_it(tmp_path):
    first = open_artefact(tmp_path / "a")
    before = folder_bytes(tmp_path)
    assert open_artefact(tmp_path / "a") == first
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "parents", "named"),
    [
        ({**CONFIG, "seed": 1}, {}, r"config\.seed = 0, but config\.seed = 1"),
        ({**CONFIG, "training": {"steps": 200, "betas": [0.9, 0.95]}}, {}, r"config\.training\.steps = 100.*200"),
        ({"training": CONFIG["training"]}, {}, r"config\.seed = 0.*config\.seed = None"),
        (CONFIG, {"data": "abc"}, r"parents\.data = None.*parents\.data = 'abc'"),
    ],
)
def test_folder_of_another_configuration_is_refused_with_the_field_named(tmp_path, config, parents, named):
    open_artefact(tmp_path / "a")
    with pytest.raises(ArtefactMismatch, match=named):
        open_artefact(tmp_path / "a", config, parents)


def test_folder_of_another_stage_is_refused(tmp_path):
    open_artefact(tmp_path / "a")
    with pytest.raises(ArtefactMismatch, match=r"stage = 'training', but stage = 'basis'"):
        Artefact.open(tmp_path / "a", "basis", CONFIG, {})


def test_folder_of_another_format_is_refused(tmp_path, monkeypatch):
    open_artefact(tmp_path / "a")
    monkeypatch.setattr("polca_lib.artefacts.FORMAT_VERSION", 10**6)
    with pytest.raises(ArtefactMismatch, match="format_version"):
        open_artefact(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b'{"stage": "trai', b"\0" * 20, b"\xff\xfe{}", b"[]"])
def test_damaged_manifest_is_refused_by_name(tmp_path, content):
    manifest = open_artefact(tmp_path / "a").path / "manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(ArtefactMismatch, match=r"manifest\.json is damaged.*delete"):
        open_artefact(tmp_path / "a")


def test_key_depends_on_configuration_stage_and_parents(tmp_path):
    keys = [
        open_artefact(tmp_path / "a").key,
        open_artefact(tmp_path / "b", {**CONFIG, "seed": 1}).key,
        open_artefact(tmp_path / "c", parents={"data": "abc"}).key,
        Artefact.open(tmp_path / "d", "basis", CONFIG, {}).key,
    ]
    assert len(set(keys)) == 4
    assert open_artefact(tmp_path / "elsewhere").key == keys[0]


def test_fingerprint_ignores_the_order_of_keys_alone():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})


def test_manifest_says_what_computed(tmp_path):
    recorded = json.loads((open_artefact(tmp_path / "a").path / "manifest.json").read_text())["software"]
    assert recorded == software()
    assert {"commit", "python", "torch", "hdbscan", "machine"} <= set(recorded)


def test_time_adds_up_over_blocks_even_those_that_fail(tmp_path):
    artefact = open_artefact(tmp_path / "a")
    seen = [artefact.seconds]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), artefact.timed():
            raise KeyboardInterrupt
        seen.append(artefact.seconds)
    assert seen[0] == 0
    assert all(earlier <= later for earlier, later in pairwise(seen))
    assert len((artefact.path / "seconds.txt").read_text().split()) == 2


def failing(*_):
    raise OSError("disk full")


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch, before, moment):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)
    content = folder_bytes(tmp_path)
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", failing)
    else:
        monkeypatch.setattr("pathlib.Path.replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert folder_bytes(tmp_path) == content


def test_write_replaces_what_was_there(tmp_path):
    write_atomically(tmp_path / "file", b"old and long")
    write_atomically(tmp_path / "file", b"new")
    assert folder_bytes(tmp_path) == {"file": b"new"}


TEMPLATE = xr.Dataset(coords={"step": [0, 20, 40], "token": [0, 1], "text": ("token", ["a", "bc"])})
VARIABLES = {"loss": (("step", "token"), "float32"), "distance": (("step",), "float64")}


def open_store(path):
    return PieceStore(path / "x.zarr", TEMPLATE, VARIABLES, dim="step")


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
def test_lost_piece_is_named_rather_than_read_as_empty(tmp_path, name):
    store = open_store(tmp_path)
    for index in store.missing():
        store.write(index, **piece(index))
    next(p for p in (store.path / name).iterdir() if p.name.startswith("1")).unlink()
    with pytest.raises(DamagedFile, match=rf"{name} has lost 1 of its pieces; delete"):
        PieceStore.load(store.path)


def test_variable_that_is_not_given_is_empty_rather_than_lost(tmp_path):
    store = open_store(tmp_path)
    for index in store.missing():
        store.write(index, loss=piece(index)["loss"])
    assert bool(PieceStore.load(store.path)["distance"].isnull().all())


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
