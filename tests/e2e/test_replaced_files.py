"""Test that a name leads to the file that has it in the source."""

import os

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import wait_until
from tests.harness.source_content import QUICK, cached, expire, noise, same, shell

REPLACED = {
    "move over": "printf 'new text' > g; mv g f",
    "move a longer one over": "head -c 3000000 /dev/zero > g; mv g f",
    "remove and create again": "rm f; printf 'again' > f",
    "move away and create again": "mv f old; printf 'again' > f",
    "link over": "printf 'linked' > g; ln -f g f",
    "symbolic link over": "printf 'target' > g; rm f; ln -s g f",
}


@pytest.mark.parametrize("where", ["mount", "source"])
@pytest.mark.parametrize("change", REPLACED)
def test_a_replaced_file_is_seen_after_the_timeout(share: Mounter, change: str, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, REPLACED[change])
    if where == "source":
        expire()
    same(fs, "f")
    if change == "move away and create again":
        same(fs, "old")
    elif where == "mount":
        assert fs.stats()["flushes"] > flushes


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_cached_file_moved_over_another_replaces_it(share: Mounter, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "a", noise(1))
    cached(fs, "b", noise(2))
    shell(fs.path if where == "mount" else fs.source, "mv a b")
    if where == "source":
        expire()
    same(fs, "b")
    assert (fs.path / "b").read_bytes() == noise(1)
    assert not (fs.path / "a").exists()
    assert os.listdir(fs.path) == ["b"]


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_removed_file_is_missing(share: Mounter, where: str) -> None:
    fs = share(*QUICK)
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, "rm f")
    if where == "source":
        expire()
    else:
        assert fs.stats()["flushes"] > flushes
    assert not (fs.path / "f").exists()
    with pytest.raises(FileNotFoundError):
        (fs.path / "f").read_bytes()


def test_removing_a_file_frees_its_compressed_pages(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", bytes(range(256)) * 20_000)
    assert fs.stats()["backend_counters"]["eph_zpages"] > 500
    (fs.path / "f").unlink()
    stats = fs.stats()
    assert stats["backend_counters"]["eph_zpages"] == 0
    assert stats["pagecache_resident"] == 0


def test_with_coherency_none_no_name_is_compared_with_the_source(mount: Mounter) -> None:
    """No one changes it there, so an open makes no further calls."""
    new_reads = (
        "from cleanfs.source import namespace\n"
        "def identify(*_): raise AssertionError('new_reads')\n"
        "namespace.identify = identify\n"
    )
    fs = mount("--coherency", "none", patch=new_reads)
    (fs.path / "f").write_bytes(b"data")
    os.chmod(fs.path / "f", 0o600)
    os.truncate(fs.path / "f", 2)
    assert (fs.path / "f").read_bytes() == b"da"


def test_a_continuously_replaced_name_causes_no_errors(mount: Mounter) -> None:
    """Each time that the name is compared with the source, it has just been replaced there."""
    replaced = """
from cleanfs.source import namespace
new_reads = namespace.identify
def identify(parent, name):
    if name == b"f":
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=parent))
        os.rename("new", "f", src_dir_fd=parent, dst_dir_fd=parent)
    return new_reads(parent, name)
namespace.identify = identify
"""
    fs = mount(patch=replaced)
    (fs.source / "f").write_bytes(b"old")
    for _ in range(2):
        assert (fs.path / "f").read_bytes() == b""
        os.chmod(fs.path / "f", 0o600)
        os.truncate(fs.path / "f", 2)
        os.link(fs.path / "f", fs.path / "g")  # looks up two names
        os.unlink(fs.path / "g")


@pytest.mark.parametrize("call", ["stat", "list"])
def test_a_file_found_by_its_new_name_is_not_opened_by_the_old_one(mount: Mounter, call: str) -> None:
    """Log rotation does this: later lines belong into a new file."""
    fs = mount("--attr-timeout", "60")
    (fs.source / "log").write_bytes(b"old")
    os.stat(fs.path / "log")
    os.rename(fs.source / "log", fs.source / "log.1")
    if call == "stat":
        os.stat(fs.path / "log.1")
    else:
        with os.scandir(fs.path) as entries:
            assert [entry.stat().st_size for entry in entries] == [3]
    wait_until(lambda: not (fs.path / "log").exists(), 5)
    with (fs.path / "log").open("ab") as log:
        log.write(b"new")
    assert (fs.source / "log.1").read_bytes() == b"old"
    assert (fs.source / "log").read_bytes() == b"new"
