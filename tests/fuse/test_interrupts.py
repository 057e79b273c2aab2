"""Test messages that libfuse reads from a file, and the replies that it writes there meanwhile."""

import errno
import os
import socket

import pytest
import trio
from trio.testing import MockClock

from cleanfs.fuse import interrupts as interrupts_module
from cleanfs.fuse import request_ids
from cleanfs.fuse.interrupts import (
    CHECK_SECONDS,
    MAX_SIGNALLED,
    Interrupts,
)
from cleanfs.fuse.protocol import (
    FUSE_FORGET,
    FUSE_IN_HEADER,
    FUSE_INT_REQ_BIT,
    FUSE_INTERRUPT,
    FUSE_INTERRUPT_IN,
    FUSE_OUT_HEADER,
)
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.source.io import Backing
from cleanfs.source.thread_limiter import ThreadLimiter

LOOKUP = b"\x64\0\0\0\x01\0\0\0" + bytes(FUSE_IN_HEADER.size - 8)


@pytest.mark.parametrize("refused", [[], [0], [1], [0, 1]], ids=str)
def test_a_refused_reply_in_the_message_file_is_rolled_back(
    monkeypatch: pytest.MonkeyPatch, refused: list[int]
) -> None:
    """Libfuse considers the reply sent and logs nothing."""
    backing, refused_replies, rolled_back = Backing(), RefusedReplies(), list[int]()
    backing.abandoned_calls = len(refused)
    interrupts = Interrupts(backing, refused_replies)
    device, kernel = os.pipe()
    os.write(kernel, LOOKUP)
    assert interrupts._pass_on(device)  # noqa: SLF001  # no public access
    assert os.read(device, 1 << 16) == LOOKUP
    replies = [FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size, 0, number) for number in range(3)]
    for number in range(2):
        refused_replies.hold(lambda number=number: rolled_back.append(number))  # type: ignore[misc]  # mypy does not infer it
        os.write(device, replies[number])
    os.write(device, replies[2])  # the reply of a handler without a rollback
    sent, write = [], os.write

    def to_device(fd: int, data: bytes) -> int:
        if data in [replies[number] for number in refused]:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        sent.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", to_device)
    interrupts._restore_device()  # noqa: SLF001  # no public access
    monkeypatch.setattr(os, "write", write)
    assert rolled_back == refused
    assert backing.abandoned_calls == 0
    assert sent == [reply for number, reply in enumerate(replies) if number not in refused]
    interrupts.uninstall()
    os.close(device)
    os.close(kernel)


def test_all_replies_in_the_message_file_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several reads of 1 MiB can end at once."""
    interrupts = Interrupts(Backing(), RefusedReplies())
    device, kernel = os.pipe()
    os.write(kernel, LOOKUP)
    assert interrupts._pass_on(device)  # noqa: SLF001  # no public access
    assert os.read(device, 1 << 16) == LOOKUP
    data = os.urandom(1 << 20)
    replies = [
        FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size + len(data), 0, number) + data for number in range(3)
    ]
    for reply in replies:
        assert os.write(device, reply) == len(reply)
    sent, write = list[bytes](), os.write
    monkeypatch.setattr(os, "write", lambda _, reply: sent.append(reply))
    interrupts._restore_device()  # noqa: SLF001  # no public access
    monkeypatch.setattr(os, "write", write)
    assert sent == replies
    interrupts.uninstall()
    os.close(device)
    os.close(kernel)


async def check_twice(interrupts: Interrupts, *, hangs: bool) -> None:
    """Run two checks of the requests, while a call hangs or not. Needs an autojump clock."""
    now = 0.0
    limiter = interrupts._backing.thread_limiter = ThreadLimiter(clock=lambda: now)  # noqa: SLF001  # no public access
    await limiter.acquire_on_behalf_of(object())
    now = 10 if hangs else 0
    with trio.move_on_after(2.5 * CHECK_SECONDS):
        await interrupts.run()


@pytest.fixture
def queried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the requests that the kernel is asked about. It knows those up to 100."""
    numbers, write = list[int](), os.write

    def to_device(fd: int, data: bytes) -> int:
        if fd != DEVICE:
            return write(fd, data)
        _, error, unique = FUSE_OUT_HEADER.unpack(data)
        if error != -errno.EAGAIN:
            return len(data)
        numbers.append(unique - FUSE_INT_REQ_BIT)
        if numbers[-1] > 100:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return len(data)

    monkeypatch.setattr(os, "write", to_device)
    # Ignore the programs that other tests kill while they wait for a source.
    monkeypatch.setattr(interrupts_module, "killed_threads", set)
    return numbers


