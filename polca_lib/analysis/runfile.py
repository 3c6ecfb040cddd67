"""An analysis that a TOML file describes: its code and its checkpoints."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from polca_lib.analysis.settings import Code, RunFile
from polca_lib.analysis.stages import Analysis
from polca_lib.derivatives.token_loss import Subject, TokenLoss
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.folders import SafetensorsFolder, StateDictFolder
from polca_lib.storage.huggingface import HuggingFaceRevisions


def open_analysis(file: str | Path | RunFile, *, verify: bool = False) -> Analysis:
    """The analysis that a file describes; nothing is computed yet.

    Args:
        file: path of a TOML file, or what was read of it, see :class:`polca_lib.analysis.settings.RunFile`.
        verify: see :class:`polca_lib.analysis.stages.Analysis`.

    Raises:
        FileNotFoundError, ValueError: of the file.
        ImportError: the module that it names can't be imported.
        TypeError: its function returns something else than a subject.
    """
    about = file if isinstance(file, RunFile) else RunFile.read(Path(file))
    subject = _subject(about.code, about.file.parent)
    return Analysis(
        about.results,
        _checkpoints(about, TokenLoss(subject.model, subject.loss)),
        subject.validation,
        hessian=subject.hessian,
        tokens=subject.tokens,
        hessian_loss=subject.hessian_loss,
        settings=about.settings,
        code=[str(about.file.parent)],
        verify=verify,
    )


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
        if (error.name or "").startswith("polca_lib."):  # an address of version 0.1
            error.msg += "; since version 0.2 names such as Subject and TokenLoss come from polca_lib itself"
        raise ImportError(
            f"code.setup = {code.setup!r}: {error}; allowed: a module beside {folder} or installed, and its function"
        ) from error
    except AttributeError:
        raise ValueError(f"code.setup = {code.setup!r}, but module {module!r} has no {name!r}") from None
    subject = function(**code.arguments)
    if not isinstance(subject, Subject):
        raise TypeError(f"code.setup = {code.setup!r} returns {type(subject).__name__}; allowed: polca_lib.Subject")
    return subject


def _checkpoints(about: RunFile, loss: TokenLoss) -> Checkpoints:
    """The checkpoints that a file tells of."""
    source, device = about.checkpoints, about.device
    local = about.file.parent / source.path
    if source.kind == "safetensors":
        return SafetensorsFolder(local, loss, device, pattern=source.pattern)
    if source.kind == "state_dict":
        return StateDictFolder(local, loss, device, pattern=source.pattern, key=source.key)
    repo = str(local) if local.is_dir() else source.path
    return HuggingFaceRevisions(repo, loss, device, revisions=source.revisions, keep=source.keep, stage=source.stage)
