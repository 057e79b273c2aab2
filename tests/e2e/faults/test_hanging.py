"""Test calls that hang in the source: which others they block."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.faults.site import (
    DATA,
    MANY,
    PAGE,
    check_alive,
    hung,
    make_directories,
    on,
    opened,
    within,
)
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import (
    MountedFs,
    as_user,
)


@pytest.mark.parametrize("op", ["lookup", "getattr", "opendir", "make", "rename", "fsync"])
def test_control_files_work_while_an_operation_hangs(served: Faulty, fs: MountedFs, op: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "lookup": lambda: os.stat(fs.path / "f"),
        "getattr": lambda: os.stat(fs.path / "f"),
        "opendir": lambda: os.listdir(fs.path),
        "make": lambda: os.mkdir(fs.path / "new"),
        "rename": lambda: os.rename(fs.path / "f", fs.path / "g"),
    }
    with opened(fs.path / "other") as fd:
        calls["fsync"] = lambda: os.fsync(fd)
        served.fault(op, hang=True)
        with hung(served, calls[op]):
            check_alive(fs)


def test_a_hanging_close_after_a_refused_open_blocks_no_other_request(tmp_path: Path) -> None:
    """The permissions in the source are stricter than those that the kernel checked."""
    tmp_path.chmod(0o755)
    options = ("--allow-other", "--attr-timeout", "1000")
    with faulty(*make_directories(tmp_path)) as source, on(source.path, tmp_path, *options) as fs:
        (fs.path / "f").stat()
        (source.real / "f").chmod(0o600)
        source.fault("flush", name="f", hang=True)
        with hung(source, lambda: as_user(fs.path, "os.open('f', os.O_RDONLY)")):
            check_alive(fs)


@pytest.mark.parametrize("op", ["getattr", "lookup"])
def test_a_hanging_getattr_of_a_cached_name_blocks_no_other_request(tmp_path: Path, op: str) -> None:
    """In the source's kernel, the name is still valid, but the attributes have expired."""
    directories = make_directories(tmp_path)
    with faulty(*directories, entry_timeout=100) as source, on(source.path, tmp_path) as fs:
        os.stat(fs.path / "f")
        source.fault(op, hang=True)
        if op == "getattr":
            with hung(source, lambda: os.stat(fs.path / "f")):
                check_alive(fs)
        else:
            os.stat(fs.path / "f")


def test_a_hanging_file_system_below_the_source_blocks_no_other_request(tmp_path: Path) -> None:
    real, source = tmp_path / "real", tmp_path / "source"
    for path in (real, source, source / "sub"):
        path.mkdir()
    (source / "f").write_bytes(DATA)
    with faulty(real, source / "sub") as sub, on(source, tmp_path) as fs:
        sub.fault("opendir", hang=True)
        with hung(sub, lambda: os.stat(fs.path / "sub")):
            check_alive(fs)
            assert (fs.path / "f").read_bytes() == DATA
        os.listdir(fs.path / "sub")


def test_a_chmod_of_a_hanging_mount_point_blocks_no_other_request(
    tmp_path: Path,
) -> None:
    """The call that compares the name with the source runs in a thread of its own."""
    real, source = tmp_path / "real", tmp_path / "source"
    for path in (real, source, source / "sub"):
        path.mkdir()
    options = ("--attr-timeout", "1000")
    with faulty(real, source / "sub") as sub, on(source, tmp_path, *options) as fs:
        os.listdir(fs.path / "sub")
        os.stat(fs.path / "sub")
        sub.fault("getattr", hang=True)
        with hung(sub, lambda: os.chmod(fs.path / "sub", 0o700)):
            check_alive(fs)


def test_a_listing_of_a_hanging_mount_point_blocks_no_other_request(tmp_path: Path) -> None:
    """Listings that have not waited lately are made on the main thread, and stay on the file system."""
    real, source = tmp_path / "real", tmp_path / "source"
    for path in (real, source, source / "sub", source / "dir"):
        path.mkdir()
    with faulty(real, source / "sub") as sub, on(source, tmp_path) as fs:
        sub.fault("getattr", hang=True)

        def list_top() -> None:
            for _ in range(1000):  # in a row, until one is made inline
                os.listdir(fs.path / "dir")
            os.listdir(fs.path)

        with hung(sub, list_top):
            check_alive(fs)


def test_another_file_is_served_while_many_requests_of_one_hang(served: Faulty, fs: MountedFs) -> None:
    with opened(fs.path / "f", os.O_RDWR) as fd, opened(fs.path / "other", os.O_RDWR) as other:
        served.fault("read", name="f", hang=True)
        served.fault("write", name="f", hang=True)
        calls: list[Callable[[], object]] = [
            lambda at=number * PAGE: os.pread(fd, 10, at)  # type: ignore[misc]  # mypy does not infer it
            for number in range(MANY)
        ]
        calls.append(lambda: os.pwrite(fd, b"x", 0))
        with hung(served, *calls):
            served.wait_hanging(64)
            check_alive(fs)

            def use() -> None:
                os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(other, 5, 8000) == b"other"
                os.pwrite(other, b"OTHER", 0)
                assert (fs.path / "other").read_bytes()[:10] == b"OTHERother"
                (fs.path / "new").write_bytes(b"new")

            within(20, use)
        assert os.pread(fd, PAGE, 5 * PAGE) == DATA[5 * PAGE : 6 * PAGE]
