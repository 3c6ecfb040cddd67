"""AdamW with linear warm-up (the paper's Table 1), with checkpoints and bitwise resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from polca_lib.storage.artefacts import DamagedFile
from polca_lib.storage.checkpoints import CheckpointFolder, load_tensors, save_tensors
from polca_lib.tasks.settings import TrainingConfig
from polca_lib.storage.progress import progress
from polca_lib.derivatives.token_loss import Batch


class NonFiniteLoss(RuntimeError):
    """Training diverged."""


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch_of: Callable[[int], Batch],
    config: TrainingConfig,
    checkpoints: CheckpointFolder,
    *,
    groups: Sequence[str] = (),
) -> None:
    """Train ``model`` in place, keeping a checkpoint every ``config.checkpoint_every`` steps, step 0 included.

    A killed run resumes from its last full state (parameters, optimiser, step) and gives the same bytes as
    one that was not killed: the batch of a step depends on the step alone.

    Args:
        model: initialised; its parameters are overwritten when a state is found.
        loss: ``(model, batch) -> (n_tokens,)``.
        batch_of: the batch of update ``i``, counted from 0.
        config: optimiser, schedule and cadence. The learning rate of update i (from 1) is
            ``learning_rate * min(i / warmup_steps, 1)``.
        checkpoints: where checkpoints go; states lie beside them in ``states/``.
        groups: names of the tokens of one example, in order; the progress bar shows their mean losses, or that of all.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite; names the step. Checkpoints up to then stay.
    """
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    states = checkpoints.path / "states"
    states.mkdir(exist_ok=True)
    start = _resume(model, optimiser, states, checkpoints, config)
    if start == config.steps:
        return
    if start == 0:
        checkpoints.save(0, dict(model.named_parameters()))
        _save_state(model, optimiser, states, 0)
    was_training, device = model.training, next(model.parameters()).device.type
    model.train()
    with progress(desc="training", unit="step", total=config.steps, done=start) as bar:
        for step in range(start, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * min((step + 1) / config.warmup_steps, 1.0)
            with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = loss(model, batch_of(step))
            mean = losses.mean()
            if not torch.isfinite(mean):
                raise NonFiniteLoss(
                    f"the training loss is {mean.item()} at step {step}; checkpoints before it are kept. "
                    f"Lower training.learning_rate = {config.learning_rate} or lengthen "
                    f"training.warmup_steps = {config.warmup_steps}"
                )
            optimiser.zero_grad()
            mean.backward()
            optimiser.step()
            done = step + 1
            if done % config.checkpoint_every == 0:
                checkpoints.save(done, dict(model.named_parameters()))
                names = groups or ("loss",)
                by_group = losses.detach().view(-1, len(names)).mean(0).tolist()
                bar.set_postfix({name: f"{value:.3f}" for name, value in zip(names, by_group, strict=True)})
            if done % config.state_every == 0 or done == config.steps:
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
    config: TrainingConfig,
) -> int:
    """Load the newest state whose checkpoints are all there, and return its step (0: none); later ones go."""
    kept = set(checkpoints.steps)
    for file in sorted(states.glob("step-*.safetensors"), reverse=True):
        step = int(file.stem.removeprefix("step-"))
        try:
            tensors = load_tensors(file) if kept.issuperset(range(0, step + 1, config.checkpoint_every)) else None
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
