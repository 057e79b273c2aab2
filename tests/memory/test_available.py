"""Test how memory limits are found, measured and watched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cleanfs.memory import available
from cleanfs.memory.available import Group, MemoryWatch, groups, machine
from cleanfs.memory.policy import MIB, Headroom

BOTH = """\
4:memory:/process/inner
3:cpuset:/
0::/user.slice
"""
MOUNTS = """\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
32 30 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
"""


def test_the_cgroups_of_the_process_are_found_with_their_ancestors() -> None:
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/unified")
    assert groups(BOTH, MOUNTS) == [
        Group(one / "process/inner", 1),
        Group(one / "process", 1),
        Group(one, 1),
        Group(two / "user.slice", 2),
        Group(two, 2),
    ]


def test_in_a_container_the_mounted_root_is_the_cgroup_of_the_process() -> None:
    inside = "32 30 0:28 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup ro,memory\n"
    assert groups("4:memory:/docker/abc\n", inside) == [Group(Path("/sys/fs/cgroup/memory"), 1)]
    assert groups("4:memory:/docker/abc/x\n", inside)[0].path == Path("/sys/fs/cgroup/memory/x")
    assert groups("4:memory:/elsewhere\n", inside) == [Group(Path("/sys/fs/cgroup/memory"), 1)]


def test_without_cgroups_none_are_found() -> None:
    assert groups("", MOUNTS) == []
    assert groups(BOTH, "") == []


def test_a_version_1_cgroup_is_measured(tmp_path: Path) -> None:
    group = Group(tmp_path, 1)
    assert group.limit() is None
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert group.limit() is None
    (tmp_path / "memory.limit_in_bytes").write_text(f"{100 * MIB}\n")
    assert group.limit() == 100 * MIB
    (tmp_path / "memory.usage_in_bytes").write_text(f"{90 * MIB}\n")
    (tmp_path / "memory.stat").write_text(
        "inactive_file 1\nactive_file 1\n"
        f"total_inactive_file {20 * MIB}\ntotal_active_file {10 * MIB}\n"
    )
    assert group.headroom(100 * MIB) == Headroom(str(tmp_path), 100 * MIB, 40 * MIB)


def test_a_version_2_cgroup_is_measured(tmp_path: Path) -> None:
    group = Group(tmp_path, 2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.high").write_text("max\n")
    assert group.limit() is None
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    assert group.limit() == 100 * MIB
    (tmp_path / "memory.high").write_text(f"{80 * MIB}\n")  # above it the kernel throttles
    assert group.limit() == 80 * MIB
    (tmp_path / "memory.current").write_text(f"{90 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"inactive_file {20 * MIB}\nactive_file {10 * MIB}\n")
    assert group.headroom(80 * MIB).available == 20 * MIB


def test_the_machine_has_headroom() -> None:
    headroom = machine()
    assert headroom is not None
    assert 0 < headroom.available < headroom.limit


def test_a_cgroup_that_disappears_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("1000000\n")
    monkeypatch.setattr(available, "groups", lambda *_: [Group(tmp_path, 1)])
    watch = MemoryWatch()
    try:
        assert [headroom.name for headroom in watch.headrooms()] == ["machine"]
    finally:
        watch.close()


async def test_a_wait_ends_and_leaves_no_fd() -> None:
    before = len(os.listdir("/proc/self/fd"))
    watch = MemoryWatch()
    with trio.fail_after(10):
        await watch.wait(0.01)  # before the first measurement
        assert watch.headrooms()[0].name == "machine"
        assert watch.headrooms() is not None
        await watch.wait(0.01)
    assert "meminfo" in watch.watched
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def group() -> Iterator[Group]:
    """Create an empty version 1 cgroup with a limit."""
    base = Path("/sys/fs/cgroup/memory")
    path = base / f"cleanfs-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"cannot create a version 1 cgroup: {exc}")
    try:
        (path / "memory.limit_in_bytes").write_text(str(64 * MIB))
        yield Group(path, 1)
    finally:
        path.rmdir()


async def test_the_threshold_follows_a_changed_limit(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "groups", lambda *_: [group])
    watch = MemoryWatch()
    try:
        [_, headroom] = watch.headrooms()
        assert headroom.limit == 64 * MIB
        assert {"pressure_level", "thresholds"} <= set(watch.watched)
        (group.path / "memory.limit_in_bytes").write_text(str(32 * MIB))
        [_, headroom] = watch.headrooms()
        assert headroom.limit == 32 * MIB
        (group.path / "memory.limit_in_bytes").write_text("-1")
        assert [headroom.name for headroom in watch.headrooms()] == ["machine"]
        assert "thresholds" not in watch.watched
    finally:
        watch.close()


async def test_usage_near_the_limit_wakes_the_watch(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "groups", lambda *_: [group])
    watch = MemoryWatch()
    join = f"open('{group.path}/cgroup.procs', 'w').write('0')"
    eater = f"{join}; x = bytearray(b'x' * (55 << 20)); input()"
    try:
        watch.headrooms()
        with subprocess.Popen(["python3", "-c", eater], stdin=subprocess.PIPE) as process:  # noqa: ASYNC220  # it starts without a wait
            try:
                with trio.fail_after(30):
                    while not watch.events:
                        await watch.wait(30)
            finally:
                process.kill()
    finally:
        watch.close()


def test_stalls_wake_the_watch_without_the_privilege_for_short_windows() -> None:
    if not os.access("/proc/pressure/memory", os.W_OK):
        pytest.skip("no PSI here")
    unprivileged = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
    script = (
        "from cleanfs.memory.available import MemoryWatch, PSI_TRIGGERS\n"
        "import os\n"
        "try:\n"
        "    fd = os.open('/proc/pressure/memory', os.O_RDWR | os.O_NONBLOCK)\n"
        "    print(os.write(fd, PSI_TRIGGERS[0] + b'\\0'))\n"
        "except OSError as exc:\n    print(exc.strerror)\n"
        "watch = MemoryWatch(); watch.headrooms(); print(watch.watched); watch.close()\n"
    )
    done = subprocess.run(
        [*(unprivileged if os.geteuid() == 0 else ()), sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    short, watched = done.stdout.splitlines()
    if short == "Operation not permitted":
        pytest.skip("this kernel allows triggers only to privileged processes")
    assert short == "Invalid argument"
    assert "psi:machine" in watched


def test_the_lowest_limit_is_that_of_the_machine_or_of_a_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_limit = Path("/proc/meminfo").read_text().split()[1]
    monkeypatch.setattr(available, "groups", lambda *_: [])
    least = available.least_limit()
    assert least == available.Limit(int(machine_limit) << 10, "this machine")
    (tmp_path / "memory.max").write_text("1048576\n")
    monkeypatch.setattr(available, "groups", lambda *_: [Group(tmp_path, 2)])
    assert available.least_limit() == available.Limit(1 << 20, f"the control group {tmp_path}")
    (tmp_path / "memory.max").write_text("max\n")
    assert available.least_limit() == least
