"""An analysis that a TOML file describes: its code, its checkpoints, and the plan of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from polca_lib.analysis.stages import Analysis
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.huggingface import HuggingFaceRevisions
from polca_lib.analysis.plan import Plan, plan
from polca_lib.analysis.settings import Code, RunFile
from polca_lib.storage.folders import SafetensorsFolder, StateDictFolder
from polca_lib.derivatives.token_loss import Subject, TokenLoss


def open_analysis(file: str | Path) -> Analysis:
    """The analysis that a file describes, see :class:`polca_lib.analysis.settings.RunFile`; nothing is computed yet.

    Raises:
        FileNotFoundError, ValueError: of the file.
        ImportError: the module that it names can't be imported.
        TypeError: its function returns something else than a subject.
    """
    file = Path(file).resolve()
    about, subject, loss = _read(file)
    return Analysis(
        about.place(file),
        _checkpoints(about, loss, file.parent),
        subject.validation,
        hessian=subject.hessian,
        tokens=subject.tokens,
        settings=about.settings,
        code=[str(file.parent)],
    )


def plan_analysis(
    file: str | Path,
    *,
    checkpoints: int | None = None,
    workers: int | None = None,
    operations_per_second: float | None = None,
) -> Plan:
    """What the analysis that a file describes will take, see :func:`polca_lib.analysis.plan.plan`.

    Args:
        file: its path.
        checkpoints: count so many, rather than those that are there.
        workers: count with so many, rather than the file's.
        operations_per_second: of a worker; measured on this device if not given.

    Raises:
        FileNotFoundError, ValueError, ImportError, TypeError: see :func:`open_analysis`.
    """
    file = Path(file).resolve()
    about, subject, loss = _read(file)
    return plan(
        loss,
        subject.validation,
        checkpoints=checkpoints or len(about.chosen(_checkpoints(about, loss, file.parent).steps)),
        basis=about.basis,
        projection=about.projection,
        hessian_batch=subject.hessian,
        device=about.device,
        memory=about.memory,
        workers=workers or about.engine.workers or 1,
        operations_per_second=operations_per_second,
    )


def _read(file: Path) -> tuple[RunFile, Subject, TokenLoss]:
    about = RunFile.read(file)
    subject = _subject(about.code, file.parent)
    return about, subject, TokenLoss(subject.model, subject.loss)


def _subject(code: Code, folder: Path) -> Subject:
    """Call the function that a file names."""
    module, _, name = code.setup.partition(":")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    beside, loaded = folder / f"{module.replace('.', '/')}.py", sys.modules.get(module)
    if beside.exists() and loaded is not None and Path(loaded.__file__ or "") != beside:
        del sys.modules[module]  # of another run, with a module of the same name
        sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"code.setup = {code.setup!r}: {error}; allowed: a module beside {folder} or installed, and its function"
        ) from error
    except AttributeError:
        raise ValueError(f"code.setup = {code.setup!r}, but module {module!r} has no {name!r}") from None
    subject = function(**code.arguments)
    if not isinstance(subject, Subject):
        raise TypeError(
            f"code.setup = {code.setup!r} returns {type(subject).__name__}; allowed: polca_lib.derivatives.token_loss.Subject"
        )
    return subject


def _checkpoints(about: RunFile, loss: TokenLoss, folder: Path) -> Checkpoints:
    """The checkpoints that a file tells of."""
    source, device = about.checkpoints, about.device
    local = folder / source.path
    if source.kind == "safetensors":
        return SafetensorsFolder(local, loss, device, pattern=source.pattern)
    if source.kind == "state_dict":
        return StateDictFolder(local, loss, device, pattern=source.pattern, key=source.key)
    repo = str(local) if local.is_dir() else source.path
    return HuggingFaceRevisions(repo, loss, device, revisions=source.revisions, keep=source.keep, stage=source.stage)