DEVICE = 123456


def with_device() -> Interrupts:
    interrupts = Interrupts(Backing(), RefusedReplies())
    interrupts._device = DEVICE  # noqa: SLF001  # no public access
    return interrupts


async def test_a_signal_is_remembered_while_its_request_is_in_flight(
    queried: list[int], autojump_clock: MockClock
) -> None:
    """The kernel reports a signal once, and does not report a later SIGKILL of the same requester."""
    interrupts = with_device()
    interrupts._signalled.update({2: 77, 200: 0})  # noqa: SLF001  # no public access
    await check_twice(interrupts, hangs=False)
    assert interrupts._signalled == {2: 77, 200: 0}  # noqa: SLF001  # no public access
    assert not queried
    interrupts._unseen = True  # noqa: SLF001  # no public access
    await check_twice(interrupts, hangs=True)
    assert interrupts._signalled == {2: 77}  # noqa: SLF001  # no public access
    assert queried == [2, 200]


@pytest.mark.parametrize("hangs", [False, True])
async def test_signals_of_finished_requests_do_not_accumulate(
    queried: list[int], autojump_clock: MockClock, hangs: bool
) -> None:
    interrupts = with_device()
    interrupts._signalled.update(dict.fromkeys(range(2, 2 * MAX_SIGNALLED + 4, 2), 0))  # noqa: SLF001  # no public access
    await check_twice(interrupts, hangs=hangs)
    assert list(interrupts._signalled) == list(range(2, 101, 2))  # noqa: SLF001  # no public access
    assert len(queried) == MAX_SIGNALLED + 1


async def test_signals_do_not_accumulate_on_an_old_kernel(
    queried: list[int], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_ids, "kernel_version", lambda: (4, 19))
    interrupts = with_device()
    interrupts._signalled.update(dict.fromkeys(range(MAX_SIGNALLED + 5), 0))  # noqa: SLF001  # no public access
    await check_twice(interrupts, hangs=True)
    assert list(interrupts._signalled) == list(range(5, MAX_SIGNALLED + 5))  # noqa: SLF001  # no public access
    assert not queried


def message(opcode: int, unique: int, requester: int, body: bytes = b"") -> bytes:
    length = FUSE_IN_HEADER.size + len(body)
    return FUSE_IN_HEADER.pack(length, opcode, unique, 1, 0, 0, requester, 0, 0) + body


def test_requesters_are_known_for_signals_and_recent_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupts_module, "MAX_REQUESTERS", 2)
    interrupts = Interrupts(Backing(), RefusedReplies())
    device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with device, kernel:

        def sent(opcode: int, unique: int, requester: int, body: bytes = b"") -> None:
            interrupts._restore_device()  # noqa: SLF001  # no public access
            kernel.send(message(opcode, unique, requester, body))
            interrupts._pass_on(device.fileno())  # noqa: SLF001  # no public access

        sent(1, 2, 77)
        for unique in range(4, 20, 2):
            sent(FUSE_FORGET, unique, 0)
        sent(FUSE_INTERRUPT, 0, 0, body=FUSE_INTERRUPT_IN.pack(2))
        for unique in range(20, 40, 2):
            sent(1, unique, unique + 1)
        assert interrupts._signalled == {2: 77}  # noqa: SLF001  # no public access
        assert interrupts._requesters == {36: 37, 38: 39}  # noqa: SLF001  # no public access
        interrupts.uninstall()
