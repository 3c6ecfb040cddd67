"""Processes that start together, die, or work where nothing can be locked."""

import errno
import fcntl
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time

import pytest
from cases import folder_bytes

from polca_lib.storage import artefacts
from polca_lib.storage.artefacts import Artefact, DamagedFile, delete_partials, write_atomically

pytestmark = pytest.mark.slow

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["polca_lib.storage.artefacts"])

STARTS = 70  # of three processes: over 200 in all


def start_again_and_again(folder, barrier):
    """Open an artefact at the same moment as the other process does, and work on it."""
    for number in range(STARTS):
        barrier.wait(timeout=30)
        artefact = Artefact.open(folder / str(number), "basis", {"number": number}, {})
        write_atomically(artefact.path / f"before-{os.getpid()}", b"unlocked")
        with artefact.at_work():
            write_atomically(artefact.path / "result", str(number).encode())


def test_processes_that_start_together_do_not_tidy_each_others_files_away(tmp_path):
    # More processes than cores: the machine is loaded.
    barrier = _FORK.Barrier(3)
    processes = [_FORK.Process(target=start_again_and_again, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for number in range(STARTS):
        files = folder_bytes(tmp_path / str(number))
        assert files["result"] == str(number).encode()
        assert len(files["seconds.txt"].split()) == 3
        assert len(files) == 7
        assert not any(name.endswith(".partial") for name in files)


HOST = re.sub(r"\W", "-", platform.node())


@pytest.fixture
def dead():
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["manifest.json", "report [1].html", ".dotted"])
def test_partial_files_of_the_dead_are_deleted_and_those_of_the_living_stay(tmp_path, dead, name):
    def partial(host, process, age=0):
        path = tmp_path / f".{name}.{host}.{process}.0a1b.partial"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
        return path

    gone = [partial(HOST, dead), partial("elsewhere", 1, age=4000), partial(HOST, os.getpid(), age=4000)]
    old = tmp_path / f".{name}.0a1b.partial"  # as version 0.2 named it
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    left = [partial(HOST, os.getppid()), partial("elsewhere", 2), partial("elsewhere", "x")]
    other = tmp_path / f".other.{HOST}.{dead}.0a1b.partial"
    other.touch()
    write_atomically(tmp_path / name, b"whole")
    assert not any(path.exists() for path in [*gone, old])
    assert all(path.exists() for path in [*left, other])
    delete_partials(tmp_path)
    assert not other.exists()
    assert all(path.exists() for path in left)


def test_report_of_a_killed_process_leaves_nothing_once_it_is_written_again(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from polca_lib.storage import artefacts
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
artefacts.write_atomically(Path({str(tmp_path)!r}) / "report.html", b"page")
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(tmp_path / "report.html", b"page")
    assert folder_bytes(tmp_path) == {"report.html": b"page"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
def test_disk_without_locks_is_named_with_the_way_round(tmp_path, monkeypatch, code):
    artefact = Artefact.open(tmp_path / "a", "basis", {}, {})

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = rf"{os.strerror(code)}: it can't be written or locked.*use a folder on a disk that takes.*a/\.lock"
    with pytest.raises(OSError, match=told), artefact.at_work():
        pytest.fail("worked without a lock")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_folder_that_takes_no_files_is_named_with_the_way_round(tmp_path, monkeypatch, code):
    artefact, opened = Artefact.open(tmp_path / "a", "basis", {}, {}), os.open

    def refuse(path, flags, *more, **options):
        if str(path).endswith(".lock"):
            raise OSError(code, os.strerror(code), path)
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: it can't be written or locked"), artefact.at_work():
        pytest.fail("worked without a lock")


def test_errors_of_another_kind_are_told_as_they_are(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        Artefact.open(tmp_path / "a", "basis", {}, {})


def test_key_is_that_of_the_manifest(tmp_path):
    artefact = Artefact.open(tmp_path / "a", "basis", {"seed": (1, 2)}, {"training": "x"})
    assert artefacts.key_of(artefact.path) == artefact.key
    assert artefacts.key_of(tmp_path) is None
    (artefact.path / "manifest.json").write_text("[]")
    assert artefacts.key_of(artefact.path) is None
    assert issubclass(DamagedFile, ValueError)


def test_settings_that_came_later_do_not_hide_what_is_there(tmp_path):
    old = Artefact.of_stage(tmp_path, "basis", {"seed": 0}, {})
    assert Artefact.of_stage(tmp_path, "basis", {"seed": 0}, {}, {"fixed": "x"}) == old
    new = Artefact.of_stage(tmp_path, "basis", {"seed": 1}, {}, {"fixed": "x"})
    assert new == Artefact.of_stage(tmp_path, "basis", {"seed": 1, "fixed": "x"}, {})
    assert new != Artefact.of_stage(tmp_path, "basis", {"seed": 1}, {}, {"fixed": "y"})
    assert Artefact.of_stage(tmp_path, "basis", {"seed": 2}, {}, {}) == Artefact.of_stage(
        tmp_path, "basis", {"seed": 2}, {}
    )
