"""The commands ``polca paper``: runs of the paper's tasks, studies of them, verdicts on the paper's claims."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from polca_lib.analysis.cli import reported_errors

app = typer.Typer(
    help="The paper's own tasks: run one, make a study of it, judge the paper's claims.", no_args_is_help=True
)

Task = StrEnum("Task", ["addition", "grammar", "wikipedia"])
Preset = StrEnum("Preset", ["smoke", "laptop", "paper"])

TaskOption = Annotated[Task, typer.Option(help="of the paper, or the grammar")]
PresetOption = Annotated[Preset, typer.Option(help="settings to start from")]
Seed = Annotated[int, typer.Option(min=0)]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="NAME=VALUE", help="another setting of the run; may be repeated")
]


@app.command()
def run(
    task: TaskOption = Task.addition,
    preset: PresetOption = Preset.laptop,
    seed: Seed = 0,
    device: Device = "cpu",
    overrides: Overrides = [],  # noqa: B006  (typer makes a new one each time)
    beside: Annotated[str, typer.Option(metavar="KINDS", help="other bases, such as random,parameters")] = "",
) -> None:
    """Compute missing or damaged stages of a run, on its own basis and on those named."""
    with reported_errors():
        from polca_lib.analysis.analysis import project_together

        first = _run(task, preset, seed, device, overrides)
        first.verify = True
        projection = first.settings.projection
        # Curvature of all tokens costs a pass of its own.
        measured = projection.curvature and not projection.curvature_of_all
        sample = projection.curvature_examples if measured else None
        kinds = [kind for kind in beside.split(",") if kind]
        others = [first.on_basis(kind, curvature=measured, curvature_examples=sample) for kind in kinds]
        _ = [each.basis for each in (first, *others)]  # damaged ones are mended although their projections are there
        project_together([first, *others])
        typer.echo(first.provenance().to_string(header=False))


@app.command()
def study(
    task: TaskOption = Task.addition,
    preset: PresetOption = Preset.laptop,
    seed: Seed = 0,
    device: Device = "cpu",
    overrides: Overrides = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="of the study; task, preset and seed if not given")] = "",
    bases: Annotated[str, typer.Option(help="that are compared; all, or hessian,random for a task of text")] = "",
    ablation_curvature: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="examples on which curvature along the other bases is measured; 0 for none; 16 if not given, or as "
            "many as along the first for a task of text",
        ),
    ] = None,
    variants: Annotated[bool, typer.Option(help="specification curve on other Hessian bases, too")] = True,
    spacy: Annotated[str, typer.Option(metavar="PIPELINE", help="that tags Wikipedia: name or path")] = "",
    tables: Annotated[str, typer.Option(help="only these, separated by commas")] = "",
) -> None:
    """Run a study: projections on all bases, then every table; or finish one that was stopped."""
    with reported_errors():
        from polca_paper.english import LanguageStudy
        from polca_paper.studies import complete
        from polca_paper.study import BASES, Study

        first = _run(task, preset, seed, device, overrides)
        folder = f"{preset.value}-{seed}"
        if task is Task.addition:
            sample = 16 if ablation_curvature is None else ablation_curvature
            made = Study(first, tuple(bases.split(",")) if bases else BASES, sample, variants)
        else:
            made = LanguageStudy(first, tuple((bases or "hessian,random").split(",")), ablation_curvature, spacy)
            folder = f"{task.value}-{folder}"
        complete(made, name or folder, [table for table in tables.split(",") if table])


@app.command()
def verdicts(
    output: Annotated[Path | None, typer.Option(help="folder of the tables; data/paper if not given")] = None,
) -> None:
    """Choose the reading that fits the paper's numbers, judge every claim by it and by the paper's plain text.

    Writes ``readings.csv``, ``verdicts.csv`` and ``english_counts.json``.
    """
    with reported_errors():
        from polca_paper.fit import PLAIN_TEXT
        from polca_paper.saved_study import PAPER, SavedStudy
        from polca_paper.verdicts import (
            COLUMNS,
            ENGLISH,
            JUDGED,
            WHOLE,
            english_counts,
            judge,
            kept_readings,
            reading_of,
            scored_readings,
        )

        folder = output or PAPER
        scored, ours = scored_readings([SavedStudy(name) for name in WHOLE])
        (folder / "readings.csv").write_text(kept_readings(scored, ours).to_csv(index=False, float_format="%.6g"))
        studies = {scale: [[SavedStudy(name) for name in names] for names in seeds] for scale, seeds in JUDGED.items()}
        table = judge(studies, {"closest": reading_of(scored.iloc[0]), "plain text": PLAIN_TEXT})
        (folder / "verdicts.csv").write_text(table[COLUMNS].to_csv(index=False, float_format="%.6g"))
        counts = english_counts(SavedStudy(ENGLISH, setting="english"))
        (folder / "english_counts.json").write_text(json.dumps(counts, indent=1) + "\n")


def _run(task: Task, preset: Preset, seed: int, device: str, overrides: list[str]) -> Any:
    from polca_lib.tasks.run import Run
    from polca_lib.tasks.settings import parse_assignments

    given = {"task": task.value, "seed": seed, "device": device}
    return Run.from_preset(preset.value, **{**given, **parse_assignments(overrides)})
