"""POLCA: loss change per token and per direction of weight space, and the breakthroughs it reveals.

Names are imported when they are first used, so that ``import polca_lib`` costs nothing.
"""

# ruff: noqa: F401  (for type checkers, which do not follow what is imported lazily)

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polca_lib.analysis.analysis import Analysis, project_together
    from polca_lib.analysis.check import check_analysis
    from polca_lib.analysis.engine import parallel_backend
    from polca_lib.analysis.plan import plan
    from polca_lib.analysis.settings import AnalysisSettings
    from polca_lib.derivatives.projection import project
    from polca_lib.derivatives.token_loss import MaskedLoss, Shared, Subject, TokenLoss
    from polca_lib.method.basis import compute_basis
    from polca_lib.method.breakthroughs import breakthrough_step
    from polca_lib.method.clustering import cluster_tokens
    from polca_lib.method.decomposition import completeness, polca, projected_loss
    from polca_lib.storage.checkpoint_folders import SafetensorsFolder, StateDictFolder
    from polca_lib.storage.huggingface import HuggingFaceRevisions
    from polca_lib.tasks.run import Run

__version__ = "0.3.0"

_MODULES = {
    # One function and its derivatives
    "derivatives.token_loss": ("TokenLoss", "Subject", "MaskedLoss", "Shared"),
    "derivatives.projection": ("project",),
    # The method
    "method.basis": ("compute_basis",),
    "method.decomposition": ("polca", "projected_loss", "completeness"),
    "method.clustering": ("cluster_tokens",),
    "method.breakthroughs": ("breakthrough_step",),
    # Checkpoints
    "storage.checkpoint_folders": ("SafetensorsFolder", "StateDictFolder"),
    "storage.huggingface": ("HuggingFaceRevisions",),
    # A run of your own
    "analysis.analysis": ("Analysis", "project_together"),
    "analysis.settings": ("AnalysisSettings",),
    "analysis.check": ("check_analysis",),
    "analysis.plan": ("plan",),
    "analysis.engine": ("parallel_backend",),
    # The paper's tasks
    "tasks.run": ("Run",),
}
_OWNERS = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_OWNERS)


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'polca_lib' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value = getattr(import_module(f"polca_lib.{_OWNERS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
