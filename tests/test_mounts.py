"""What is mounted, whatever it is called."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.mounts import mounted_at
from tests.e2e.mounting import is_mounted

NAMES = ("a b", "tab\there", "line\nfeed", "back\\slash", "return\rhere", "form\x0cfeed", "line\u2028")


@pytest.fixture(params=NAMES)
def mountpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A tmpfs on a directory with such a name."""
    path = tmp_path / str(request.param)
    path.mkdir()
    command = ["mount", "-n", "-t", "tmpfs", "test", str(path)]
    if subprocess.run(command, capture_output=True, check=False, timeout=20).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-n", str(path)], check=True, timeout=20)


def test_a_mount_is_found_by_its_name_and_hides_no_other(mountpoint: Path) -> None:
    point = mounted_at(str(mountpoint))
    assert point is not None
    assert point.fs_type == "tmpfs"
    assert is_mounted(mountpoint)
    assert mounted_at("/proc") is not None
