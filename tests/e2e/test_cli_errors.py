"""Test that a wrong or failing command gives one line that says why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.commands import clean_up, complains
from tests.harness.mounting import (
    cleanfs,
    is_mounted,
    mount_namespace,
)
from tests.harness.unprivileged import as_nobody, open_to_all

WRONG_CALLS = {
    "no source": (),
    "no mount point": ("S",),
    "one argument too many": ("S", "M", "x"),
    "an unknown option": ("--frobnicate", "S", "M"),
    "an unknown backend": ("--backend", "floppy", "S", "M"),
    "an unknown compression": ("--compression", "zip", "S", "M"),
    "a compression level that is not a number": ("--compression", "lz4:high", "S", "M"),
    "a pool limit that is not a size": ("--pool-limit", "much", "S", "M"),
    "a pool limit of zero": ("--pool-limit", "0", "S", "M"),
    "a pool limit that is too small": ("--pool-limit", "1000", "S", "M"),
    "a negative pool limit": ("--pool-limit", "-5M", "S", "M"),
    "an absurd pool limit": ("--pool-limit", "1e99", "S", "M"),
    "a page cache below one page": ("--page-cache", "100", "S", "M"),
    "a page cache that is not a size": ("--page-cache", "5X", "S", "M"),
    "a page size of zero": ("--page-size", "0", "S", "M"),
    "a page size below 4096": ("--page-size", "2048", "S", "M"),
    "a page size that is not a power of two": ("--page-size", "12288", "S", "M"),
    "a page size above 1 MiB": ("--page-size", "2M", "S", "M"),
    "an invalid UUID": ("--shared-pool", "1234", "S", "M"),
    "a negative timeout": ("--attr-timeout", "-1", "S", "M"),
    "a timeout that is not a number": ("--attr-timeout", "nan", "S", "M"),
    "an unknown coherency": ("--coherency", "maybe", "S", "M"),
    "write-back while others may change the source": ("--writeback", "S", "M"),
    "an unknown log level": ("--log-level", "loud", "S", "M"),
    "an unknown mount option": ("-o", "frobnicate", "S", "M"),
    "a mount option without its value": ("-o", "pool-limit", "S", "M"),
    "a mount option with an empty value": ("-o", "pool-limit=", "S", "M"),
    "a flag with a value as a mount option": ("-o", "allow-other=yes", "S", "M"),
    "a mount option with a wrong value": ("-o", "ro,page-size=5000", "S", "M"),
    "an argument as a mount option": ("-o", "source=/", "S", "M"),
}


@pytest.mark.parametrize("args", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_wrong_call_is_an_error_of_one_line_and_status_2(
    source: Path, mountpoint: Path, args: tuple[str, ...]
) -> None:
    paths = {"S": source, "M": mountpoint}
    done = cleanfs("mount", *(paths.get(arg, arg) for arg in args))
    clean_up(mountpoint)
    complains(done, 2)


@pytest.mark.parametrize("args", [("frobnicate",), ("--frobnicate",), ("stats",), ("list", "x")])
def test_a_wrong_command_is_an_error_of_one_line_and_status_2(args: tuple[str, ...]) -> None:
    complains(cleanfs(*args), 2)


def test_without_a_command_the_help_is_readable() -> None:
    done = cleanfs()
    assert done.returncode == 2
    assert len((done.stdout + done.stderr).splitlines()) > 5


FAILURES = {
    "source is missing": ("nowhere", "M", "does not exist"),
    "source is a file": ("file", "M", "not a directory"),
    "source is below a file": ("file/x", "M", "ot a directory"),
    "source is a loop of links": ("loop", "M", "source"),
    "mount point is missing": ("S", "nowhere", "does not exist"),
    "mount point is a file": ("S", "file", "not a directory"),
    "mount point is in the source": ("S", "S/below", "recurse"),
    "mount point is in the source by a link": ("S", "link/below", "recurse"),
    "log file cannot be written": ("--log-file=nowhere/log", "S", "M", "nowhere/log"),
}


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background"])
def test_a_failure_is_an_error_of_one_line_and_status_1(
    source: Path,
    mountpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, ...],
    foreground: bool,
) -> None:
    monkeypatch.chdir(mountpoint.parent)
    Path("file").touch()
    Path("link").symlink_to(source)
    Path("loop").symlink_to("loop")
    (source / "below").mkdir()
    *args, part = case
    names = {
        "S": str(source),
        "M": str(mountpoint),
        "S/below": str(source / "below"),
        "S/.": f"{source}/.",
    }
    done = cleanfs("mount", *(["-f"] if foreground else []), *(names.get(arg, arg) for arg in args))
    complains(done, 1, part)
    assert not is_mounted(mountpoint)


def test_a_mount_point_in_use_is_refused(source: Path, mountpoint: Path, background: Path) -> None:
    complains(cleanfs("mount", source, mountpoint), 1, "already a mount")
    assert os.listdir(mountpoint) == []


def run_as_nobody(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as an unprivileged user."""
    return subprocess.run(as_nobody(*args), capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """Make a directory that every user can reach."""
    return open_to_all(tmp_path)


def test_a_source_that_is_not_readable_is_refused(
    source: Path, mountpoint: Path, open_path: Path
) -> None:
    source.chmod(0o700)
    complains(run_as_nobody("mount", "--backend", "none", source, mountpoint), 1, "not readable")


def test_allow_other_must_be_permitted(source: Path, mountpoint: Path, open_path: Path) -> None:
    if re.search(r"^\s*user_allow_other", Path("/etc/fuse.conf").read_text(), re.MULTILINE):
        pytest.skip("/etc/fuse.conf permits it")
    os.chown(mountpoint, 65534, 65534)
    complains(
        run_as_nobody("mount", "--backend", "none", "--allow-other", source, mountpoint), 1, "fuse.conf"
    )


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background"])
def test_a_forbidden_dev_fuse_is_named(
    source: Path, mountpoint: Path, open_path: Path, foreground: bool
) -> None:
    if Path("/dev/fuse").stat().st_mode & 0o006:
        pytest.skip("every user may open /dev/fuse here")
    os.chown(mountpoint, 65534, 65534)
    options = ["-f"] if foreground else []
    complains(run_as_nobody("mount", "--backend", "none", *options, source, mountpoint), 1, "/dev/fuse")


def test_a_missing_dev_fuse_is_named(source: Path, mountpoint: Path) -> None:
    script = 'mount -t tmpfs none /dev && exec "$0" -m cleanfs mount "$1" "$2"'
    done = subprocess.run(
        [*mount_namespace(), "sh", "-c", script, sys.executable, source, mountpoint],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    complains(done, 1, "/dev/fuse")


@pytest.mark.parametrize("command", ["umount", "stats", "drop"])
def test_commands_for_a_mount_refuse_other_directories(tmp_path: Path, command: str) -> None:
    complains(cleanfs(command, tmp_path), 1, "not a cleanfs mount")
    complains(cleanfs(command, tmp_path / "missing"), 1, "not a cleanfs mount")
    complains(cleanfs(command, "/proc"), 1, "not a cleanfs mount")
