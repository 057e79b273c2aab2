"""Test the options of ``-o``, and the flags of a mount that they change."""

import pytest

from cleanfs.linux.mounts import MountPoint
from cleanfs.mount.flags import (
    DIRSYNC,
    NOATIME,
    NODEV,
    NODIRATIME,
    NOEXEC,
    NOSUID,
    NOSYMFOLLOW,
    RDONLY,
    RELATIME,
    STRICTATIME,
    flags_of,
    remounted,
    with_names,
)
from cleanfs.mount.options import REFUSED, WITHOUT_MEANING, is_remount, parse

DEFAULT = NOSUID | NODEV | RELATIME


def point(options: str, super_options: str = "rw") -> MountPoint:
    return MountPoint(1, "/mnt", "fuse.cleanfs", "/src", options, super_options)


def test_options_are_sorted_by_kind() -> None:
    text = 'rw,noatime,pool_limit=1G,x-a=b,context="a:b,c",checksum,fsname=x,X-y,_netdev,allow_suid'
    options = parse([text, "ro"])
    assert not options.remount
    assert options.flags == ("noatime", "suid", "ro")
    assert options.for_kernel == ('context="a:b,c"', "fsname=x")
    assert options.ours == (("pool_limit", "1G"), ("checksum", None))


@pytest.mark.parametrize("word", sorted(WITHOUT_MEANING))
def test_ignored_options_have_no_effect(word: str) -> None:
    for text in (word, f"{word}=x"):
        options = parse([text])
        assert (options.flags, options.for_kernel, options.ours) == ((), (), ())


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_refused_options_give_a_reason(word: str) -> None:
    for text in (word, f"{word}=1"):
        with pytest.raises(ValueError, match=rf"'{word}' is refused: \w+"):
            parse(["rw", text])


def test_the_subtype_is_always_cleanfs() -> None:
    assert parse(["subtype=cleanfs"]).ours == ()
    for text in ("subtype=x", "subtype"):
        with pytest.raises(ValueError, match="always"):
            parse([text])


def test_a_remount_may_repeat_unchanged_options() -> None:
    words = ["ro,remount,user_id=0,allow_other,page_size=4096"]
    assert is_remount(words)
    assert not is_remount(["x-remount,remounts,remount=1"])
    options = parse(words, ["rw", "user_id=0", "group_id=0", "allow_other"])
    assert options.remount
    assert (options.flags, options.ours) == (("ro",), (("page_size", "4096"),))
    with pytest.raises(ValueError, match="user_id"):
        parse(["remount,user_id=1"], ["user_id=0"])


@pytest.mark.parametrize(
    ("options", "super_options", "flags"),
    [
        ("rw,nosuid,nodev,relatime", "rw,user_id=0", DEFAULT),
        ("rw,nosuid,nodev,relatime", "ro,user_id=0", DEFAULT | RDONLY),
        (
            "ro,nodiratime,nosymfollow",
            "rw,dirsync",
            RDONLY | NODIRATIME | NOSYMFOLLOW | DIRSYNC | STRICTATIME,
        ),
        ("rw,noexec,noatime", "rw", NOEXEC | NOATIME),
    ],
)
def test_flags_come_from_mountinfo_without_strictatime(
    options: str, super_options: str, flags: int
) -> None:
    assert flags_of(point(options, super_options)) == flags


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("noatime", DEFAULT & ~RELATIME | NOATIME),
        ("noatime,strictatime", DEFAULT & ~RELATIME | STRICTATIME),
        ("suid", DEFAULT & ~NOSUID),
        ("ro,rw,ro", DEFAULT | RDONLY),
        ("noexec,exec", DEFAULT),
    ],
)
def test_names_change_flags(words: str, flags: int) -> None:
    assert with_names(DEFAULT, words.split(",")) == flags


def test_a_remount_clears_unnamed_flags_except_nosuid_and_nodev() -> None:
    before = DEFAULT | NOEXEC | RDONLY
    assert remounted(before, ["rw"]) == DEFAULT
    assert remounted(before, ["ro", "noexec", "relatime"]) == before
    assert remounted(before, ["suid"]) == NODEV | RELATIME
    assert remounted(RELATIME, ["rw"]) == RELATIME
