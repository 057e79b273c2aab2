"""Test the negotiation of FUSE_INIT, byte by byte."""

import errno
import struct

import pytest

from cleanfs.fuse.channel import Channel
from cleanfs.fuse.init_flags import WANTED, negotiate
from cleanfs.fuse.protocol import (
    FUSE_AUTO_INVAL_DATA,
    FUSE_DONT_MASK,
    FUSE_EXPLICIT_INVAL_DATA,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_OUT_HEADER,
    FUSE_PARALLEL_DIROPS,
    FUSE_SETXATTR_EXT,
)
from tests.harness.kernel import message

ALL = sum(WANTED)
OFFER = 0x73FFFFFB
REST = struct.pack("<HHIIHH8I", 12, 9, 1 << 20, 1, 256, 0, *range(8))


def request(flags: int = OFFER) -> bytes:
    return message(26, 2, FUSE_INIT_IN.pack(7, 45, 131072, flags) + bytes(48))


def reply(error: int = 0, major: int = 7, flags: int = 0x4050_8029) -> bytes:
    header = FUSE_OUT_HEADER.pack(80, error, 2)
    return header + FUSE_INIT_OUT.pack(major, 31, 131072, flags) + REST


def test_what_is_wanted_is_asked_for_if_it_is_on_offer() -> None:
    assert negotiate(request(), reply())[1] == ALL
    without = request(OFFER & ~FUSE_HANDLE_KILLPRIV_V2)
    assert negotiate(without, reply())[1] == ALL & ~FUSE_HANDLE_KILLPRIV_V2
    assert negotiate(request(flags=0), reply()) == (reply(), 0)
    assert negotiate(request()[:52], reply()) == (reply(), 0)


def test_only_the_wanted_bits_of_the_reply_change() -> None:
    changed, _ = negotiate(request(), reply())
    assert len(changed) == len(reply()) == 80
    differing = [i for i, (a, b) in enumerate(zip(reply(), changed, strict=True)) if a != b]
    assert differing == [28, 30, 31]
    assert changed[28] ^ reply()[28] == FUSE_DONT_MASK
    assert changed[30] ^ reply()[30] == FUSE_PARALLEL_DIROPS >> 16
    assert changed[31] ^ reply()[31] == (FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT) >> 24


@pytest.mark.parametrize("flags", [FUSE_AUTO_INVAL_DATA, 0])
def test_explicit_invalidation_replaces_automatic_invalidation(flags: int) -> None:
    explicit, added = negotiate(request(), reply(flags=flags), FUSE_EXPLICIT_INVAL_DATA)
    assert explicit == reply(flags=ALL | FUSE_EXPLICIT_INVAL_DATA)
    assert added == ALL | FUSE_EXPLICIT_INVAL_DATA
    assert negotiate(request(), reply(flags=flags))[0] == reply(flags=flags | ALL)
    old = request(OFFER & ~FUSE_EXPLICIT_INVAL_DATA)
    assert negotiate(old, reply(flags=flags), FUSE_EXPLICIT_INVAL_DATA)[0] == reply(flags=flags | ALL)


@pytest.mark.parametrize("other", [reply(error=-errno.EPROTO), reply(major=8), reply()[:24]])
def test_any_other_reply_is_left_alone(other: bytes) -> None:
    assert negotiate(request(), other) == (other, 0)


def test_what_is_in_force_is_reported() -> None:
    granted = list[int]()
    channel = Channel(0, FUSE_EXPLICIT_INVAL_DATA, granted.append)
    channel._init_reply(request(), reply())  # noqa: SLF001  # libfuse's reply comes this way
    channel._init_reply(request(OFFER & ~FUSE_EXPLICIT_INVAL_DATA), reply())  # noqa: SLF001  # the same
    assert granted == [ALL | FUSE_EXPLICIT_INVAL_DATA, ALL]
