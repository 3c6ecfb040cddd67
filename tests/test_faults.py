"""Faults on purpose; the table of the book comes from the same functions, with more tries."""

import faults
import pytest


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
    found = faults.FAULTS[name](tmp_path / "fault", expected)
    assert found["tries"] >= 1
