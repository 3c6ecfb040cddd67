"""Packaging, layout and notebooks as they are kept in the repository."""

import ast
import csv
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import build
import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import polca_lib

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Who may import whom: a file imports its own folder and those to its left.
ORDER = ("derivatives", "storage", "method", "report", "analysis", "tasks", "polca_paper")


def declared(without=()):
    extras = [extra for name, extra in PROJECT["optional-dependencies"].items() if name not in without]
    lines = PROJECT["dependencies"] + [line for extra in extras for line in extra]
    requirements = map(Requirement, lines)
    return {r.name: str(r.specifier) for r in requirements if r.name != PROJECT["name"]}


def test_conda_environment_has_the_dependencies_of_pyproject():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = entries[-1]["pip"]
    assert pip[-1] == "--editable ."
    lines = [*entries[:-1], *pip[:-1]]
    conda = {r.name: str(r.specifier) for r in map(Requirement, lines)}
    assert conda.pop("python") == str(Requirement("python" + PROJECT["requires-python"]).specifier)
    assert conda.pop("make") == conda.pop("pip") == ""
    conda["torch"] = conda.pop("pytorch")
    conda = {name.replace("_", "-"): bounds for name, bounds in conda.items()}
    # The peers of the benchmarks are installed by make benchmarks alone, an object store by make faults.
    assert conda == declared(without=["benchmarks", "faults"])


def test_constraints_pin_every_dependency_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for name, bounds in declared().items():
        assert Requirement(f"{name}{bounds}").specifier.contains(pins[name.lower()]), name
    assert pins["torch"] == "2.13.0"


def test_what_is_pinned_takes_the_oldest_python_that_the_project_takes():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]) for line in lines if line and not line.startswith("#")}
    asked = {one.name: one.metadata.get("Requires-Python") for one in distributions()}
    oldest = PROJECT["requires-python"].removeprefix(">=").partition(",")[0] + ".0"
    late = {name: bounds for name, bounds in asked.items() if bounds and oldest not in SpecifierSet(bounds)}
    assert not [name for name in late if canonicalize_name(name) in pins]


def rooms():
    """Every file of the two packages, with the folder that it stands in."""
    for path in [*(ROOT / "polca_lib").glob("*/*.py"), *(ROOT / "notebooks" / "polca_paper").glob("*.py")]:
        yield path, path.parent.name


def test_library_has_the_folders_of_the_plan_and_no_others():
    found = {path.name for path in (ROOT / "polca_lib").iterdir() if path.name != "__pycache__"}
    assert found == {*ORDER[:-1], "__init__.py", "py.typed"}


def test_no_file_imports_a_folder_to_its_right():
    for path, folder in rooms():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else names
            for name in names:
                target = name.removeprefix("polca_lib.").split(".")[0]
                allowed = ORDER[: ORDER.index(folder) + 1]
                assert target not in ORDER or target in allowed, (
                    f"{path.relative_to(ROOT)} imports {name}; a file in {folder}/ may import {', '.join(allowed)}"
                )


def lines(*folders):
    return sum(len(path.read_text().splitlines()) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_library_stays_thin():
    assert lines("polca_lib") < 11_660
    assert lines("notebooks/polca_paper") < 4_840


def test_continuous_integration_runs_make_test():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_workflows_run_what_the_makefile_has_with_the_least_rights():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ran = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert "concurrency" in workflow
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
        ran += [step["run"].removeprefix("make ") for step in steps if "run" in step]
    assert sorted(ran) == ["book", "test", "validate"]
    assert set(ran) <= set(targets)


def test_citation_and_changelog_have_the_version_of_the_library():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == polca_lib.__version__
    assert str(citation["date-released"]) == newest[2]


def test_a_wheel_holds_the_library_alone_and_says_that_it_is_typed(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    built = {name for name in built if ".egg-info" not in name}
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "polca_lib").rglob("*") if "__pycache__" not in path.parts
    }
    assert built == {name for name in sources if (ROOT / name).is_file()}
    assert "polca_lib/py.typed" in built


def loaded_by(code):
    """Modules that a fresh Python has loaded after ``code``."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_the_library_loads_next_to_nothing():
    assert not loaded_by("import polca_lib") & {"torch", "numpy", "pandas", "xarray", "pydantic"}


@pytest.mark.slow
def test_the_method_loads_nothing_that_reads_text_or_draws():
    modules = [f"polca_lib.method.{path.stem}" for path in (ROOT / "polca_lib" / "method").glob("*.py")]
    loaded = loaded_by(f"import {', '.join(modules)}")
    assert "torch" in loaded
    assert not loaded & {"tokenizers", "spacy", "seaborn", "plotly", "matplotlib"}


@pytest.mark.parametrize("command", [[], ["run"], ["paper"], ["paper", "study"]], ids=" ".join)
def test_help_loads_neither_torch_nor_numpy(command):
    code = f"""
