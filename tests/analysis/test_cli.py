"""The command as a user types it."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from cases import folder_bytes
from typer.testing import CliRunner

from polca_lib.analysis.cli import app

HELP = {
    "--help": ("plan", "run", "status", "report", "Exit codes"),
    "plan --help": ("--workers", "--operations-per-second", "--json"),
    "run --help": ("--stage", "--engine", "--address", "missing"),
    "status --help": ("--verify", "from the files alone"),
    "report --help": ("--output",),
}


def polca(*arguments, cwd):
    """In this process, as the shell would call it in a folder: importing all that it needs takes seconds."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, [str(one) for one in arguments], env={"NO_COLOR": "1", "COLUMNS": "120"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return faults.make(tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture(scope="module")
def ran(folder):
    return polca("run", "--json", cwd=folder)


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_there_is(tmp_path, command):
    done = polca(*command.split(), cwd=tmp_path)
    assert done.exit_code == 0
    assert all(word in done.stdout for word in HELP[command]), done.stdout


def test_run_computes_all_and_says_so_in_json(folder, ran):
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert Path(told["report"]).stat().st_size > 1e6
    assert told["summary"]["vectors"] == 12
    assert "projections: 100%" in ran.stderr
    assert "\r" not in ran.stderr  # a log has lines


