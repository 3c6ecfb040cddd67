"""Checkpoints that others wrote: which step, which weights, and what is refused."""

import json

import numpy as np
import pytest
import torch
from cases import Attention, Mlp, flip_bit, mlp_loss, next_token_loss
from safetensors.torch import save_file

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoint_folders import SafetensorsFolder, StateDictFolder

LOSS = TokenLoss(Mlp(), mlp_loss)


def state(seed):
    torch.manual_seed(seed)
    return Mlp().state_dict()


def vector(seed):
    return torch.cat([value.flatten() for value in state(seed).values()])


def safetensors(folder, name, seed):
    save_file(state(seed), folder / f"{name}.safetensors")


def sharded(folder, name, seed):
    """As Hugging Face's trainer writes it."""
    (folder / name).mkdir()
    items = list(state(seed).items())
    index = {}
    for number, part in enumerate((items[:1], items[1:])):
        file = f"model-{number}.safetensors"
        save_file(dict(part), folder / name / file)
        index |= {key: file for key, _ in part}
    (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def single(folder, name, seed):
    (folder / name).mkdir()
    save_file(state(seed), folder / name / "model.safetensors")


def plain(folder, name, seed):
    torch.save(state(seed), folder / f"{name}.pt")


def nested(folder, name, seed):
    torch.save({"model_state_dict": state(seed), "step": 3, "loss": 0.5}, folder / f"{name}.ckpt")


def wrapped(folder, name, seed):
    """Of DistributedDataParallel around torch.compile."""
    torch.save({f"module._orig_mod.{key}": value for key, value in state(seed).items()}, folder / f"{name}.pth")


WRITERS = {
    SafetensorsFolder: (safetensors, sharded, single),
    StateDictFolder: (plain, nested, wrapped),
}


@pytest.mark.parametrize(("source", "write"), [(s, w) for s, writers in WRITERS.items() for w in writers])
def test_weights_are_those_that_were_written_in_the_order_of_the_steps(tmp_path, source, write):
    for step in (100, 20, 3000):
        write(tmp_path, f"run2-step-{step}", seed=step)
    (tmp_path / "notes-7.txt").write_text("no checkpoint")
    found = source(tmp_path, LOSS)
    assert found.steps == [20, 100, 3000]
    for step in found.steps:
        assert torch.equal(found.theta(step), vector(step))
        assert f"step-{step}" in found.name(step)
        assert f"step-{step}" in found.identity(step)


def test_identity_changes_with_the_size_of_a_file(tmp_path):
    safetensors(tmp_path, "step-1", 0)
    found = SafetensorsFolder(tmp_path, LOSS)
    before = found.identity(1)
    save_file({**state(0), "more": torch.zeros(1)}, tmp_path / "step-1.safetensors")
    assert found.identity(1) != before


def test_pattern_says_which_number_is_the_step(tmp_path):
    for step in (5, 6):
        plain(tmp_path, f"epoch{step}-of-9", step)
    plain(tmp_path, "best", 0)
    with pytest.raises(ValueError, match=r"best\.pt has no step in its name.*or a pattern"):
        StateDictFolder(tmp_path, LOSS)
    assert StateDictFolder(tmp_path, LOSS, pattern=r"epoch(\d+)").steps == [5, 6]
    with pytest.raises(ValueError, match="has 0 groups; allowed: one, the step"):
        StateDictFolder(tmp_path, LOSS, pattern="epoch")


def test_two_checkpoints_of_a_step_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints; allowed: files step-500"):
        SafetensorsFolder(tmp_path, LOSS)
    safetensors(tmp_path, "a-1", 0)
    safetensors(tmp_path, "b-1", 0)
    with pytest.raises(ValueError, match=r"a-1\.safetensors and b-1\.safetensors in .* are both of step 1"):
        SafetensorsFolder(tmp_path, LOSS)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        SafetensorsFolder(tmp_path / "nowhere", LOSS)


class Code:
    """What no reader of weights may run."""

    def __reduce__(self):
        return print, ("code of a checkpoint runs",)


def test_pickled_code_is_never_run(tmp_path, capsys):
    torch.save({**state(0), "more": Code()}, tmp_path / "step-1.pt")
    with pytest.raises(ValueError, match=r"step-1\.pt holds more than tensors.*could run any code; save"):
        StateDictFolder(tmp_path, LOSS).theta(1)
    torch.save(Mlp(), tmp_path / "step-2.pt")
    with pytest.raises(ValueError, match=r"step-2\.pt holds more than tensors"):
        StateDictFolder(tmp_path, LOSS).theta(2)
    assert "code of a checkpoint runs" not in capsys.readouterr().out


def test_state_dict_under_another_key_is_found_by_it(tmp_path):
    torch.save({"ema": state(1), "steps": 5}, tmp_path / "step-1.pt")
    assert torch.equal(StateDictFolder(tmp_path, LOSS, key="ema").theta(1), vector(1))
    with pytest.raises(ValueError, match=r"nothing under key = 'weights'; it has \['ema', 'steps'\]"):
        StateDictFolder(tmp_path, LOSS, key="weights").theta(1)
    with pytest.raises(ValueError, match="holds no state_dict, tensors by name; say under which key"):
        StateDictFolder(tmp_path, LOSS).theta(1)


@pytest.mark.parametrize(("source", "write"), [(SafetensorsFolder, safetensors), (StateDictFolder, plain)])
def test_damaged_file_is_named(tmp_path, source, write):
    write(tmp_path, "step-1", 0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"step-1\..*is damaged, or can't be read"):
        source(tmp_path, LOSS).theta(1)


def test_header_of_safetensors_that_is_damaged_is_named(tmp_path):
    safetensors(tmp_path, "step-1", 0)
    flip_bit(tmp_path / "step-1.safetensors", 3)
    with pytest.raises(DamagedFile, match="step-1"):
        SafetensorsFolder(tmp_path, LOSS).theta(1)


def test_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    sharded(tmp_path, "checkpoint-1", 0)
    index = tmp_path / "checkpoint-1" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0", "../model-0"))
    with pytest.raises(ValueError, match=r"names '\.\./model-0\.safetensors'; allowed: files beside it"):
        SafetensorsFolder(tmp_path, LOSS).theta(1)
    index.write_text("{")
    with pytest.raises(DamagedFile, match=r"index\.json is damaged"):
        SafetensorsFolder(tmp_path, LOSS).theta(1)


def test_checkpoint_of_another_model_is_named(tmp_path):
    safetensors(tmp_path, "step-1", 0)
    with pytest.raises(ValueError, match=r"step-1\.safetensors does not fit the model: parameters \['embed"):
        SafetensorsFolder(tmp_path, TokenLoss(Attention(), next_token_loss)).theta(1)


def test_half_precision_is_read_as_the_dtype_of_the_loss(tmp_path):
    save_file({name: value.half() for name, value in state(0).items()}, tmp_path / "step-1.safetensors")
    theta = SafetensorsFolder(tmp_path, LOSS).theta(1)
    assert theta.dtype == torch.float32
    np.testing.assert_array_equal(theta, vector(0).half().float())
