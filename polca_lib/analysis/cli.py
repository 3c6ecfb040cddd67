"""The command ``polca``: plan, run, look at and report an analysis that a TOML file describes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
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
def _told() -> Iterator[None]:
    """Errors as one message and an exit code."""
    from polca_lib.storage.artefacts import ArtefactMismatch, DamagedFile
    from polca_lib.analysis.engine import EngineFailure
    from polca_lib.analysis.worker import NonFiniteProjection

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


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where to put the files")] = Path("."),
) -> None:
    """Write `polca.toml` and `my_run.py` to begin with: a small example that runs as it is."""

    from polca_lib.analysis.starter import write_starter

    with _told():
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
    with _told():
        from polca_lib.analysis.runfile import plan_analysis

        planned = plan_analysis(
            file, checkpoints=checkpoints, workers=workers, operations_per_second=operations_per_second
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
    """Compute what is still missing, stage by stage, and write the report."""
    with _told():
        from polca_lib.analysis.engine import engine as engaged
        from polca_lib.analysis.runfile import open_analysis
        from polca_lib.analysis.settings import RunFile

        settings = RunFile.read(file)
        own = settings.engine
        who = {
            "name": own.name if engine is None else engine.value,
            "workers": workers or own.workers,
            "address": address or (own.address if engine is None else None),
        }
        analysis = open_analysis(file)
        order = list(Stage)
        done: dict[str, Any] = {"folder": str(analysis.folder)}
        with engaged(**who):
            for one in order[: order.index(stage) + 1]:
                if one is Stage.report:
                    done["report"] = str(analysis.report(analysis.folder / "report.html", settings.title))
                else:
                    getattr(analysis, {"clusters": "labels"}.get(one.value, one.value))
        if stage is Stage.report:
            done["summary"] = analysis.findings.summary()
        _print(done, as_json)


@app.command()
def status(
    place: Annotated[Path, typer.Argument(help="the TOML file, or the folder of results")] = Path("polca.toml"),
    verify: Annotated[bool, typer.Option("--verify", help="read all pieces and check them")] = False,
    as_json: Json = False,
) -> None:
    """Say what is done and what is missing, from the files alone."""
    with _told():
        from polca_lib.analysis.settings import RunFile
        from polca_lib.analysis.status import as_table, status

        folder = RunFile.read(place).place(place) if place.is_file() else place
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
    with _told():
        from polca_lib.analysis.runfile import open_analysis
        from polca_lib.analysis.settings import RunFile

        settings, analysis = RunFile.read(file), open_analysis(file)
        written = analysis.report(output or analysis.folder / "report.html", settings.title)
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


def main() -> None:
    """Run the command."""
    sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
