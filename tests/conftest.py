import os
import pathlib
import shutil

import pytest
import torch
from cases import TINY_RUN, problem
from hypothesis import settings

from polca_lib.tasks.run import Run

# On a busy machine an example may take long: that says nothing about the library.
settings.register_profile("polca", deadline=None, max_examples=30, database=None)
settings.load_profile("polca")


_SLOWEST = ("test_notebooks.py", "test_faults.py", "test_engine.py", "test_language_study.py", "test_explorer.py")


def pytest_collection_modifyitems(items):
    """The slowest files come first, so that with two workers none of them is left for the end."""
    items.sort(key=lambda item: _SLOWEST.index(item.path.name) if item.path.name in _SLOWEST else len(_SLOWEST))


_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")


@pytest.fixture(scope="session", autouse=True)
def runs_folder(tmp_path_factory):
    """Where runs lie: nothing is written in the checkout."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLCA_RUNS", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """Work this small only loses by threads, and by processes that joblib starts for each core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["mlp", "attention"])
def case(request):
    """A tiny token loss in float64 with a point and a batch."""
    return problem(request.param)


@pytest.fixture(scope="session")
def run(runs_folder):
    """A whole run in miniature; all its stages are computed."""
    run = Run.from_preset("smoke", **TINY_RUN)
    _ = run.projections
    return run


@pytest.fixture
def read_only(monkeypatch):
    """Any attempt to write below a folder fails, as on a read-only disk."""

    def lock(folder):
        real = os.open, pathlib.Path.mkdir, io_open

        def refuse(path):
            raise OSError(30, "Read-only file system", str(path))

        def os_open(path, flags, *more, **options):
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return refuse(path) if writes and str(folder) in str(path) else real[0](path, flags, *more, **options)

        def mkdir(self, *arguments, **options):
            return refuse(self) if str(folder) in str(self) else real[1](self, *arguments, **options)

        def opened(self, mode="r", *arguments, **options):
            return (
                refuse(self)
                if str(folder) in str(self) and set(mode) & set("wax+")
                else real[2](self, mode, *arguments, **options)
            )

        monkeypatch.setattr(os, "open", os_open)
        monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
        monkeypatch.setattr(pathlib.Path, "open", opened)
        monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and str(folder) in str(path)))

    io_open = pathlib.Path.open
    return lock


@pytest.fixture(scope="session")
def browser():
    """Chromium or Chrome, headless; without one, tests that need it are skipped, or fail if one is required."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("POLCA_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        problem = "no browser: install chromium, or set POLCA_BROWSER to a Chromium or Chrome"
        (pytest.fail if os.environ.get("POLCA_REQUIRE_BROWSER") else pytest.skip)(problem)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        browser.close()
