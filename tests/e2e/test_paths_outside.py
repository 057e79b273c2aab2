"""Test that no path leads the daemon out of its source."""

import ctypes
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import as_user

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_a_directory_replaced_by_a_link_does_not_lead_outside(mount: Mounter, tmp_path: Path) -> None:
    """The daemon may read files that the user may not. It must follow no link for the user."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    fs = mount("-o", "allow_other,attr_timeout=0")
    for parent in (*fs.path.parents[:3], fs.source):
        parent.chmod(parent.stat().st_mode | 0o011)
    fs.source.chmod(0o777)
    for top, text in ((fs.source / "d", "inside"), (outside, "secret")):
        top.mkdir(exist_ok=True)
        for name in "abc":
            (top / name).write_text(text)
    (fs.source / "l").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            exchange(fs.source / "d", fs.source / "l")
            time.sleep(0.0002)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        code = (
            "import time\nseen = set(); begin = time.monotonic()\n"
            "while time.monotonic() < begin + (1 if 'inside' in seen else 15):\n"
            "    for name in ('d/a', 'l/b', 'd/c'):\n"
            "        try: seen.add(open(name).read())\n"
            "        except OSError: pass\n"
            "        try: seen.update(os.listdir('d'))\n"
            "        except OSError: pass\n"
            "        try: os.mkdir('d/new'); os.rmdir('d/new')\n"
            "        except OSError: pass\n"
            "print(sorted(seen))"
        )
        output = as_user(fs.path, code)
    finally:
        stop.set()
        swapper.join()
    assert "secret" not in output
    assert "inside" in output
    assert sorted(os.listdir(outside)) == ["a", "b", "c"]


def test_a_moved_source_is_followed_and_a_removed_one_is_empty(source: Path, mount: Mounter) -> None:
    (source / "f").write_text("content")
    fs = mount("--attr-timeout", "0")
    moved = source.with_name("moved")
    source.rename(moved)
    source.mkdir()
    (source / "f").write_text("another's")
    assert (fs.path / "f").read_text() == "content"
    (fs.path / "g").write_text("new")
    assert (moved / "g").read_text() == "new"
    shutil.rmtree(moved)
    assert os.listdir(fs.path) == []
    with pytest.raises(FileNotFoundError):
        (fs.path / "h").write_text("nowhere")
    assert os.listdir(source) == ["f"]


def test_links_out_of_the_source_are_resolved_by_the_kernel_only(place: Place) -> None:
    (place.source / "up").symlink_to("../../../../../../../../etc")
    (place.source / "absolute").symlink_to("/etc/hostname")
    assert os.readlink(place.path / "up") == "../../../../../../../../etc"
    assert os.readlink(place.path / "absolute") == "/etc/hostname"
    assert os.stat(place.path / "up").st_dev == os.stat("/etc").st_dev  # resolved by the kernel
    assert os.path.samefile(place.fs.path / "..", place.fs.path.parent)
