"""Test mount(8) and fstab: the options that they pass to the helper, and their effect."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.mount8 import Mount8, Namespace, namespace
from tests.harness.mounting import mount_line, wait_until


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """Provide a namespace with the helper in /sbin."""
    with namespace(tmp_path_factory.mktemp("mount8")) as space:
        yield space


@pytest.fixture
def here(space: Namespace) -> Iterator[Mount8]:
    """Make a place in the namespace for each test."""
    with space.place() as place:
        yield place


DEFAULT = {"nosuid", "nodev", "relatime"}

# The options of a user; those that mount(8) passes on; those that the kernel then shows, or hides.
GENERIC = {
    "none": ("defaults", "rw", {"rw", *DEFAULT}, {"noexec"}),
    "access times": (
        "nodiratime,strictatime,norelatime",
        "rw,nodiratime,strictatime",
        {"nodiratime", "nosuid"},
        {"relatime", "noatime"},
    ),
    "noatime": (
        "noatime,diratime,nostrictatime",
        "rw,noatime",
        {"noatime"},
        {"relatime", "nodiratime"},
    ),
    "flags": (
        "noexec,nosymfollow,lazytime,sync,dirsync,relatime",
        "rw,noexec,nosymfollow,sync,dirsync,relatime,lazytime",
        {"noexec", "nosymfollow", "lazytime", "sync", "dirsync", *DEFAULT},
        set(),
    ),
    "without effect": (
        "silent,user_xattr,iversion,nofail,_netdev,group,nouser,comment=a,x-systemd.automount,X-c.d=e",
        "rw,nosuid,nodev,silent,iversion,user_xattr,nofail,_netdev",
        {"rw", *DEFAULT},
        {"iversion"},
    ),
    "suid and dev": ("suid,dev", "rw", DEFAULT, set()),
    "exec again": ("users,exec", "rw,nosuid,nodev,users,exec", DEFAULT, {"noexec"}),
    "of libfuse": (
        "fsname=somewhere,subtype=cleanfs,nonempty,default_permissions,auto_unmount,allow_other,ro",
        "ro,fsname=somewhere,subtype=cleanfs,nonempty,default_permissions,auto_unmount,allow_other",
        {"ro", "allow_other", "default_permissions"},
        {"rw"},
    ),
    "of cleanfs": (
        "pool_limit=32M,page_cache=1M,allow_suid,allow_dev",
        "rw,pool_limit=32M,page_cache=1M,allow_suid,allow_dev",
        {"rw", "relatime"},
        {"nosuid", "nodev"},
    ),
}


NEWER = {"norelatime", "nostrictatime", "diratime", "nouser", "suid", "dev"}
"""Names of defaults: mount(8) keeps them up to util-linux 2.38 and passes them on in 2.41."""


@pytest.mark.parametrize("name", GENERIC)
def test_all_options_of_mount_are_accepted(here: Mount8, name: str) -> None:
    options, passed_on, shown, not_shown = GENERIC[name]
    (here.source / "f").write_text("text")
    here.mounts(options)
    program, source, mountpoint, minus_o, words = here.helper_call
    assert (program, minus_o) == ("/sbin/mount.cleanfs", "-o")
    assert (source, mountpoint) == (str(here.source), str(here.mountpoint))
    more = set(words.split(",")) - set(passed_on.split(","))
    assert set(passed_on.split(",")) <= set(words.split(","))
    assert more <= NEWER & set(options.split(","))
    assert shown - {f"no{word}" for word in more} <= here.options()
    assert not not_shown & here.options()
    assert (here.path / "f").read_text() == "text"


def test_an_fstab_line_with_options_of_systemd(here: Mount8) -> None:
    options = (
        "pool_limit=32M,noatime,nofail,_netdev,noauto,x-systemd.requires-mounts-for=/,x-gvfs-show,"
        "allow_suid"
    )
    here.fstab.write_text(f"{here.source} {here.mountpoint} cleanfs {options} 0 0\n")
    done = here.mount(here.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert "x-" not in here.helper_call[4]
    assert {"noatime", "nodev"} <= here.options()
    assert "nosuid" not in here.options()
    assert here.control("pool_limit").read_text() == f"{32 << 20}\n"


def test_both_types_call_the_helper(here: Mount8) -> None:
    here.fstab.write_text(f"{here.source} {here.mountpoint} fuse.cleanfs ro 0 0\n")
    done = here.mount(here.mountpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert here.helper_call[0] == "/sbin/mount.fuse.cleanfs"
    assert {"nosuid", "nodev", "ro"} <= here.options()


def test_an_option_that_cannot_be_honoured_is_refused_with_a_reason(here: Mount8) -> None:
    done = here.mount("-t", "cleanfs", "-o", "noatime,uid=0", here.source, here.mountpoint)
    assert done.returncode == 2
    assert done.stderr == "cleanfs: mount option 'uid' is refused: owners and modes are the source's\n"


def test_a_killed_daemon_is_unmounted_with_auto_unmount(here: Mount8) -> None:
    here.mounts("auto_unmount")
    os.kill(json.loads(here.control("stats.json").read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: mount_line(here.mountpoint, Path(f"/proc/{here.pid}")) is None)


# -- remount ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fstab", [False, True], ids=["mountinfo", "fstab"])
def test_ro_and_rw_by_a_remount(here: Mount8, fstab: bool) -> None:
    """mount(8) merges the options of fstab, or otherwise those of mountinfo."""
    (here.source / "f").write_text("text")
    options = "pool_limit=32M,page_cache=1M,page_size=16K,compression=lz4hc:4,coherency=watch,noexec"
    here.mounts(options)
    if fstab:
        line = f"{here.source} {here.mountpoint} cleanfs {options},nofail,x-systemd.after=x.mount 0 0\n"
        here.fstab.write_text(line)
    before = here.options()
    here.remounts("ro")
    assert here.helper_call[0] == ("/sbin/mount.cleanfs" if fstab else "/sbin/mount.fuse.cleanfs")
    assert "remount" in here.helper_call[4].split(",")
    assert ("page_size=16K" if fstab else "relatime") in here.helper_call[4].split(",")
    assert here.options() == before - {"rw"} | {"ro"}
    for change in (lambda: (here.path / "f").write_text("x"), (here.path / "d").mkdir):
        with pytest.raises(OSError, match="Read-only"):
            change()
    with pytest.raises(OSError, match="Read-only"):
        here.control("pool_limit").write_text("64M")
    assert (here.path / "f").read_text() == "text"
    here.remounts("rw")
    assert here.options() == before
    (here.path / "f").write_text("changed")
    assert (here.source / "f").read_text() == "changed"
    here.control("pool_limit").write_text("64M")


def test_a_read_only_remount_is_refused_while_a_file_is_open_for_writing(here: Mount8) -> None:
    here.mounts("pool_limit=32M")
    with (here.path / "f").open("w") as file:
        assert "busy" in here.refuses("ro,pool_limit=64M")
        assert here.control("pool_limit").read_text() == f"{32 << 20}\n"
        file.write("text")
    assert (here.source / "f").read_text() == "text"
    here.remounts("ro")
    assert "ro" in here.options()


def test_options_with_a_control_file_can_be_changed(here: Mount8) -> None:
    here.mounts("pool_limit=32M,page_cache=1M")
    here.remounts("pool_limit=64M,page_cache=2M,log_level=debug,backend=zcache")
    assert here.control("pool_limit").read_text() == f"{64 << 20}\n"
    assert here.control("page_cache").read_text() == f"{2 << 20}\n"
    assert here.control("log_level").read_text() == "debug\n"
    here.remounts("ro,pool_limit=48M")
    assert here.control("pool_limit").read_text() == f"{48 << 20}\n"
    assert "cannot change pool_limit of a read-only mount" in here.refuses("ro,pool_limit=64M")
    here.remounts("ro,pool_limit=48M")  # unchanged
    here.remounts("rw,pool_limit=64M,backend=none")
    options = json.loads(here.control("options.json").read_text())
    assert (options["pool_limit"], options["backend"]) == (64 << 20, "none")


def test_all_other_options_are_refused_by_name(here: Mount8) -> None:
    here.mounts("pool_limit=32M,log_level=info")
    complaint = here.refuses("page_size=16K,compression=zstd,pool_limit=64M,log_level=info")
    assert "cannot change page_size, compression while mounted: unmount first" in complaint
    assert here.control("pool_limit").read_text() == f"{32 << 20}\n"
    assert "allow_other" in here.refuses("allow_other")
    assert "fsname" in here.refuses("fsname=x")
    assert "auto_unmount" in here.refuses("auto_unmount")
    assert "user_id" in here.refuses("user_id=7")
    other = here.mount("-t", "cleanfs", "-o", "remount,ro", "/proc", here.mountpoint)
    assert "cannot change the source" in other.stderr


def test_flags_of_the_mount_change(here: Mount8) -> None:
    here.mounts("noatime")
    here.remounts("noexec,nosymfollow,sync,nodiratime")
    assert {"noexec", "nosymfollow", "sync", "nodiratime", "noatime", "nosuid"} <= here.options()
    here.remounts("exec,symfollow,async,relatime")
    assert not {"noexec", "nosymfollow", "sync", "noatime"} & here.options()
    assert {"nosuid", "nodev", "relatime"} <= here.options()


def test_nosuid_and_nodev_change_only_by_an_explicit_option(here: Mount8) -> None:
    here.mounts()
    here.remounts("suid,dev")
    if "suid" in here.helper_call[4].split(","):  # util-linux 2.41
        assert not {"nosuid", "nodev"} & here.options()
        here.remounts("nosuid,nodev")
    assert {"nosuid", "nodev"} <= here.options()
    here.remounts("allow_suid")
    assert "nosuid" not in here.options()
    assert "nodev" in here.options()
    here.remounts("ro")
    assert "nosuid" not in here.options()
    here.remounts("nosuid")
    assert {"nosuid", "nodev", "ro"} <= here.options()


def test_a_remount_of_another_directory_is_refused(here: Mount8) -> None:
    done = here.run("/sbin/mount.cleanfs", here.source, here.mountpoint, "-o", "remount,ro")
    assert done.returncode == 1
    assert done.stderr.startswith(f"cleanfs: {here.mountpoint} is not a cleanfs mount point")
