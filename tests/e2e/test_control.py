"""Test the control directory of a real mount."""

import errno
import json
import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cleanfs.sizes import parse_size
from tests.e2e.conftest import SMALL_CACHES, Mounter
from tests.harness.mounting import MountedFs, cleanfs, is_mounted, mounted, settle, wait_until

NUMBERS = ("succ_gets", "failed_gets", "puts", "flushes")
WRITABLE = ("backend", "pool_limit", "page_cache", "log_level")
READABLE = (*NUMBERS, *WRITABLE, "stats", "stats.json", "metrics", "options.json")
KERNEL_NAMES = ("obj_count", "eph_zpages", "eph_zbytes", "evicted_eph_zpages", "compress_poor",
                "zero_filled_pages", "flush_total", "flush_found", "flobj_total", "flobj_found",
                "failed_eph_puts")  # fmt: skip
SIZE = 4 << 20


def fill(fs: MountedFs, name: str = "f") -> bytes:
    """Read a compressible file of four times the page cache, so that most pages go to cleancache."""
    data = b"".join(b"%07d\n" % i for i in range(SIZE // 8))
    (fs.source / name).write_bytes(data)
    settle()
    wait_until((fs.path / name).exists, 2)
    assert (fs.path / name).read_bytes() == data
    return data


def settled_stats(fs: MountedFs) -> dict[str, Any]:
    """Return the statistics once the backend's worker is idle."""
    stats: dict[str, Any] = {}

    def is_idle() -> bool:
        nonlocal stats
        before, stats = stats, fs.stats()
        return bool(before.get("backend_counters") == stats["backend_counters"])

    wait_until(is_idle, 5)
    return stats


def refused(fs: MountedFs, name: str, text: str | bytes) -> str:
    """Return the name of the error of a write; empty if there was none."""
    data = text.encode() if isinstance(text, str) else text
    fd = os.open(fs.control(name), os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, data)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    finally:
        os.close(fd)
    return ""


def test_the_directory_is_reachable_but_not_listed(mount: Mounter) -> None:
    fs = mount()
    assert os.listdir(fs.path) == []
    assert [entry.name for entry in os.scandir(fs.path)] == []
    assert fs.control("").is_dir()
    assert not (fs.source / ".cleancache").exists()
    assert sorted(os.listdir(fs.control(""))) == sorted((*READABLE, "drop", "zcache"))
    assert set(KERNEL_NAMES) <= set(os.listdir(fs.control("zcache")))


def test_every_file_reads_and_has_its_size(mount: Mounter) -> None:
    fs = mount()
    fill(fs)
    for name in (*READABLE, *(f"zcache/{counter}" for counter in os.listdir(fs.control("zcache")))):
        with fs.control(name).open("rb") as file:
            st = os.fstat(file.fileno())
            text = file.read().decode()
        assert text.endswith("\n"), name
        assert (st.st_size, st.st_blocks) == (len(text), -(-len(text) // 512)), name
        assert fs.control(name).stat().st_mode & 0o444 == 0o444, name
        if name in NUMBERS or name.startswith("zcache/"):
            assert text == f"{int(text)}\n", name
    with pytest.raises(PermissionError):
        fs.control("drop").read_text()


def test_modes_allow_writes_to_the_owner_only(mount: Mounter) -> None:
    fs = mount()
    for name in (*READABLE, "drop"):
        st = fs.control(name).stat()
        writable = name in (*WRITABLE, "drop")
        assert stat.S_IMODE(st.st_mode) & 0o222 == (0o200 if writable else 0), name
        assert st.st_uid == os.getuid()
    for name in (*NUMBERS, "stats", "zcache/obj_count"):
        with pytest.raises(PermissionError):
            os.open(fs.control(name), os.O_WRONLY)


def test_the_four_counters_agree_with_all_other_views(mount: Mounter) -> None:
    fs = mount()
    fill(fs)
    fs.drop_kernel()
    fill(fs, "g")
    for _ in range(100):
        if views_agree(fs):
            return
    pytest.fail("the backend's worker is never idle")


def views_agree(fs: MountedFs) -> bool:
    """Compare all views. Return False if the backend's worker was busy meanwhile."""
    stats = settled_stats(fs)
    assert stats["puts"] > 500
    lines = dict(line.split(" ", 1) for line in fs.control("stats").read_text().splitlines())
    metrics = {
        sample.name: sample.value
        for family in text_string_to_metric_families(fs.control("metrics").read_text())
        for sample in family.samples
    }
    single = {name: int(fs.control(f"zcache/{name}").read_text()) for name in stats["backend_counters"]}
    if fs.stats()["backend_counters"] != stats["backend_counters"]:
        return False
    for name in NUMBERS:
        number = int(fs.control(name).read_text())
        assert number == stats[name] == int(lines[name]) == metrics[f"cleanfs_{name}_total"], name
    for name, value in stats["backend_counters"].items():
        assert single[name] == value == int(lines[f"zcache_{name}"])
    assert stats["mountpoint"] == lines["mountpoint"] == str(fs.path)
    return True


def test_each_request_is_timed_by_the_place_of_its_pages(mount: Mounter) -> None:
    fs = mount()
    (fs.source / "f").write_bytes(b"text" * 4096)
    settle()
    before = requests(fs)
    assert not any(before.values())

    def counted(request: Callable[[], object]) -> dict[str, int]:
        nonlocal before
        last = before
        request()
        before = requests(fs)
        return {name: count - last[name] for name, count in before.items() if count != last[name]}

    fd = os.open(fs.path / "f", os.O_RDONLY | os.O_DIRECT)  # bypasses the kernel's page cache
    try:
        buffer = mmap.mmap(-1, 8192)

        def read() -> None:
            assert os.preadv(fd, [buffer], 4096) == 8192

        assert counted(read) == {"source_read": 1}
        assert counted(read) == {"pagecache_hit": 1}
        fs.control("drop").write_text("1")
        assert counted(read) == {"cleancache_hit": 1}
        assert counted(read) == {"cleancache_hit": 1}, "the pages stay there"
        fs.control("drop").write_text("3")
        assert counted(read) == {"source_read": 1}
        assert counted(lambda: (fs.path / "g").write_bytes(b"x" * 100)) == {"write": 1}
    finally:
        os.close(fd)
    stats = fs.stats()
    assert (stats["reads"], stats["read_bytes"]) == (5, 5 * 8192)
    assert (stats["writes"], stats["write_bytes"]) == (1, 100)


def requests(fs: MountedFs) -> dict[str, int]:
    """Return the number of timed requests by kind. All views must agree."""
    stats = fs.stats()
    lines = dict(line.split(" ", 1) for line in fs.control("stats").read_text().splitlines())
    families = {f.name: f for f in text_string_to_metric_families(fs.control("metrics").read_text())}
    latency = families["cleanfs_request_latency_seconds"]
    assert latency.type == "histogram"
    metrics = {s.labels["kind"]: s.value for s in latency.samples if s.name.endswith("_count")}
    counts: dict[str, int] = {kind: member["count"] for kind, member in stats["latencies"].items()}
    assert counts == metrics
    for kind, count in counts.items():
        assert stats[f"latency_{kind}_count"] == int(lines[f"latency_{kind}_count"]) == count
        assert sum(stats["latencies"][kind]["buckets_ns"].values()) == count
        assert (float(lines[f"latency_{kind}_p99_us"]) > 0) == (count > 0)
    return counts


def test_metrics_are_valid_prometheus_text(mount: Mounter) -> None:
    fs = mount()
    fill(fs)
    families = {f.name: f for f in text_string_to_metric_families(fs.control("metrics").read_text())}
    assert families["cleanfs_puts"].type == "counter"
    assert families["cleanfs_pagecache_used"].type == "gauge"
    assert all(family.documentation for family in families.values())
    assert families["cleanfs_puts"].samples[0].labels == {"mountpoint": str(fs.path)}
    assert families["cleanfs_info"].samples[0].labels["source"] == str(fs.source)


def test_each_read_from_the_start_of_an_open_file_returns_new_values(mount: Mounter) -> None:
    fs = mount()
    with fs.control("puts").open() as puts, fs.control("stats.json").open() as stats:
        assert puts.read() == "0\n"
        assert json.load(stats)["puts"] == 0
        fill(fs)
        puts.seek(0)
        stats.seek(0)
        assert int(puts.read()) > 500
        assert json.load(stats)["puts"] > 500


def by_sendfile(path: Path, to: Path) -> None:
    with path.open("rb") as source, to.open("wb") as target:
        while os.sendfile(target.fileno(), source.fileno(), None, 1 << 20):
            pass


def by_splice(path: Path, to: Path) -> None:
    reader, writer = os.pipe()
    with path.open("rb") as source, to.open("wb") as target:
        while count := os.splice(source.fileno(), writer, 4096):
            os.splice(reader, target.fileno(), count)
    os.close(reader)
    os.close(writer)


def by_copy_file_range(path: Path, to: Path) -> None:
    with path.open("rb") as source, to.open("wb") as target:
        while os.copy_file_range(source.fileno(), target.fileno(), 1 << 20):
            pass


def by_private_mapping(path: Path, to: Path) -> None:
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        to.write_bytes(mapping)


def by_pread_from_the_end(path: Path, to: Path) -> None:
    with path.open("rb") as source:
        end = os.lseek(source.fileno(), 0, os.SEEK_END)
        second = os.pread(source.fileno(), end, end // 2)
        to.write_bytes(os.pread(source.fileno(), end // 2, 0) + second)


def by(command: str) -> Callable[[Path, Path], None]:
    def copy(path: Path, to: Path) -> None:
        if shutil.which(command.split()[0]) is None:
            pytest.skip(f"no {command.split()[0]}")
        subprocess.run(["sh", "-ec", command.format(path=path, to=to)], check=True, timeout=20)

    return copy


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "shutil.copyfile": shutil.copyfile,
    "shutil.copy2": shutil.copy2,
    "sendfile": by_sendfile,
    "splice": by_splice,
    "private mapping": by_private_mapping,
    "pread from the end": by_pread_from_the_end,
    "cp": by("cp {path} {to}"),
    "cp, sparse": by("cp --sparse=always --reflink=auto {path} {to}"),
    "cat": by("cat {path} > {to}"),
    "head": by("head -c 1M {path} > {to}"),
    "tail": by("tail -n +1 {path} > {to}"),
    "tail of all lines": by("tail -n 100000 {path} > {to}"),
    "dd": by("dd if={path} of={to} bs=64K status=none"),
    "tar": by("tar cf - {path} 2> /dev/null | tar xOf - > {to}"),
    "curl": by("curl -s file://{path} > {to}"),
    "rsync": by("rsync {path} {to}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def filled_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide one mount with pages in its caches, for all ways to copy."""
    top = tmp_path_factory.mktemp("filled")
    for name in ("source", "mnt"):
        (top / name).mkdir()
    with mounted(top / "source", top / "mnt", *SMALL_CACHES) as fs:
        fill(fs)
        yield fs


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_copy_a_file_copies_all_of_it(
    filled_fs: MountedFs, tmp_path: Path, way: str
) -> None:
    fs, to = filled_fs, tmp_path / "copy"
    with fs.control("stats.json").open() as others:  # it has another size and stays open
        json.load(others)
        for text in ("2M", "123456K", "1234567K", "8M"):
            assert refused(fs, "pool_limit", text) == ""
            WAYS[way](fs.control("stats.json"), to)
            assert json.loads(to.read_text())["pool_limit"] == parse_size(text)
            WAYS[way](fs.control("pool_limit"), to)
            assert to.read_text() == f"{parse_size(text)}\n"
        others.seek(0)
        assert json.load(others)["pool_limit"] == 8 << 20


def test_a_copy_within_the_mount_is_whole(mount: Mounter) -> None:
    fs = mount()
    for copy in (by_copy_file_range, shutil.copyfile, WAYS["cp"]):
        copy(fs.control("stats.json"), fs.path / "copy")
        assert json.loads((fs.path / "copy").read_text())["source"] == str(fs.source)


def test_concurrent_copies_are_complete(mount: Mounter, tmp_path: Path) -> None:
    fs = mount()
    names = ("stats.json", "pool_limit")

    def copies(number: int) -> None:
        for turn in range(30):
            if number == 0:
                assert refused(fs, "pool_limit", ("2M", "1234567K")[turn % 2]) == ""
                continue
            for name in names:
                shutil.copyfile(fs.control(name), tmp_path / f"{number}")
                text = (tmp_path / f"{number}").read_text()
                limit = json.loads(text)["pool_limit"] if name == "stats.json" else int(text)
                assert limit in (2 << 20, 64 << 20, 1234567 << 10)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(copies, number) for number in range(4)]:
            done.result(60)
    inodes = set()
    for _ in range(2):
        st = fs.control("stats.json").stat()
        inodes.add(st.st_ino)
    assert len(inodes) == 1  # cp and rsync compare it with that of the file they open


def test_an_open_after_an_old_lookup_returns_new_values(mount: Mounter) -> None:
    fs = mount()
    looked_up = os.open(fs.control("pool_limit"), os.O_PATH)
    try:
        assert refused(fs, "pool_limit", "1234567K") == ""
        wait_until(lambda: Path(f"/proc/self/fd/{looked_up}").read_text() == f"{1234567 << 10}\n", 5)
    finally:
        os.close(looked_up)


def test_a_text_read_in_small_pieces_is_not_torn(mount: Mounter) -> None:
    fs = mount()
    fd = os.open(fs.control("stats.json"), os.O_RDONLY)
    try:
        text = b""
        while piece := os.read(fd, 7):
            text += piece
            if len(text) % 70 == 0:
                (fs.path / f"f{len(text)}").write_bytes(b"x" * len(text))
    finally:
        os.close(fd)
    assert json.loads(text)["source"] == str(fs.source)


@pytest.mark.parametrize(
    ("text", "limit"), [("2M", 2 << 20), ("1048576\n", 1 << 20), ("1.5M", 3 << 19)]
)
def test_pool_limit_is_effective_at_once(mount: Mounter, text: str, limit: int) -> None:
    fs = mount()
    (fs.source / "f").write_bytes(os.urandom(1 << 20) * 4)
    fill(fs)
    fill(fs, "g")
    fill(fs, "h")
    assert fs.stats()["backend_counters"]["pool_used"] > limit
    assert refused(fs, "pool_limit", text) == ""
    assert fs.control("pool_limit").read_text() == f"{limit}\n"
    counters = settled_stats(fs)["backend_counters"]
    assert counters["pool_limit"] == limit
    assert counters["pool_used"] <= limit
    assert counters["evicted_eph_zpages"] > 0
    fs.drop_kernel()
    assert fill(fs) == (fs.source / "f").read_bytes()
    wait_until(lambda: fs.stats()["backend_counters"]["pool_used"] <= limit, 5)


def test_page_cache_is_effective_at_once(mount: Mounter) -> None:
    fs = mount("--page-cache", "16M")
    fill(fs)
    assert fs.stats()["pagecache_used"] > SIZE
    for text, limit in (("512K", 512 << 10), ("0", 0)):
        assert refused(fs, "page_cache", text) == ""
        assert fs.control("page_cache").read_text() == f"{limit}\n"
        assert fs.stats()["pagecache_used"] <= limit
        fs.drop_kernel()
        fill(fs)
        assert fs.stats()["pagecache_used"] <= limit
    assert refused(fs, "page_cache", "32M") == ""
    fs.drop_kernel()
    fill(fs)
    assert fs.stats()["pagecache_used"] > SIZE


def test_the_log_level_changes_at_once(mount: Mounter) -> None:
    fs = mount("--log-level", "debug")
    assert fs.control("log_level").read_text() == "debug\n"
    for level, logged in (("error", 0), ("warning", 1), ("debug", 2)):
        assert refused(fs, "log_level", f"{level}\n") == ""
        assert fs.control("log_level").read_text() == f"{level}\n"
        assert refused(fs, "page_cache", "4194304T") == ""  # causes a warning
        assert fs.log.read_text().count("are more than the") == logged


def test_the_options_in_effect_can_be_read(mount: Mounter) -> None:
    fs = mount("--page-size", "16K", "--coherency", "none", "-o", "fsname=x,noexec", "--poor", "keep")
    for name, text in (("pool_limit", "32M"), ("page_cache", "2M"), ("log_level", "error")):
        assert refused(fs, name, text) == ""
    options = json.loads(fs.control("options.json").read_text())
    assert options["source"] == str(fs.source)
    expected = {"page_size": 16 << 10, "coherency": "none", "fuse_options": ["fsname=x"],
                "poor": "keep", "pool_limit": 32 << 20, "page_cache": 2 << 20,
                "log_level": "error", "backend": "zcache", "attr_timeout": 86400.0,
                "allow_other": False, "shared_pool": None, "busy_poll": 50.0,
                "memory_pressure": True, "log_file": None}  # fmt: skip
    assert {name: options[name] for name in expected} == expected


WRONG = {
    "pool_limit": (" ", "x", "-1", "0", "1", "4096", "12Q", "1 2", "1e99", "nan", b"\xff", "9" * 500),
    "page_cache": ("x", "-1", "1", "4095", "1e99", "nan", "1M 2M", b"\x00", b"\xff\xfe"),
    "log_level": (" ", "loud", "INFO", "info debug", "20", b"\xff"),
    "drop": ("0", "4", "-1", "12", "1 2", "both", b"1\x00", "\u0663"),
    "backend": ("x", "zcache x", "ZCACHE", "../zcache", b"\xff", "zcache\nnone"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_einval_and_changes_nothing(mount: Mounter, name: str) -> None:
    fs = mount()
    fill(fs)
    before = fs.stats()
    errors = {text: refused(fs, name, text)
            for text in WRONG[name]}  # fmt: skip
    assert errors == dict.fromkeys(errors, "EINVAL")
    assert refused(fs, name, "\n") == "EINVAL"
    after = fs.stats()
    for value in ("backend", "pool_id", "pagecache_limit", "pagecache_resident"):
        assert after[value] == before[value], value
    for value in ("pool_limit", "obj_count", "eph_zpages"):  # others change while the worker compresses
        assert after["backend_counters"][value] == before["backend_counters"][value], value


def test_a_backend_registered_later_gets_its_pool_then(mount: Mounter) -> None:
    fs = mount("--backend", "none")
    data = fill(fs)
    assert fs.control("backend").read_text() == "none\n"
    assert fs.stats()["pool_id"] < 0
    assert fs.stats()["puts"] == 0
    assert not fs.control("zcache").exists()
    assert refused(fs, "pool_limit", "8M") == ""
    assert refused(fs, "backend", "zcache\n") == ""
    assert fs.control("backend").read_text() == "zcache\n"
    pool = fs.stats()["pool_id"]
    assert pool >= 0
    assert fs.control("pool_limit").read_text() == f"{8 << 20}\n"
    for _ in range(2):
        fs.drop_kernel()
        assert (fs.path / "f").read_bytes() == data
    assert fs.stats()["succ_gets"] > 500
    assert refused(fs, "backend", "zcache") == "EBUSY"
    assert fs.stats()["pool_id"] == pool
    assert fs.stats()["backend_counters"]["eph_zpages"] > 0


def test_none_unregisters_and_drops_every_page(mount: Mounter) -> None:
    fs = mount()
    data = fill(fs)
    for _ in range(2):
        assert refused(fs, "backend", "none") == ""
        assert fs.control("backend").read_text() == "none\n"
        stats = fs.stats()
        assert stats["backend_counters"] == {}
        assert stats["pool_id"] < 0
        fs.drop_kernel()
        assert (fs.path / "f").read_bytes() == data
        assert fs.stats()["succ_gets"] == stats["succ_gets"]
    assert refused(fs, "backend", "zcache") == ""
    assert fs.stats()["backend_counters"]["eph_zpages"] == 0


def test_nothing_stale_survives_a_change_of_the_backend(mount: Mounter) -> None:
    fs = mount()
    data = fill(fs)
    assert refused(fs, "backend", "none") == ""
    (fs.path / "f").write_bytes(b"new" + data[3:])
    assert refused(fs, "backend", "zcache") == ""
    fs.drop_kernel()
    assert (fs.path / "f").read_bytes() == b"new" + data[3:]


@pytest.mark.parametrize("caches", [1, 2, 3])
def test_drop(mount: Mounter, caches: int) -> None:
    fs = mount()
    data = fill(fs)
    before = fs.stats()
    assert before["pagecache_resident"] > 100
    assert before["backend_counters"]["eph_zpages"] > 500
    assert refused(fs, "drop", f"{caches}\n") == ""
    after = fs.stats()
    kept = after["backend_counters"]["eph_zpages"]
    if caches == 1:
        # As with the kernel's drop_caches, the evicted pages go to cleancache.
        assert kept == before["backend_counters"]["eph_zpages"] + before["pagecache_resident"]
    else:
        assert kept == 0
    assert after["pagecache_resident"] == (before["pagecache_resident"] if caches == 2 else 0)
    fs.drop_kernel()
    assert (fs.path / "f").read_bytes() == data


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_a_real_entry_of_that_name_is_refused_at_mount(
    source: Path, mountpoint: Path, kind: str
) -> None:
    entry = source / ".cleancache"
    make: dict[str, Callable[[], object]] = {
        "file": entry.touch,
        "directory": entry.mkdir,
        "dangling link": lambda: entry.symlink_to("x"),
    }
    make[kind]()
    done = cleanfs("mount", source, mountpoint)
    assert done.returncode == 1
    assert ".cleancache" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not is_mounted(mountpoint)


def fails(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False


def test_the_name_cannot_be_reused_removed_or_moved(mount: Mounter) -> None:
    fs = mount()
    control, other = fs.control(""), fs.path / "other"
    other.mkdir()
    (fs.path / "file").touch()
    attempts = {
        "rmdir": control.rmdir,
        "rename away": lambda: control.rename(fs.path / "x"),
        "rename over": lambda: other.rename(control),
        "rename a file over": lambda: (fs.path / "file").rename(control),
        "mkdir": control.mkdir,
        "symlink": lambda: control.symlink_to("x"),
        "link": lambda: os.link(fs.path / "file", control),
        "unlink a file": lambda: fs.control("puts").unlink(),
        "rename a file": lambda: fs.control("puts").rename(fs.path / "x"),
        "rename into": lambda: (fs.path / "file").rename(fs.control("new")),
        "create in": lambda: fs.control("new").touch(),
        "mkdir in": lambda: fs.control("new").mkdir(),
        "link out of": lambda: os.link(fs.control("puts"), fs.path / "x"),
        "chmod": lambda: fs.control("drop").chmod(0o666),
        "chown": lambda: os.chown(fs.control("drop"), 1, 1),
        "chmod the directory": lambda: control.chmod(0o777),
        "truncate": lambda: os.truncate(fs.control("puts"), 0),
        "set an xattr": lambda: os.setxattr(control, "user.x", b""),
        "remove an xattr": lambda: os.removexattr(fs.control("puts"), "user.x"),
        "open a missing one": lambda: fs.control("missing").read_text(),
        "look below a file": lambda: fs.control("puts/x").read_text(),
        "list a file": lambda: os.listdir(fs.control("puts")),
    }
    assert [name for name, attempt in attempts.items() if not fails(attempt)] == []
    assert sorted(os.listdir(fs.source)) == ["file", "other"]
    assert fs.control("puts").read_text() == "0\n"


def test_reading_xattrs_of_control_files_finds_none(mount: Mounter) -> None:
    fs = mount()
    for path in (fs.control(""), fs.control("puts")):
        assert os.listxattr(path) == []
        with pytest.raises(OSError, match="No data"):
            os.getxattr(path, "user.x")


def test_an_entry_made_in_the_source_later_stays_hidden(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "0")
    (fs.source / ".cleancache").mkdir()
    (fs.source / ".cleancache" / "puts").write_text("of the source")
    assert fs.control("puts").read_text() == "0\n"
    assert os.listdir(fs.path) == []
    assert (fs.source / ".cleancache" / "puts").read_text() == "of the source"


def test_shell_redirection_works(mount: Mounter) -> None:
    fs = mount()
    for script in ("echo 2M > pool_limit", "echo 3 >> drop", "echo 0 | tee page_cache", "cat * */*"):
        # cat fails on drop and on the directory, and must get through the rest.
        status = os.system(f"cd {fs.control('')} && ({script}) > /dev/null 2>&1")
        assert (status == 0) == (not script.startswith("cat")), script
    assert fs.control("pool_limit").read_text() == f"{2 << 20}\n"
    assert fs.control("page_cache").read_text() == "0\n"
