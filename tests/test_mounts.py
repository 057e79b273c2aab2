"""Reading the list of mounts."""

import os
import subprocess
from pathlib import Path

import pytest

from cleanfs.mounts import mount_points


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_mount_point_may_have_a_carriage_return_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a\rb"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True, timeout=20)
    try:
        assert str(path) in [point.path for point in mount_points()]
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=20)
