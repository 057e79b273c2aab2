"""Test the command line: its output, its status and its clean-up."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from cleanfs import __version__
from cleanfs.backends.zcache import engine_name
from tests.e2e.conftest import Mounter
from tests.harness.commands import clean_up, complains, is_alive
from tests.harness.mounting import (
    cleanfs,
    is_mounted,
    mount_line,
    mounted,
    wait_until,
)


def test_version() -> None:
    done = cleanfs("--version")
    version = f"cleanfs {__version__} (zcache engine: {engine_name()})\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, version, "")


def test_mount_returns_when_the_mount_replies(source: Path, background: Path) -> None:
    (source / "f").write_bytes(b"text")
    assert is_mounted(background)
    assert (background / "f").read_bytes() == b"text"
    pid = json.loads(cleanfs("stats", "--json", background).stdout)["pid"]
    assert is_alive(pid)
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    done = cleanfs("umount", background)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not is_mounted(background)
    assert not is_alive(pid)
    log = background.with_name("log").read_text()
    assert "unmounted" in log
    assert "ERROR" not in log


def test_umount_of_a_busy_mount_fails_and_lazily_works(source: Path, background: Path) -> None:
    (source / "f").write_bytes(b"text")
    pid = json.loads(cleanfs("stats", "--json", background).stdout)["pid"]
    with (background / "f").open("rb") as file:
        complains(cleanfs("umount", background), 1, "busy")
        assert is_mounted(background)
        assert cleanfs("umount", "--lazy", background).returncode == 0
        assert not is_mounted(background)
        assert file.read() == b"text"
    wait_until(lambda: not is_alive(pid))


def test_stats_and_list_show_the_mount(source: Path, background: Path) -> None:
    (source / "f").write_bytes(b"text")
    (background / "f").read_bytes()
    shown = cleanfs("stats", background)
    assert shown.returncode == 0
    for word in ("hit ratio", "compression ratio", "succ_gets", "puts", "flushes", "zcache"):
        assert word in shown.stdout
    parsed = json.loads(cleanfs("stats", "--json", background).stdout)
    assert (parsed["source"], parsed["mountpoint"]) == (str(source), str(background))
    assert parsed["source_read_bytes"] == 4
    listed = cleanfs("list")
    assert listed.returncode == 0
    line = next(line for line in listed.stdout.splitlines() if str(background) in line)
    assert str(source) in line
    assert str(parsed["pid"]) in line
    assert "%" in line


@pytest.mark.parametrize(
    ("options", "page_cache", "cleancache"),
    [((), False, False), (("--page-cache",), False, True), (("--cleancache",), True, False)],
)
def test_drop(
    source: Path, mount: Mounter, options: tuple[str, ...], page_cache: bool, cleancache: bool
) -> None:
    (source / "f").write_bytes(b"text" * 1_000_000)
    fs = mount()
    (fs.path / "f").read_bytes()
    done = cleanfs("drop", *options, fs.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    stats = fs.stats()
    assert bool(stats["pagecache_resident"]) is page_cache
    assert bool(stats["backend_counters"]["eph_zpages"]) is cleancache


def test_mount_options_match_those_of_the_command_line(source: Path, mountpoint: Path) -> None:
    (source / "f").touch()
    options = (
        "rw,defaults,noauto,x-systemd.automount,_netdev,nofail,noatime,noexec,nodev,allow_other,"
        "pool_limit=8M,page-cache=2M,page_size=16K,compression=lz4hc:4,attr_timeout=0.5,coherency=none"
    )
    with mounted(source, mountpoint, "-o", options, "-o", "read_only,log-level=debug") as fs:
        stats = fs.stats()
        assert stats["backend_counters"]["pool_limit"] == 8 << 20
        assert (stats["pagecache_limit"], stats["page_size"]) == (2 << 20, 16 << 10)
        assert stats["coherency"] == "none"
        line = mount_line(mountpoint)
        assert line is not None
        for word in ("ro", "allow_other", "noexec", "noatime", "nodev", "default_permissions"):
            assert word in re.split("[ ,]", line)


def test_a_read_only_mount_refuses_every_change(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"text")
    with mounted(source, mountpoint, "-o", "ro,noatime") as fs:
        for change in (
            lambda: (fs.path / "f").write_bytes(b""),
            (fs.path / "f").unlink,
            lambda: (fs.path / "f").chmod(0),
            lambda: os.utime(fs.path / "f"),
            (fs.path / "d").mkdir,
        ):
            with pytest.raises(OSError, match="Read-only"):
                change()
        assert (fs.path / "f").read_bytes() == b"text"


@pytest.mark.parametrize(
    "name",
    ["a,b", "a b", "ä€", "back\\slash", "new\nline", "quo'te\"", "-dash", "a=b,ro", "bad\udcff"],
    ids=ascii,
)
def test_paths_may_contain_any_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, mountpoint = tmp_path / f"s{name}", tmp_path / name
    source.mkdir()
    mountpoint.mkdir()
    (source / "f").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    try:
        done = cleanfs("mount", "--log-file", f"{name}.log", "--", source, name)
        assert (done.returncode, done.stderr) == (0, "")
        assert (mountpoint / "f").read_bytes() == b"text"
        (mountpoint / "g").write_bytes(b"more")
        shown = json.loads(cleanfs("stats", "--json", "--", name).stdout)
        assert (shown["source"], shown["mountpoint"]) == (str(source), str(mountpoint))
        if not name.isascii():
            assert cleanfs("stats", "--", name).returncode == 0
            assert cleanfs("list").returncode == 0
        (mountpoint / ".cleancache" / "metrics").read_bytes().decode()
        done = cleanfs("umount", "--", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(mountpoint) == []
        assert (source / "g").read_bytes() == b"more"
    finally:
        clean_up(mountpoint)


def test_a_directory_of_a_mount_can_be_the_source_of_another(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    (source / "d").mkdir()
    (source / "d" / "f").write_bytes(b"text" * 100_000)
    (tmp_path / "outer").mkdir()
    fs = mount("--attr-timeout", "0")
    with mounted(fs.path / "d", tmp_path / "outer", "--attr-timeout", "0"):
        assert (tmp_path / "outer" / "f").read_bytes() == b"text" * 100_000
        (tmp_path / "outer" / "f").write_bytes(b"new")
        assert (source / "d" / "f").read_bytes() == b"new"
        assert (tmp_path / "outer" / "f").read_bytes() == b"new"


def test_a_mount_can_cover_its_source(source: Path) -> None:
    (source / "f").write_bytes(b"text")
    with mounted(source, source) as fs:
        assert (fs.path / "f").read_bytes() == b"text"
        (fs.path / "g").write_bytes(b"more")
        assert (fs.control("stats.json")).exists()
    assert (source / "g").read_bytes() == b"more"


def test_a_supervisor_is_notified_when_the_mount_is_ready(
    source: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with mounted(source, mountpoint):
            assert sock.recv(100) == b"READY=1"
            assert is_mounted(mountpoint)
