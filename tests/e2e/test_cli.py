"""Test the command line: its output, its status and its clean-up."""

import itertools
import json
import mmap
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cleanfs import __version__
from cleanfs.backends.zcache import engine_name
from cleanfs.cli.watch import COLUMNS, HEADER
from tests.e2e.conftest import Mounter
from tests.harness.machine import Deadline
from tests.harness.mounting import (
    STOP_TIMEOUT,
    cleanfs,
    end_of,
    is_mounted,
    mount_line,
    mount_namespace,
    mounted,
    settle,
    wait_until,
)
from tests.harness.unprivileged import as_nobody, open_to_all

HEADINGS = [heading for heading, _ in COLUMNS]


def complains(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    """Check for exactly one line on stderr with these parts, and for the status."""
    assert done.returncode == status, done
    assert done.stdout == ""
    assert done.stderr.startswith("cleanfs: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 300
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def background(source: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount in the background; unmount and wait for the end of the daemon after the test."""
    done = cleanfs("mount", "--log-file", mountpoint.with_name("log"), source, mountpoint)
    try:
        assert done.returncode == 0, done.stderr
        yield mountpoint
    finally:
        clean_up(mountpoint)


def clean_up(mountpoint: Path) -> None:
    """Unmount everything on the mount point, and wait for the daemon if it still reports its pid."""
    while mount_line(mountpoint):
        try:
            pid = json.loads((mountpoint / ".cleancache" / "stats.json").read_text())["pid"]
        except OSError:
            pid = 0
        subprocess.run(["umount", "-l", mountpoint], check=True, timeout=10)
        wait_until(lambda: not is_alive(pid), 10)  # noqa: B023  # called before pid changes


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


def watching(mountpoint: Path, *options: str) -> list[str]:
    """Return the command of ``stats --watch`` with the default action for SIGINT.

    A shell without job control starts background processes with SIGINT ignored. Their children, such as
    those of pytest, inherit this.
    """
    python = ["env", "--default-signal=INT", sys.executable]
    return [*python, "-m", "cleanfs", "stats", "--watch", *options, str(mountpoint)]


def test_stats_watch_continues_until_interrupted(background: Path) -> None:
    command = watching(background, "0.05", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            uptimes = [json.loads(process.stdout.readline())["uptime_seconds"] for _ in range(3)]
        finally:
            process.send_signal(signal.SIGINT)
        assert end_of(process, 10) in (0, 130)
        assert b"Traceback" not in process.stderr.read()
    assert uptimes == sorted(set(uptimes))


def test_stats_watch_shows_plain_lines_on_a_terminal(background: Path) -> None:
    master, terminal = pty.openpty()
    with subprocess.Popen(
        watching(background, "0.05"), stdout=terminal, stderr=subprocess.PIPE
    ) as process:
        os.close(terminal)
        text = b""

        def three_lines() -> bool:
            nonlocal text
            text += os.read(master, 65536)
            return text.count(b"\n") > 3

        try:
            wait_until(three_lines, 10)
            process.send_signal(signal.SIGINT)
            assert end_of(process, 10) == 130
        finally:
            process.kill()
            os.close(master)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert text.startswith(HEADER.encode())
    assert b"\x1b" not in text


def cells_of_interval(process: subprocess.Popen[str], reads: bool) -> dict[str, str]:
    """Return the cells of the first line of an interval with reads, or of one without."""
    assert process.stdout is not None
    while True:
        cells = dict(zip(HEADINGS, process.stdout.readline().split(), strict=True))
        if cells["time"] != "time" and (cells["reads/s"] != "0") is reads:
            return cells


def test_the_lines_of_stats_watch_add_up(source: Path, mount: Mounter) -> None:
    size, page = 16 << 20, 4096
    (source / "f").write_bytes(b"".join(b"%07d\n" % i for i in range(size // 8)))
    settle()
    fs = mount()  # the file is 16 times its page cache, so most goes to cleancache
    (fs.path / "f").read_bytes()
    command = watching(fs.path, "0.2")
    fd = os.open(fs.path / "f", os.O_RDONLY | os.O_DIRECT)
    stop = threading.Event()

    def read_pages() -> None:
        buffer = mmap.mmap(-1, page)
        for offset in itertools.cycle(range(0, size, page)):
            if stop.is_set():
                return
            assert os.preadv(fd, [buffer], offset) == page

    reader = threading.Thread(target=read_pages)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            idle = cells_of_interval(process, reads=False)
            reader.start()
            cells_of_interval(process, reads=True)  # the first interval may have been idle for a part
            busy = cells_of_interval(process, reads=True)
        finally:
            stop.set()
            process.send_signal(signal.SIGINT)
    reader.join()
    os.close(fd)
    assert {idle[name] for name in ("pc%", "zc%", "p50", "p99")} == {"-"}
    assert float(busy["MB/s"]) == pytest.approx(int(busy["reads/s"]) * page / 1e6, abs=0.06)
    assert float(busy["pc%"]) + float(busy["zc%"]) == pytest.approx(100, abs=0.11)
    assert float(busy["zc%"]) > 90
    assert busy["srcMB/s"] == "0.0"
    assert busy["pool"].endswith("/64.0M")
    assert float(busy["ratio"]) > 1.5
    assert busy["p50"].endswith("us")
    assert re.fullmatch(r"[0-9.]+(us|ms|s)", busy["p99"])


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


ENDINGS = {
    "SIGINT": "kill -INT PID",
    "SIGTERM": "kill -TERM PID",
    "umount": "umount MNT",
    "fusermount3": "fusermount3 -u MNT",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_daemon_ends_cleanly(source: Path, mount: Mounter, ending: str) -> None:
    (source / "f").write_bytes(b"text" * 500_000)
    fs = mount()
    (fs.path / "f").read_bytes()
    script = ENDINGS[ending].replace("PID", str(fs.process.pid)).replace("MNT", f"'{fs.path}'")
    subprocess.run(["sh", "-ec", script], check=True, timeout=20)
    assert end_of(fs.process, 10) == 0
    assert not is_mounted(fs.path)
    assert "unmounted" in fs.log.read_text()
    assert os.listdir(fs.path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repeated_signals_do_not_leave_a_dead_mount(mount: Mounter, number: int) -> None:
    fs = mount()
    deadline = Deadline(10)
    while fs.process.poll() is None:
        fs.process.send_signal(number)
        assert not deadline.over()
        time.sleep(0.001)  # lets the daemon run in between
    assert not is_mounted(fs.path)
    assert fs.process.returncode == 0
    assert "Traceback" not in fs.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_mount_that_is_in_use(source: Path, mount: Mounter, number: int) -> None:
    (source / "f").write_bytes(b"text")
    fs = mount()
    fd = os.open(fs.path / "f", os.O_RDONLY)
    try:
        fs.process.send_signal(number)
        assert end_of(fs.process, 10) == 0
        wait_until(lambda: not is_mounted(fs.path), 5)
    finally:
        with suppress(OSError):  # the daemon has ended
            os.close(fd)


def test_a_dead_mount_point_is_reused(source: Path, mountpoint: Path) -> None:
    (source / "f").write_bytes(b"text")
    with mounted(source, mountpoint) as fs:
        fs.kill()
        with pytest.raises(OSError, match="not connected"):
            os.listdir(mountpoint)
        assert "dead" in cleanfs("list").stdout
        with mounted(source, mountpoint) as again:
            assert (again.path / "f").read_bytes() == b"text"
            lines = Path("/proc/self/mountinfo").read_bytes().split()
            assert lines.count(os.fsencode(mountpoint)) == 1


def test_a_dead_mount_point_is_reused_through_a_symbolic_link(
    source: Path, mountpoint: Path, tmp_path: Path
) -> None:
    (source / "f").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path)
    with mounted(source, mountpoint) as fs:
        fs.kill()
        done = cleanfs("mount", source, tmp_path / "link" / "mnt")
        try:
            assert (done.returncode, done.stderr) == (0, "")
            assert (mountpoint / "f").read_bytes() == b"text"
        finally:
            clean_up(mountpoint)


def test_a_dead_mount_point_can_be_unmounted(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs:
        fs.kill()
        done = cleanfs("umount", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert not is_mounted(mountpoint)


def test_stats_of_a_dead_mount_is_an_error_of_one_line(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint) as fs:
        fs.kill()
        complains(cleanfs("stats", mountpoint), 1, "not connected")
        complains(cleanfs("drop", mountpoint), 1, "not connected")


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


def test_umount_does_not_wait_for_a_parent_to_reap_the_daemon(mount: Mounter) -> None:
    fs = mount()
    assert cleanfs("umount", fs.path, timeout=9).returncode == 0  # the wait would be 10 s
    assert end_of(fs.process, STOP_TIMEOUT) == 0


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
