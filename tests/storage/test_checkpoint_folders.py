"""Checkpoints that others wrote: which step, which weights, and what is refused."""

import json

import numpy as np
import pytest
import torch
from cases import Attention, Mlp, flip_bit, mlp_loss, next_token_loss
from safetensors.torch import save_file
from torch import nn

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
    with pytest.raises(
        ValueError, match=r"step is not clear.*epoch5-of-9\.pt \(5 or 9\).*such as 'epoch\(\[0-9\]\+\)-of-'"
    ):
        StateDictFolder(tmp_path, LOSS)
    found = StateDictFolder(tmp_path, LOSS, pattern=r"epoch(\d+)")
    assert found.steps == [5, 6]
    assert found.notes() == ["left aside: best.pt"]
    with pytest.raises(ValueError, match="has 0 groups; allowed: one, the step"):
        StateDictFolder(tmp_path, LOSS, pattern="epoch")


def test_two_checkpoints_of_a_step_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoints; allowed: files step-500.* It holds nothing"):
        SafetensorsFolder(tmp_path, LOSS)
    safetensors(tmp_path, "epoch=1-step=10", 0)
    safetensors(tmp_path, "epoch=1-step=10-v1", 0)
    with pytest.raises(ValueError, match=r"step=10-v1\.safetensors and epoch=1-step=10\.saf.* are both of step 10"):
        SafetensorsFolder(tmp_path, LOSS)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        SafetensorsFolder(tmp_path / "nowhere", LOSS)


def test_lightning_folder_leaves_last_and_best_aside_and_says_so(tmp_path):
    for name in ("epoch=0-step=500", "epoch=1-step=1,500-v1", "last", "last-v1", "best-epoch=1-loss=0.33"):
        nested(tmp_path, name, 0)
    with pytest.warns(UserWarning, match=r"left aside .*: best-epoch=1-loss=0\.33\.ckpt, last-v1\.ckpt, last\.ckpt$"):
        found = StateDictFolder(tmp_path, LOSS)
    assert found.steps == [500, 1500]
    assert "last.ckpt" in found.notes()[0]


def trainer(folder, name, seed, shards=1):
    """As Hugging Face's trainer writes it with save_safetensors = False."""
    (folder / name).mkdir()
    items = list(state(seed).items())
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)]
    parts = [items] if shards == 1 else [items[:1], items[1:]]
    for file, part in zip(files, parts, strict=True):
        torch.save(dict(part), folder / name / file)
    if shards > 1:
        index = {key: file for file, part in zip(files, parts, strict=True) for key, _ in part}
        (folder / name / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for other in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "._pytorch_model.bin"):
        (folder / name / other).write_bytes(b"no weights")


def test_output_of_the_trainer_has_checkpoints_beside_a_final_model_and_other_files(tmp_path):
    trainer(tmp_path, "checkpoint-500", 1)
    trainer(tmp_path, "checkpoint-1000", 2, shards=2)
    torch.save(state(3), tmp_path / "pytorch_model-00001-of-00002.bin")
    for other in ("rng_state_7.pth", "training_args.bin", "._checkpoint-500.bin", "optimizer_500.pt"):
        (tmp_path / other).write_bytes(b"no weights")
    with pytest.warns(UserWarning, match="left aside .*: a model in several files"):
        found = StateDictFolder(tmp_path, LOSS)
    assert found.steps == [500, 1000]
    assert torch.equal(found.theta(500), vector(1))
    assert torch.equal(found.theta(1000), vector(2))
    assert found.identity(1000).count("pytorch_model-0000") == 2
    (tmp_path / "checkpoint-1000" / "pytorch_model-00002-of-00002.bin").unlink()
    for read in (found.identity, found.theta, found.header):
        with pytest.raises(FileNotFoundError, match=r"index\.json names pytorch_model-00002-of-00002\.bin: missing"):
            read(1000)


def test_links_that_lead_nowhere_are_named(tmp_path):
    safetensors(tmp_path, "step-1", 0)
    (tmp_path / "step-2.safetensors").symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"step-2\.safetensors is a link to .*gone\.safetensors, which is miss"):
        SafetensorsFolder(tmp_path, LOSS)
    assert SafetensorsFolder(tmp_path, LOSS, pattern="step-(1)").steps == [1]
    (tmp_path / "step-2.safetensors").unlink()
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match="left aside .*: latest"):
        assert SafetensorsFolder(tmp_path, LOSS).steps == [1]


