import pytest
import torch
from cases import Attention, Mlp, flip_bit, folder_bytes, mlp_loss, next_token_loss

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.checkpoints import (
    CheckpointFolder,
    ChecksummedCheckpoints,
    DamagedFile,
    load_tensors,
    save_tensors,
)

TENSORS = {"a": torch.arange(3.0), "b": torch.tensor(7)}


@pytest.fixture
def file(tmp_path):
    save_tensors(tmp_path / "some.safetensors", TENSORS)
    return tmp_path / "some.safetensors"


def test_tensors_read_back_bit_for_bit(tmp_path):
    tensors = {
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "transposed": torch.randn(3, 4, dtype=torch.float64).T,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    save_tensors(tmp_path / "x", tensors)
    loaded = load_tensors(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(file):
    for position in range(file.stat().st_size):
        for bit in range(8):
            flip_bit(file, position, bit)
            with pytest.raises(DamagedFile, match=r"some\.safetensors is damaged.*delete"):
                load_tensors(file)
            flip_bit(file, position, bit)
    assert load_tensors(file)["b"] == 7


def test_every_truncation_is_noticed(file):
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedFile, match=r"some\.safetensors is damaged"):
            load_tensors(file)


def test_file_without_a_checksum_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "foreign.safetensors")
    with pytest.raises(DamagedFile, match="foreign"):
        load_tensors(tmp_path / "foreign.safetensors")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tensors(tmp_path / "absent.safetensors")


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path, TokenLoss(Mlp(), mlp_loss))
    for step in (100, 0, 20):
        folder.save(step, dict(Mlp().named_parameters()))
    return folder


def test_steps_are_in_training_order_and_nothing_else_counts(folder):
    (folder.path / ".step-00000040.safetensors.partial").touch()
    (folder.path / "step-40.safetensors").touch()
    (folder.path / "states").mkdir()
    assert folder.steps == [0, 20, 100]


def test_theta_is_the_stored_parameters_in_the_order_of_the_model(folder):
    model = Mlp()
    folder.save(40, dict(reversed(list(model.named_parameters()))))
    assert torch.equal(folder.theta(40), torch.cat([p.flatten() for p in model.parameters()]))


def test_damaged_checkpoint_is_named(folder):
    flip_bit(folder.file(20), -1)
    with pytest.raises(DamagedFile, match=r"step-00000020\.safetensors"):
        folder.theta(20)


def test_missing_checkpoint_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"step-00000060\.safetensors"):
        folder.theta(60)


def test_checkpoint_of_another_model_is_refused_by_name(folder):
    foreign = CheckpointFolder(folder.path, TokenLoss(Attention(), next_token_loss))
    with pytest.raises(ValueError, match=r"step-00000020\.safetensors does not fit the model.*embed\.weight"):
        foreign.theta(20)


def test_saving_the_same_parameters_gives_the_same_bytes(folder):
    before = folder_bytes(folder.path)
    folder.save(20, folder.token_loss.unflatten(folder.theta(20)))
    assert folder_bytes(folder.path) == before


def checksummed(tmp_path, seeds):
    """Checkpoints whose weights are drawn from the seeds, so that equal seeds give equal weights."""
    folder = CheckpointFolder(tmp_path / "run", TokenLoss(Mlp(), mlp_loss))
    folder.path.mkdir()
    for step, seed in enumerate(seeds):
        torch.manual_seed(seed)
        folder.save(10 * step, dict(Mlp().named_parameters()))
    return ChecksummedCheckpoints(folder, tmp_path / "checksums")


def test_equal_weights_at_different_steps_are_known_once_they_were_read(tmp_path):
    checkpoints = checksummed(tmp_path, [1, 2, 1, 3, 2, 1])
    assert checkpoints.duplicates() == []
    for step in (50, 10, 0):
        checkpoints.theta(step)
    assert checkpoints.duplicates() == [[0, 50]]
    for step in checkpoints.steps:
        checkpoints.theta(step)
    assert checkpoints.duplicates() == [[0, 20, 50], [10, 40]]
    assert checkpoints.notes() == ["the same weights at steps 0, 20, 50", "the same weights at steps 10, 40"]
