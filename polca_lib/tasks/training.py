"""AdamW with linear warm-up (the paper's Table 1), with checkpoints and bitwise resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polca_lib.derivatives.token_loss import Batch, TokenLoss
from polca_lib.storage.artefacts import Artefact, DamagedFile
from polca_lib.storage.checkpoints import CheckpointFolder, load_tensors, save_tensors
from polca_lib.storage.progress import progress
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings, TrainingSettings
from polca_lib.tasks.task import Task


class NonFiniteLoss(RuntimeError):
    """Training diverged."""


class TrainedCheckpoints(CheckpointFolder):
    """Checkpoints that are trained when weights are first asked for.

    Args:
        artefact: of the training stage; its folder holds the checkpoints.
        task: data and loss.
        settings: of the run.
    """

    def __init__(self, artefact: Artefact, task: Task, settings: RunSettings):
        self.path, self.device = artefact.path, settings.device
        self._artefact, self._task, self._settings, self._trained = artefact, task, settings, False

    @cached_property
    def token_loss(self) -> TokenLoss:
        """Of the model, whose weights are initialised from the seed."""
        settings = self._settings
        return TokenLoss(build_model(settings.model, settings.seed, settings.device), self._task.loss)

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, or will have one."""
        return self._settings.training.checkpoint_steps

    def identity(self, step: int) -> str:
        """What the weights at ``step`` depend on."""
        return f"{self._artefact.key}: {step}"

    def theta(self, step: int) -> Float[Tensor, " d"]:
        """Flat parameter vector at ``step``; trains, or finishes training, first.

        Raises:
            FileNotFoundError, DamagedFile: the checkpoint is not what was written.
        """
        self.train()
        return super().theta(step)

    def train(self) -> None:
        """Train, or go on with it, until all checkpoints are there."""
        if self._trained:
            return
        with self._artefact.at_work():
            train(
                self.token_loss.model,
                self._task.loss,
                lambda step: self._task.batch(step).to(self.device),
                self._settings.training,
                self._plain(),
                groups=self._task.groups,
            )
        self._trained = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers get the folder alone: what they are to read has been trained."""
        return CheckpointFolder, (self.path, self.token_loss, self.device)

    def _plain(self) -> CheckpointFolder:
        return CheckpointFolder(self.path, self.token_loss, self.device)


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch_of: Callable[[int], Batch],
    settings: TrainingSettings,
    checkpoints: CheckpointFolder,
    *,
    groups: Sequence[str] = (),
) -> None:
    """Train ``model`` in place, keeping a checkpoint every ``settings.checkpoint_every`` steps, step 0 included.

    A killed run resumes from its last full state (parameters, optimiser, step) and gives the same bytes as
    one that was not killed: the batch of a step depends on the step alone.

    Args:
        model: initialised; its parameters are overwritten when a state is found.
        loss: ``(model, batch) -> (n_tokens,)``.
        batch_of: the batch of update ``i``, counted from 0.
        settings: optimiser, schedule and cadence. The learning rate of update i (from 1) is
            ``learning_rate * min(i / warmup_steps, 1)``.
        checkpoints: where checkpoints go; states lie beside them in ``states/``.
        groups: names of the tokens of one example, in order; the progress bar shows their mean losses, or that of all.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite; names the step. Checkpoints up to then stay.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    states = checkpoints.path / "states"
    states.mkdir(exist_ok=True)
    start = _resume(model, optimiser, states, checkpoints, settings)
    if start == settings.steps:
        return
    if start == 0:
        checkpoints.save(0, dict(model.named_parameters()))
        _save_state(model, optimiser, states, 0)
    was_training, device = model.training, next(model.parameters()).device.type
    model.train()
    with progress(desc="training", unit="step", total=settings.steps, done=start) as bar:
        for step in range(start, settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * min((step + 1) / settings.warmup_steps, 1.0)
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = loss(model, batch_of(step))
            mean = losses.mean()
            if not torch.isfinite(mean):
                raise NonFiniteLoss(
                    f"the training loss is {mean.item()} at step {step}; checkpoints before it are kept. "
                    f"Lower training.learning_rate = {settings.learning_rate} or lengthen "
                    f"training.warmup_steps = {settings.warmup_steps}"
                )
            optimiser.zero_grad()
            mean.backward()
            optimiser.step()
            done = step + 1
            if done % settings.checkpoint_every == 0:
                checkpoints.save(done, dict(model.named_parameters()))
                names = groups or ("loss",)
                by_group = losses.detach().view(-1, len(names)).mean(0).tolist()
                bar.set_postfix({name: f"{value:.3f}" for name, value in zip(names, by_group, strict=True)})
            if done % settings.state_every == 0 or done == settings.steps:
                _save_state(model, optimiser, states, done)
            bar.update()
    model.train(was_training)


def _save_state(model: nn.Module, optimiser: torch.optim.Optimizer, states: Path, step: int) -> None:
    tensors = {f"parameters/{name}": p for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{key}/{name}": value for key, value in optimiser.state[p].items()}
    save_tensors(states / f"step-{step:08d}.safetensors", tensors)
    for old in sorted(states.glob("step-*.safetensors"))[:-2]:
        old.unlink()


def _resume(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    states: Path,
    checkpoints: CheckpointFolder,
    settings: TrainingSettings,
) -> int:
    """Load the newest state whose checkpoints are all there, and return its step (0: none); later ones go."""
    kept = set(checkpoints.steps)
    for file in sorted(states.glob("step-*.safetensors"), reverse=True):
        step = int(file.stem.removeprefix("step-"))
        try:
            tensors = load_tensors(file) if kept.issuperset(range(0, step + 1, settings.checkpoint_every)) else None
        except DamagedFile:
            tensors = None
        if tensors is None:
            # The state before it, or a fresh start, gives the same run.
            file.unlink()
            continue
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"parameters/{name}"])
                state = {
                    key: tensors[f"{key}/{name}"].to(p.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in tensors
                }
                if state:
                    optimiser.state[p] = state
        return step
    return 0