@pytest.mark.parametrize(
    "file",
    [
        "step-2/pytorch_model_fsdp_0/__0_0.distcp",
        "step-2/__0_0.distcp",
        "step-2/global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "step-2/mp_rank_00_model_states.pt",
        "step-2/mp_rank_00/model_optim_rng.pt",
        "mp_rank_00_model_states.pt",
    ],
)
@pytest.mark.parametrize("source", [SafetensorsFolder, StateDictFolder])
def test_weights_in_pieces_by_process_are_refused_for_what_they_are(tmp_path, source, file):
    (safetensors if source is SafetensorsFolder else plain)(tmp_path, "step-1", 0)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"has a file for each process .*zero_to_fp32\.py.*dcp_to_torch"):
        source(tmp_path, LOSS)
    if file.startswith("step-2"):
        assert source(tmp_path, LOSS, pattern="step-(1)").steps == [1]
        # DeepSpeed gathers the weights on request: then they are read, and the pieces ignored.
        (safetensors if source is SafetensorsFolder else plain)(tmp_path / "step-2", "model", 2)
        if "/" in file.removeprefix("step-2/"):
            assert torch.equal(source(tmp_path, LOSS).theta(2), vector(2))


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


def test_file_with_weights_under_two_keys_is_refused_and_keys_may_have_two_levels(tmp_path):
    torch.save({"model": {"net": state(1), "config": {"width": 4}}, "step": torch.tensor(7)}, tmp_path / "step-1.pt")
    torch.save({"module": state(2), "model": {}, "optimizer": {"state": state(3)}}, tmp_path / "step-2.pt")
    torch.save({"model": state(1), "state_dict": state(2), "ema": {"fast": state(4)}}, tmp_path / "step-3.pt")
    found = StateDictFolder(tmp_path, LOSS)
    assert torch.equal(found.theta(1), vector(1))
    assert torch.equal(found.theta(2), vector(2))
    with pytest.raises(ValueError, match=r"step-3\.pt holds weights under model and state_dict; say which with key"):
        found.theta(3)
    assert torch.equal(StateDictFolder(tmp_path, LOSS, key="ema.fast").theta(3), vector(4))


def test_parameters_that_were_saved_with_their_gradients_become_plain_numbers(tmp_path):
    torch.manual_seed(1)
    torch.save(dict(Mlp().named_parameters()), tmp_path / "step-1.pt")
    theta = StateDictFolder(tmp_path, LOSS).theta(1)
    assert torch.equal(theta, vector(1))
    assert not theta.requires_grad


def test_running_statistics_that_were_not_saved_are_noted(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "step-1.safetensors")
    found = SafetensorsFolder(tmp_path, TokenLoss(model, mlp_loss))
    assert len(found.theta(1)) == 18
    told = "not in checkpoints, as in the model: 1.running_mean, 1.running_var, 1.num_batches_tracked"
    assert found.notes() == [told]


@pytest.mark.parametrize("legacy", [False, True])
def test_header_has_names_shapes_and_dtypes_and_no_values(tmp_path, legacy):
    tensors = {f"module.{name}": value.half() for name, value in state(0).items()}
    tensors["module.n_averaged"] = torch.tensor(3)
    save_file(tensors, tmp_path / "step-1.safetensors")
    torch.save(tensors, tmp_path / "step-1.pt", _use_new_zipfile_serialization=not legacy)
    for found in (SafetensorsFolder(tmp_path, LOSS), StateDictFolder(tmp_path, LOSS)):
        header = found.header(1)
        assert all(tensor.is_meta and tensor.dtype == torch.float16 for tensor in header.values())
        assert {name: tensor.shape for name, tensor in header.items()} == {n: t.shape for n, t in state(0).items()}
        assert found.notes() == ["ignored in checkpoints: module.n_averaged"]
        assert torch.equal(found.theta(1), vector(0).half().float())
    del tensors["module.layers.0.bias"]
    save_file(tensors, tmp_path / "step-1.safetensors")
    with pytest.raises(
        ValueError, match=r"step-1\.safetensors does not fit the model: the checkpoint lacks 'layers\.0\.b"
    ):
        SafetensorsFolder(tmp_path, LOSS).header(1)


