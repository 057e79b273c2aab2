"""Test where data of a file may end up: another file, a dump, a log; and what the daemon leaves."""

import json
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cleanfs.printable import printable
from tests.e2e.conftest import Mounter
from tests.harness.mounting import (
    cleanfs,
    end_of,
    is_mounted,
    mounted,
    wait_until,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")

UID, GID, EXTRA = 12345, 23456, 34567
"""A user; fusermount3 needs the user name."""


def test_files_never_show_each_others_bytes(source: Path, mount: Mounter) -> None:
    """The caches hold a part of the files, and the files end within pages."""
    files = {bytes([65 + i]): 40_000 + 7919 * i for i in range(10)}
    for mark, size in files.items():
        (source / mark.decode()).write_bytes(mark * size)
    fs = mount("--page-cache", "64K", "--pool-limit", "1M")
    shown: set[str] = set()

    def check(mark: bytes, size: int) -> None:
        path = fs.path / mark.decode()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            page = bytearray(1 << 17)
            for offset in (0, 4096, size // 4096 * 4096, (size // 4096 + 1) * 4096, 1 << 20):
                with mmap.mmap(-1, 1 << 17) as aligned:
                    got = os.preadv(fd, [aligned], offset)
                    page[:] = aligned
                expected = max(0, min(size - offset, 1 << 17))
                if got != expected or page[:got].strip(mark) or page[got:].strip(b"\0"):
                    shown.add(f"{mark!r} at {offset}")
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                if mapped[:].strip(mark) or len(mapped) != size:
                    shown.add(f"{mark!r} mapped")
        finally:
            os.close(fd)

    for _ in range(3):
        for mark, size in files.items():
            check(mark, size)
        fs.drop_kernel()
    for mark, size in list(files.items())[::2]:  # truncated data does not return
        os.truncate(fs.path / mark.decode(), 4097)
        os.truncate(fs.path / mark.decode(), size)
        assert (fs.path / mark.decode()).read_bytes() == mark * 4097 + bytes(size - 4097)
    assert shown == set()


MARKER = b"cleanfs-core-marker:"


def test_no_file_data_is_in_a_core_dump(
    source: Path, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "f").write_bytes(MARKER * 50_000)
    source.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    # The limit is 0 in some logins: then only the filter is tested.
    _, limit = resource.getrlimit(resource.RLIMIT_CORE)
    limit_text = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    fs = mount("--allow-other", prefix=("prlimit", f"--core={limit_text}:{limit_text}"))
    (fs.path / "f").read_bytes()
    proc = Path(f"/proc/{fs.process.pid}")
    assert int((proc / "coredump_filter").read_text(), 16) == 0
    with (proc / "maps").open() as maps:
        assert maps.read(1)  # root may read it: a dump is possible
    fs.process.send_signal(signal.SIGABRT)
    assert end_of(fs.process, 20) == -signal.SIGABRT
    for core in tmp_path.glob("core*"):
        assert MARKER not in core.read_bytes()


def test_only_its_owner_can_read_the_log(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    log, old_umask = tmp_path / "log", os.umask(0)
    try:
        with mounted(source, mountpoint, "--log-file", str(log)):
            assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        os.umask(old_umask)


def test_a_name_cannot_forge_a_line_of_the_log_or_the_list(tmp_path: Path) -> None:
    source = tmp_path / "s\n2026-01-01 00:00:00 ERROR forged \x1b[31m"
    mountpoint = tmp_path / "a[" / "b]:smile:\r\x1b]0;title\x07"
    source.mkdir()
    mountpoint.mkdir(parents=True)
    log = tmp_path / "log"
    with mounted(source, mountpoint, "--log-file", str(log)):
        listed = cleanfs("list")
        assert listed.returncode == 0, listed.stderr
        assert printable(str(mountpoint)) in listed.stdout
        for shown in (listed.stdout, cleanfs("stats", mountpoint).stdout):
            assert "\x1b]" not in shown
            assert "\x1b[31m" not in shown
            folded = "\\n2026-01-0100:00:00ERRORforged\\x1b[31m"  # by the table
            assert folded in "".join(shown.split())
    lines = log.read_text().splitlines()
    assert lines
    assert not [line for line in lines if line.startswith("2026-01-01")]
    assert "\x1b" not in log.read_text()


def test_the_daemon_closes_inherited_fds(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", "cleanfs", "mount", "--backend", "none"]
    try:
        subprocess.run([*command, source, mountpoint], pass_fds=[writer], check=True, timeout=60)
        os.close(writer)
        assert os.read(reader, 1) == b""  # end of file: the writing end is closed
        pid = json.loads((mountpoint / ".cleancache/stats.json").read_text())["pid"]
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    finally:
        os.close(reader)
        if is_mounted(mountpoint):  # busy while another test lists all mounts
            wait_until(lambda: cleanfs("umount", mountpoint).returncode == 0)


def test_an_unreachable_supervisor_does_no_harm(
    source: Path, mount: Mounter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
    fs = mount()
    wait_until(lambda: "mounted" in fs.log.read_text())
    time.sleep(0.1)
    assert fs.process.poll() is None
    assert fs.stats()["backend"] == "zcache"
