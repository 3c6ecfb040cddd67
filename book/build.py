"""Execute the notebooks by papermill and build the book from what came out.

    python book/build.py --preset laptop [--set seed=1 --set order=trapezoid]

Executed notebooks, and a copy of the prose, go to ``_build/<preset>/source``, the pages to
``_build/<preset>/html``, the numbers to ``results/<preset>/``. The notebooks of the checkout stay as they are,
unless ``--in-place`` asks to keep the executed ones there (and builds no pages).
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import joblib
import nbformat
import papermill
from plotly.offline import get_plotlyjs
from polca_paper.tables import results_folder
from traitlets.config import Config
from warm_kernels import warm_kernels

from polca_lib.report.explorer import PLOTLY_FILE
from polca_lib.storage.hashing import hash_json
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import PRESET_NAMES, RunSettings, parse_assignments

ROOT = Path(__file__).parents[1]
README_PICTURE = "book/_static/polca-laptop.png"
AT_ONCE = 2  # notebooks; much of the time of one is starting its kernel, and importing

KEPT = ("07", "08", "09", "10", "11", "12", "15", "18", "19", "20")
"""Pages of kept studies and records alone: they show the same at every preset, and on every machine."""


def make(source: Path, target: Path, parameters: dict[str, Any], kernel: str) -> None:
    """Take a page of kept studies as it is in the repository if nothing has changed that it shows; else execute it."""
    notebook = nbformat.read(source, 4)
    about = notebook.metadata.get("polca", {})
    own = {name: ast.literal_eval(p["default"]) for name, p in papermill.inspect_notebook(str(source)).items()}
    asked = {name: value for name, value in parameters.items() if own.get(name, value) != value and name != "preset"}
    now = {"executed": fingerprint(notebook, "laptop"), "shown": shown_files()}
    if source.name[:2] not in KEPT or asked or now != {name: about.get(name) for name in now}:
        execute(source, target, parameters, kernel)
        return
    print(f"unchanged: {source.name}", flush=True)
    note = "This build did not execute this page again: neither the page nor any study has changed since (hash `{}`)."
    notebook.cells.append(nbformat.v4.new_markdown_cell(note.format(now["shown"]), id="unchanged"))
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    file = results_folder(parameters["preset"]) / f"{source.stem}.json"
    file.write_text(json.dumps(about["numbers"], indent=1))


def shown_files() -> str:
    """Hash of all that pages of kept studies show: studies, records of benchmarks, and the code that draws them."""
    files = (path for name in ("data", "benchmarks", "notebooks/polca_paper") for path in (ROOT / name).rglob("*"))
    paths = {path.relative_to(ROOT): path for path in sorted(files) if path.is_file()}
    kept = {name: path for name, path in paths.items() if not {"runs", "__pycache__"} & {*name.parts}}
    return hash_json({str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()})[:12]


def execute(source: Path, target: Path, parameters: dict[str, Any], kernel: str) -> None:
    """Execute one notebook with those of ``parameters`` that it has and that differ from its own.

    Raises:
        RuntimeError: a cell fails.
    """
    print(f"running {source.name}", flush=True)
    own = {name: ast.literal_eval(p["default"]) for name, p in papermill.inspect_notebook(str(source)).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as sockets:  # of its own: their paths must be short, and no other's
            notebook = papermill.execute_notebook(
                str(source),
                str(target),
                {name: value for name, value in parameters.items() if name in own and own[name] != value},
                kernel_name=kernel,
                cwd=str(ROOT),
                progress_bar=False,
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            )
    except papermill.PapermillExecutionError as error:  # names the cell, but not the page
        raise RuntimeError(f"{source.name}: {error}") from None
    # Papermill's notes and progress bars hold paths and times of this machine.
    for item in (notebook, *notebook.cells):
        for notes in ("papermill", "execution"):
            item.metadata.pop(notes, None)
        if "outputs" in item:
            item.outputs = [output for output in item.outputs if output.get("name") != "stderr"]
    notebook.metadata["polca"] = {"executed": fingerprint(notebook, parameters["preset"])}
    if source.name[:2] in KEPT:
        numbers = json.loads((results_folder(parameters["preset"]) / f"{source.stem}.json").read_text())
        notebook.metadata["polca"] |= {"shown": shown_files(), "numbers": numbers}
    nbformat.write(notebook, target)


def fingerprint(notebook: nbformat.NotebookNode, preset: str) -> str:
    """Hash of what outputs hang on: code cells, and the stages of runs, which are named by all of their settings.

    It does not know whether the library computes other numbers than it did: that takes an execution, by nbval.
    """
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hash_json([code, *(Run.from_preset(preset, task=task).keys for task in ("addition", "grammar"))])[:12]


def check_parameters(notebooks: list[Path], parameters: dict[str, Any]) -> None:
    """Refuse, before anything runs, names that no notebook has (papermill would only warn) and values not allowed.

    Raises:
        ValueError: names the parameter and what is allowed.
    """
    known = sorted({name for notebook in notebooks for name in papermill.inspect_notebook(str(notebook))})
    for name in parameters:
        if name not in known:
            raise ValueError(f"no notebook has a parameter {name!r}; allowed: {', '.join(known)}")
    kinds = {"str": str, "int": int, "bool": bool, "list": list}
    for notebook in notebooks:
        for name, about in papermill.inspect_notebook(str(notebook)).items():
            kind = kinds.get(about["inferred_type_name"], object)
            if name in parameters and not isinstance(parameters[name], kind):
                example = f", such as [{parameters[name]}]" if kind is list else ""
                raise ValueError(f"{name} = {parameters[name]!r}; allowed: {about['inferred_type_name']}{example}")
    RunSettings.from_preset(**{name: parameters[name] for name in ("preset", "seed", "device") if name in parameters})


def build_pages(preset: str, source: Path, target: Path) -> None:
    """Turn prose and executed notebooks into pages; any warning is an error."""
    for name in ("book", "_config.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    (source / "book" / "_static" / PLOTLY_FILE).write_text(get_plotlyjs(), encoding="utf-8")
    results = results_folder(preset)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(source), "--toc", str(source / "book" / "_toc.yml")]
    command += ["--path-output", str(source.parent), "-W", "-n", "--keep-going"]
    subprocess.run(command, check=True, env={**os.environ, "POLCA_BOOK_RESULTS": str(results.resolve())})
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(source.parent / "_build" / "html", target)
    for report in results.glob("*.html"):  # that a notebook made, and its page links
        shutil.copy(report, target / "_static")
    for page in (page for page in target.rglob("*.html") if "_static" not in page.parts):
        page.write_text(lighten(page.read_text(encoding="utf-8"), page.parent, target), encoding="utf-8")
    print(f"\nThe book is at {target / 'index.html'}")


def lighten(page: str, folder: Path, root: Path) -> str:
    """Make a page of the book lighter: figures and tables in files, no scripts that nothing on it needs.

    Args:
        page: HTML.
        folder: that the page lies in, below ``root``, the folder of the book.
    """

    def to_file(match: re.Match[str]) -> str:
        attribute, kind, data = match.groups()
        content = base64.b64decode(data)
        file = root / "_images" / f"{hashlib.sha256(content).hexdigest()[:16]}.{kind.partition('+')[0]}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        return f'{attribute}="{os.path.relpath(file, folder)}"'

    page = re.sub(r'(src|href)="data:(?:image|text)/(svg\+xml|csv);base64,([^"]+)"', to_file, page)
    # Links of tables and captions name notebooks, so that they work in Jupyter, too.
    page = re.sub(r'(href="(?![^"]*_sources/)[^":]+)\.(?:ipynb|md)(?=[#"])', r"\1.html", page)
    # The theme loads an icon font of 1.5 MB for a dozen signs (see custom.css), and Thebe, which is not used, twice.
    page = re.sub(r"<(script|link)\b[^>]*(?:src|href)=[^>]*(?:fontawesome|thebe)[^>]*>(?:</script>)?", "", page)
    return re.sub(r"<script\b(?:(?!</script>)[\s\S]){0,999}?(?:thebe|kernelName|THEBE)[\s\S]*?</script>", "", page)


def export_figure(notebook: Path, name: str, target: Path) -> None:
    """Write the figure ``name`` of an executed notebook as PNG, for the README."""
    for cell in nbformat.read(notebook, 4).cells:
        if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name:
            image = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
            target.write_bytes(base64.b64decode(image))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESET_NAMES, default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another notebook parameter")
    parser.add_argument("--in-place", action="store_true", help="keep the executed notebooks in notebooks/; no pages")
    parser.add_argument("--output", type=Path, default=ROOT / "_build", help="folder for what is built")
    arguments = parser.parse_args()
    parameters: dict[str, Any] = {"preset": arguments.preset, **parse_assignments(arguments.set)}
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    try:
        check_parameters(notebooks, parameters)
    except ValueError as error:
        parser.error(str(error))
    folder = arguments.output.resolve() / arguments.preset
    shutil.rmtree(folder / "source", ignore_errors=True)
    place = ROOT / "notebooks" if arguments.in_place else folder / "source" / "notebooks"
    # Threads of one kernel that wait for work must not keep the other from it, nor two kernels one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(joblib.cpu_count() // AT_ONCE, 1)))
    way = execute if arguments.in_place else make
    with warm_kernels() as kernel:
        # The last pages first: they take longest.
        own = (joblib.delayed(way)(one, place / one.name, parameters, kernel) for one in reversed(notebooks))
        joblib.Parallel(n_jobs=AT_ONCE, prefer="threads")(own)
    if arguments.in_place:
        export_figure(ROOT / "notebooks" / "06_orders.ipynb", "fig-carry", ROOT / README_PICTURE)
    else:
        build_pages(arguments.preset, folder / "source", folder / "html")


if __name__ == "__main__":
    main()
