"""The messages of the first exchange, byte by byte."""

import errno
import struct

from cleanfs.fuse.init_flags import (
    ANSWER,
    AUTO_INVAL_DATA,
    DONT_MASK,
    EXPLICIT_INVAL_DATA,
    HANDLE_KILLPRIV_V2,
    PARALLEL_DIROPS,
    QUESTION,
    WANTED,
    offered,
    with_flags,
)

REST = struct.pack("<HHIIHH8I", 12, 9, 1 << 20, 1, 256, 0, *range(8))


def question(opcode: int = 26, flags: int = 0x73FFFFFB) -> bytes:
    return QUESTION.pack(104, opcode, 2, 0, 0, 0, 0, 0, 7, 45, 131072, flags) + bytes(48)


def answer(error: int = 0, major: int = 7, length: int = 80, flags: int = 0x4050_8029) -> bytes:
    return ANSWER.pack(length, error, 2, major, 31, 131072, flags) + REST


def test_the_kernels_offer_is_found() -> None:
    assert offered(question()) & WANTED == WANTED
    without = question(flags=0x73FFFFFB & ~HANDLE_KILLPRIV_V2)
    assert offered(without) & WANTED == WANTED & ~HANDLE_KILLPRIV_V2
    assert offered(question(opcode=1)) == 0
    assert offered(question()[:40]) == 0


def test_only_those_bits_of_the_answer_change() -> None:
    changed = with_flags(answer(), WANTED)
    assert changed is not None
    assert len(changed) == len(answer()) == 80
    differing = [i for i, (a, b) in enumerate(zip(answer(), changed, strict=True)) if a != b]
    assert differing == [28, 30, 31]
    assert changed[28] ^ answer()[28] == DONT_MASK
    assert changed[30] ^ answer()[30] == PARALLEL_DIROPS >> 16
    assert changed[31] ^ answer()[31] == HANDLE_KILLPRIV_V2 >> 24


def test_pages_are_not_dropped_by_mtime_where_they_are_when_told_to() -> None:
    for flags in (AUTO_INVAL_DATA, 0):
        explicit = with_flags(answer(flags=flags), EXPLICIT_INVAL_DATA)
        assert explicit == answer(flags=EXPLICIT_INVAL_DATA)
        assert with_flags(answer(flags=flags), DONT_MASK) == answer(flags=flags | DONT_MASK)


def test_any_other_answer_is_left_alone() -> None:
    assert with_flags(answer(error=-errno.EPROTO), WANTED) is None
    assert with_flags(answer(major=8), WANTED) is None
    assert with_flags(answer(length=24), WANTED) is None
    assert with_flags(answer()[:24], WANTED) is None
