"""Test the edits to FUSE_INIT, byte by byte."""

import errno
import struct

from cleanfs.fuse.init_flags import WANTED, offered, with_flags
from cleanfs.fuse.protocol import (
    FUSE_AUTO_INVAL_DATA,
    FUSE_DONT_MASK,
    FUSE_EXPLICIT_INVAL_DATA,
    FUSE_HANDLE_KILLPRIV_V2,
    FUSE_IN_HEADER,
    FUSE_INIT_IN,
    FUSE_INIT_OUT,
    FUSE_OUT_HEADER,
    FUSE_PARALLEL_DIROPS,
)

REST = struct.pack("<HHIIHH8I", 12, 9, 1 << 20, 1, 256, 0, *range(8))


def request(opcode: int = 26, flags: int = 0x73FFFFFB) -> bytes:
    header = FUSE_IN_HEADER.pack(104, opcode, 2, 0, 0, 0, 0, 0, 0)
    return header + FUSE_INIT_IN.pack(7, 45, 131072, flags) + bytes(48)


def reply(error: int = 0, major: int = 7, length: int = 80, flags: int = 0x4050_8029) -> bytes:
    header = FUSE_OUT_HEADER.pack(length, error, 2)
    return header + FUSE_INIT_OUT.pack(major, 31, 131072, flags) + REST


def test_the_offered_flags_are_found() -> None:
    assert offered(request()) & WANTED == WANTED
    without = request(flags=0x73FFFFFB & ~FUSE_HANDLE_KILLPRIV_V2)
    assert offered(without) & WANTED == WANTED & ~FUSE_HANDLE_KILLPRIV_V2
    assert offered(request(opcode=1)) == 0
    assert offered(request()[:40]) == 0


def test_only_the_wanted_bits_of_the_reply_change() -> None:
    changed = with_flags(reply(), WANTED)
    assert changed is not None
    assert len(changed) == len(reply()) == 80
    differing = [i for i, (a, b) in enumerate(zip(reply(), changed, strict=True)) if a != b]
    assert differing == [28, 30, 31]
    assert changed[28] ^ reply()[28] == FUSE_DONT_MASK
    assert changed[30] ^ reply()[30] == FUSE_PARALLEL_DIROPS >> 16
    assert changed[31] ^ reply()[31] == FUSE_HANDLE_KILLPRIV_V2 >> 24


def test_explicit_invalidation_replaces_automatic_invalidation() -> None:
    for flags in (FUSE_AUTO_INVAL_DATA, 0):
        explicit = with_flags(reply(flags=flags), FUSE_EXPLICIT_INVAL_DATA)
        assert explicit == reply(flags=FUSE_EXPLICIT_INVAL_DATA)
        assert with_flags(reply(flags=flags), FUSE_DONT_MASK) == reply(flags=flags | FUSE_DONT_MASK)


def test_any_other_reply_is_left_alone() -> None:
    assert with_flags(reply(error=-errno.EPROTO), WANTED) is None
    assert with_flags(reply(major=8), WANTED) is None
    assert with_flags(reply(length=24), WANTED) is None
    assert with_flags(reply()[:24], WANTED) is None
