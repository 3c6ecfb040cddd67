"""The command ``polca``: plan, run, check and report an analysis that a TOML file describes."""

from __future__ import annotations

import json
import sys
import warnings
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
    "A TOML file names the checkpoints and the function that returns model, loss and data. `polca init` writes an "
    "example, `polca check` looks for what would go wrong. The file names code that is run: trust it as you would a "
    "script; `polca check --no-code` runs none. To resume stopped work, run the same command again.\n\n"
    "Exit codes: 0 done, 1 the work failed, 2 a setting or a file is wrong, 3 something is missing (status), "
    "130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="the TOML file", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]

# Stages of an analysis, in order, and where tasks run.
Stage = StrEnum("Stage", ["basis", "projections", "clusters", "report"])
Engine = StrEnum("Engine", [(name.replace("-", "_"), name) for name in ("in-process", "processes", "dask", "ray")])


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print expected errors as one message and exit with a code."""
    from polca_lib.analysis.engine import EngineFailure
    from polca_lib.analysis.workers import NonFiniteProjection
    from polca_lib.storage.artefacts import DamagedFile

    wrong_input = ValueError, TypeError, ImportError, FileNotFoundError
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to resume", err=True)
        raise typer.Exit(130) from None
    except (*wrong_input, EngineFailure, NonFiniteProjection, MemoryError, OSError) as error:
        typer.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        # DamagedFile is a ValueError, but the user gave no wrong input.
        raise typer.Exit(2 if isinstance(error, wrong_input) and not isinstance(error, DamagedFile) else 1) from error


def write_starter(folder: Path) -> list[Path]:
    """Write ``polca.toml`` and ``my_run.py`` to ``folder`` and return their paths.

    Raises:
        ValueError: one of them exists.
    """
    paths = [folder / name for name in ("polca.toml", "my_run.py")]
    if existing := [path for path in paths if path.exists()]:
        raise ValueError(f"{existing[0]} is there already; use another folder, or move the file away")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_bytes((files("polca_lib.analysis") / "example" / path.name).read_bytes())
    return paths


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="folder for the files")] = Path(".")) -> None:
    """Write `polca.toml` and `my_run.py`: a small example that runs without changes."""
    with reported_errors():
        for file in write_starter(folder):
            typer.echo(f"wrote {file}")
        typer.echo(f"next: cd {folder}; python my_run.py; polca check; polca plan; polca run")


@app.command()
def plan(
    file: File = Path("polca.toml"),
    as_json: Json = False,
    checkpoints: Annotated[int | None, typer.Option(min=2, help="number to plan for; existing ones by default")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="number to plan for; from the file by default")] = None,
    operations_per_second: Annotated[
        float | None, typer.Option(min=1, help="speed of a worker, such as 4e14; measured here by default")
    ] = None,
) -> None:
    """Estimate memory, disk and time of a run before it starts."""
    with reported_errors():
        from polca_lib.analysis.check import as_table, check_checkpoints
        from polca_lib.analysis.runfile import RunFile, open_analysis

        run_file = RunFile.read(file)
        analysis = open_analysis(run_file)
        findings = check_checkpoints(analysis.checkpoints.inner, steps=analysis.steps)
        if problems := [finding.text for finding in findings if finding.state == "problem"]:
            raise ValueError("\n".join(problems))
        planned = analysis.plan(
            checkpoints=checkpoints,
            workers=workers or run_file.engine.workers or 1,
            operations_per_second=operations_per_second,
        )
        about = {"check": [finding._asdict() for finding in findings], **planned.as_dict()}
        typer.echo(json.dumps(about, indent=1) if as_json else f"{as_table(findings)}\n\n{planned}")


@app.command()
def check(
    place: Annotated[Path, typer.Argument(help="the TOML file, or a folder of checkpoints")] = Path("polca.toml"),
    code: Annotated[bool, typer.Option("--code/--no-code", help="call the function that the file names")] = True,
    read: Annotated[bool, typer.Option("--read", help="read all weights, also those of large runs")] = False,
    as_json: Json = False,
) -> None:
    """Say in seconds what would go wrong: names, steps, shapes, values, data, loss, derivatives, settings."""
    with reported_errors():
        from polca_lib.analysis.check import as_table, check_file, check_folder

        findings = check_folder(place, read=read) if place.is_dir() else check_file(place, code=code, read=read)
        listed = [finding._asdict() for finding in findings]
        typer.echo(json.dumps({"findings": listed}, indent=1) if as_json else as_table(findings))
        if any(finding.state == "problem" for finding in findings):
            raise typer.Exit(2)


@app.command()
def run(
    file: File = Path("polca.toml"),
    stage: Annotated[Stage, typer.Option(help="last stage to compute")] = Stage.report,
    engine: Annotated[Engine | None, typer.Option(help="where tasks run; from the file by default")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="number of processes; from the file, or all")] = None,
    address: Annotated[str | None, typer.Option(help="running cluster, such as tcp://10.0.0.1:8786")] = None,
    as_json: Json = False,
) -> None:
    """Compute missing or damaged results, stage by stage, and write the report."""
    with reported_errors():
        from polca_lib.analysis.analysis import project_together
        from polca_lib.analysis.engine import parallel_backend
        from polca_lib.analysis.runfile import RunFile, open_analysis
        from polca_lib.storage.artefacts import is_read_only

        run_file = RunFile.read(file)
        # The address of the file belongs to the engine of the file.
        name = run_file.engine.name if engine is None else engine.value
        address = address or (run_file.engine.address if engine is None else None)
        analysis = open_analysis(run_file, verify=True)
        controls = [analysis.on_basis(kind) for kind in run_file.beside]
        analyses, stages = [analysis, *controls], list(Stage)[: list(Stage).index(stage) + 1]
        done: dict[str, Any] = {"folder": str(analysis.folder)}
        with parallel_backend(name, workers=workers or run_file.engine.workers, address=address):
            # Refuse what can be refused before the first basis is computed.
            for each in analyses:
                if each.stored("basis") is None:
                    each.check_before()
            _ = [each.basis for each in analyses]
            if Stage.projections in stages:
                project_together(analyses)
            if Stage.clusters in stages:
                _ = [each.labels for each in analyses]
            if Stage.report in stages:
                page = analysis.folder / "report.html"
                if not (page.exists() and is_read_only(analysis.folder)):
                    page = analysis.report(page, run_file.title)
                done["report"] = str(page)
        if stage is Stage.report:
            done["summary"] = analysis.findings.summary()
            done["beside"] = {each.settings.basis.kind: each.findings.summary() for each in controls}
        _print(done, as_json)


@app.command()
def status(
    place: Annotated[Path, typer.Argument(help="the TOML file, or the folder of results")] = Path("polca.toml"),
    verify: Annotated[bool, typer.Option("--verify", help="read and check all pieces")] = False,
    as_json: Json = False,
) -> None:
    """Show what is done and what is missing, from the files alone."""
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
        Path | None, typer.Option("--output", "-o", help="path of the page; report.html in the folder of results")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report, one HTML file, and compute missing results first."""
    with reported_errors():
        from polca_lib.analysis.runfile import RunFile, open_analysis

        run_file = RunFile.read(file)
        analysis = open_analysis(run_file)
        page = analysis.report(output or analysis.folder / "report.html", run_file.title)
        done = {"folder": str(analysis.folder), "report": str(page), "summary": analysis.findings.summary()}
        _print(done, as_json)


