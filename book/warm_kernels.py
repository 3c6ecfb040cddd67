"""Kernels that start at once: each is forked from one process that has imported what the pages import.

    with warm_kernels() as name:
        papermill.execute_notebook(source, target, kernel_name=name)

The imports of a page take several seconds, and there are some twenty pages. Otherwise these kernels are ordinary ones.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

IMPORTS = (
    "ipykernel.kernelapp",
    "polca_paper.page",
    "polca_paper.study",
    "polca_paper.verdicts",
    "polca_lib.tasks.run",
    "transformer_lens",  # and all else that takes seconds, and that the others import when they need it
    "torch._dynamo",
    "dask.array",
)


@contextmanager
def warm_kernels() -> Iterator[str]:
    """Give the name of a kernel that starts at once, or of the ordinary one where forking is not safe (macOS).

    Kernels have the threads of this process: libraries read OMP_NUM_THREADS when they are imported.
    """
    if sys.platform != "linux":
        yield "python3"
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := f"{folder}/socket")
        listener.listen()
        spec = Path(folder) / "kernels" / "polca-warm" / "kernel.json"
        spec.parent.mkdir(parents=True)
        ask = [sys.executable, __file__, "ask", address, "{connection_file}"]
        spec.write_text(json.dumps({"argv": ask, "display_name": "Python 3", "language": "python"}))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("JUPYTER_PATH"))))
        # Matplotlib reads its backend when it is imported; a kernel would set the same.
        environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        serve = [sys.executable, __file__, "serve", str(listener.fileno())]
        with subprocess.Popen(serve, pass_fds=[listener.fileno()], env=environment) as server:
            listener.close()  # from now on it is the server's: without a server, nobody waits for an answer
            try:
                with patch.dict(os.environ, JUPYTER_PATH=path):
                    yield spec.parent.name
            finally:
                server.terminate()


def serve(listener: socket.socket) -> None:
    """Import what pages need, then fork a kernel for each connection. Connections made before wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that end are not waited for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as pages do, which leave standard error out
        for name in IMPORTS:
            import_module(name)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            be_kernel(connection)
            return
        connection.close()


def be_kernel(connection: socket.socket) -> None:
    """Run the kernel that was asked for, for as long as who asked is there; take signals from there."""
    request = json.loads(connection.makefile("rb", buffering=0).readline())
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [
        "ipykernel_launcher.py",
        "-f",
        request["connection_file"],
        f"--IPKernelApp.parent_handle={os.getppid()}",
    ]

    def obey() -> None:
        while number := connection.recv(1):
            os.kill(os.getpid(), number[0])
        os._exit(1)

    threading.Thread(target=obey, daemon=True).start()
    import_module("ipykernel.kernelapp").launch_new_instance()
    atexit._run_exitfuncs()
    os._exit(0)  # at once: to take all modules down takes a second


def ask(address: str, connection_file: str) -> None:
    """Ask for a kernel, pass interrupts on to it, and end when it ends. Jupyter sees this process as the kernel."""
    request = {"folder": os.getcwd(), "environment": dict(os.environ), "connection_file": connection_file}
    with socket.socket(socket.AF_UNIX) as kernel:
        kernel.connect(address)
        kernel.sendall(json.dumps(request).encode() + b"\n")
        signal.signal(signal.SIGINT, lambda number, _: kernel.sendall(bytes([number])))
        kernel.recv(1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(*sys.argv[2:])