import sys
from polca_lib.analysis.cli import main
sys.argv = ["polca", *{command}, "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code"""
    assert not loaded_by(code) & {"torch", "numpy", "pandas"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_typed_parameters_with_help_first_and_provenance_last(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert "parameters" in cells[0].metadata.tags
    assert re.search(r"^(page|run)\.provenance\(", cells[-1].source, re.MULTILINE)
    parameters = papermill.inspect_notebook(str(path))
    assert len(parameters) == len([line for line in cells[0].source.splitlines() if "=" in line])
    for name, parameter in parameters.items():
        assert parameter["inferred_type_name"] in ("str", "int", "float", "bool", "list"), name
        assert parameter["help"], f"{name} has no help"
        ast.literal_eval(parameter["default"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_kept_executed_and_without_errors(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_shows_what_its_code_cells_gave(path):
    notebook = nbformat.read(path, 4)
    executed = notebook.metadata.get("polca", {}).get("executed")
    stale = f"{path.name} was changed, or settings of its run were, after it was executed: run make notebooks"
    assert executed == build.fingerprint(notebook, "laptop"), stale


def test_a_fingerprint_is_of_code_and_settings_but_not_of_prose():
    notebook = nbformat.read(NOTEBOOKS[0], 4)
    first = build.fingerprint(notebook, "laptop")
    next(c for c in notebook.cells if c.cell_type == "markdown").source += " More prose."
    assert build.fingerprint(notebook, "laptop") == first
    assert build.fingerprint(notebook, "smoke") != first
    next(c for c in notebook.cells if c.cell_type == "code").source += "\n1 + 1"
    assert build.fingerprint(notebook, "laptop") != first


@pytest.mark.parametrize("change", ["", "code", "study", "parameter", "preset"])
def test_a_page_of_kept_studies_is_executed_only_if_something_that_it_shows_has_changed(change, tmp_path, monkeypatch):
    monkeypatch.setenv("POLCA_RESULTS", str(tmp_path))
    executed = []
    monkeypatch.setattr(build, "execute", lambda source, *arguments: executed.append(source))
    notebook = nbformat.read(ROOT / "notebooks" / "10_chance.ipynb", 4)
    notebook.metadata["polca"]["shown"] = build.shown_files()
    if change == "code":
        notebook.cells[-1].source += "\n1 + 1"
    if change == "study":
        notebook.metadata["polca"]["shown"] = "another"
    nbformat.write(notebook, tmp_path / "10_chance.ipynb")
    parameters = {"preset": "smoke" if change == "preset" else "laptop"}
    parameters |= {"study": "paper-whole"} if change == "parameter" else {}
    build.make(tmp_path / "10_chance.ipynb", tmp_path / "made" / "10_chance.ipynb", parameters, "python3")
    assert bool(executed) == (change in ("code", "study", "parameter"))
    if not executed:
        made = nbformat.read(tmp_path / "made" / "10_chance.ipynb", 4)
        assert made.cells[:-1] == notebook.cells
        assert "did not execute this page again" in made.cells[-1].source
        numbers = json.loads((tmp_path / parameters["preset"] / "10_chance.json").read_text())
        assert numbers == notebook.metadata["polca"]["numbers"]


def test_every_figure_and_table_has_a_name_of_its_own():
    names = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            for output in cell.get("outputs", []):
                names += re.findall(r'<figure class="polca" id="([^"]+)"', output.get("data", {}).get("text/html", ""))
    assert len(names) == len(set(names))
    assert len(names) > 4


def test_readme_gives_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make book" in readme
    assert "make test" in readme


def test_each_situation_of_the_book_is_a_test():
    rows = list(csv.DictReader((ROOT / "book" / "situations.csv").open(encoding="utf-8")))
    assert len(rows) > 100
    for row in rows:
        file, _, name = row["test"].strip("`").partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), row["test"]
        assert re.match(r"works|refused", row["what happens"]), row
        assert re.fullmatch(r"(\[[\w.-]+#\d+\]\(https://github\.com/[\w.-]+/[\w.-]+/issues/\d+\))?", row["from"]), row
