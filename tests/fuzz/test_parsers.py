"""Test that a parser turns any input into a correct value or one well-defined error."""

import os
import re
import struct
import sys
from fractions import Fraction
from typing import Any
from uuid import UUID

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cleanfs.backends import codec
from cleanfs.cli.params import (
    BackendType,
    CompressionType,
    Microseconds,
    PageSizeType,
    PathType,
    Seconds,
    SizeType,
)
from cleanfs.fuse.init_flags import WANTED, negotiate
from cleanfs.fuse.protocol import FUSE_INIT_OUT, FUSE_OUT_HEADER
from cleanfs.linux.mounts import MountPoint, parse_mountinfo
from cleanfs.mount.libfuse import option_text
from cleanfs.printable import printable
from cleanfs.sizes import MAX_SIZE, parse_size
from tests.harness.fuzzing import ARGUMENTS, NUMBERS, SIZES, UNITS, examples

POWERS = {unit: 1024**power for power, unit in enumerate("BKMGTPE")}


def size_of(text: str) -> int | None:
    """Parse a size with a one-letter unit, without floats."""
    found = re.fullmatch(r"[ \t\r\n]*([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([A-Za-z]?)[ \t\r\n]*", text)
    if (
        not found
        or found[2].upper() not in (*POWERS, "")
        or found[2] == "b"
        or found[0].strip().isspace()
    ):
        return None
    if not found[2] and not found[1].isdecimal():
        return None
    if not found[2] and " " in found[0].strip(" \t\r\n"):
        return None
    if len(found[1]) > sys.get_int_max_str_digits():
        return None  # Python refuses to parse it
    bytes_ = Fraction(found[1]) * POWERS[found[2].upper() or "B"]
    return int(bytes_) if bytes_ <= MAX_SIZE and (not bytes_ or bytes_ >= 1) else None


@given(SIZES)
@examples(400)
@example("\u0663")
@example("\uff11\uff12")
@example("1_000")
@example("+5")
@example("-0")
@example("1e5")
@example("0.5")
@example(".0001K")
@example("\x1c5")
@example("5\nK")
def test_a_size_is_parsed_exactly_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError as exc:
        assert repr(text) in str(exc)  # noqa: PT017  # other texts are sizes
        assert size_of(text) is None
        return
    assert 0 <= size <= MAX_SIZE
    assert text.isascii()
    assert re.match(r"[ \t\r\n]*[0-9.]", text)
    if (exact := size_of(text)) is not None:
        assert size == pytest.approx(exact, rel=1e-15, abs=1)
    assert size or not re.search("[1-9]", text)


SPECS = st.one_of(
    st.builds(
        "{}{}{}{}{}".format,
        st.sampled_from(("lz4", "lz4hc", "zstd", "none", "LZ4", "", "lz4 ", "\uff4cz4")),
        st.sampled_from(("", ":", "::", "=")),
        NUMBERS,
        st.sampled_from(("", "+", "+dict", "+dict+dict", "+DICT", "-dict")),
        UNITS,
    ),
    st.text(max_size=20),
)


@given(SPECS)
@examples(300)
def test_a_compression_is_parsed_or_refused(spec: str) -> None:
    try:
        parsed = codec.parse(spec)
    except ValueError:
        return
    assert spec.isascii()
    assert parsed.level in codec.LEVELS[parsed.method]
    base = f"{parsed.method}:{parsed.level}"
    levels = (base, parsed.method, *(() if ":" not in spec else (spec.partition("+")[0],)))
    assert spec in {f"{level}{'+dict' * parsed.dictionary}" for level in levels}


TYPES: dict[str, click.ParamType[Any]] = {
    "size": SizeType(4096),
    "size or zero": SizeType(4096, zero=True),
    "page size": PageSizeType(4096),
    "seconds": Seconds(0.05, 86400),
    "microseconds": Microseconds(0, 10_000),
    "backend": BackendType(),
    "compression": CompressionType(),
    "path": PathType(),
    "uuid": click.UUID,
}


