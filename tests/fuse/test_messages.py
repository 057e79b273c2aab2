"""Test the native channel with raw messages: recorded ones, cut ones, and any bytes."""

import contextlib
import errno
import struct
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cleanfs.fuse.protocol import FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_IN_HEADER, FUSE_INTERRUPT
from cleanfs.fuse.session import native
from tests.harness.fuzzing import examples
from tests.harness.kernel import Device, message

pytestmark = pytest.mark.skipif(native is None, reason="the native module was not built")

NOTIFY_REPLY, WRITE, READ, OPEN, SETATTR, CREATE, IOCTL, OPENDIR = 41, 16, 15, 14, 4, 35, 39, 27
NO_REPLY: Final = (FUSE_FORGET, FUSE_INTERRUPT, NOTIFY_REPLY, FUSE_BATCH_FORGET)

SIZES: Final = {
    2: 8, 3: 16, 4: 88, 8: 16, 9: 8, 12: 8, 13: 8, 14: 8, 15: 40, 16: 40, 18: 24, 20: 16, 21: 8, 22: 8,
    23: 8, 25: 24, 26: 16, 27: 8, 28: 40, 29: 24, 30: 16, 31: 48, 32: 48, 33: 48, 34: 8, 35: 16, 36: 8,
    37: 16, 39: 32, 40: 24, 41: 40, 42: 8, 43: 32, 44: 40, 45: 16, 46: 24, 47: 56, 48: 40, 49: 4, 50: 8,
    51: 16, 52: 24, 53: 56,
}  # fmt: skip
"""The size of the struct that the body of each opcode begins with (linux/fuse.h)."""

NAMES: Final = {
    1: 1,
    6: 2,
    8: 1,
    9: 1,
    10: 1,
    11: 1,
    12: 2,
    13: 1,
    21: 1,
    22: 1,
    24: 1,
    35: 1,
    45: 2,
    51: 1,
}
"""How many names follow the struct."""

RECORDED: Final = {
    "LOOKUP": (1, b"name\0"),
    "SYMLINK": (6, b"link\0target\0"),
    "RENAME2": (45, struct.pack("=QII", 1, 1, 0) + b"old\0new\0"),
    "CREATE": (35, struct.pack("=IIII", 0o102101, 0o100644, 0o22, 0) + b"new\0"),
    "SETXATTR": (21, struct.pack("=II", 5, 0) + b"user.x\0value"),
    "WRITE": (16, struct.pack("=QQIIQII", 1, 4096, 5, 0, 0, 0o102001, 0) + b"hello"),
    "IOCTL": (39, struct.pack("=QIIQII", 1, 0, 0x40086602, 0, 8, 0)),
    "BATCH_FORGET": (42, struct.pack("=II", 2, 0) + struct.pack("=QQ", 5, 1) * 2),
    "READDIRPLUS": (44, struct.pack("=QQIIQII", 1, 0, 4096, 0, 0, 0, 0)),
    "INIT": (26, struct.pack("=IIII", 7, 45, 131072, 0x73FFFFFB) + bytes(48)),
}


@contextlib.contextmanager
def channel() -> Iterator[tuple[Device, Any]]:
    assert native is not None
    device = Device()
    try:
        yield device, native.Channel(device.fd, -1, 0, lambda _, reply: reply, lambda _: None)
    finally:
        device.close()


def fate(raw: bytes) -> Any:  # noqa: ANN401  # a native object, or errors
    """Return the request, if the channel passes it on; else the errors of its replies."""
    with channel() as (device, receiver):
        device.kernel.send(raw)
        request = receiver.receive(0)
        errors = [error for _, error, _ in device.replies()]
        assert request is None or not errors
        assert len(receiver) == (request is not None and request.opcode not in NO_REPLY)
        if request is None:
            return errors
        assert receiver.body() == raw[FUSE_IN_HEADER.size :]
        return request


def complete_body(opcode: int) -> bytes:
    return bytes(SIZES.get(opcode, 0)) + b"n\0" * NAMES.get(opcode, 0)


@pytest.mark.parametrize("opcode", range(1, 60))
def test_a_body_shorter_than_its_struct_or_names_never_reaches_libfuse(opcode: int) -> None:
    body = complete_body(opcode)
    if opcode == IOCTL:
        body = struct.pack("=QIIQII", 1, 0, 0x80086601, 0, 0, 4)  # one that has a handler
    assert fate(message(opcode, 2, body)).opcode == opcode
    assert fate(message(opcode, 2, body + b"more")).opcode == opcode
    for end in range(len(body)):
        assert fate(message(opcode, 2, body[:end])) == ([] if opcode in NO_REPLY else [-errno.EIO])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_messages_are_passed_on_and_cut_ones_are_not(name: str) -> None:
    opcode, body = RECORDED[name]
    if name == "IOCTL":
        assert fate(message(opcode, 2, body)) == [-errno.EIO], "its input does not follow"
        body += bytes(8)
    request = fate(message(opcode, 2, body))
    assert (request.unique, request.opcode, request.nodeid) == (2, opcode, 1)
    for end in range(0 if name in ("READDIRPLUS", "INIT") else len(body) - 1, len(body)):
        cut = message(opcode, 2, body[:end])
        if name != "INIT" or end < 16:
            assert fate(cut) == ([] if opcode in NO_REPLY else [-errno.EIO])


