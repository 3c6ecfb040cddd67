"""The commands `polca paper` as a user types them."""

import pytest
from cases import TINY_RUN, flip_bit
from polca_paper.cli import app
from polca_paper.saved_study import PAPER
from typer.testing import CliRunner

TINY = [part for name, value in TINY_RUN.items() for part in ("--set", f"{name}={value}")]


def polca_paper(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"NO_COLOR": "1", "COLUMNS": "120"})


def test_run_computes_a_preset_on_several_bases_and_prints_what_made_it(run):
    done = polca_paper("run", "--preset", "smoke", *TINY, "--beside", "random")
    assert done.exit_code == 0, done.stderr
    assert "smoke" in done.stdout
    assert "projection: commit" in done.stdout
    assert run.on_basis("random").stored("projection") is not None


def test_run_mends_a_damaged_basis_also_if_its_projections_are_there(run):
    file = run._basis.path / "basis.zarr" / "vectors" / "1.0"
    before = file.read_bytes()
    flip_bit(file, -1)
    with pytest.warns(UserWarning, match="1 files are damaged and will be recomputed"):
        done = polca_paper("run", "--preset", "smoke", *TINY)
    assert done.exit_code == 0, done.stderr
    assert file.read_bytes() == before


def test_verdicts_of_the_kept_studies_are_those_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.delenv("POLCA_STUDIES", raising=False)
    done = polca_paper("verdicts", "--output", tmp_path)
    assert done.exit_code == 0, done.stderr
    for name in ("readings.csv", "verdicts.csv", "english_counts.json"):
        assert (tmp_path / name).read_bytes() == (PAPER / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "--set", "basis.kindd=random"), "unknown parameter 'basis.kindd' (did you mean 'basis.kind'?)"),
        (("run", "--preset", "smoke", "--device", "abacus"), "device = 'abacus' is not on this machine"),
        (("study", "--preset", "smoke", "--bases", "fourier"), "bases = ['fourier'] are unknown"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_with_exit_code_2(arguments, told):
    done = polca_paper(*arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
