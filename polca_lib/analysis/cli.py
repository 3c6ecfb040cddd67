"""The command ``polca``: plan, run, look at and report an analysis that a TOML file describes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="POLCA on your own training run: loss change per token and per direction of weight space.\n\n"
    "A TOML file says where the checkpoints are and which function makes model, loss and data; `polca init` writes one "
    "to begin with. Work that is stopped goes on where it was: run the same command again.\n\n"
    "Exit codes: 0 done, 1 the work failed, 2 a setting or a file is wrong, 3 something is still missing (status), "
    "130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="the TOML file", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]


class Stage(StrEnum):
    """Stages of an analysis; each needs those before it."""

    basis = "basis"
    projections = "projections"
    clusters = "clusters"
    report = "report"


class Engine(StrEnum):
    """Who carries out the tasks."""

    in_process = "in-process"
    processes = "processes"
    dask = "dask"
    ray = "ray"


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors as one message and an exit code."""
    from polca_lib.analysis.engine import EngineFailure
    from polca_lib.analysis.projections import NonFiniteProjection
    from polca_lib.storage.artefacts import ArtefactMismatch, DamagedFile

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to go on", err=True)
        raise typer.Exit(130) from None
    except (DamagedFile, EngineFailure, NonFiniteProjection, MemoryError) as error:
        _fail(error, 1)
    except (ArtefactMismatch, ValueError, TypeError, ImportError, FileNotFoundError) as error:
        _fail(error, 2)
    except OSError as error:
        _fail(error, 1)


def _fail(error: BaseException, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(note, err=True)
    raise typer.Exit(code)


def write_starter(folder: Path) -> list[Path]:
    """Write ``polca.toml`` and ``my_run.py`` to ``folder``, which is made if missing; returns their paths.

    Raises:
        ValueError: one of them is there already.
    """
    paths = [folder / name for name in ("polca.toml", "my_run.py")]
    if there := [path for path in paths if path.exists()]:
        raise ValueError(f"{there[0]} is there already; give another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_text(
            (files("polca_lib.analysis") / "example" / path.name).read_text(encoding="utf-8"), encoding="utf-8"
        )
    return paths


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where to put the files")] = Path("."),
) -> None:
    """Write `polca.toml` and `my_run.py` to begin with: a small example that runs as it is."""

    with reported_errors():
        for file in write_starter(folder):
            typer.echo(f"wrote {file}")
        typer.echo(f"next: cd {folder}; python my_run.py; polca plan; polca run")


@app.command()
def plan(
    file: File = Path("polca.toml"),
    as_json: Json = False,
    checkpoints: Annotated[int | None, typer.Option(min=2, help="count so many, not those that are there")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="count with so many, not those of the file")] = None,
    operations_per_second: Annotated[
        float | None,
        typer.Option(min=1, help="of a worker, such as 4e14; measured on this device if not given"),
    ] = None,
) -> None:
    """Say what a run will take, before any of it is done: memory, disk, time, and how it will go about it."""
    with reported_errors():
        from polca_lib.analysis.runfile import RunFile, open_analysis

        about = RunFile.read(file)
        planned = open_analysis(about).plan(
            checkpoints=checkpoints,
            workers=workers or about.engine.workers or 1,
            operations_per_second=operations_per_second,
        )
        typer.echo(json.dumps(planned.as_dict(), indent=1) if as_json else str(planned))


@app.command()
def run(
    file: File = Path("polca.toml"),
    stage: Annotated[Stage, typer.Option(help="the last one to do")] = Stage.report,
    engine: Annotated[Engine | None, typer.Option(help="who carries out the tasks; the file's if not given")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; all there are if not given")] = None,
    address: Annotated[str | None, typer.Option(help="of a running cluster, such as tcp://10.0.0.1:8786")] = None,
    as_json: Json = False,
) -> None:
    """Compute what is still missing, or damaged, stage by stage, and write the report."""
    with reported_errors():
        from polca_lib.analysis.engine import parallel_backend
        from polca_lib.analysis.runfile import RunFile, open_analysis
        from polca_lib.analysis.stages import project_together

        about = RunFile.read(file)
        backend = {
            "name": about.engine.name if engine is None else engine.value,
            "workers": workers or about.engine.workers,
            "address": address or (about.engine.address if engine is None else None),
        }
        analysis = open_analysis(about, verify=True)
        controls = [analysis.on_basis(kind) for kind in about.beside]
        done: dict[str, Any] = {"folder": str(analysis.folder)}
        with parallel_backend(**backend):
            for name in list(Stage)[: list(Stage).index(stage) + 1]:
                if name is Stage.basis:
                    _ = [one.basis for one in (analysis, *controls)]
                elif name is Stage.projections:
                    project_together([analysis, *controls])
                elif name is Stage.clusters:
                    _ = [one.labels for one in (analysis, *controls)]
                else:
                    done["report"] = str(analysis.report(analysis.folder / "report.html", about.title))
        if stage is Stage.report:
            done["summary"] = analysis.findings.summary()
            done["beside"] = {one.settings.basis.kind: one.findings.summary() for one in controls}
        _print(done, as_json)


@app.command()
def status(
    place: Annotated[Path, typer.Argument(help="the TOML file, or the folder of results")] = Path("polca.toml"),
    verify: Annotated[bool, typer.Option("--verify", help="read all pieces and check them")] = False,
    as_json: Json = False,
) -> None:
    """Say what is done and what is missing, from the files alone."""
    with reported_errors():
        from polca_lib.analysis.settings import RunFile
        from polca_lib.analysis.status import as_table, status

        folder = RunFile.read(place).results if place.is_file() else place
        rows = status(folder, verify=verify)
        typer.echo(json.dumps({"folder": str(folder), "stages": rows}, indent=1) if as_json else as_table(folder, rows))
        if not rows or any(row["problem"] or row["done"] != row["pieces"] for row in rows):
            raise typer.Exit(3)


@app.command()
def report(
    file: File = Path("polca.toml"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="report.html of the run's folder if not given")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the page that shows it all: one HTML file, which needs nothing else. What is missing is computed first."""
    with reported_errors():
        from polca_lib.analysis.runfile import RunFile, open_analysis

        about = RunFile.read(file)
        analysis = open_analysis(about)
        written = analysis.report(output or analysis.folder / "report.html", about.title)
        found = analysis.findings.summary()
        _print({"folder": str(analysis.folder), "report": str(written), "summary": found}, as_json)


def _print(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done, indent=1))
        return
    for name in ("folder", "report"):
        if name in done:
            typer.echo(f"{name}: {done[name]}")
    for name, value in done.get("summary", {}).items():
        if not isinstance(value, (list, dict)):
            typer.echo(f"{name}: {value}")
    for kind, summary in done.get("beside", {}).items():
        told = (f"{name} {summary[name]}" for name in ("claimed", "inside", "vectors_with_clusters", "clusters"))
        typer.echo(f"beside, basis {kind}: {', '.join(told)}")


def main() -> None:
    """Run the command, with those that other packages add to it."""
    sys.stdout.reconfigure(errors="backslashreplace")
    for extension in entry_points(group="polca.commands"):
        # The package of the book is installed with a checkout alone.
        with suppress(ModuleNotFoundError):
            app.add_typer(extension.load(), name=extension.name)
    app()


if __name__ == "__main__":
    main()
