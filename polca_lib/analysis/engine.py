"""One loop for all work: tasks that read from and write to storage, in process or by an engine of joblib.

Tasks return nothing: what they made is in storage, and what is missing there is what is still to be done. So it does
not matter who did a task, or how often, and a worker that dies costs no more than what it was about to do.
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

# Dask has workers give memory back to the system at once. Tensors are then mapped and zeroed anew for each operation,
# and two workers that do so side by side take nearly twice the time.
_DASK = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}

_ANSWER = 20  # seconds in which a scheduler must answer
_PATIENCE = 3  # times that an engine may break down with no task done in between


class EngineFailure(RuntimeError):
    """An engine could not be had, or broke down time and again."""


class Portable:
    """A callable that travels to workers, with code that is not installed there.

    Args:
        function: of one task.
        folders: that hold modules it needs; they are put on the path of workers, which must see them, too.
    """

    def __init__(self, function: Callable[[Any], None], folders: Sequence[str] = ()):
        self.function, self.folders = function, tuple(folders)

    def __call__(self, task: Any) -> None:
        """Carry out one task.

        Raises:
            TaskFailure: it raised; holds the exception, so that it is not taken for one of the engine.
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
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    return Portable(pickle.loads(content), folders)


class TaskFailure(Exception):
    """What a task raised, on its way from a worker."""

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        # Tracebacks do not travel.
        told = "in a worker:\n" + "".join(traceback.format_exception(self.error))
        try:
            error = pickle.loads(pickle.dumps(self.error))
        except Exception:
            error = RuntimeError(f"{type(self.error).__name__}: {self.error}")
        error.add_note(told)
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
    """Carry out tasks until none is missing, by the engine that ``joblib.parallel_config`` has set; else in process.

    Tasks that are lost because a worker died are given to others. If the engine itself breaks down it is asked anew, as
    long as something gets done in between.

    Args:
        function: of one task, which stores what it makes; picklable, for engines other than the process itself.
        missing: tasks that storage still lacks, in order.
        total: tasks there are in all.
        description, unit: for the progress bar.
        folders: see :class:`Portable`.

    Raises:
        EngineFailure: the engine broke down several times in a row without a task done.
        Exception: what a task raised; what others finished stays.
    """
    failures, tasks, portable = 0, missing(), Portable(function, folders)
    with progress(desc=description, unit=unit, total=total, done=total - len(tasks)) as bar:
        while tasks:
            try:
                _Parallel(bar)(joblib.delayed(portable)(task) for task in tasks)
            except TaskFailure as failure:
                raise failure.error from None
            except Exception as error:
                left = missing()
                failures = 0 if len(left) < len(tasks) else failures + 1
                if failures == _PATIENCE:
                    raise EngineFailure(
                        f"{description}: the engine broke down {failures} times in a row ({type(error).__name__}: "
                        f"{error}); what was finished is kept. Workers may lack memory, or a module they can't import"
                    ) from error
                tqdm.write(f"{description}: {type(error).__name__}, {len(left)} tasks are given out again")
                time.sleep(failures)
            else:
                if len(missing()) >= len(tasks):
                    raise EngineFailure(
                        f"{description}: {len(tasks)} tasks were carried out, but nothing of them is stored; do workers"
                        " see the same folder? It must be on a disk that all share, or in an object store"
                    )
            tasks = missing()
            bar.n = total - len(tasks)
            bar.refresh()


class _Parallel(joblib.Parallel):
    """Joblib's loop, which tells a progress bar of finished tasks whatever the engine."""

    def __init__(self, bar: tqdm):
        super().__init__(batch_size=1, pre_dispatch="2*n_jobs")
        self._bar, self._before = bar, bar.n

    def print_progress(self) -> None:
        self._bar.n = self._before + self.n_completed_tasks
        self._bar.update(0)


@contextlib.contextmanager
def parallel_backend(
    name: EngineName = "in-process", *, workers: int | None = None, address: str | None = None
) -> Iterator[None]:
    """Have :func:`carry_out` use an engine within the block.

    Args:
        name: ``in-process``, also within a block of another engine; ``processes`` of this machine (joblib's loky);
            ``dask`` or ``ray``, a cluster.
        workers: processes to use; of a cluster all it has, if not given.
        address: of a running cluster, such as ``tcp://10.0.0.1:8786`` for Dask or ``auto`` for Ray. Without one, a
            cluster of ``workers`` processes is started on this machine and shut down afterwards.

    Raises:
        ValueError: an unknown name, or an address where there is none.
        EngineFailure: the library is not installed, or no cluster answers at the address.
    """
    if name not in get_args(EngineName):
        raise ValueError(f"engine = {name!r} is unknown; allowed: {', '.join(get_args(EngineName))}")
    if address and name not in ("dask", "ray"):
        raise ValueError(f"address = {address!r} is of no use to engine = {name!r}; allowed with: dask, ray")
    if workers is not None and workers < 1:
        raise ValueError(f"workers = {workers}; allowed: 1 or more")
    with contextlib.ExitStack() as stack:
        if name == "in-process":
            stack.enter_context(joblib.parallel_config("sequential"))
        elif name == "processes":
            stack.enter_context(joblib.parallel_config("loky", n_jobs=workers or -1))
        elif name == "dask":
            _dask(stack, workers, address)
        elif name == "ray":
            _ray(stack, workers, address)
        yield


def _dask(stack: contextlib.ExitStack, workers: int | None, address: str | None) -> None:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise EngineFailure(f"engine = 'dask' needs {error.name}; install polca-lib[cluster]") from None
    if not address:
        stack.enter_context(dask.config.set(_DASK))
        local = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        address = stack.enter_context(local)
    try:
        client = stack.enter_context(Client(address, timeout=_ANSWER))
    except OSError as error:
        raise EngineFailure(f"no Dask scheduler answers at address = {address!r}: {error}") from None
    stack.enter_context(joblib.parallel_config("dask", client=client, wait_for_workers_timeout=60))


def _ray(stack: contextlib.ExitStack, workers: int | None, address: str | None) -> None:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise EngineFailure(f"engine = 'ray' needs {error.name}; install polca-lib[cluster]") from None
    if not ray.is_initialized():
        try:
            ray.init(
                address=address, num_cpus=None if address else workers, include_dashboard=False, log_to_driver=False
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise EngineFailure(f"no Ray cluster answers at address = {address!r}: {error}") from None
        stack.callback(ray.shutdown)
    register_ray()
    stack.enter_context(joblib.parallel_config("ray", n_jobs=workers or -1))
