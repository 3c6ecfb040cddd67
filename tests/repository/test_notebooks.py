"""The notebooks by papermill at preset smoke, the book from what came out, and nbval on the same copies."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import nbformat
import pytest
from test_prose import overflows
from warm_kernels import warm_kernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]

# These read what is kept in data and benchmarks: they show the same at every preset, and on every machine.
SHOW_STUDIES = [name for name in NAMES if name[:2] in ("00", *build.KEPT)]


def run(*command, env, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=ROOT, **kwargs)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("book")


@pytest.fixture(scope="module")
def kernel():
    """With one thread, in the build and in nbval: sums differ in their last digits by the number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with warm_kernels() as name:
            yield name


@pytest.fixture(scope="module")
def env(place, kernel):
    own = {"POLCA_RUNS": str(place / "runs"), "POLCA_RESULTS": str(place / "results")}
    return {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def book(place, env):
    """The folder of a book built at preset smoke; any warning of the build is an error."""
    done = run(sys.executable, "book/build.py", "--preset", "smoke", "--output", place / "_build", env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "_build" / "smoke"


def test_every_page_is_built_and_shows_its_numbers(book):
    pages = [
        *(f"notebooks/{name}" for name in NAMES),
        "book/api",
        "book/glossary",
        "book/errata",
        "book/rerun",
        "book/references",
    ]
    for page in pages:
        html = (book / "html" / f"{page}.html").read_text()
        assert "{result}" not in html
        assert "Traceback" not in html
    assert "preset of this build: <code" in (book / "html" / "notebooks" / "00_summary.html").read_text()


def test_figures_and_tables_stand_in_the_pages_with_captions_and_in_files(book):
    html = (book / "html" / "notebooks" / "05_polca.html").read_text()
    assert html.count("<strong>Figure ") == 2
    assert 'id="fig-polca-clusters"' in html
    files = re.findall(r'="(\.\./_images/\w+\.(?:svg|csv))"', html)
    assert len(files) > 2  # two figures and at least one table
    assert all((book / "html" / "notebooks" / file).exists() for file in files)


def test_pages_are_light_and_load_nothing_that_they_do_not_use(book):
    pages = [path for path in (book / "html").rglob("*.html") if "_static" not in path.parts]  # a report stands alone
    assert len(pages) > 20
    for page in pages:
        html = page.read_text()
        assert len(html) < 1.5e6, page.name
        assert "fontawesome" not in html.lower(), page.name
        assert "thebe" not in html.lower(), page.name
        assert "data:image/svg" not in html, page.name


def test_no_page_is_wider_than_the_window(book, browser):
    pages = list((book / "html").glob("*/*.html"))
    wide = {page.stem: found for page in pages if any((found := overflows(browser, page)).values())}
    assert len(pages) > 20
    assert not wide


@pytest.mark.parametrize("name", NAMES)
def test_notebook_writes_finite_numbers_with_provenance(book, place, name):
    numbers = json.loads((place / "results" / "smoke" / f"{name}.json").read_text())
    assert {"preset", "seed", "device"} <= numbers["provenance"].keys()
    values = [v for v in numbers.values() if isinstance(v, int | float)]
    assert all(math.isfinite(v) for v in values)
    assert len(numbers) > 1


def test_nbval_reproduces_every_page(book, kernel, env):
    """Strictly: as kept in the repository where a page shows kept studies, as executed above where it shows a run."""
    executed, kept = book / "source" / "notebooks", ROOT / "notebooks"
    pages = [(kept if name in SHOW_STUDIES else executed) / f"{name}.ipynb" for name in NAMES]
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--color=no"]
    command += ["--nbval", "--nbval-kernel-name", kernel]
    with ThreadPoolExecutor() as pool:  # two at a time, as they were built
        both = list(pool.map(lambda part: run(*command, *part, env=env), (pages[::2], pages[1::2])))
    for done in both:
        assert done.returncode == 0, done.stdout[-4000:]
        assert " passed" in done.stdout


def structure(path):
    cells = nbformat.read(path, 4).cells
    cells = [c for c in cells if "injected-parameters" not in c.metadata.get("tags", [])]
    # Progress bars of what had to be computed go to stderr, which pages leave out.
    shown = [[o.output_type for o in c.get("outputs", []) if o.get("name") != "stderr"] for c in cells]
    return [(c.cell_type, outputs) for c, outputs in zip(cells, shown, strict=True)]


def test_another_seed_and_order_give_other_numbers_on_the_same_page(book, place, kernel, env):
    first = json.loads((place / "results" / "smoke" / "05_polca.json").read_text())
    copy = place / "other.ipynb"
    done = run(
        "papermill", "notebooks/05_polca.ipynb", copy, "--kernel", kernel,
        "-p", "preset", "smoke", "-p", "seed", "1", "-p", "order", "trapezoid",
        env={**env, "POLCA_RESULTS": str(place / "other")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads((place / "other" / "smoke" / "05_polca.json").read_text())
    assert other["order"] == "trapezoid"
    assert other["provenance"]["seed"] == "1"
    assert other["per_vector"] != first["per_vector"]
    assert structure(copy) == structure(book / "source" / "notebooks" / "05_polca.ipynb")


def test_papermill_explains_the_parameters(env):
    done = run("papermill", "--help-notebook", "notebooks/05_polca.ipynb", env=env)
    for text in ("order: str", "first, second, exact or trapezoid", "seed: int"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("sede=1", ["no notebook has a parameter 'sede'", "seed"]),
        ("preset=desktop", ["preset = 'desktop' is unknown", "laptop"]),
        ("vectors=3", ["vectors = 3; allowed: list, such as [3]"]),
        ("device=abacus", ["device = 'abacus' is not on this machine", "cpu"]),
    ],
)
def test_builder_refuses_unknown_names_and_values(place, monkeypatch, capsys, assignment, words):
    monkeypatch.setattr(
        sys, "argv", ["build.py", "--preset", "smoke", "--output", str(place / "refused"), "--set", assignment]
    )
    with pytest.raises(SystemExit, match="2"):
        build.main()
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
