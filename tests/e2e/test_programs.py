"""Run common programs on a mount, with work for a few seconds each."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import MountedFs, end_of

FIO = {
    "buffered": ("--ioengine=psync", "--fallocate=none"),
    "direct": ("--ioengine=psync", "--direct=1", "--fallocate=none"),
    "mmap": ("--ioengine=mmap", "--fallocate=none"),
    "libaio": ("--ioengine=libaio", "--direct=1", "--iodepth=8", "--fallocate=none"),
}


def need(tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", FIO)
def test_fio_verifies_its_writes(mount: Mounter, kind: str) -> None:
    need("fio")
    fs = mount()
    run(
        "fio", "--name=f", "--rw=randrw", "--size=6m", "--bsrange=4k-64k", "--verify=crc32c",
        "--verify_fatal=1", "--do_verify=1", "--verify_backlog=200", "--numjobs=2", *FIO[kind],
        cwd=fs.path,
    )  # fmt: skip
    for name in ("f.0.0", "f.1.0"):
        fs.drop_kernel(fs.path / name)
        assert (fs.path / name).read_bytes() == (fs.source / name).read_bytes()
    stats = fs.stats()
    assert stats["puts"] > 0
    assert stats["flushes"] > 0


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate"])
def test_sqlite_commits_and_reads_back(mount: Mounter, journal: str) -> None:
    need("sqlite3")
    fs = mount()
    script = f"PRAGMA journal_mode={journal}; CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT);"
    for start in range(0, 20_000, 5000):
        script += f"""
            BEGIN; WITH RECURSIVE c(x) AS (SELECT {start} UNION SELECT x+1 FROM c WHERE x<{start}+4999)
            INSERT INTO t SELECT x, hex(x) || '{"text" * 20}' FROM c; COMMIT;
            BEGIN; UPDATE t SET text='undone'; ROLLBACK;
            UPDATE t SET text='changed' WHERE n % 7 = 0;"""
    assert run("sqlite3", "db", script, cwd=fs.path) == f"{journal}\n"
    query = "PRAGMA integrity_check; SELECT count(*), sum(text='changed'), sum(text='undone') FROM t;"
    assert run("sqlite3", "db", query, cwd=fs.path) == "ok\n20000|2858|0\n"
    fs.drop()
    assert run("sqlite3", "db", query, cwd=fs.path) == "ok\n20000|2858|0\n"
    assert run("sqlite3", "db", query, cwd=fs.source) == "ok\n20000|2858|0\n"


def test_two_sqlite_processes_do_not_lose_an_update(mount: Mounter) -> None:
    need("sqlite3")
    fs = mount()
    run("sqlite3", "db", "CREATE TABLE t (n); INSERT INTO t VALUES (0);", cwd=fs.path)
    script = ".timeout 20000\n" + "UPDATE t SET n = n + 1;\n" * 40
    processes = [
        subprocess.Popen(["sqlite3", "db"], stdin=subprocess.PIPE, cwd=fs.path) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(script.encode())
            process.stdin.close()
        assert [end_of(process, 50) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            end_of(process, 10)
    assert run("sqlite3", "db", "SELECT n FROM t", cwd=fs.path) == "80\n"


def test_git_clone_fsck_status_and_commit(mount: Mounter, tmp_path: Path) -> None:
    need("git")
    identity = ("-c", "user.name=n", "-c", "user.email=e@x")
    origin = tmp_path / "origin"
    origin.mkdir()
    for i in range(200):
        (origin / f"d{i % 10}").mkdir(exist_ok=True)
        (origin / f"d{i % 10}" / f"f{i}").write_text(f"{i}\n" * i * 10)
    run("git", "init", "-q", cwd=origin)
    run("git", "add", ".", cwd=origin)
    run("git", *identity, "commit", "-qm", "one", cwd=origin)
    fs = mount()
    run("git", "clone", "-q", "--no-hardlinks", origin, "clone", cwd=fs.path)
    clone = fs.path / "clone"
    run("git", "fsck", "--strict", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    (clone / "d1" / "f1").write_text("changed\n")
    (clone / "new").write_text("new\n")
    (clone / "d2" / "f2").unlink()
    assert run("git", "status", "--porcelain", cwd=clone) == " M d1/f1\n D d2/f2\n?? new\n"
    run("git", "add", "-A", cwd=clone)
    run("git", *identity, "commit", "-qm", "two", cwd=clone)
    run("git", "gc", "-q", "--prune=now", cwd=clone)
    run("git", "checkout", "-q", "HEAD~1", cwd=clone)
    fs.control("drop").write_text("3")
    run("git", "fsck", "--strict", cwd=clone)
    run("git", "fsck", "--strict", cwd=fs.source / "clone")
    run("diff", "-r", "--exclude=.git", origin, clone, cwd=fs.path)


def test_a_program_compiles_with_make(mount: Mounter) -> None:
    need("gcc")
    need("make")
    fs = mount()
    parts = range(8)
    for i in parts:
        code = f'#include <stdio.h>\nint part{i}(void) {{ return printf("{i}") * {i}; }}\n'
        (fs.path / f"part{i}.c").write_text('#include "all.h"\n' + code)
    (fs.path / "all.h").write_text("".join(f"int part{i}(void);\n" for i in parts))
    calls = " + ".join(f"part{i}()" for i in parts)
    (fs.path / "main.c").write_text(f'#include "all.h"\nint main(void) {{ return {calls}; }}\n')
    objects = " ".join(["main.o", *(f"part{i}.o" for i in parts)])
    (fs.path / "Makefile").write_text(
        f"prog: {objects}\n\tgcc -o $@ $^\n%.o: %.c all.h\n\tgcc -O1 -g -c -o $@ $<\n"
    )
    run("make", "-j2", cwd=fs.path)
    done = subprocess.run([fs.path / "prog"], capture_output=True, timeout=10, check=False)
    assert (done.stdout, done.returncode) == (b"01234567", sum(parts))
    assert "up to date" in run("make", cwd=fs.path)
    (fs.path / "all.h").touch()
    assert run("make", "-j2", cwd=fs.path).count("gcc") == len(parts) + 2


def furnish(top: Path) -> None:
    """Make a tree with all kinds of files and attributes that tar keeps."""
    for i in range(40):
        (top / f"d{i % 5}").mkdir(exist_ok=True)
        file = top / f"d{i % 5}" / f"f{i}"
        file.write_bytes(os.urandom(i * 997) + bytes(i * 500))
        file.chmod(0o400 + i)
        os.chown(file, 1000 + i, 2000 + i)
        os.setxattr(file, "user.n", b"%d" % i)
        os.utime(file, ns=(10**18 + i, 10**18 + i * 10**9 + 123_456_789))
        os.link(file, top / f"hard{i}")
        (top / f"soft{i}").symlink_to(f"d{i % 5}/f{i}")
    os.mkfifo(top / "fifo")
    (top / "empty").mkdir(mode=0o700)
    with (top / "sparse").open("wb") as sparse:
        sparse.truncate(3 << 20)
    (top / ("n" * 255)).touch(mode=0o4755)
    os.setxattr(top / "empty", "user.dir", b"x")
    os.utime(top / "d1", ns=(10**18, 10**18 + 1))


TAR = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--format=posix")


def test_tar_out_and_in_compares_equal(mount: Mounter, tmp_path: Path) -> None:
    need("tar")
    original = tmp_path / "original"
    original.mkdir()
    furnish(original)
    fs = mount()
    run("tar", *TAR, "-cSf", tmp_path / "one.tar", ".", cwd=original)
    run("tar", *TAR, "-xpf", tmp_path / "one.tar", cwd=fs.path)
    run("tar", *TAR, "-df", tmp_path / "one.tar", cwd=fs.path)
    run("tar", *TAR, "-cSf", tmp_path / "two.tar", ".", cwd=fs.path)
    fs.control("drop").write_text("3")
    run("tar", *TAR, "-df", tmp_path / "two.tar", cwd=original)
    listing = "find . ! -name . -printf '%P %M %n %U %G %l %T@ %s\\n' | sort"
    assert run("sh", "-c", listing, cwd=fs.path).replace("./", "") == run(
        "sh", "-c", listing, cwd=original
    )
    xattrs = "getfattr -Rd -m - . | sort"
    if shutil.which("getfattr"):
        assert run("sh", "-c", xattrs, cwd=fs.path) == run("sh", "-c", xattrs, cwd=original)


def test_cp_in_and_out_and_diff(mount: Mounter, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    furnish(original)
    (original / "fifo").unlink()  # diff -r cannot compare fifos
    fs = mount()
    run("cp", "-a", original, "copy", cwd=fs.path)
    run("cp", "-r", fs.path / "copy", tmp_path / "back", cwd=tmp_path)
    run("diff", "-r", original, fs.path / "copy", cwd=tmp_path)
    run("diff", "-r", original, tmp_path / "back", cwd=tmp_path)
    run("cp", "-r", "copy", "again", cwd=fs.path)
    run("diff", "-r", "copy", "again", cwd=fs.path)
    run("rm", "-r", "copy", cwd=fs.path)
    assert os.listdir(fs.source) == ["again"]


def test_processes_appending_to_one_log_lose_no_line(mount: Mounter) -> None:
    fs = mount()
    script = 'i=0; while [ $i -lt 150 ]; do echo "$0 $i" >> log; i=$((i+1)); done'
    processes = [subprocess.Popen(["sh", "-c", script, name], cwd=fs.path) for name in "abc"]
    try:
        assert [end_of(process, 30) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            end_of(process, 10)
    lines = (fs.path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {i}" for name in "abc" for i in range(150))


@pytest.fixture
def overlay(mount: Mounter, tmp_path: Path) -> Iterator[tuple[MountedFs, Path]]:
    """Make an overlay with its upper directory on a mount and some files in its lower directory."""
    fs = mount()
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    for path in (lower / "d", merged, fs.path / "upper", fs.path / "work"):
        path.mkdir(parents=True)
    (lower / "f").write_text("lower\n")
    (lower / "d" / "g").write_text("g\n")
    (lower / "gone").write_text("gone\n")
    options = f"lowerdir={lower},upperdir={fs.path}/upper,workdir={fs.path}/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        pytest.skip(f"no overlay here: {done.stderr.strip()}")
    try:
        yield fs, merged
    finally:
        subprocess.run(["umount", str(merged)], timeout=30, check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_mount_can_hold_the_upper_directory_of_an_overlay(overlay: tuple[MountedFs, Path]) -> None:
    fs, merged = overlay
    with (merged / "f").open("a") as file:
        file.write("upper\n")
    (merged / "gone").unlink()
    (merged / "d" / "g").rename(merged / "d" / "h")
    (merged / "new").mkdir()
    (merged / "new" / "x").write_bytes(bytes(100_000))
    os.link(merged / "new" / "x", merged / "new" / "y")
    os.setxattr(merged / "f", "user.a", b"1")
    shutil.rmtree(merged / "new")
    (merged / "new").write_text("a file now\n")
    assert sorted(os.listdir(merged)) == ["d", "f", "new"]
    assert os.listdir(merged / "d") == ["h"]
    assert (merged / "f").read_text() == "lower\nupper\n"
    assert (merged / "new").read_text() == "a file now\n"
    upper = fs.source / "upper"
    assert (upper / "f").read_text() == "lower\nupper\n"
    assert os.getxattr(upper / "f", "user.a") == b"1"
    for whiteout in (upper / "gone", upper / "d" / "g"):
        st = whiteout.stat()
        assert (stat.S_ISCHR(st.st_mode), st.st_rdev) == (True, 0)
