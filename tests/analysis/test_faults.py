"""Faults on purpose, a few of each; `make faults` does more of them, for the table of the book."""

import faults
import pytest

pytestmark = pytest.mark.slow

FEW = {
    "SIGKILL at random moments": {"moments": 12},
    "damaged pieces": {"damages": ("flipped",)},
    "damaged checkpoint": {"damages": ("flipped",)},
    "two processes on one run": {"pairs": 1},
    "disk full": {"times": 2},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Results of a run that nothing happens to."""
    return faults.reference(tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="module")
def may_mount():
    return faults.may_mount()


@pytest.mark.parametrize("name", faults.FAULTS)
def test_nothing_is_lost(tmp_path, expected, may_mount, name):
    if name in faults.NEED_MOUNT and not may_mount:
        pytest.skip("this user may not mount a file system")
    if name == "results in an object store":
        for library in ("moto", "s3fs"):
            pytest.importorskip(library, reason=f"{library} is not installed; make faults installs it")
    found = faults.FAULTS[name](tmp_path / "fault", expected, **FEW.get(name, {}))
    assert found["tries"] >= 1
