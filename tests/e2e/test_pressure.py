"""Test a daemon in a memory control group that is smaller than its pool limit."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.mounting import cleanfs, mounted, wait_until

MIB = 1 << 20
LIMIT = 112 * MIB
FILES = 7
FILE_SIZE = 24 * MIB
"""Together the files exceed the group's limit, and none of them compresses."""


@dataclass(frozen=True)
class Group:
    """Holds a memory control group of either version."""

    path: Path
    limit_file: str

    def limit(self, size: int) -> None:
        """Set the limit of the group in bytes."""
        (self.path / self.limit_file).write_text(str(size))

    @property
    def prefix(self) -> tuple[str, ...]:
        """Return the prefix of a command that runs in the group."""
        return ("sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")


@pytest.fixture
def group() -> Iterator[Group]:
    for base, limit_file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        path = base / f"cleanfs-pressure-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if not (path / limit_file).exists():
                continue
            yield Group(path, limit_file)
            return
        finally:
            wait_until(lambda procs=path / "cgroup.procs": not procs.read_text())  # type: ignore[misc]  # mypy does not infer it
            path.rmdir()
    pytest.skip("cannot make a memory control group")


def noise(number: int) -> Callable[[int], bytes]:
    """Make the content of a file that does not compress, as a function of the MiB."""
    base = random.Random(number).randbytes(MIB)
    return lambda at: at.to_bytes(8, "little") * 512 + base[4096:]


def test_the_pool_uses_the_memory_available_and_grows_with_it(
    source: Path, mountpoint: Path, group: Group
) -> None:
    group.limit(LIMIT)
    for number in range(FILES):
        with (source / str(number)).open("wb") as file:
            for at in range(FILE_SIZE // MIB):
                file.write(noise(number)(at))
    options = ("--pool-limit", "1G", "--page-cache", "4M", "--busy-poll", "0")
    with mounted(source, mountpoint, *options, prefix=group.prefix) as fs:
        for number in range(FILES):
            content = noise(number)
            with (mountpoint / str(number)).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for at in range(FILE_SIZE // MIB):
                    assert file.read(MIB) == content(at)
        stats = fs.stats()  # the daemon is alive
        assert stats["pool_limit"] == 1024 * MIB
        assert fs.control("pool_limit").read_text() == f"{1024 * MIB}\n"
        assert stats["pool_limit_now"] == stats["backend_counters"]["pool_limit"] < LIMIT
        assert stats["memory_withheld_bytes"] > 900 * MIB
        assert str(group.path) in stats["memory_pressure"]
        assert stats["backend_counters"]["pool_used"] > 8 * MIB, "the pool is in use"
        group.limit(4096 * MIB)
        wait_until(lambda: fs.stats()["pool_limit_now"] > LIMIT)
        assert fs.stats()["memory_pressure_grows"] > 0
        assert "memory is short" in fs.log.read_text()


def test_with_pressure_off_the_limit_stays_in_effect(source: Path, mountpoint: Path) -> None:
    with mounted(source, mountpoint, "--memory-pressure", "off", "--pool-limit", "1T") as fs:
        stats = fs.stats()
        assert stats["memory_pressure"] == "off"
        assert stats["pool_limit_now"] == stats["pool_limit"] == 1 << 40
        assert stats["memory_withheld_bytes"] == 0


def test_the_effective_limit_stays_below_the_memory_of_the_machine(
    source: Path, mountpoint: Path
) -> None:
    with mounted(source, mountpoint, "--pool-limit", "16M") as fs:
        assert fs.stats()["memory_pressure"].startswith("meminfo")
        fs.control("pool_limit").write_text("1T")
        stats = fs.stats()
        assert stats["pool_limit"] == 1 << 40
        assert 0 < stats["pool_limit_now"] < 1 << 40
        assert fs.control("pool_limit").read_text() == f"{1 << 40}\n"
        fs.control("page_cache").write_text("8M")
        assert fs.control("page_cache").read_text() == f"{8 * MIB}\n"
        fs.control("pool_limit").write_text("2M")
        assert fs.stats()["pool_limit_now"] == 2 * MIB
        assert fs.stats()["memory_withheld_bytes"] == 0


def test_limits_above_the_memory_of_the_machine_cause_a_warning_and_work(
    source: Path, mountpoint: Path
) -> None:
    """Memory is allocated only for pages that are kept, so no limit up to 4 EiB is an error."""
    (source / "f").write_bytes(os.urandom(MIB))
    log = mountpoint.with_name("log")
    done = cleanfs("mount", "--pool-limit", "100T", "--log-file", log, source, mountpoint)
    try:
        assert done.returncode == 0
        assert done.stderr.startswith(
            "cleanfs: warning: pool limit 100.0 TiB and page cache 64.0 MiB are"
        )
        assert done.stderr.count("\n") == 1
        assert done.stderr.removeprefix("cleanfs: warning: ") in log.read_text()
        control = mountpoint / ".cleancache"

        def stats() -> dict[str, int]:
            parsed: dict[str, int] = json.loads((control / "stats.json").read_text())
            return parsed

        assert len((mountpoint / "f").read_bytes()) == MIB
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wait_until(lambda: stats()["pool_limit_now"] < machine)  # in slices it would take hours
        for name, size in (
            ("pool_limit", "4194304T"),
            ("page_cache", "4194304T"),
            ("page_cache", "2M"),
        ):
            (control / name).write_text(size)
        assert stats()["pool_limit"] == 1 << 62
        assert log.read_text().count("are more than the") == 4
        with pytest.raises(OSError, match="Invalid"):
            (control / "pool_limit").write_text("4194305T")
        assert stats()["pool_limit"] == 1 << 62
        assert len((mountpoint / "f").read_bytes()) == MIB
    finally:
        assert cleanfs("umount", mountpoint).returncode == 0


def test_without_a_backend_the_pool_limit_causes_no_warning(source: Path, mountpoint: Path) -> None:
    done = cleanfs("mount", "--pool-limit", "100T", "--backend", "none", source, mountpoint)
    assert cleanfs("umount", mountpoint).returncode == 0
    assert (done.returncode, done.stderr) == (0, "")