def test_flags_of_init_that_were_announced_must_follow() -> None:
    extended = struct.pack("=IIII", 7, 45, 131072, 1 << 30)
    assert fate(message(26, 2, extended)) == [-errno.EIO]
    assert fate(message(26, 2, extended + bytes(48))).opcode == 26


def test_an_ioctl_that_no_handler_knows_gets_enotty() -> None:
    isatty, of_a_device = 0x5401, 0x80086603
    for command in (isatty, of_a_device, 0):
        body = struct.pack("=QIIQII", 1, 0, command, 0, 0, 0)
        assert fate(message(IOCTL, 2, body)) == [-errno.ENOTTY]


@pytest.mark.parametrize("length", [0, 39, 41, 1 << 31, (1 << 32) - 1])
def test_a_wrong_length_in_the_header_is_an_error(length: int) -> None:
    raw = struct.pack("=I", length) + message(17, 2)[4:]
    assert fate(raw) == [-errno.EIO]


def test_what_is_no_message_is_dropped() -> None:
    with channel() as (device, receiver):
        for size in range(1, FUSE_IN_HEADER.size):
            device.kernel.send(bytes(size))
        device.send(17, 4)
        assert receiver.receive(0).unique == 4
        assert receiver.receive(0) is None
        assert not device.replies()


def test_flags_are_those_of_the_struct() -> None:
    write = struct.pack("=QQIIQII", 1, 0, 0, 5, 0, 0o2001, 0)
    read = struct.pack("=QQIIQII", 1, 0, 4096, 2, 0, 0o40000, 0)
    create = struct.pack("=IIII", 0o102101, 0o644, 0o22, 1) + b"n\0"
    for opcode, body, flags, file_flags in (
        (WRITE, write, 5, 0o2001),
        (READ, read, 2, 0o40000),
        (OPEN, struct.pack("=II", 0o1001, 1), 1, 0),
        (CREATE, create, 1, 0),
        (OPENDIR, struct.pack("=II", 0o1200000, 1), 1, 0o1200000),
        (SETATTR, struct.pack("=I", 1 << 11) + bytes(84), 1 << 11, 0),
        (17, b"", 0, 0),
    ):
        request = fate(message(opcode, 2, body))
        assert (request.flags, request.file_flags) == (flags, file_flags)


@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=200),
            st.builds(
                message,
                st.one_of(st.integers(0, 64), st.integers(0, (1 << 32) - 1)),
                st.integers(0, (1 << 64) - 1),
                st.binary(max_size=200),
                node=st.integers(0, (1 << 64) - 1),
            ),
            st.builds(
                lambda chosen, cut, more: message(chosen[0], 6, chosen[1][:cut] + more),
                st.sampled_from(list(RECORDED.values())),
                st.integers(0, 80),
                st.binary(max_size=20),
            ),
        ),
        max_size=20,
    )
)
@examples(300)
@example([message(0xFFFFFFFF, 2)])
@example([message(IOCTL, 2, bytes(32))])
def test_any_bytes_are_passed_on_or_get_an_error(stream: list[bytes]) -> None:
    """What is passed on is complete, so that libfuse, which trusts the kernel, reads no further."""
    with channel() as (device, receiver):
        for raw in stream:
            device.kernel.send(raw)
            request = receiver.receive(0)
            errors = [error for _, error, _ in device.replies()]
            if request is None:
                is_ioctl = raw[4:8] == struct.pack("=I", IOCTL)
                assert errors in ([], [-errno.EIO]) or (is_ioctl and errors == [-errno.ENOTTY])
                continue
            assert not errors
            body = receiver.body()
            assert FUSE_IN_HEADER.size + len(body) == len(raw) == struct.unpack_from("=I", raw)[0]
            size = SIZES.get(request.opcode, 0)
            assert len(body) >= size
            assert body[size:].count(0) >= NAMES.get(request.opcode, 0)


def test_a_message_of_the_largest_write_fits() -> None:
    """The kernel's largest WRITE is 1 MiB, until FUSE_INIT has said otherwise."""
    data = bytes(1 << 20)
    body = struct.pack("=QQIIQII", 1, 0, len(data), 0, 0, 0, 0) + data
    with channel() as (device, receiver):
        device.kernel.setsockopt(1, 32, 8 << 20)  # SO_SNDBUFFORCE; root may
        device.kernel.send(message(WRITE, 2, body))
        assert receiver.receive(0).unique == 2
        assert receiver.body() == body
