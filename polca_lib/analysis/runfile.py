"""Open an analysis that a TOML file describes: import its code and find its checkpoints."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

from polca_lib.analysis.analysis import Analysis
from polca_lib.analysis.settings import Code, RunFile
from polca_lib.derivatives.memory import checked_device
from polca_lib.derivatives.token_loss import Subject, TokenLoss
from polca_lib.storage.checkpoint_folders import SafetensorsFolder, StateDictFolder
from polca_lib.storage.checkpoints import Checkpoints
from polca_lib.storage.huggingface import HuggingFaceRevisions


def open_analysis(file: str | Path | RunFile, *, verify: bool = False) -> Analysis:
    """Open the analysis that a file describes; computes nothing yet.

    Args:
        file: path of a TOML file, or its content, see :class:`polca_lib.analysis.settings.RunFile`.
        verify: see :class:`polca_lib.analysis.analysis.Analysis`.

    Raises:
        FileNotFoundError, ValueError: the file is missing or wrong.
        ImportError: its module can't be imported.
        TypeError: its function does not return a subject.
    """
    run_file = file if isinstance(file, RunFile) else RunFile.read(Path(file))
    checked_device(run_file.device)
    subject = _subject(run_file.code, run_file.file.parent)
    return Analysis(
        run_file.results,
        open_checkpoints(run_file, TokenLoss(subject.model, subject.loss)),
        subject.validation,
        hessian=subject.hessian,
        tokens=subject.tokens,
        hessian_loss=subject.hessian_loss,
        settings=run_file.settings,
        code=[str(run_file.file.parent)],
        verify=verify,
    )


def _subject(code: Code, folder: Path) -> Subject:
    """Call the function that a file names."""
    module, _, name = code.setup.partition(":")
    # Import the module beside the file, even if one of the same name was imported from another folder.
    path, loaded = folder / f"{module.replace('.', '/')}.py", sys.modules.get(module)
    if path.exists() and module.partition(".")[0] in sys.stdlib_module_names:
        raise ImportError(f"code.setup = {code.setup!r}: {path.name} has the name of a module of Python; rename it")
    if loaded is not None and path.exists() and Path(loaded.__file__ or "") != path:
        del sys.modules[module]
        sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        if (error.name or "").startswith("polca_lib."):  # code for version 0.1
            error.msg += "; since version 0.2 names such as Subject and TokenLoss come from polca_lib itself"
        raise ImportError(
            f"code.setup = {code.setup!r}: {error}; allowed: a function of an installed module or a module in {folder}"
        ) from error
    except AttributeError:
        raise ValueError(f"code.setup = {code.setup!r}, but module {module!r} has no {name!r}; correct it") from None
    # Relative paths among the arguments start from the file, as all other paths of the file do.
    with contextlib.chdir(folder):
        subject = function(**code.arguments)
    if not isinstance(subject, Subject):
        raise TypeError(f"code.setup = {code.setup!r} returns {type(subject).__name__}; allowed: polca_lib.Subject")
    return subject


def open_checkpoints(run_file: RunFile, loss: TokenLoss | None) -> Checkpoints:
    """The checkpoints that a file names; without a loss, only to look at them."""
    source, device = run_file.checkpoints, run_file.device
    path, names = run_file.file.parent / source.path, {"pattern": source.pattern, "rename": source.rename}
    if source.kind == "safetensors":
        return SafetensorsFolder(path, loss, device, **names)
    if source.kind == "state_dict":
        return StateDictFolder(path, loss, device, key=source.key, **names)
    repo, of_hub = (
        str(path) if path.is_dir() else source.path,
        source.model_dump(include={"revisions", "keep", "stage"}),
    )
    return HuggingFaceRevisions(repo, loss, device, **of_hub, **names)
