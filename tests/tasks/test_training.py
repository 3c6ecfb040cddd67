import itertools
import math
import shutil

import pytest
import torch
from cases import Mlp, fail_at, flip_bit, folder_bytes, mlp_batch, mlp_loss
from torch import nn

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.artefacts import ArtefactMismatch
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.tasks.settings import TrainingSettings
from polca_lib.tasks.training import NonFiniteLoss, train

CONFIG = TrainingSettings(steps=12, learning_rate=0.01, warmup_steps=5, checkpoint_every=2, state_every=4)


def batch_of(step):
    return mlp_batch(4, torch.float32, seed=step)


def fresh_model():
    torch.manual_seed(0)
    return Mlp()


def run(path, loss=mlp_loss, config=CONFIG):
    path.mkdir(exist_ok=True)
    model = fresh_model()
    checkpoints = CheckpointFolder(path, TokenLoss(model, loss))
    train(model, loss, batch_of, config, checkpoints)
    return checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    run(path)
    return folder_bytes(path)


def test_step_zero_and_every_step_of_the_cadence_have_a_checkpoint(tmp_path):
    assert run(tmp_path).steps == [0, 2, 4, 6, 8, 10, 12]


def test_step_zero_is_the_model_as_it_was_initialised(tmp_path):
    expected = torch.cat([p.flatten() for p in fresh_model().parameters()])
    assert torch.equal(run(tmp_path).theta(0), expected.detach())


def test_learning_rate_warms_up_linearly_from_the_first_update(tmp_path):
    # Adam moves a parameter with a constant gradient by exactly the learning rate.
    config = CONFIG.model_copy(update={"weight_decay": 0.0, "checkpoint_every": 1})
    model = nn.Linear(1, 1, bias=False).double()
    checkpoints = CheckpointFolder(tmp_path, TokenLoss(model, mlp_loss))
    train(model, lambda model, _: model.weight.flatten(), lambda _: None, config, checkpoints)
    theta = torch.stack([checkpoints.theta(step) for step in range(13)]).flatten()
    expected = [0.01 * min(i / 5, 1) for i in range(1, 13)]
    assert (-theta.diff()).tolist() == pytest.approx(expected, rel=1e-5)


def test_updates_are_those_of_adamw_with_the_settings(tmp_path):
    checkpoints = run(tmp_path)
    model = fresh_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min((i + 1) / 5, 1))
    for step in range(12):
        optimiser.zero_grad()
        mlp_loss(model, batch_of(step)).mean().backward()
        optimiser.step()
        schedule.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(checkpoints.theta(12), expected, rtol=1e-5, atol=1e-6)


def test_training_again_is_the_same_run(tmp_path, whole):
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


@pytest.mark.parametrize("update", range(1, 13))
def test_run_killed_in_any_update_resumes_to_the_same_bytes(tmp_path, whole, update):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail_at(mlp_loss, update))
    assert folder_bytes(tmp_path) != whole
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


@pytest.mark.parametrize("write", range(1, 12))
def test_run_killed_in_any_write_resumes_to_the_same_bytes(tmp_path, monkeypatch, whole, write):
    import polca_lib.storage.checkpoints as checkpoints

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomically", fail_at(checkpoints.write_atomically, write))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


LOG = CONFIG.model_copy(update={"checkpoints": "log", "n_checkpoints": 6})
LIST = CONFIG.model_copy(update={"checkpoints": (0, 1, 6, 7, 12)})


@pytest.mark.parametrize("config", [LOG, LIST], ids=["log", "list"])
def test_run_with_uneven_checkpoints_killed_anywhere_resumes_to_the_same_bytes(tmp_path, config):
    checkpoints = run(tmp_path / "whole", config=config)
    assert checkpoints.steps == config.checkpoint_steps
    assert {b - a for a, b in itertools.pairwise(checkpoints.steps)} > {1}
    expected = folder_bytes(tmp_path / "whole")
    for update in range(1, 13):
        path = tmp_path / f"killed-{update}"
        with pytest.raises(KeyboardInterrupt):
            run(path, fail_at(mlp_loss, update), config)
        assert folder_bytes(path) != expected
        run(path, config=config)
        assert folder_bytes(path) == expected


