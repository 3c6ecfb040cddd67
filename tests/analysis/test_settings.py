"""Settings of somebody's own run: defaults that follow from the run, and errors that say what to do."""

import numpy as np
import pytest
import torch
from cases import Mlp, mlp_loss
from pydantic import ValidationError
from safetensors.torch import save_file

from polca_lib.analysis.runfile import open_checkpoints
from polca_lib.analysis.settings import AnalysisSettings, BasisSettings, ClusteringSettings, RunFile
from polca_lib.derivatives.token_loss import TokenLoss

FILE = """
folder = "results"
[code]
setup = "my_run:setup"
[checkpoints]
kind = "safetensors"
path = "checkpoints"
"""
LOGARITHMIC = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000]


def written(tmp_path, text):
    (tmp_path / "polca.toml").write_text(text)
    return tmp_path / "polca.toml"


def test_file_that_says_the_least_has_the_defaults(tmp_path):
    about = RunFile.read(written(tmp_path, FILE))
    assert about.settings == AnalysisSettings()
    assert about.results == tmp_path / "results"
    assert (about.engine.name, about.device, about.code.arguments) == ("in-process", "cpu", {})


def test_folder_of_results_may_be_a_url(tmp_path):
    about = RunFile.read(written(tmp_path, FILE.replace('"results"', '"memory://bucket/run"')))
    assert str(about.results) == "memory://bucket/run"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FILE + "[basis]\nn_vectors = 0\n", r"basis\.n_vectors: .*greater than or equal to 1 \(given: 0\)"),
        (
            FILE + "[basis]\nvectors = 3\n",
            r"basis\.vectors: .*'vectors' \(did you mean 'n_vectors'\?\); allowed: kind, k,",
        ),
        (FILE.replace('kind = "safetensors"', 'kind = "pickle"'), r"checkpoints\.kind: .*'safetensors', 'state_dict'"),
        (FILE.replace("my_run:setup", "print('x')"), r"allowed: module:function, such as 'my_run:setup'"),
        (
            FILE.replace("[code]", "[kode]"),
            r"(?s)code: Field required.*'kode' \(did you mean 'code'\?\)",
        ),
        ('memory = "lots"\n' + FILE, r"memory = 'lots'; allowed: a number of bytes, or text such as '8 GiB'"),
        (FILE + "[clustering]\norder = 'second'\n", r"clustering\.order = 'second' needs projection\.curvature = true"),
        (FILE + "x = = 1", r"polca\.toml is not valid TOML: "),
    ],
)
def test_file_that_is_wrong_is_refused_with_every_field_named(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        RunFile.read(written(tmp_path, text))


def test_memory_is_read_in_words():
    assert AnalysisSettings(memory="8 GiB").memory == 8 * 2**30
    assert AnalysisSettings(memory="1.5MB").memory == 1_500_000
    assert AnalysisSettings(memory=77).memory == 77
    with pytest.raises(ValidationError):
        AnalysisSettings(memory="-1 GiB")


def test_basis_checkpoints_are_spread_evenly_and_end_at_the_last():
    steps = list(range(0, 101, 10))
    assert BasisSettings(n_vectors=5).births(steps) == [20, 40, 60, 80, 100]
    assert BasisSettings(n_vectors=10).births(steps) == steps[1:]
    assert BasisSettings(n_vectors=3, k=3).births(steps) == [100]
    assert BasisSettings(n_vectors=4).births(LOGARITHMIC) == [8, 64, 512, 3000]
    for n in range(1, 14):
        births = BasisSettings(n_vectors=n).births(LOGARITHMIC)
        assert len(births) == len(set(births)) == n
        assert births[-1] == 3000


def test_other_bases_are_born_where_they_belong():
    assert BasisSettings(kind="trajectory", n_vectors=2).births(LOGARITHMIC) == LOGARITHMIC[1:]
    assert BasisSettings(kind="random", n_vectors=50).births([0, 5]) == [5] * 50
    assert BasisSettings(steps=(4, 1), n_vectors=2).births(LOGARITHMIC) == [1, 4]


def test_vectors_that_no_checkpoint_can_bear_are_refused():
    with pytest.raises(ValueError, match=r"basis\.n_vectors = 11 needs 11 checkpoints after the first .* there are 10"):
        BasisSettings(n_vectors=11).births(range(0, 101, 10))
    with pytest.raises(ValueError, match=r"basis\.steps names 5, which has no checkpoint; allowed: 0, 10, 20"):
        BasisSettings(steps=(5,), n_vectors=1).births(range(0, 101, 10))


def test_checkpoints_to_use_are_those_named():
    assert AnalysisSettings().chosen(LOGARITHMIC) == LOGARITHMIC
    assert AnalysisSettings(steps=[8, 0, 1]).chosen(LOGARITHMIC) == [0, 1, 8]
    with pytest.raises(ValueError, match="steps names 7, which has no checkpoint"):
        AnalysisSettings(steps=[0, 7]).chosen(LOGARITHMIC)
    with pytest.raises(ValueError, match="steps gives 1 checkpoints; allowed: 2 or more"):
        AnalysisSettings(steps=[8]).chosen(LOGARITHMIC)


def test_clustering_follows_from_the_run_where_it_is_left_open():
    resolved = ClusteringSettings().resolved(5000, list(range(0, 2001, 20)))
    assert (resolved.min_cluster_size, resolved.breakthrough_window) == (150, 100)  # as in the paper
    assert ClusteringSettings().resolved(50, [0, 10]).min_cluster_size == 5
    assert ClusteringSettings().resolved(50, LOGARITHMIC).breakthrough_window == 150
    assert ClusteringSettings(min_cluster_size=7, breakthrough_window=20).resolved(50, [0, 10]).min_cluster_size == 7
    gaps = np.diff(range(0, 71, 7))
    assert ClusteringSettings().resolved(50, list(range(0, 71, 7))).breakthrough_window % gaps[0] == 0


def test_file_gives_pattern_and_rename_to_every_kind_of_checkpoints(tmp_path):
    names = 'pattern = "epoch-([0-9]+)"\n[checkpoints.rename]\n"^backbone[.]" = ""\n'
    torch.manual_seed(0)
    weights = {f"backbone.{name}": value for name, value in Mlp().state_dict().items()}
    save_file(weights, tmp_path / "epoch-3-of-9.safetensors")
    torch.save(weights, tmp_path / "epoch-3-of-9.pt")
    for kind in ("safetensors", "state_dict"):
        text = FILE.replace('"safetensors"', f'"{kind}"').replace('"checkpoints"', '"."') + names
        checkpoints = open_checkpoints(RunFile.read(written(tmp_path, text)), TokenLoss(Mlp(), mlp_loss))
        assert checkpoints.steps == [3]
        assert torch.equal(checkpoints.theta(3), torch.cat([value.flatten() for value in weights.values()]))
    (tmp_path / "epoch-7-of-9").mkdir()
    text = FILE.replace('"safetensors"', '"huggingface"').replace('"checkpoints"', '"."') + names
    checkpoints = open_checkpoints(RunFile.read(written(tmp_path, text)), TokenLoss(Mlp(), mlp_loss))
    assert (checkpoints.steps, checkpoints._rename) == ([7], {"^backbone[.]": ""})
