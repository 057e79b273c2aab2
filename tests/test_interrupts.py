"""A message that libfuse is lent, and the answers that it writes meanwhile."""

import errno
import os

import pytest
import trio

from cleanfs.backing import Backing
from cleanfs.given import Given
from cleanfs.interrupts import ANSWER, CHECK_SECONDS, HEADER_SIZE, Interrupts
from cleanfs.slots import Slots

LOOKUP = b"\x64\0\0\0\x01\0\0\0" + bytes(HEADER_SIZE - 8)


@pytest.mark.parametrize("gone", [[], [0], [1], [0, 1]], ids=str)
def test_what_was_given_out_in_a_lent_answer_is_taken_back_if_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, gone: list[int]
) -> None:
    """Libfuse takes it for sent, and complains of nothing."""
    backing, given, taken_back = Backing(), Given(), list[int]()
    backing.orphans = len(gone)
    interrupts = Interrupts(backing, given)
    device, kernel = os.pipe()
    os.write(kernel, LOOKUP)
    assert interrupts._lend(device)  # noqa: SLF001
    assert os.read(device, 1 << 16) == LOOKUP
    answers = [ANSWER.pack(ANSWER.size, 0, number) for number in range(3)]
    for number in range(2):
        given.hold(lambda number=number: taken_back.append(number))  # type: ignore[misc]
        os.write(device, answers[number])
    os.write(device, answers[2])  # of a handler that gives nothing
    sent, write = [], os.write

    def to_device(fd: int, data: bytes) -> int:
        if data in [answers[number] for number in gone]:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        sent.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", to_device)
    interrupts._take_place_back()  # noqa: SLF001
    monkeypatch.setattr(os, "write", write)
    assert taken_back == gone
    assert backing.orphans == 0
    assert sent == [answer for number, answer in enumerate(answers) if number not in gone]
    interrupts.uninstall()
    os.close(device)
    os.close(kernel)


def test_all_answers_that_were_written_into_a_lent_message_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some reads of 1 MiB can end at a time."""
    interrupts = Interrupts(Backing(), Given())
    device, kernel = os.pipe()
    os.write(kernel, LOOKUP)
    assert interrupts._lend(device)  # noqa: SLF001
    assert os.read(device, 1 << 16) == LOOKUP
    data = os.urandom(1 << 20)
    answers = [ANSWER.pack(ANSWER.size + len(data), 0, number) + data for number in range(3)]
    for answer in answers:
        assert os.write(device, answer) == len(answer)
    sent, write = list[bytes](), os.write
    monkeypatch.setattr(os, "write", lambda _, answer: sent.append(answer))
    interrupts._take_place_back()  # noqa: SLF001
    monkeypatch.setattr(os, "write", write)
    assert sent == answers
    interrupts.uninstall()
    os.close(device)
    os.close(kernel)


async def test_a_signal_of_a_call_that_does_not_hang_yet_is_asked_about_later() -> None:
    """Another one hung when we read of it."""
    backing = Backing()
    backing.slots = Slots(clock=lambda: 0.0)
    interrupts = Interrupts(backing, Given())
    await backing.slots.acquire_on_behalf_of(object())
    interrupts._signalled[2] = None  # noqa: SLF001
    with trio.move_on_after(2 * CHECK_SECONDS):
        await interrupts.run()
    assert not interrupts._signalled  # noqa: SLF001
    assert interrupts._unseen  # noqa: SLF001