def test_uneven_checkpoint_that_was_deleted_is_made_again_from_a_state_before_it(tmp_path):
    checkpoints = run(tmp_path, config=LIST)
    whole = folder_bytes(tmp_path)
    checkpoints.file(7).unlink()
    run(tmp_path, config=LIST)
    assert folder_bytes(tmp_path) == whole


def test_every_way_to_space_checkpoints_trains_the_same_weights(tmp_path):
    even, listed = run(tmp_path / "even"), run(tmp_path / "list", config=LIST)
    assert torch.equal(even.theta(6), listed.theta(6))
    assert torch.equal(even.theta(12), listed.theta(12))


def test_finished_run_is_not_trained_again(tmp_path, whole):
    run(tmp_path)
    run(tmp_path, fail_at(mlp_loss, 1))
    assert folder_bytes(tmp_path) == whole


@pytest.mark.parametrize("damage", [lambda file: flip_bit(file, -1), lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("n_damaged", [1, 2])
def test_damaged_states_are_passed_over_for_older_ones_or_a_fresh_start(tmp_path, whole, damage, n_damaged):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail_at(mlp_loss, 10))
    states = sorted((tmp_path / "states").iterdir())
    assert [file.name for file in states] == ["step-00000004.safetensors", "step-00000008.safetensors"]
    for file in states[-n_damaged:]:
        damage(file)
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


def test_resuming_repeats_no_update_before_the_newest_state(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail_at(mlp_loss, 10))
    calls = []

    def counting(model, batch):
        calls.append(1)
        return mlp_loss(model, batch)

    run(tmp_path, counting)
    assert len(calls) == 12 - 8


def test_deleted_checkpoint_is_made_again(tmp_path, whole):
    checkpoints = run(tmp_path)
    checkpoints.file(4).unlink()
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


def test_states_that_were_deleted_do_not_cost_the_checkpoints(tmp_path, whole):
    run(tmp_path)
    shutil.rmtree(tmp_path / "states")
    run(tmp_path)
    assert folder_bytes(tmp_path) == whole


def test_checkpoints_of_another_machine_are_not_overwritten_without_their_states(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "states")
    before = {name: content for name, content in folder_bytes(tmp_path).items() if "states" not in name}
    # Another machine or version rounds differently.
    with pytest.raises(ArtefactMismatch, match=r"step-00000002\.safetensors is there, but .*states has no state"):
        run(tmp_path, lambda model, batch: 1.0001 * mlp_loss(model, batch) ** 1.0001)
    after = {name: content for name, content in folder_bytes(tmp_path).items() if "states" not in name}
    assert after == before
    # A state of step 0 that the failed attempt left does not hide that.
    with pytest.raises(ArtefactMismatch):
        run(tmp_path, lambda model, batch: 1.0001 * mlp_loss(model, batch) ** 1.0001)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_training_and_names_the_step(tmp_path, whole, value):
    def loss(model, batch):
        losses = mlp_loss(model, batch)
        return losses * value if torch.equal(batch[0], batch_of(5)[0]) else losses

    with pytest.raises(NonFiniteLoss, match=r"at step 5.*learning_rate = 0\.01.*warmup_steps = 5"):
        run(tmp_path, loss)
    kept = {name: content for name, content in folder_bytes(tmp_path).items() if "states" not in name}
    assert sorted(kept) == [f"step-{step:08d}.safetensors" for step in (0, 2, 4)]
    assert all(whole[name] == content for name, content in kept.items())


def test_model_is_left_in_the_mode_it_was_in(tmp_path):
    model = Mlp().eval()
    train(model, mlp_loss, batch_of, CONFIG, CheckpointFolder(tmp_path, TokenLoss(model, mlp_loss)))
    assert not model.training


def test_training_lowers_the_loss(tmp_path):
    config = CONFIG.model_copy(update={"steps": 60, "learning_rate": 0.05})
    torch.manual_seed(0)
    model = Mlp()
    checkpoints = CheckpointFolder(tmp_path, TokenLoss(model, mlp_loss))
    batch = mlp_batch(8, torch.float32)
    train(model, mlp_loss, lambda _: batch, config, checkpoints, groups=("one", "two"))
    before, after = (checkpoints.token_loss(checkpoints.theta(step), batch).mean() for step in (0, 60))
    assert after < before / 2