def test_rename_gives_the_names_of_the_model(tmp_path):
    tensors = {f"teacher.{name}": value for name, value in state(1).items()}
    tensors |= {f"student.{name.replace('layers', 'blocks')}": value for name, value in state(2).items()}
    save_file(tensors, tmp_path / "step-1.safetensors")
    with pytest.raises(ValueError, match=r"nearest: '(teacher|student).*set rename"):
        SafetensorsFolder(tmp_path, LOSS).theta(1)
    rename = {r"^teacher\..*": "", r"^student\.blocks\.(\d)": r"layers.\1"}
    assert torch.equal(SafetensorsFolder(tmp_path, LOSS, rename=rename).theta(1), vector(2))
    with pytest.raises(ValueError, match=r"rename gives 'student.*' and 'teacher.*' the same name"):
        SafetensorsFolder(tmp_path, LOSS, rename={"^student.blocks": "layers", "^teacher.": ""}).theta(1)
    for wrong in ({"(": ""}, {"(a)": r"\2"}):
        with pytest.raises(ValueError, match="is not a valid regular expression"):
            SafetensorsFolder(tmp_path, LOSS, rename=wrong)


@pytest.mark.parametrize("content", [[1, 2], {0: torch.ones(3)}, {**state(0), "epoch": 3}, {"params": state(0)}])
def test_content_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "step-1.pt")
    with pytest.raises(ValueError, match=r"step-1\.pt holds no state_dict, tensors by name"):
        StateDictFolder(tmp_path, LOSS).theta(1)


def test_two_models_in_a_checkpoint_are_named_and_so_is_an_empty_file(tmp_path):
    for name in ("model", "model_1"):
        (tmp_path / "step-1").mkdir(exist_ok=True)
        save_file(state(0), tmp_path / "step-1" / f"{name}.safetensors")
    with pytest.raises(
        ValueError, match=r"step-1 has weights in model\.safetensors, model_1\.safetensors, and no model"
    ):
        SafetensorsFolder(tmp_path, LOSS).theta(1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "step-2.pt").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"step-2\.pt is damaged, or can't be read \(EOFError\)"):
        StateDictFolder(tmp_path / "empty", LOSS).theta(2)


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
    with pytest.raises(ValueError, match=r"step-1\.safetensors does not fit the model: .*lacks 'embed\.weight'"):
        SafetensorsFolder(tmp_path, TokenLoss(Attention(), next_token_loss)).theta(1)


def test_half_precision_is_read_as_the_dtype_of_the_loss(tmp_path):
    save_file({name: value.half() for name, value in state(0).items()}, tmp_path / "step-1.safetensors")
    theta = SafetensorsFolder(tmp_path, LOSS).theta(1)
    assert theta.dtype == torch.float32
    np.testing.assert_array_equal(theta, vector(0).half().float())


def test_checkpoints_of_two_formats_in_one_folder_are_refused_and_those_without_weights_left_aside(tmp_path):
    for step in (0, 10):
        plain(tmp_path, f"step-{step}", step)
    for step in (20, 30):
        safetensors(tmp_path, f"step-{step}", step)
    for kind in (SafetensorsFolder, StateDictFolder):
        with pytest.raises(ValueError, match=r"has its weights in another format than step-\d+\..*Convert it"):
            kind(tmp_path, LOSS)
    assert SafetensorsFolder(tmp_path, LOSS, pattern="step-([23]0)").steps == [20, 30]
    # Both formats of one step, a folder that a crash left, and other files are no other checkpoints.
    for step in (20, 30):
        plain(tmp_path, f"step-{step}", step)
    (tmp_path / "step-0.pt").unlink()
    (tmp_path / "step-10.pt").unlink()
    (tmp_path / "step-40").mkdir()
    (tmp_path / "step-40" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "vocabulary-50257.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match="left aside .*step-40, without weights"):
        assert SafetensorsFolder(tmp_path, LOSS).steps == [20, 30]


@pytest.mark.parametrize(
    "name", ["sampler.bin", "optimiser.bin", "1_optimizer.bin", "scheduler.bin", "random_states_0.bin"]
)
def test_states_of_accelerate_beside_weights_are_no_weights(tmp_path, name):
    for step in (1, 2):
        (tmp_path / f"checkpoint_{step}").mkdir()
        torch.save(state(step), tmp_path / f"checkpoint_{step}" / "pytorch_model.bin")
        (tmp_path / f"checkpoint_{step}" / name).write_bytes(b"")
    assert torch.equal(StateDictFolder(tmp_path, LOSS).theta(2), vector(2))
