"""The same work in process, in processes, on Dask and on Ray: same bytes, also when workers are killed."""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pandas as pd
import psutil
import pytest
import torch
from cases import folder_bytes, mlp_batch, project_run, tiny_checkpoints, tiny_config

from polca_lib.analysis.engine import EngineFailure, Portable, TaskFailure, carry_out, parallel_backend
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.analysis.workers import NonFiniteProjection
from polca_lib.method.basis import compute_basis
from polca_lib.storage.pieces import PieceStore

pytestmark = pytest.mark.slow

BATCH = mlp_batch(5, torch.float32)
STEPS = list(range(0, 81, 4))
TOKENS = pd.DataFrame({"number": range(10)})
HERE = str(Path(__file__).parents[1])  # of cases
ENGINES = ("processes", "dask", "ray")

# What the command of a worker has in it; those of Ray are children of its own daemon.
WORKERS = {"processes": "popen_loky", "dask": "multiprocessing", "ray": "ray::PoolActor"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    checkpoints = tiny_checkpoints(path / "checkpoints", STEPS)
    config = tiny_config(**{"basis.k": 3})
    return checkpoints, compute_basis(path / "basis.zarr", config.basis, checkpoints, BATCH, steps=config.basis_steps)


def project(path, made):
    """In blocks: three of vectors, and what has no vector, of 21 checkpoints."""
    torch.set_num_threads(1)
    settings = ProjectionSettings(curvature=False)
    return project_run(path, made[0], STEPS, BATCH, TOKENS, made[1], settings, 1200, folders=[HERE])


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("in-process") / "x.zarr"
    assert project(path, made).sizes == {"step": 21, "token": 10, "vector": 12}
    assert PieceStore.open(path).pieces == 21 * 4
    return folder_bytes(path)


def test_tasks_that_are_done_are_not_given_out_again(tmp_path):
    done = []
    carry_out(done.append, lambda: [t for t in range(5) if t not in done], total=5, description="tasks", unit="task")
    assert done == [0, 1, 2, 3, 4]


def test_tasks_that_leave_nothing_behind_are_an_error_rather_than_done_for_ever():
    with pytest.raises(EngineFailure, match="2 tasks were carried out, but nothing of them is stored; do workers see"):
        carry_out(len, lambda: ["a", "b"], total=2, description="tasks", unit="task")


def test_in_process_is_in_process_also_within_another_engine():
    done = []
    with parallel_backend("processes", workers=2), parallel_backend("in-process"):
        carry_out(
            done.append, lambda: [t for t in range(5) if t not in done], total=5, description="tasks", unit="task"
        )
    assert done == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module", params=ENGINES)
def engaged(request):
    with parallel_backend(request.param, workers=2):
        yield request.param


def test_engine_writes_the_bytes_that_this_process_writes(tmp_path, made, expected, engaged):
    project(tmp_path / "x.zarr", made)
    assert folder_bytes(tmp_path / "x.zarr") == expected


def test_worker_killed_in_the_middle_changes_nothing(tmp_path, made, expected, engaged):
    path, killed = tmp_path / "x.zarr", []

    def kill():
        while not killed:
            time.sleep(0.02)
            if len(list(path.glob("_done/[0-9]*"))) > 10:
                for process in psutil.process_iter(["cmdline"]):
                    if WORKERS[engaged] in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
                        killed.append(process.pid)
                        process.send_signal(signal.SIGKILL)
                        break

    threading.Thread(target=kill, daemon=True).start()
    project(path, made)
    assert killed
    assert {name: b for name, b in folder_bytes(path).items() if not name.endswith(".partial")} == expected


def test_what_a_task_raises_reaches_the_caller_and_the_rest_stays(tmp_path, made, engaged):
    broken = tiny_checkpoints(tmp_path / "checkpoints", STEPS)
    theta = broken.theta(40)
    theta[3] = torch.nan
    broken.save(40, broken.token_loss.unflatten(theta))
    with pytest.raises(
        NonFiniteProjection, match=r"step-00000040\.safetensors holds weights that are not finite"
    ) as told:
        project(tmp_path / "x.zarr", (broken, made[1]))
    assert any("in a worker" in note for note in told.value.__notes__)
    missing = PieceStore.open(tmp_path / "x.zarr").missing()
    assert 0 not in missing
    assert 4 * STEPS.index(40) in missing


def test_engine_that_breaks_down_time_and_again_is_given_up_with_what_to_do(tmp_path):
    def die(task):
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        pytest.raises(EngineFailure, match=r"(?s)broke down 3 times in a row.*what was finished is kept"),
        parallel_backend("processes", workers=2),
    ):
        carry_out(die, lambda: [1, 2], total=2, description="dying", unit="task")


def test_failure_that_does_not_travel_is_told_in_words():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    failure = pickle.loads(cloudpickle.dumps(TaskFailure(Odd(1, 2))))
    assert isinstance(failure.error, RuntimeError)
    assert str(failure.error) == "Odd: 1 and 2"


def test_function_travels_with_the_folder_its_module_is_in(tmp_path):
    (tmp_path / "far_away.py").write_text("def write(path):\n    open(path, 'w').write('there')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        content = cloudpickle.dumps(Portable(importlib.import_module("far_away").write, [str(tmp_path)]))
    finally:
        sys.path.remove(str(tmp_path))
    (tmp_path / "portable").write_bytes(content)
    command = f"import pickle; pickle.load(open({str(tmp_path / 'portable')!r}, 'rb'))({str(tmp_path / 'out')!r})"
    subprocess.run([sys.executable, "-c", command], check=True)
    assert (tmp_path / "out").read_text() == "there"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "slurm"}, r"engine = 'slurm' is unknown; allowed: in-process, processes, dask, ray"),
        ({"name": "processes", "address": "tcp://x:1"}, r"'tcp://x:1' can't be used with engine = 'processes'"),
        ({"name": "dask", "workers": 0}, r"workers = 0; allowed: 1 or more"),
    ],
)
def test_engine_that_cannot_be_is_refused(settings, told):
    with pytest.raises(ValueError, match=told), parallel_backend(**settings):
        pass


def test_cluster_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("polca_lib.analysis.engine._ANSWER", 1)
    with (
        pytest.raises(EngineFailure, match=r"no Dask scheduler answers at address = 'tcp://127\.0\.0\.1:9'"),
        parallel_backend("dask", address="tcp://127.0.0.1:9"),
    ):
        pass
