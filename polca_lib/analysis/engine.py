"""Carry out tasks in this process or with an engine of joblib.

Tasks return nothing: they write to storage, and what storage lacks is still to do. So any worker may carry out any
task, even twice, and a worker that dies only loses its current task.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import cloudpickle
import joblib
from tqdm import tqdm

from polca_lib.storage.progress import progress

EngineName = Literal["in-process", "processes", "dask", "ray"]

# Dask makes workers return memory to the system at once. Each operation then maps and clears memory again, which nearly
# doubles the time of two workers on one machine.
_DASK = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}

_ANSWER = 20  # seconds to wait for a scheduler
_PATIENCE = 3  # failures of an engine in a row, with no task done in between, before giving up


class EngineFailure(RuntimeError):
    """An engine could not start, or failed repeatedly."""


class Portable:
    """A callable that travels to workers, with code that is not installed there.

    Args:
        function: carries out one task.
        folders: folders with modules that it needs, added to ``sys.path`` of workers; workers must see them, too.
    """

    def __init__(self, function: Callable[[Any], None], folders: Sequence[str] = ()):
        self.function, self.folders = function, tuple(folders)

    def __call__(self, task: Any) -> None:
        """Carry out one task.

        Raises:
            TaskFailure: the task raised an exception; wrapped to tell it from exceptions of the engine.
        """
        try:
            self.function(task)
        except Exception as error:
            raise TaskFailure(error) from None

    @cached_property
    def _content(self) -> bytes:
        return cloudpickle.dumps(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.folders, self._content)


def _unpack(folders: tuple[str, ...], content: bytes) -> Portable:
    """Load a :class:`Portable` in a worker."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    return Portable(pickle.loads(content), folders)


class TaskFailure(Exception):
    """Carries the exception of a task from a worker to the caller."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        # Tracebacks can't be pickled: send the text as a note. Some exceptions can't be pickled: send their message.
        note = "in a worker:\n" + "".join(traceback.format_exception(self.error))
        try:
            error = pickle.loads(pickle.dumps(self.error))
        except Exception:
            error = RuntimeError(f"{type(self.error).__name__}: {self.error}")
        error.add_note(note)
        return TaskFailure, (error,)


def carry_out(
    function: Callable[[Any], None],
    missing: Callable[[], Sequence[Any]],
    *,
    total: int,
    description: str,
    unit: str,
    folders: Sequence[str] = (),
) -> None:
    """Carry out tasks until none is missing, with the engine of ``joblib.parallel_config`` or in this process.

    Tasks of dead workers are assigned again. An engine that fails is tried again as long as it finishes tasks.

    Args:
        function: carries out one task and stores the result; other engines than ``in-process`` pickle it.
        missing: returns the tasks that storage lacks, in order.
        total: number of all tasks, done or not.
        folders: see :class:`Portable`.

    Raises:
        EngineFailure: the engine failed several times in a row without finishing a task.
        Exception: a task raised it; finished tasks stay.
    """
    failures, tasks, portable = 0, missing(), Portable(function, folders)
    with progress(desc=description, unit=unit, total=total, done=total - len(tasks)) as bar:
        while tasks:
            try:
                _Parallel(bar)(joblib.delayed(portable)(task) for task in tasks)
            except TaskFailure as failure:
                raise failure.error from None
            except Exception as error:
                # The engine failed: try again, but give up after several failures without progress.
                remaining = missing()
                failures = 0 if len(remaining) < len(tasks) else failures + 1
                if failures == _PATIENCE:
                    raise EngineFailure(
                        f"{description}: the engine broke down {failures} times in a row ({type(error).__name__}: "
                        f"{error}); what was finished is kept. Check that workers have enough memory and can import "
                        "all modules"
                    ) from error
                tqdm.write(f"{description}: {type(error).__name__}, {len(remaining)} tasks are assigned again")
                time.sleep(failures)
            else:
                # Stop if nothing arrived in storage, instead of repeating the tasks forever.
                if len(missing()) >= len(tasks):
                    raise EngineFailure(
                        f"{description}: {len(tasks)} tasks were carried out, but nothing of them is stored; do workers"
                        " see the same folder? Use a shared disk or an object store"
                    )
            tasks = missing()
            bar.n = total - len(tasks)
            bar.refresh()


class _Parallel(joblib.Parallel):
    """Parallel loop of joblib that updates a progress bar with any engine."""

    def __init__(self, bar: tqdm):
        super().__init__(batch_size=1, pre_dispatch="2*n_jobs")
        self._bar, self._done_before = bar, bar.n

    def print_progress(self) -> None:
        self._bar.n = self._done_before + self.n_completed_tasks
        self._bar.update(0)


@contextlib.contextmanager
def parallel_backend(
    name: EngineName = "in-process", *, workers: int | None = None, address: str | None = None
) -> Iterator[None]:
    """Let :func:`carry_out` use an engine within the block.

    Args:
        name: ``in-process``, also inside a block of another engine; ``processes`` on this machine (joblib's loky);
            ``dask`` or ``ray`` for a cluster.
        workers: number of processes; all of the machine or cluster if not given.
        address: address of a running cluster, such as ``tcp://10.0.0.1:8786`` for Dask or ``auto`` for Ray. Without
            one, a cluster of ``workers`` processes runs on this machine until the block ends.

    Raises:
        ValueError: the name is unknown, or the engine takes no address.
        EngineFailure: the library is not installed, or no cluster answers at the address.
    """
    if name not in get_args(EngineName):
        raise ValueError(f"engine = {name!r} is unknown; allowed: {', '.join(get_args(EngineName))}")
    if address and name not in ("dask", "ray"):
        raise ValueError(f"address = {address!r} can't be used with engine = {name!r}; allowed with: dask, ray")
    if workers is not None and workers < 1:
        raise ValueError(f"workers = {workers}; allowed: 1 or more")
    with contextlib.ExitStack() as stack:
        try:
            if name == "in-process":
                config = joblib.parallel_config("sequential")
            elif name == "processes":
                config = joblib.parallel_config("loky", n_jobs=workers or -1)
            else:
                config = {"dask": _dask, "ray": _ray}[name](stack, workers, address)
        except ImportError as error:
            raise EngineFailure(f"engine = {name!r} needs {error.name}; install polca-lib[cluster]") from None
        with config:
            yield


def _dask(stack: contextlib.ExitStack, workers: int | None, address: str | None) -> joblib.parallel_config:
    """Connect to a Dask cluster, or start one that ends with the stack."""
    import dask
    from distributed import Client, LocalCluster

    if not address:
        stack.enter_context(dask.config.set(_DASK))
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        address = stack.enter_context(cluster)
    try:
        client = stack.enter_context(Client(address, timeout=_ANSWER))
    except OSError as error:
        raise EngineFailure(f"no Dask scheduler answers at address = {address!r}: {error}") from None
    return joblib.parallel_config("dask", client=client, wait_for_workers_timeout=60)


def _ray(stack: contextlib.ExitStack, workers: int | None, address: str | None) -> joblib.parallel_config:
    """Connect to a Ray cluster, or start one that ends with the stack."""
    import ray
    from ray.util.joblib import register_ray

    if not ray.is_initialized():
        processes = None if address else workers
        try:
            ray.init(address=address, num_cpus=processes, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineFailure(f"no Ray cluster answers at address = {address!r}: {error}") from None
        stack.callback(ray.shutdown)
    register_ray()
    return joblib.parallel_config("ray", n_jobs=workers or -1)
