"""``polca check`` on runs and folders that are awkward on purpose: it names what would go wrong, and where."""

import json
import re

import faults
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import polca

from polca_lib.analysis.check import check_checkpoints, check_file, check_folder
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.checkpoint_folders import SafetensorsFolder


def told(findings, state="problem"):
    return "\n".join(f"{finding.about}: {finding.text}" for finding in findings if finding.state == state)


def change(file, function):
    """Change the tensors of a checkpoint."""
    save_file(function(load_file(file)), file)


@pytest.fixture
def run(tmp_path):
    return faults.make(tmp_path / "run")


def test_sound_run_has_no_problem(run):
    findings = check_file(run / "polca.toml")
    assert told(findings) == ""
    note = r"spacing: not fit for POLCA: .* makes? \d\d% of (its|their) loss drop between steps 0 and 20 .*"
    assert re.fullmatch(note, told(findings, "note"))
    by_name = {finding.about: finding.text for finding in findings}
    assert by_name["steps"] == "7 checkpoints: 0, 20, 40, 60, 80, 100, 120, every 20"
    assert by_name["weights"] == "4 tensors, 212 numbers, alike in 7 of 7"
    assert by_name["tokens"] == "80 of 40 examples, 2 in an example"
    assert by_name["hessian"] == "30 examples"
    assert sum(finding.about == "losses" for finding in findings) == 2
    assert not (run / "results").exists()  # nothing is written


def test_checkpoints_that_see_what_is_learned_are_fit(run):
    ends = [load_file(run / "checkpoints" / f"step-{step}.safetensors") for step in (0, 120)]
    for step in range(0, 121, 5):  # on a straight line
        weights = {name: torch.lerp(ends[0][name], ends[1][name], step / 120) for name in ends[0]}
        save_file(weights, run / "checkpoints" / f"step-{step}.safetensors")
    findings = check_file(run / "polca.toml")
    assert [finding.state for finding in findings if finding.about == "spacing"] == ["ok"]


def test_where_it_takes_long_the_spacing_is_not_measured(run, monkeypatch):
    monkeypatch.setattr("polca_lib.analysis.check._SPACING_SECONDS", 0)
    note = "spacing: not measured, for want of time; the report will tell it"
    assert told(check_file(run / "polca.toml"), "note") == note


def test_a_run_without_a_table_of_tokens_is_noted(run):
    code = (run / "my_run.py").read_text()
    (run / "my_run.py").write_text(code.replace(", tokens=tokens)", ")"))
    assert "tokens: no table of tokens" in told(check_file(run / "polca.toml"), "note")


def test_what_is_wrong_with_all_checkpoints_is_said_once(run):
    for file in (run / "checkpoints").iterdir():
        change(file, lambda t: {**t, "0.weight": torch.zeros(16, 9)})
    (problem,) = told(check_file(run / "polca.toml")).splitlines()
    assert problem.endswith("the model's is (16, 8) (and 6 more checkpoints alike)")


def test_a_loss_that_rises_is_noted(run):
    first, last = (run / "checkpoints" / f"step-{step}.safetensors" for step in (0, 120))
    both = load_file(first), load_file(last)
    save_file(both[1], first)
    save_file(both[0], last)
    text = "losses: the mean loss does not fall from step 0 to step 120; is the model trained on such targets?"
    assert told(check_file(run / "polca.toml"), "note") == text


def test_table_names_the_problem_and_the_exit_code_says_so(run):
    change(run / "checkpoints" / "step-40.safetensors", lambda t: {**t, "0.weight": torch.zeros(16, 9)})
    done = polca("check", cwd=run)
    assert done.exit_code == 2
    assert "step-40.safetensors does not fit the model: parameter '0.weight' has shape (16, 9)" in done.stdout
    assert "alike in 6 of 6" in done.stdout
    assert "1 problem; mend them before polca run" in done.stdout
    planned = polca("plan", cwd=run)
    assert planned.exit_code == 2
    assert "step-40.safetensors does not fit the model" in planned.stderr


def other_shape(folder):
    change(folder / "step-40.safetensors", lambda t: {**t, "0.weight": torch.zeros(16, 9)})


def lacks_a_tensor(folder):
    change(folder / "step-60.safetensors", lambda t: {n: v for n, v in t.items() if n != "2.bias"})


def has_one_more(folder):
    change(folder / "step-60.safetensors", lambda t: {**t, "3.bias": torch.zeros(4)})


def not_finite(folder):
    change(folder / "step-80.safetensors", lambda t: {**t, "2.bias": torch.full((4,), float("nan"))})


def cut_off(folder):
    file = folder / "step-20.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def two_of_a_step(folder):
    (folder / "newer-step-20.safetensors").write_bytes((folder / "step-20.safetensors").read_bytes())


def link_to_nothing(folder):
    (folder / "step-140.safetensors").symlink_to(folder / "gone.safetensors")


def no_clear_step(folder):
    for file in list(folder.iterdir()):
        step = file.stem.removeprefix("step-")
        file.rename(folder / f"model_{step}_2024{step}.safetensors")


def all_alike(folder):
    for file in folder.iterdir():
        file.write_bytes((folder / "step-20.safetensors").read_bytes())


