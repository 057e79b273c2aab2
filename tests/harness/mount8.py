"""Run mount(8) with this checkout's helper, in a mount namespace that leaves the machine unchanged."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.mounting import mount_line, mount_namespace
from tests.harness.zygote import Zygote

SETUP = """
set -e
sbin=$(readlink -f /sbin)
mount -n -t tmpfs none "$1"
mkdir "$1/upper" "$1/work"
mount -n -t overlay none -o "lowerdir=$sbin,upperdir=$1/upper,workdir=$1/work" "$sbin"
mount -n -t tmpfs none /run
echo ready
cat
for point in "$2"/*; do
    while umount -n -l "$point" 2> /dev/null; do :; done
done
"""
"""mount(8) looks for helpers in /sbin and keeps its state in /run/mount. Daemons end with this
process, even if the tests are killed."""

HELPERS = ("mount.cleanfs", "mount.fuse.cleanfs")


@dataclass(frozen=True)
class Mount8:
    """Holds a source and a mount point in the namespace."""

    pid: int
    source: Path
    mountpoint: Path
    calls: Path
    fstab: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace, with the same root: nsenter alone would leave a chroot."""
        return subprocess.run(
            ["nsenter", "-m", "-r", "-w", "-t", str(self.pid), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
            env={**os.environ, "LIBMOUNT_FSTAB": str(self.fstab)},
        )

    def mount(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run ``mount``."""
        return self.run("mount", *arguments)

    def mounts(self, options: str = "defaults") -> None:
        """Mount the source as root would on the command line. It must succeed."""
        done = self.mount("-t", "cleanfs", "-o", options, self.source, self.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")

    def remounts(self, options: str) -> None:
        """Remount with further options. It must succeed."""
        done = self.mount("-o", f"remount,{options}", self.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")

    def refuses(self, options: str) -> str:
        """Return the one-line error of a remount that must fail and change nothing."""
        before = self.options()
        done = self.mount("-o", f"remount,{options}", self.mountpoint)
        assert done.returncode != 0
        assert done.stderr.startswith("cleanfs: ")
        assert done.stderr.count("\n") == 1
        assert self.options() == before
        return done.stderr

    @property
    def helper_call(self) -> list[str]:
        """Return the helper's name and arguments in the last call by mount(8)."""
        return self.calls.read_text().splitlines()[-1].split(" ")

    @property
    def path(self) -> Path:
        """Return the path of the mount outside the namespace."""
        return Path(f"/proc/{self.pid}/root") / self.mountpoint.relative_to("/")

    def control(self, name: str) -> Path:
        """Return the path of a control file."""
        return self.path / ".cleancache" / name

    def options(self) -> set[str]:
        """Return the options that mountinfo shows."""
        line = mount_line(self.mountpoint, Path(f"/proc/{self.pid}"))
        assert line is not None
        before, after = line.split(" - ")
        return {*before.split(" ")[5].split(","), *after.split(" ")[-1].split(",")}


@dataclass(frozen=True)
class Namespace:
    """Holds the mount namespace, in which the helpers are forks of one process."""

    pid: int
    directory: Path
    calls: Path

    @contextmanager
    def place(self) -> Iterator[Mount8]:
        """Make directories in the namespace until the end of the block, and then unmount them."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        source, fstab = directory / "source", directory / "fstab"
        source.mkdir()
        fstab.touch()
        mountpoint = self.directory / "points" / directory.name
        mountpoint.mkdir()
        place = Mount8(self.pid, source, mountpoint, self.calls, fstab)
        try:
            yield place
        finally:
            while mount_line(mountpoint, Path(f"/proc/{self.pid}")):
                place.run("umount", "-n", "-l", mountpoint)


@contextmanager
def namespace(directory: Path) -> Iterator[Namespace]:
    """Provide the namespace until the end of the block."""
    if os.geteuid() != 0 or not shutil.which("nsenter"):
        pytest.skip("takes root, and nsenter")
    for name in ("layer", "points"):
        (directory / name).mkdir()
    places = [str(directory / name) for name in ("layer", "points")]
    command = [*mount_namespace(), "sh", "-c", SETUP, "sh", *places]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            pytest.skip("no overlay of /sbin can be made here")
        enter = ["nsenter", "-m", "-r", "-w", "-t", str(process.pid)]
        helpers = Zygote(*enter)
        try:
            calls = directory / "calls"
            _install(Path(f"/proc/{process.pid}/root/sbin"), calls, helpers)
            yield Namespace(process.pid, directory, calls)
        finally:
            helpers.end()
            process.communicate(timeout=20)


def _install(sbin: Path, calls: Path, helpers: Zygote) -> None:
    """Install the helper under its names. Each records its call and then runs it."""
    program = helpers.command(module="helper")
    for name in HELPERS:
        (sbin / name).write_text(
            f'#!/bin/sh\necho "$0 $*" >> {shlex.quote(str(calls))}\nexec {shlex.join(program)} "$@"\n'
        )
        (sbin / name).chmod(0o755)
