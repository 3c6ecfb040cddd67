"""Files to begin with: a small model, and the settings of its analysis."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_NAMES = ("polca.toml", "my_run.py")


def write_starter(folder: Path) -> list[Path]:
    """Write ``polca.toml`` and ``my_run.py`` to ``folder``, which is made if missing; returns their paths.

    Raises:
        ValueError: one of them is there already.
    """
    paths = [folder / name for name in _NAMES]
    if there := [path for path in paths if path.exists()]:
        raise ValueError(f"{there[0]} is there already; give another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_text((files("polca_lib") / "example" / path.name).read_text(encoding="utf-8"), encoding="utf-8")
    return paths