def one_for_each_process(folder):
    (folder / "step-140").mkdir()
    (folder / "step-140" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")


AWKWARD = {
    other_shape: "step 40 has 0.weight (16, 9) instead of (16, 8)",
    lacks_a_tensor: "step 60 lacks 2.bias",
    has_one_more: "step 60 has also 3.bias",
    not_finite: "weights are not finite at 80",
    cut_off: "step-20.safetensors is damaged",
    two_of_a_step: "are both of step 20",
    link_to_nothing: "which is missing; restore or delete it",
    no_clear_step: "the step is not clear from all names",
    all_alike: "all checkpoints hold the same weights",
    one_for_each_process: "zero_to_fp32.py",
}


@pytest.mark.parametrize("make", AWKWARD, ids=lambda make: make.__name__)
def test_folder_of_checkpoints_is_checked_without_a_model(run, make):
    make(run / "checkpoints")
    assert AWKWARD[make] in told(check_folder(run / "checkpoints"))
    assert AWKWARD[make] in told(check_file(run / "polca.toml", code=False))


def test_checkpoints_that_the_settings_leave_out_are_not_checked(run):
    not_finite(run / "checkpoints")
    assert "not finite at 80" in told(check_file(run / "polca.toml"))
    settings = (run / "polca.toml").read_text()
    (run / "polca.toml").write_text("steps = [0, 20, 40, 60, 100, 120]\n" + settings)
    assert told(check_file(run / "polca.toml")) == told(check_file(run / "polca.toml", code=False)) == ""


def test_basis_and_controls_that_need_a_sample_are_problems(run):
    text = (run / "my_run.py").read_text()
    (run / "my_run.py").write_text(text.replace("hessian=batch(2, 30), ", ""))
    assert "opening: basis.kind = 'hessian' needs a batch for the Hessian" in told(check_file(run / "polca.toml"))
    settings = (run / "polca.toml").read_text().replace("[basis]", '[basis]\nkind = "random"')
    (run / "polca.toml").write_text('beside = ["final"]\n' + settings)
    assert told(check_file(run / "polca.toml")).startswith(
        "beside final: basis.kind = 'final' needs a batch for the Hessian"
    )
    done = polca("run", cwd=run)
    assert done.exit_code == 2
    assert "needs a batch for the Hessian" in done.stderr
    assert not list((run / "results").glob("basis-*/basis.zarr"))  # no basis was computed


def test_target_outside_the_vocabulary_is_a_problem_and_not_a_traceback(run):
    text = (run / "my_run.py").read_text()
    (run / "my_run.py").write_text(text.replace("torch.randint(4, (n, 2)", "3 + torch.randint(4, (n, 2)"))
    assert "IndexError: Target" in told(check_file(run / "polca.toml"))


def test_tied_weight_that_some_checkpoints_lack_is_a_note(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    for step in range(3):
        weights = {"embedding.weight": torch.randn(5, 3)}
        save_file(
            weights | ({"head.weight": weights["embedding.weight"].clone()} if step else {}),
            tmp_path / f"step-{step}.safetensors",
        )
    findings = check_checkpoints(SafetensorsFolder(tmp_path, TokenLoss(Tied(), lambda model, batch: batch)))
    assert told(findings) == ""
    assert "step 0 lacks head.weight" in told(findings, "note")


def test_notes_are_no_problems(run):
    folder = run / "checkpoints"
    (folder / "step-40.safetensors").write_bytes((folder / "step-20.safetensors").read_bytes())
    change(folder / "step-100.safetensors", lambda t: {name: value.half() for name, value in t.items()})
    (folder / "last.safetensors").write_bytes((folder / "step-120.safetensors").read_bytes())
    findings = check_folder(folder)
    assert told(findings) == ""
    notes = told(findings, "note")
    assert "20, 40 hold the same weights" in notes
    assert "float16 at 100" in notes
    assert "last.safetensors" in notes


def test_large_runs_are_only_read_when_asked(run, monkeypatch):
    monkeypatch.setattr("polca_lib.analysis.check.READ_BYTES", 1000)
    not_finite(run / "checkpoints")
    findings = check_folder(run / "checkpoints")
    assert "were not read; polca check --read" in told(findings, "note")
    assert told(findings) == ""
    assert "not finite at 80" in told(check_folder(run / "checkpoints", read=True))


@pytest.mark.parametrize(
    ("old", "new", "about"),
    [
        ("return torch.randn(n, 2, 8", "return float('nan') * torch.randn(n, 2, 8", "loss is nan for example 0, pos"),
        ('np.tile(["one", "two"], 40)', 'np.tile(["one", "two"], 39)', "tokens has 78 rows; allowed: 80"),
        ("model.eval()", "nn.Sequential(model, nn.Dropout(0.5))", "drops out with p = 0.5"),
        ('reduction="none"', 'reduction="mean"', "allowed: one floating-point number for each target token"),
    ],
    ids=["not finite", "table", "dropout", "mean"],
)  # fmt: skip
def test_data_and_loss_are_checked(run, old, new, about):
    text = (run / "my_run.py").read_text()
    assert old in text
    (run / "my_run.py").write_text(text.replace(old, new))
    assert about in told(check_file(run / "polca.toml"))


def test_loss_that_is_only_infinite_at_the_end_is_found(run):
    change(run / "checkpoints" / "step-120.safetensors", lambda t: {**t, "2.weight": t["2.weight"] * 1e38})
    assert "step 120: nan for example" in told(check_file(run / "polca.toml")).replace("inf for", "nan for")


def test_without_code_nothing_of_the_file_is_called(run):
    settings = (run / "polca.toml").read_text()
    settings = settings.replace(
        'setup = "my_run:setup"', 'setup = "os:system"\narguments = { command = "touch called" }'
    )
    (run / "polca.toml").write_text(settings)
    done = polca("check", "--no-code", "--json", cwd=run)
    assert done.exit_code == 0, done.stdout
    assert not (run / "called").exists()
    assert json.loads(done.stdout)["findings"][0]["state"] == "ok"
    # With it, the file is trusted as a script would be.
    assert "returns int; allowed: polca_lib.Subject" in polca("check", cwd=run).stdout
    assert (run / "called").exists()