@pytest.mark.slow
def test_command_is_there_as_a_process_of_its_own(folder, ran):
    done = subprocess.run(
        [sys.executable, "-m", "polca_lib.analysis.cli", "status"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0
    assert "12 of 12 pieces" in done.stdout


def test_second_run_has_nothing_to_do(folder, ran):
    before = faults.finished(folder)
    assert polca("run", cwd=folder).exit_code == 0
    assert faults.finished(folder) == before


def test_status_tells_what_is_done(folder, ran):
    done = polca("status", "--json", "--verify", cwd=folder)
    assert done.exit_code == 0, done.stdout
    stages = json.loads(done.stdout)["stages"]
    assert [row["stage"] for row in stages] == ["basis", "projection", "clusters"]
    assert all(row["done"] == row["pieces"] >= 7 for row in stages)
    assert "12 of 12 pieces" in polca("status", "results", cwd=folder).stdout


def test_report_is_written_where_it_is_asked_for(folder, ran):
    done = polca("report", "-o", "elsewhere.html", cwd=folder)
    assert done.exit_code == 0, done.stderr
    assert "elsewhere.html" in done.stdout
    assert (folder / "elsewhere.html").exists()


def test_finished_run_on_a_read_only_disk_has_nothing_to_do(folder, ran, read_only, tmp_path):
    before = folder_bytes(folder / "results")
    read_only(folder / "results")
    again = polca("run", "--json", cwd=folder)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(ran.stdout)
    assert polca("status", "--verify", cwd=folder).exit_code == 0
    assert polca("report", "-o", tmp_path / "there.html", cwd=folder).exit_code == 0
    assert (tmp_path / "there.html").stat().st_size > 1e6
    here = polca("report", cwd=folder)
    assert here.exit_code == 1
    assert "Read-only file system" in here.output
    assert folder_bytes(folder / "results") == before


@pytest.mark.slow
def test_stage_by_stage(tmp_path):
    run = faults.make(tmp_path / "run")
    assert polca("run", "--stage", "basis", cwd=run).exit_code == 0
    rows = json.loads(polca("status", "--json", cwd=run).stdout)["stages"]
    assert [row["stage"] for row in rows] == ["basis"]
    assert polca("run", "--stage", "projections", "--engine", "processes", "--workers", "2", cwd=run).exit_code == 0
    rows = json.loads(polca("status", "--json", cwd=run).stdout)["stages"]
    assert [row["stage"] for row in rows] == ["basis", "projection"]


def test_plan_needs_no_work(folder):
    done = polca("plan", "--json", "--workers", "4", cwd=folder)
    assert done.exit_code == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["parameters"] == 8 * 16 + 16 + 16 * 4 + 4
    assert planned["workers"] == 4
    assert "212" in polca("plan", cwd=folder).stdout


@pytest.mark.slow
def test_starter_runs_as_it_is(tmp_path):
    assert "polca plan" in polca("init", "mine", cwd=tmp_path).stdout
    again = polca("init", "mine", cwd=tmp_path)
    assert again.exit_code == 2
    assert "polca.toml is there already" in again.stderr
    for name, written, shorter in (
        ("my_run.py", "STEPS = 32, 64, 400", "STEPS = 32, 64, 60"),
        ("polca.toml", "n_vectors = 6", "n_vectors = 2"),
    ):
        text = (tmp_path / "mine" / name).read_text()
        assert text.count(written) == 1
        (tmp_path / "mine" / name).write_text(text.replace(written, shorter))
    subprocess.run([sys.executable, "my_run.py"], check=True, cwd=tmp_path / "mine")
    done = polca("run", cwd=tmp_path / "mine")
    assert done.exit_code == 0, done.stderr
    assert "report:" in done.stdout


def test_paths_among_the_arguments_start_from_the_file(tmp_path, monkeypatch):
    run = faults.make(tmp_path / "run")
    text = (run / "my_run.py").read_text()
    (run / "my_run.py").write_text(text.replace("def setup():", "def setup(data):\n    open(data).close()"))
    settings = (run / "polca.toml").read_text().replace('setup"', 'setup"\narguments = { data = "data/here.txt" }')
    (run / "polca.toml").write_text(settings)
    (run / "data").mkdir()
    (run / "data" / "here.txt").write_text("")
    done = polca("plan", "run/polca.toml", "--json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr


def test_file_with_a_byte_order_mark_is_read(folder, tmp_path):
    run = faults.make(tmp_path / "run")
    content = (run / "polca.toml").read_bytes()
    (run / "polca.toml").write_bytes(b"\xef\xbb\xbf" + content)
    assert polca("plan", "--json", cwd=run).exit_code == 0


def test_link_to_a_file_says_where_its_paths_start(tmp_path):
    run = faults.make(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "polca.toml").symlink_to(run / "polca.toml")
    with pytest.warns(UserWarning, match=f"is a link; paths in it are relative to {run}"):
        assert polca("plan", "--json", cwd=tmp_path / "elsewhere").exit_code == 0


@pytest.mark.parametrize("name", ["time", "json"])
def test_module_with_a_name_of_pythons_own_is_refused(tmp_path, name):
    run = faults.make(tmp_path / "run")
    (run / "my_run.py").rename(run / f"{name}.py")
    (run / "polca.toml").write_text((run / "polca.toml").read_text().replace("my_run", name))
    done = polca("plan", cwd=run)
    assert done.exit_code == 2
    assert f"{name}.py has the name of a module of Python; rename it" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({"polca.toml": ('folder = "results"', "")}, 2, "folder: Field required"),
        ({"polca.toml": ("my_run:setup", "no_run:setup")}, 2, "No module named 'no_run'"),
        ({"polca.toml": ("my_run:setup", "my_run:start")}, 2, "module 'my_run' has no 'start'"),
        ({"polca.toml": ("my_run:setup", "my_run:batch")}, 2, "batch() missing 2 required"),
        ({"polca.toml": ("n_vectors = 12", "n_vectors = 1200")}, 2, "needs 300 checkpoints after the first"),
        ({"polca.toml": ('path = "checkpoints"', 'path = "nothing"')}, 2, "nothing"),
        ({"my_run.py": ("from polca_lib import", "from polca_lib.token_loss import")}, 2, "come from polca_lib itself"),
        ({"my_run.py": ("nn.Linear(8, 16)", "nn.Linear(8, 17)")}, 2, "shape"),
        ({"polca.toml": ('folder =', 'device = "cuda"\nfolder =')}, 2, "device = 'cuda' is not on this machine"),
        ({"polca.toml": ('folder =', 'device = "gpu"\nfolder =')}, 2, "device = 'gpu' is not on this machine"),
        ({"polca.toml": ('folder =', 'device = "CPU"\nfolder =')}, 2, "'CPU' is not on this machine; allowed: cpu"),
        ({"polca.toml": ('folder =', 'device = ""\nfolder =')}, 2, "device = '' is not on this machine"),
        ({"polca.toml": ('folder =', 'device = "mps"\nfolder =')}, 2, "device = 'mps' has no float64"),
        ({"my_run.py": ("model.eval()", "nn.Sequential(model, nn.Dropout(0.5))")}, 2, "eval()"),
    ],
    ids=["field", "module", "function", "signature", "vectors", "checkpoints", "former address", "model",
         "cuda", "gpu", "CPU", "no device", "mps", "dropout"],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line_with_an_exit_code(tmp_path, change, code, told):
    run = faults.make(tmp_path / "run")
    for name, (old, new) in change.items():
        text = (run / name.strip()).read_text()
        assert old in text
        (run / name.strip()).write_text(text.replace(old, new))
    done = polca("run", cwd=run)
    assert done.exit_code == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_file_that_is_not_there_is_named(tmp_path):
    done = polca("run", "nothing.toml", cwd=tmp_path)
    assert done.exit_code == 2
    assert "nothing.toml" in done.stderr


def test_status_of_what_is_missing_has_an_exit_code_of_its_own(tmp_path):
    run = faults.make(tmp_path / "run")
    assert polca("status", cwd=run).exit_code == 2  # no folder yet
    polca("run", "--stage", "basis", cwd=run)
    (file,) = (run / "results").glob("basis-*/basis.zarr/_done/7")
    file.unlink()
    done = polca("status", cwd=run)
    assert done.exit_code == 3
    assert "missing: vector 8" in done.stdout


@pytest.mark.slow
def test_other_bases_stand_beside_as_controls(tmp_path):
    run = faults.make(tmp_path / "run")
    (run / "polca.toml").write_text('beside = ["random"]\n' + (run / "polca.toml").read_text())
    done = polca("run", "--json", cwd=run)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["beside"].keys() == {"random"}
    assert told["beside"]["random"]["vectors"] == told["summary"]["vectors"] == 12
    assert "beside, basis random: claimed" in polca("run", cwd=run).stdout
