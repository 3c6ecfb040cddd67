"""The same projections in process, in processes, on Dask and on Ray, with one worker and two: time, same bytes?

    python benchmarks/engines.py

Writes ``engines.csv`` and ``provenance.json`` to ``benchmarks/results/engines``, which the book shows. Workers have one
thread each, and so has the process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

import joblib
import pandas as pd
import torch

from polca_lib.analysis.engine import parallel_backend
from polca_lib.analysis.settings import ProjectionSettings
from polca_lib.analysis.workers import project_runs
from polca_lib.derivatives.token_loss import TokenLoss
from polca_lib.method.basis import compute_basis
from polca_lib.method.settings import BasisSettings
from polca_lib.storage.artefacts import software
from polca_lib.storage.checkpoints import CheckpointFolder
from polca_lib.tasks import arithmetic
from polca_lib.tasks.arithmetic import Addition
from polca_lib.tasks.models import build_model
from polca_lib.tasks.settings import RunSettings

ENGINES = (("in-process", None), ("processes", 1), ("processes", 2), ("dask", 1), ("dask", 2), ("ray", 1), ("ray", 2))


def digest(path: Path) -> str:
    """Of all pieces below ``path``, by name and content."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(path)).encode() + f.read_bytes() for f in files)).hexdigest()


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = RunSettings.from_preset("laptop", **{"data.validation_examples": 250})
    task = Addition(config)
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), list(range(0, 20 * arguments.steps, 20))
        checkpoints = CheckpointFolder(folder, TokenLoss(build_model(config.model, 0), arithmetic.answer_loss))
        theta = checkpoints.token_loss.flatten(checkpoints.token_loss.parameters)
        for step in steps:
            checkpoints.save(step, checkpoints.token_loss.unflatten(theta))
            theta = theta + 1e-3 * torch.randn_like(theta)
        settings = BasisSettings(kind="random", n_vectors=16)
        basis = compute_basis(folder / "basis.zarr", settings, checkpoints, None, steps=[0] * 16)
        rows, first = [], None

        def project(path: Path, steps: list[int]) -> None:
            settings = ProjectionSettings(curvature=False)
            project_runs([path], checkpoints, steps, task.validation, task.tokens, [basis], [settings], 2**30)

        for repeat in range(arguments.repeats):
            for engaged, workers in ENGINES:
                path = folder / f"{engaged}-{workers}-{repeat}.zarr"
                with parallel_backend(engaged, workers=workers):
                    # Starting workers, and what they import, is not what is measured: so each does a task before.
                    project(path.with_suffix(".warm"), steps[: 4 * (workers or 1)])
                    start = time.perf_counter()
                    project(path, steps)
                    seconds = time.perf_counter() - start
                first = first or digest(path)
                rows.append(
                    {"engine": engaged, "workers": workers or 1, "seconds": seconds, "same": digest(path) == first}
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby(["engine", "workers"], sort=False)
    result = table["seconds"].agg(["median", "min", "max"]).round(2)
    result["speed-up"] = (result.loc[("in-process", 1), "median"] / result["median"]).round(2)
    result["same bytes"] = table["same"].all()
    place = Path(__file__).parent / "results/engines"
    place.mkdir(exist_ok=True)
    result.reset_index().to_csv(place / "engines.csv", index=False)
    about = {key: software()[key] for key in ("commit", "python", "torch", "machine")}
    about |= {"joblib": joblib.__version__, "repeats": arguments.repeats, "checkpoints": arguments.steps}
    about |= {"parameters": checkpoints.token_loss.n_parameters, "tokens": len(task.tokens), "vectors": 16}
    (place / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")
    assert result["same bytes"].all(), result
    print(result)


if __name__ == "__main__":
    main()