@pytest.mark.parametrize("name", TYPES)
@given(
    text=st.one_of(SIZES, SPECS, ARGUMENTS, st.sampled_from(("zcache", "none", "{" + "0" * 32 + "}")))
)
@examples(60)
@example(text="")
@example(text="nan")
def test_an_option_is_in_its_range_or_a_bad_parameter(name: str, text: str) -> None:
    try:
        value = TYPES[name].convert(text, None, None)
    except click.BadParameter:
        return
    if name in ("size", "page size"):
        assert 4096 <= value <= MAX_SIZE
    elif name == "size or zero":
        assert value == 0 or 4096 <= value <= MAX_SIZE
    elif name == "seconds":
        assert 0.05 <= value <= 86400
    elif name == "microseconds":
        assert 0 <= value <= 10_000
    elif name == "uuid":
        assert isinstance(value, UUID)
    else:
        assert value == text != ""


# -- mountinfo ---------------------------------------------------------------------------------------

# Characters of a path, a type or a source, with some that the kernel escapes and some that it does not.
WORDS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4), st.sampled_from((b" ", b"\n", b"\r", b"\\", b"#", b" - "))
    ),
    max_size=5,
).map(lambda parts: b"".join(parts).replace(b"\0", b""))


def mangled(text: bytes) -> bytes:
    """Escape a text as the kernel does (fs/proc_namespace.c, mangle)."""
    return re.sub(rb"[ \t\n\\#]", lambda match: b"\\%03o" % match[0][0], text)


LINES = st.lists(
    st.tuples(
        st.integers(0, (1 << 12) - 1),
        st.integers(0, (1 << 20) - 1),
        WORDS.map(lambda path: b"/" + path),
        st.from_regex(rb"[a-z0-9]+(\.[a-z0-9]+)?", fullmatch=True),
        WORDS,
        st.sampled_from((b"", b"shared:1 ", b"master:2 propagate_from:3 ")),
        st.integers(0, (1 << 32) - 2),
    ),
    max_size=4,
)


@given(LINES)
@examples(100)
@example([(0, 40, b"/a\rb", b"tmpfs", b"none", b"", 0)])
@example([(0, 40, b"/\x85\xe2\x80\xa8\x1c", b"tmpfs", b"", b"", 1000)])
def test_mountinfo_is_parsed_as_the_kernel_writes_it(
    lines: list[tuple[int, int, bytes, bytes, bytes, bytes, int]],
) -> None:
    content = b"".join(
        b"36 35 %d:%d / %s rw,noatime %s- %s %s rw,user_id=%d,group_id=7\n"
        % (major, minor, mangled(path), tags, fs_type, mangled(source), owner)
        for major, minor, path, fs_type, source, tags, owner in lines
    )
    assert parse_mountinfo(content) == [
        MountPoint(
            os.makedev(major, minor),
            os.fsdecode(path),
            fs_type.decode(),
            os.fsdecode(source),
            "rw,noatime",
            f"rw,user_id={owner},group_id=7",
        )
        for major, minor, path, fs_type, source, _, owner in lines
    ]


@given(ARGUMENTS)
@examples(100)
def test_a_path_becomes_a_single_fuse_option(path: str) -> None:
    text = option_text(path)
    assert text.isascii()
    # libfuse takes the character after a backslash literally; a comma ends the option.
    read, rest = "", iter(text)
    for char in rest:
        assert char != ","
        read += next(rest) if char == "\\" else char
    assert read == path.encode("ascii", "backslashreplace").decode()


# -- FUSE_INIT ----------------------------------------------------------------------------------------


@given(
    st.binary(max_size=120),
    st.binary(max_size=100),
    st.one_of(st.none(), st.tuples(st.integers(-200, 5), st.sampled_from((6, 7, 8, 1 << 31)))),
)
@examples(100)
def test_a_reply_to_init_keeps_all_but_the_wanted_bits(
    request: bytes, reply: bytes, head: tuple[int, int] | None
) -> None:
    if head is not None:
        error, major = head
        reply = struct.pack("<IiQI", 20 + len(reply), error, 2, major) + reply
    changed, added = negotiate(request, reply)
    wanted = sum(WANTED)
    assert not added & ~wanted
    assert len(changed) == len(reply)
    bits = int.from_bytes(changed, "little") ^ int.from_bytes(reply, "little")
    assert not bits & ~(added << 8 * (FUSE_OUT_HEADER.size + FUSE_INIT_OUT.size - 4))


# -- text for a terminal ------------------------------------------------------------------------------


@given(
    st.one_of(ARGUMENTS, st.text(st.characters(categories=("Cc", "Cf", "Zl", "Zp", "Cs")), max_size=9))
)
@examples(200)
@example("\x1b[2J\x9b31m\r\n\u202e\u2028")
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text
