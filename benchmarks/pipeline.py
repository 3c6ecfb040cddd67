"""A training step against a bare loop in torch, each stage of the pipeline, and what a run takes on disk.

python benchmarks/pipeline.py --sizes smoke laptop --repeats 5
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch
import xarray as xr
from harness import Trial

from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.storage.pieces import PieceStore
from polca_lib.tasks import arithmetic
from polca_lib.tasks.models import build_model
from polca_lib.tasks.run import Run
from polca_lib.tasks.settings import RunSettings, TrainingSettings
from polca_lib.tasks.training import train

STEPS = {"smoke": 20, "laptop": 100, "paper": 20}  # of one turn


def training_step(size: str, repeats: int, device: str) -> list[harness.Record]:
    """Seconds a step of ``training.train``, checkpoints included, and of the same loop without anything around it."""
    config = RunSettings.from_preset(size)
    settings = TrainingSettings.model_validate({**config.training.model_dump(), "steps": STEPS[size]})
    pairs = arithmetic.sample_pairs(0, 0, 0, settings.steps * settings.batch_size).train
    stream = arithmetic.encode(pairs).to(device).split(settings.batch_size)

    def ours() -> Trial:
        model = build_model(config.model, 0, device)
        token_loss = TokenLoss(model, arithmetic.answer_loss)

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                checkpoints = CheckpointFolder(Path(folder), token_loss, device)
                train(model, arithmetic.answer_loss, lambda step: stream[step], settings, checkpoints)

        return Trial(run, settings.steps)

    def bare() -> Trial:
        model = build_model(config.model, 0, device).train()

        def run() -> None:
            rate = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
            optimiser = torch.optim.AdamW(model.parameters(), fused=True, **rate)
            for batch in stream:
                loss = arithmetic.answer_loss(model, batch).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

        return Trial(run, settings.steps)

    return harness.compare(
        "training step",
        f"{size}, {settings.batch_size} examples a step",
        {"bare torch loop": bare, "ours": ours},
        ours="ours",
        repeats=repeats,
        device=device,
        unit="s a step",
        size=size,
        # The last token of an example is not fed to the model.
        tokens=settings.batch_size * (stream[0].shape[1] - 1),
    )


def stages(size: str, device: str) -> list[harness.Record]:
    """One run of the whole pipeline into a folder of its own."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(RunSettings.from_preset(size, device=device), Path(folder))
        first, lca = (run.on_basis(kind, curvature=False) for kind in ("hessian", "parameters"))
        tasks: dict[str, Callable[[], object]] = {
            "training": lambda: run.checkpoints,
            "basis": lambda: run.basis,
            "projections": lambda: first.projections,
            "projections with curvature": lambda: run.projections,
            "projections on parameters (LCA)": lambda: lca.projections,
        }
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds = time.perf_counter() - start
            records.append(
                {
                    "question": "stages",
                    "setting": size,
                    "contender": name,
                    **dict.fromkeys(("median_s", "low_s", "high_s"), seconds),
                    "ratio_to_ours": None,
                    "repeats": 1,
                    "unit": "s",
                    "size": size,
                    **harness.provenance(device),
                }
            )
    return records


def storage(size: str, repeats: int, device: str) -> list[harness.Record]:
    """Projections of a run's size: seconds to open and read them, and bytes of files over bytes of float32 values."""
    config = RunSettings.from_preset(size)
    steps, tokens = config.training.checkpoint_steps, len(arithmetic.PLACES) * config.data.validation_examples
    names = ("step", "token", "vector")
    template = xr.Dataset(coords=dict(zip(names, (steps, np.arange(tokens), np.arange(config.n_vectors)), strict=True)))
    dims = {"gradient": names, "loss": names[:2], "movement": names[::2]}
    values = np.random.default_rng(0).standard_normal((tokens, config.n_vectors), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "projections.zarr"
        store = PieceStore(path, template, {name: (own, "float32") for name, own in dims.items()}, "step")
        for piece in range(store.pieces):
            store.write(piece, gradient=values, loss=values[:, 0], movement=values[0])
        held = sum(variable.nbytes for variable in store.dataset().data_vars.values())
        taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        tasks: dict[str, Callable[[], object]] = {
            "open": lambda: PieceStore.load(path),
            "open, and read one vector": lambda: PieceStore.load(path)["gradient"].isel(vector=0).load(),
            "open, and read all vectors": lambda: PieceStore.load(path)["gradient"].load(),
        }
        return harness.compare(
            "storage",
            f"{size}, {len(steps)} x {tokens} x {config.n_vectors}",
            {name: lambda task=task: Trial(task) for name, task in tasks.items()},
            ours="open",
            repeats=repeats,
            device=device,
            unit="s",
            size=size,
            held_bytes=held,
            taken_over_held=taken / held,
        )


def main() -> None:
    """Command line."""
    arguments = harness.arguments(__doc__).parse_args()
    for size in arguments.sizes:
        harness.write(arguments.out, training_step(size, arguments.repeats, arguments.device))
        harness.write(arguments.out, storage(size, arguments.repeats, arguments.device))
        harness.write(arguments.out, stages(size, arguments.device))


if __name__ == "__main__":
    main()
