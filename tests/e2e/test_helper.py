"""Test the helper of mount(8), and mounts on their own source."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import cleanfs, is_mounted, mounted

HELPER = [sys.executable, "-c", "from cleanfs.cli.commands import mount_helper; mount_helper()"]


def helper(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``mount.cleanfs``."""
    return subprocess.run(
        [*HELPER, *map(str, args)], capture_output=True, text=True, timeout=30, check=False
    )


def test_the_mount_helper_accepts_the_arguments_of_mount(source: Path, mountpoint: Path) -> None:
    (source / "f").write_text("x")
    options = "rw,noatime,noauto,_netdev,x-systemd.automount,pool_limit=2M,page-cache=1M"
    done = helper(source, mountpoint, "-s", "-n", "-o", options)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert (mountpoint / "f").read_text() == "x"
        assert (mountpoint / ".cleancache/pool_limit").read_text() == f"{2 << 20}\n"
        assert (mountpoint / ".cleancache/page_cache").read_text() == f"{1 << 20}\n"
        assert os.statvfs(mountpoint).f_flag & os.ST_NOATIME
    finally:
        assert cleanfs("umount", mountpoint).returncode == 0


def test_a_fake_mount_does_nothing(source: Path, mountpoint: Path) -> None:
    assert helper(source, mountpoint, "-f").returncode == 0
    assert not is_mounted(mountpoint)


@pytest.mark.parametrize("args", [("-o", "nonsense=1"), ("-z",)])
def test_a_wrong_call_of_the_helper_is_an_error_of_one_line(
    source: Path, mountpoint: Path, args: tuple[str, ...]
) -> None:
    done = helper(source, mountpoint, *args)
    assert done.returncode == 2
    assert done.stderr.startswith("cleanfs: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_mount_on_its_own_source_serves_the_files_below(source: Path) -> None:
    (source / "d").mkdir()
    (source / "d" / "f").write_text("below")
    with mounted(source, source):
        assert (source / "d" / "f").read_text() == "below"
        (source / "d" / "g").write_text("written through")
        assert sorted(path.name for path in source.rglob("*")) == ["d", "f", "g"]
    assert (source / "d" / "g").read_text() == "written through"


def test_a_second_mount_on_a_mount_is_refused(source: Path, mountpoint: Path, mount: Mounter) -> None:
    mount()
    done = cleanfs("mount", source, mountpoint)
    assert done.returncode == 1
    assert "already a mount" in done.stderr
