"""Test that writes to the control files take effect at once, or are refused."""

import os

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.control_files import SIZE, fill, refused, settled_stats
from tests.harness.mounting import wait_until


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