_MEANS = {
    "checkpoints_fit": "whether checkpoints see what is learned",
    "claimed": "sum of projected losses / true loss change",
    "inside": "delivered: loss change of the movement inside the basis / true loss change",
    "correlation": "of sum and true loss change, over tokens",
    "still": "curves of a token along a vector that do not move",
    "vectors_falling": "vectors along which the mean falls: only these are clustered",
}


def _print(done: dict[str, Any], as_json: bool) -> None:
    """Print results as JSON or as lines of text."""
    if as_json:
        typer.echo(json.dumps(done, indent=1))
        return
    values = {name: done[name] for name in ("folder", "report") if name in done} | done.get("summary", {})
    for name, value in values.items():
        if not isinstance(value, (list, dict)):
            typer.echo(f"{name}: {value}{f'  ({_MEANS[name]})' if name in _MEANS else ''}")
    if values.get("checkpoints_fit") is False:
        typer.echo("Clusters and breakthroughs tell little here: see checkpoints_advice.")
    for kind, summary in done.get("beside", {}).items():
        counts = (f"{name} {summary[name]}" for name in ("claimed", "inside", "vectors_with_clusters", "clusters"))
        typer.echo(f"beside, basis {kind}: {', '.join(counts)}")


def main() -> None:
    """Run the command, with the commands that other packages add."""
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
    for extension in entry_points(group="polca.commands"):
        # The package of the book is only installed with a checkout.
        with suppress(ModuleNotFoundError):
            app.add_typer(extension.load(), name=extension.name)
    app()


if __name__ == "__main__":
    main()
