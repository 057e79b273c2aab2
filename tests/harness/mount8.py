"""mount(8) that finds our helper, in a mount namespace in which nothing of the machine is changed."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.mounting import mount_line, mount_namespace

SETUP = """
set -e
sbin=$(readlink -f /sbin)
mount -n -t tmpfs none "$1"
mkdir "$1/upper" "$1/work"
mount -n -t overlay none -o "lowerdir=$sbin,upperdir=$1/upper,workdir=$1/work" "$sbin"
mount -n -t tmpfs none /run
cp "$2" /sbin/mount.cleanfs
ln -s mount.cleanfs /sbin/mount.fuse.cleanfs
echo ready
cat
while umount -n -l "$3" 2> /dev/null; do :; done
"""
"""mount(8) looks for helpers in /sbin and keeps notes in /run/mount. A daemon ends with us, also where
the tests are killed."""


@dataclass(frozen=True)
class Mount8:
    """The namespace, a source and a mount point in it."""

    pid: int
    source: Path
    mountpoint: Path
    calls: Path
    fstab: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command there, below the same root: entering a mount namespace leaves a chroot."""
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
        """Mount the source, as root would at the command line. It must succeed."""
        done = self.mount("-t", "cleanfs", "-o", options, self.source, self.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")

    def remounts(self, options: str) -> None:
        """Remount with further options. It must succeed."""
        done = self.mount("-o", f"remount,{options}", self.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")

    def refuses(self, options: str) -> str:
        """Fail to remount, which changes nothing; the one line that says why."""
        before = self.options()
        done = self.mount("-o", f"remount,{options}", self.mountpoint)
        assert done.returncode != 0
        assert done.stderr.startswith("cleanfs: ")
        assert done.stderr.count("\n") == 1
        assert self.options() == before
        return done.stderr

    @property
    def helper_call(self) -> list[str]:
        """The words that mount(8) gave the helper last; first its name."""
        return self.calls.read_text().splitlines()[-1].split(" ")

    @property
    def path(self) -> Path:
        """The mount, as it is seen from outside."""
        return Path(f"/proc/{self.pid}/root") / self.mountpoint.relative_to("/")

    def control(self, name: str) -> Path:
        """A control file."""
        return self.path / ".cleancache" / name

    def options(self) -> set[str]:
        """What the kernel shows."""
        line = mount_line(self.mountpoint, Path(f"/proc/{self.pid}"))
        assert line is not None
        before, after = line.split(" - ")
        return {*before.split(" ")[5].split(","), *after.split(" ")[-1].split(",")}


@contextmanager
def mount8(directory: Path) -> Iterator[Mount8]:
    """The namespace, until the end of the block; what is mounted in it is unmounted."""
    if os.geteuid() != 0 or not shutil.which("nsenter"):
        pytest.skip("takes root, and nsenter")
    for name in ("source", "mnt", "layer"):
        (directory / name).mkdir()
    helper, calls = directory / "helper", directory / "calls"
    code = "from cleanfs.cli.commands import mount_helper; mount_helper()"
    helper.write_text(
        f'#!/bin/sh\necho "$0 $*" >> {shlex.quote(str(calls))}\n'
        f'exec {shlex.join([sys.executable, "-c", code])} "$@"\n'
    )
    helper.chmod(0o755)
    (directory / "fstab").touch()
    with subprocess.Popen(
        [
            *mount_namespace(),
            "sh",
            "-c",
            SETUP,
            "sh",
            str(directory / "layer"),
            str(helper),
            str(directory / "mnt"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            pytest.skip("no overlay of /sbin can be made here")
        space = Mount8(process.pid, directory / "source", directory / "mnt", calls, directory / "fstab")
        try:
            yield space
        finally:
            while mount_line(space.mountpoint, Path(f"/proc/{space.pid}")):
                space.run("umount", "-n", "-l", space.mountpoint)
            process.communicate(timeout=20)
