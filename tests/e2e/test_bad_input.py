"""Test bad input to real mounts and processes: one line, the right status, no loss."""

import errno
import json
import os
import pty
import shutil
import stat as stat_module
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis.stateful import run_state_machine_as_test

from tests.e2e.conftest import Mounter
from tests.e2e.test_cli import clean_up, complains
from tests.harness.control_machine import ControlMachine
from tests.harness.fuzzing import examples
from tests.harness.mounting import (
    MountedFs,
    cleanfs,
    command_line,
    end_of,
    forked_command_line,
    is_mounted,
    mount_namespace,
    mounted,
)


@pytest.fixture(scope="module")
def fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide one mount for all tests that leave it unchanged."""
    top = tmp_path_factory.mktemp("bad-input")
    for name in ("source", "mnt"):
        (top / name).mkdir()
    (top / "source" / "f").write_bytes(b"text" * 10_000 + os.urandom(10_000))
    with mounted(top / "source", top / "mnt", "--page-cache", "1M", "--pool-limit", "64M") as fs:
        yield fs


# -- control files ------------------------------------------------------------------------------------


def test_control_files_accept_exactly_the_valid_commands(fs: MountedFs) -> None:
    run_state_machine_as_test(
        lambda: ControlMachine(fs),  # type: ignore[arg-type]  # it also takes a factory
        settings=examples(6, steps=15),
    )


def written(fs: MountedFs, name: str, data: bytes) -> str:
    """Return the name of the error of one write; empty if there was none."""
    fd = os.open(fs.control(name), os.O_WRONLY)
    try:
        os.write(fd, data)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    finally:
        os.close(fd)
    return ""


@pytest.mark.parametrize("limit", [1 << 51, 1 << 62])
def test_a_pool_limit_above_the_memory_of_any_machine_is_accepted(fs: MountedFs, limit: int) -> None:
    assert written(fs, "pool_limit", b"%d" % limit) == ""
    assert fs.control("pool_limit").read_text() == f"{limit}\n"
    assert fs.stats()["pool_id"] >= 0
    assert written(fs, "pool_limit", b"64M") == ""


def test_a_command_that_the_kernel_would_split_is_refused_as_a_whole(fs: MountedFs) -> None:
    before = fs.control("pool_limit").read_text()
    assert written(fs, "pool_limit", b"8M" + b" " * (2 << 20)) == "EINVAL"
    assert fs.control("pool_limit").read_text() == before


@pytest.mark.parametrize("text", ["\u0668M", "\uff18M", "8_0M", "+8M", "1e7", "\x1c8M", "\u00a08M"])
def test_a_size_is_written_in_plain_digits(fs: MountedFs, text: str) -> None:
    before = fs.control("pool_limit").read_text()
    assert written(fs, "pool_limit", text.encode()) == "EINVAL"
    assert fs.control("pool_limit").read_text() == before


def test_a_first_read_can_begin_at_any_offset(fs: MountedFs) -> None:
    fd = os.open(fs.control("stats"), os.O_RDONLY)
    try:
        assert os.pread(fd, 4, 3) == b"sion"
        assert os.pread(fd, 4, 1 << 40) == b""
    finally:
        os.close(fd)


def test_concurrent_writes_do_not_mix(fs: MountedFs) -> None:
    limits = [b"2097152", b"3145728", b"nonsense", b"4194304"]
    errors: list[str] = []

    def write(data: bytes) -> None:
        errors.extend(written(fs, "pool_limit", data) for _ in range(30))

    threads = [threading.Thread(target=write, args=(data,)) for data in limits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(errors) == [""] * 90 + ["EINVAL"] * 30
    assert fs.control("pool_limit").read_text().strip().encode() in limits
    assert written(fs, "pool_limit", b"64M") == ""


# -- a mount of another program or version ----------------------------------------------------------


@pytest.fixture
def foreign(fs: MountedFs, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Make a mount of cleanfs's type with a real directory in place of the control directory."""
    fake = fs.source / "d" / ".cleancache"
    fake.mkdir(parents=True)
    point = tmp_path / "bound"
    point.mkdir()
    subprocess.run(["mount", "--bind", fs.path / "d", point], check=True, timeout=10)
    try:
        yield point, fake
    finally:
        while is_mounted(point):
            subprocess.run(["umount", "-l", point], check=True, timeout=10)
        shutil.rmtree(fs.source / "d")


