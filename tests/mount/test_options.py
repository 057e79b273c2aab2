"""The words of ``-o``, and what they make of a mount's flags."""

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
    with_words,
)
from cleanfs.mount.options import REFUSED, WITHOUT_MEANING, asks_for_remount, parse

DEFAULT = NOSUID | NODEV | RELATIME


def point(options: str, super_options: str = "rw") -> MountPoint:
    return MountPoint(1, "/mnt", "fuse.cleanfs", "/src", options, super_options)


def test_each_word_goes_where_it_belongs() -> None:
    text = 'rw,noatime,pool_limit=1G,x-a=b,context="a:b,c",checksum,fsname=x,X-y,_netdev,allow_suid'
    options = parse([text, "ro"])
    assert not options.remount
    assert options.flags == ("noatime", "suid", "ro")
    assert options.for_kernel == ('context="a:b,c"', "fsname=x")
    assert options.ours == (("pool_limit", "1G"), ("checksum", None))


@pytest.mark.parametrize("word", sorted(WITHOUT_MEANING))
def test_what_has_no_meaning_leaves_nothing(word: str) -> None:
    for text in (word, f"{word}=x"):
        options = parse([text])
        assert (options.flags, options.for_kernel, options.ours) == ((), (), ())


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_what_can_not_be_honoured_has_a_reason(word: str) -> None:
    for text in (word, f"{word}=1"):
        with pytest.raises(ValueError, match=rf"'{word}' can not be had: \w+"):
            parse(["rw", text])


def test_the_type_is_always_ours() -> None:
    assert parse(["subtype=cleanfs"]).ours == ()
    for text in ("subtype=x", "subtype"):
        with pytest.raises(ValueError, match="always"):
            parse([text])


def test_a_remount_may_name_what_is_already_so() -> None:
    words = ["ro,remount,user_id=0,allow_other,page_size=4096"]
    assert asks_for_remount(words)
    assert not asks_for_remount(["x-remount,remounts,remount=1"])
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
def test_mountinfo_shows_all_flags_but_one(options: str, super_options: str, flags: int) -> None:
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
def test_words_change_flags(words: str, flags: int) -> None:
    assert with_words(DEFAULT, words.split(",")) == flags


def test_a_remount_takes_away_what_is_not_named_but_for_nosuid_and_nodev() -> None:
    before = DEFAULT | NOEXEC | RDONLY
    assert remounted(before, ["rw"]) == DEFAULT
    assert remounted(before, ["ro", "noexec", "relatime"]) == before
    assert remounted(before, ["suid"]) == NODEV | RELATIME
    assert remounted(RELATIME, ["rw"]) == RELATIME
