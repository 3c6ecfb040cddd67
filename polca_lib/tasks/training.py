"""Training with AdamW and linear warm-up (PAPER Table 1), with checkpoints and bitwise resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Batch, Loss, TokenLoss
from polca_lib.storage.artefacts import Artefact, ArtefactMismatch, DamagedFile
from polca_lib.storage.checkpoints import CheckpointFolder, load_tensors, save_tensors
from polca_lib.storage.progress import progress
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings, TrainingSettings
from polca_lib.tasks.task import Task


class NonFiniteLoss(RuntimeError):
    """The training loss is NaN or infinite."""


class TrainedCheckpoints(CheckpointFolder):
    """Checkpoints of a run. The first call of :meth:`theta` trains the model.

    Args:
        artefact: training stage; its folder holds the checkpoints.
        task: training data and loss.
    """

    def __init__(self, artefact: Artefact, task: Task, settings: RunSettings):
        self.path, self.device = artefact.path, settings.device
        self._artefact, self._task, self._settings = artefact, task, settings

    @cached_property
    def token_loss(self) -> TokenLoss:
        """Loss of the model, whose weights are initialised from the seed."""
        return TokenLoss(build_model(self._settings.model, self._settings.seed, self.device), self._task.loss)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, including those not yet trained."""
        return self._settings.training.checkpoint_steps

    def identity(self, step: int) -> str:
        """Key of the training stage, and the step."""
        return f"{self._artefact.key}: {step}"

    def at_hand(self, step: int) -> bool:
        """Whether the model is built, which takes seconds, and the checkpoint is there."""
        return "token_loss" in self.__dict__ and self.file(step).exists()

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``, see ``CheckpointFolder.theta``. Trains the model first, if necessary."""
        return self._trained.theta(step)

    @cached_property
    def _trained(self) -> CheckpointFolder:
        """The folder, after training was started or resumed until all checkpoints exist."""
        folder = CheckpointFolder(self.path, self.token_loss, self.device)
        if set(folder.steps).issuperset(self.steps):
            return folder
        with self._artefact.at_work():
            train(
                self.token_loss.model,
                self._task.loss,
                lambda step: self._task.batch(step).to(self.device),
                self._settings.training,
                folder,
                groups=self._task.groups,
            )
        return folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Send workers a plain folder: they only read checkpoints that exist."""
        return CheckpointFolder, (self.path, self.token_loss, self.device)


def train(
    model: nn.Module,
    loss: Loss,
    batch_of: Callable[[int], Batch],
    settings: TrainingSettings,
    checkpoints: CheckpointFolder,
    *,
    groups: Sequence[str] = (),
) -> None:
    """AdamW with learning rate ``learning_rate * min(i / warmup_steps, 1)`` at update i = 1, 2, ... (PAPER Table 1).

    Trains ``model`` in place. Saves a checkpoint at each of ``settings.checkpoint_steps``. A killed run resumes
    from its last full state (parameters, optimiser, step) and writes the same bytes as an uninterrupted run.

    Args:
        model: initialised model. A stored state overwrites its parameters.
        loss: ``(model, batch) -> (n_tokens,)``.
        batch_of: gives the batch of update ``step``, counted from 0. It must depend on ``step`` alone.
        settings: optimiser, schedule and steps of checkpoints.
        checkpoints: folder of the checkpoints; states go to its folder ``states``.
        groups: names of the target tokens of an example. The progress bar shows the mean loss of each.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite. Earlier checkpoints stay.
        ArtefactMismatch: there are checkpoints but no state, and training from the start gives others. They stay.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    states = checkpoints.path / "states"
    states.mkdir(exist_ok=True)
    start = _resume(model, optimiser, states, checkpoints, due := settings.checkpoint_steps)
    if start == settings.steps:
        return
    # Without a state, training begins anew, and must not mix its checkpoints with those of another machine or version.
    keep = start is None
    if start is None:
        _save_checkpoint(checkpoints, 0, model, keep=keep)
        _save_state(model, optimiser, states, 0)
        start = 0
    was_training, device = model.training, next(model.parameters()).device.type
    names = groups or ("loss",)
    model.train()
    with progress(desc="training", unit="step", total=settings.steps, done=start) as bar:
        for done in range(start + 1, settings.steps + 1):
            # Linear warm-up of the learning rate (Table 1).
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * min(done / settings.warmup_steps, 1.0)
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = loss(model, batch_of(done - 1))
            mean = losses.mean()
            if not torch.isfinite(mean):
                raise NonFiniteLoss(
                    f"the training loss is {mean.item()} at step {done - 1}; checkpoints before it are kept. "
                    f"Lower training.learning_rate = {settings.learning_rate} or raise "
                    f"training.warmup_steps = {settings.warmup_steps}"
                )
            optimiser.zero_grad()
            mean.backward()
            optimiser.step()
            if done in due:
                _save_checkpoint(checkpoints, done, model, keep=keep)
                means = losses.detach().view(-1, len(names)).mean(0).tolist()
                bar.set_postfix({name: f"{value:.3f}" for name, value in zip(names, means, strict=True)})
            if done % settings.state_every == 0 or done == settings.steps:
                _save_state(model, optimiser, states, done)
            bar.update()
    model.train(was_training)


def _save_checkpoint(checkpoints: CheckpointFolder, step: int, model: nn.Module, *, keep: bool) -> None:
    """Save the parameters at ``step``; with ``keep``, an intact checkpoint stays and must equal them."""
    parameters, existing = dict(model.named_parameters()), {}
    if keep:
        with suppress(FileNotFoundError, DamagedFile):
            existing = load_tensors(checkpoints.file(step), step=step)
    if any(not torch.equal(value, parameters[name].detach().cpu()) for name, value in existing.items()):
        for state in (checkpoints.path / "states").glob("step-*"):  # of this attempt
            state.unlink()
        raise ArtefactMismatch(
            f"{checkpoints.file(step)} is there, but {checkpoints.path / 'states'} has no state to go on from, and "
            "training from the start gives other weights here; restore the states, or delete the folder to train anew"
        )
    if not existing:
        checkpoints.save(step, parameters)


def _save_state(model: nn.Module, optimiser: torch.optim.Optimizer, states: Path, step: int) -> None:
    """Save parameters and optimiser state at ``step``, and delete all but the last two states."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors |= {f"{key}/{name}": value for key, value in {"parameters": p, **optimiser.state[p]}.items()}
    save_tensors(states / f"step-{step:08d}.safetensors", tensors, step=step)
    for old in sorted(states.glob("step-*.safetensors"))[:-2]:
        old.unlink()


@torch.no_grad()
def _resume(
    model: nn.Module, optimiser: torch.optim.Optimizer, states: Path, checkpoints: CheckpointFolder, due: list[int]
) -> int | None:
    """Load the newest intact state whose checkpoints all exist, and return its step, if there is one."""
    existing = set(checkpoints.steps)
    for file in sorted(states.glob("step-*.safetensors"), reverse=True):
        step = int(file.stem.removeprefix("step-"))
        with suppress(DamagedFile):
            if existing.issuperset(earlier for earlier in due if earlier <= step):
                tensors = load_tensors(file, step=step)
                for name, p in model.named_parameters():
                    p.copy_(tensors[f"parameters/{name}"])
                    # The state of step 0 has parameters only.
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                    optimiser.state[p] = {key: tensors[f"{key}/{name}"].to(p.device) for key in keys}
                return step
        # An earlier state, or a fresh start, gives the same run.
        file.unlink()
    return None