INVALID: dict[str, Callable[[Path], object]] = {
    "an empty object": lambda path: path.write_text("{}"),
    "no JSON": lambda path: path.write_bytes(b"\xff\x1b[31m{"),
    "a fifo": os.mkfifo,
    "an endless file": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_statistics_are_an_error_of_one_line(foreign: tuple[Path, Path], kind: str) -> None:
    point, fake = foreign
    INVALID[kind](fake / "stats.json")
    complains(cleanfs("stats", point, timeout=10), 1, str(point))
    complains(cleanfs("stats", "--watch", "1", "--json", point, timeout=10), 1, str(point))
    listed = cleanfs("list", timeout=10)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert str(point) in listed.stdout
    done = cleanfs("umount", point, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(point)


def test_drop_neither_follows_links_nor_makes_files(foreign: tuple[Path, Path], tmp_path: Path) -> None:
    point, fake = foreign
    complains(cleanfs("drop", point), 1, "No such file")
    assert os.listdir(fake) == []
    (tmp_path / "precious").write_text("precious")
    (fake / "drop").symlink_to(tmp_path / "precious")
    complains(cleanfs("drop", point), 1)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_carriage_return_in_another_mount_point_does_not_break_list(
    fs: MountedFs, tmp_path: Path
) -> None:
    other = tmp_path / "a\rb"
    other.mkdir()
    # In a namespace, where no other process sees it.
    script = 'mount -t tmpfs none "$0" && grep -q "\r" /proc/self/mountinfo && exec "$@"'
    listed = subprocess.run(
        [*mount_namespace(), "sh", "-c", script, other, *command_line("list")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (listed.returncode, listed.stderr) == (0, "")
    assert str(fs.path) in listed.stdout


# -- paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[/x]", "[bold]e\x1b[31m\x07" + "x" * 200])
def test_statistics_of_a_mount_with_a_strange_name_are_printable(tmp_path: Path, name: str) -> None:
    source, point = tmp_path / "s" / name, tmp_path / "m" / name
    source.mkdir(parents=True)
    point.mkdir(parents=True)
    try:
        assert cleanfs("mount", "--log-file", tmp_path / "log", source, point).returncode == 0
        for command in (("stats", point), ("list",)):
            shown = cleanfs(*command)
            assert (shown.returncode, shown.stderr) == (0, "")
            assert all(line.isprintable() for line in shown.stdout.split("\n"))
        assert all(line.isprintable() for line in (point / ".cleancache/stats").read_text().split("\n"))
        assert json.loads(cleanfs("stats", "--json", point).stdout)["source"] == str(source)
        assert cleanfs("umount", point).returncode == 0
    finally:
        clean_up(point)


BAD_PATHS: dict[str, tuple[int, Callable[[Path], tuple[str, str]]]] = {
    "an empty source": (2, lambda top: ("", f"{top}/m")),
    "an empty mount point": (2, lambda top: (f"{top}/s", "")),
    "a missing source": (1, lambda top: (f"{top}/x", f"{top}/m")),
    "a missing mount point": (1, lambda top: (f"{top}/s", f"{top}/x\n\x1b[31m")),
    "a file": (1, lambda top: (f"{top}/file", f"{top}/m")),
    "a file as a mount point": (1, lambda top: (f"{top}/s", f"{top}/file")),
    "a fifo": (1, lambda top: (f"{top}/fifo", f"{top}/m")),
    "a device": (1, lambda _: ("/dev/null", "/dev/zero")),
    "a loop of links": (1, lambda top: (f"{top}/loop", f"{top}/m")),
    "below a file": (1, lambda top: (f"{top}/file/x", f"{top}/m")),
    "a mount point inside the source": (1, lambda top: (f"{top}", f"{top}//m/")),
    "too long": (1, lambda top: (f"{top}/{'x' * 256}", f"{top}/m")),
    "much too long": (1, lambda top: ("/" + "x/" * 3000, f"{top}/m")),
    "everything": (1, lambda _: ("/", "/")),
}


@pytest.mark.parametrize("kind", BAD_PATHS)
def test_a_bad_path_is_an_error_of_one_line(tmp_path: Path, kind: str) -> None:
    for name in ("s", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    status, paths = BAD_PATHS[kind]
    done = cleanfs("mount", *paths(tmp_path), timeout=10)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    assert done.stderr[:-1].isprintable()
    assert "Traceback" not in done.stderr
    assert not is_mounted(tmp_path / "m")


def test_a_removed_working_directory_is_an_error_of_one_line(fs: MountedFs, tmp_path: Path) -> None:
    for args in (("mount", "s", "m"), ("umount", "m"), ("list",), ("stats", fs.path)):
        removed = tmp_path / "removed"
        removed.mkdir()
        script = 'cd "$0" && rmdir "$0" && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, removed, *forked_command_line(*args)],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        if "/" in str(args[-1]) or args == ("list",):
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 1
            assert done.stderr.count("\n") == 1


# -- streams and logs --------------------------------------------------------------------------------


NO_STREAMS = "<&- >&- 2>&-"


def shell(redirections: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with its streams redirected. Without streams, it is a Python process of its own."""
    script = f'exec "$@" {redirections}'
    command = command_line if redirections == NO_STREAMS else forked_command_line
    return subprocess.run(
        ["sh", "-c", script, "sh", *command(*args)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", NO_STREAMS, "2>/dev/full"])
def test_closed_streams_do_not_change_the_status(source: Path, mountpoint: Path, closed: str) -> None:
    assert shell(closed, "frobnicate").returncode == 2
    assert shell(closed, "mount", source / "x", mountpoint).returncode == 1
    done = shell(closed, "mount", "--log-file", mountpoint.with_name("log"), source, mountpoint)
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        (mountpoint / "f").write_text("x")
        listed = shell(closed, "list")
        assert listed.returncode == (1 if ">&-" in closed.replace("2>&-", "") else 0)
        assert "Traceback" not in listed.stderr
        assert listed.stderr.count("\n") <= 1
        assert shell(closed, "umount", mountpoint).returncode == 0
    finally:
        clean_up(mountpoint)
    assert (source / "f").read_text() == "x"


def test_a_foreground_mount_with_closed_streams_does_not_write_into_files(
    source: Path, mountpoint: Path
) -> None:
    script = f'exec "$@" {NO_STREAMS}'
    command = ["sh", "-c", script, "sh", *command_line("mount", "-f", source, mountpoint)]
    with subprocess.Popen(command) as process:
        try:
            while not is_mounted(mountpoint):
                assert process.poll() is None
            for number in range(8):
                (mountpoint / str(number)).write_text("x")
            for fd in (0, 1, 2):
                assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == "/dev/null"
        finally:
            process.terminate()
            end_of(process, 20)
    assert {path.read_text() for path in source.iterdir()} == {"x"}
    assert not is_mounted(mountpoint)


def test_output_that_cannot_be_written_is_an_error_of_one_line(fs: MountedFs) -> None:
    for args in (
        ("--version",),
        ("list",),
        ("stats", fs.path),
        ("stats", "--json", fs.path),
        ("--help",),
    ):
        done = shell(">/dev/full", *args)
        assert done.returncode == 1
        assert done.stderr == "cleanfs: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"},
     {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "1"}],
    ids=str,
)  # fmt: skip
def test_no_environment_causes_a_traceback(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    mountpoint = tmp_path / "m\u00fcnt"
    mountpoint.mkdir()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    try:
        assert cleanfs("mount", source, mountpoint).returncode == 0
        complains(cleanfs("mount", source, mountpoint), 1, "already a mount")
        for command in (("stats", mountpoint), ("list",), ("umount", mountpoint)):
            done = on_terminal(*command)
            assert done.returncode == 0, done.stdout
            assert "Traceback" not in done.stdout
        assert not is_mounted(mountpoint)
    finally:
        clean_up(mountpoint)


def on_terminal(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command on a terminal and return its output."""
    master, terminal = pty.openpty()
    with subprocess.Popen(command_line(*args), stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(master, 65536):
                shown += piece
        except OSError:
            pass  # EIO: the terminal is closed
        finally:
            os.close(master)
        status = end_of(process, 20)
    return subprocess.CompletedProcess(args, status, shown.decode(errors="replace"), "")


def test_a_fifo_without_a_reader_as_a_log_is_refused_at_once(source: Path, mountpoint: Path) -> None:
    fifo = mountpoint.with_name("fifo")
    os.mkfifo(fifo)
    complains(cleanfs("mount", "--log-file", fifo, source, mountpoint, timeout=10), 1, "fifo")
    assert not is_mounted(mountpoint)


def test_a_full_log_or_a_full_fifo_does_not_stop_the_mount(source: Path, mountpoint: Path) -> None:
    fifo = mountpoint.with_name("fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for log in ("/dev/full", fifo):
            with mounted(source, mountpoint, "--log-file", str(log), "--log-level", "debug") as fs:
                (fs.path / "f").write_text("x")
            assert "Logging error" not in fs.log.read_text()
            assert stat_module.S_ISFIFO(fifo.stat().st_mode)
        assert b"mounted" in os.read(reader, 65536)
    finally:
        os.close(reader)


def test_a_missing_supervisor_does_not_end_the_daemon(
    source: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/" + "x" * 200)
    with mounted(source, mountpoint) as fs:
        (fs.path / "f").write_text("x")
        assert fs.stats()["pid"] == fs.process.pid


@pytest.mark.parametrize(("words", "flag"), [("exec,noexec", True), ("noexec,exec", False)])
def test_the_last_of_two_mount_options_reaches_the_kernel(
    mount: Mounter, words: str, flag: bool
) -> None:
    fs = mount("-o", words)
    assert bool(os.statvfs(fs.path).f_flag & os.ST_NOEXEC) is flag
