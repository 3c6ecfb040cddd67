import json
import os
from itertools import pairwise

import pytest
from cases import folder_bytes

from polca_lib.storage.artefacts import Artefact, ArtefactMismatch, software, write_atomically
from polca_lib.storage.hashing import hash_json

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
    monkeypatch.setattr("polca_lib.storage.artefacts.FORMAT_VERSION", 10**6)
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
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1, "b": [1, 2]}) != hash_json({"a": 1, "b": [2, 1]})


def test_manifest_says_what_computed(tmp_path):
    recorded = json.loads((open_artefact(tmp_path / "a").path / "manifest.json").read_text())["software"]
    assert recorded == software()
    assert {"commit", "python", "torch", "hdbscan", "machine"} <= set(recorded)


def test_time_adds_up_over_blocks_even_those_that_fail(tmp_path):
    artefact = open_artefact(tmp_path / "a")
    seen = [artefact.seconds]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), artefact.at_work():
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
