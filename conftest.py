"""How nbval validates the notebooks: ``pytest --nbval-lax notebooks/04_exact_loss.ipynb``, as typed."""

from pathlib import Path

import pytest

SANITISED = Path(__file__).parent / "tests" / "nbval_sanitize.cfg"


def pytest_configure(config: pytest.Config) -> None:
    """Give nbval its defaults: the kernel is the Python that runs pytest, and what no two runs share is left out."""
    option = config.option
    if getattr(option, "nbval", False) or getattr(option, "nbval_lax", False):
        option.nbval_current_env = option.nbval_current_env or not option.nbval_kernel_name
        option.nbval_sanitize_with = option.nbval_sanitize_with or str(SANITISED)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave out standard error, as the pages do: progress bars of what this machine had to compute."""
    if hasattr(collector, "skip_compare"):  # of nbval: a notebook
        collector.skip_compare += ("stderr",)
